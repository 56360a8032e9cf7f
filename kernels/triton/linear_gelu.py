"""The products around GELU with GELU in their epilogue: up-projection forward, and down-projection's gradient.

What GELU reads is still in registers when the product ends, so it costs no pass over the (rows, intermediate) tensor.
Where the launch table says that cuBLAS and a pass of bias_gelu are faster, they run instead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.bias_gelu import bias_gelu_bwd_with_out, bias_gelu_fwd, gelu, gelu_grad


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block of this program, GROUP_M row blocks at a time so that they share columns of b in L2."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    in_group = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    inside = tl.program_id(0) % (GROUP_M * blocks_n)
    return group * GROUP_M + inside % in_group, inside // in_group


@triton.jit
def _product(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N), strides stride_bk, stride_bn
    offs_m,
    offs_n,
    M,
    N,
    stride_bk,
    stride_bn,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a @ b at these rows and columns: (BLOCK_M, BLOCK_N) fp32; rows and columns past the end wrap around."""
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (offs_m % M)[:, None].to(tl.int64) * K + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + (offs_n % N)[None, :] * stride_bn
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        out = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), out)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    return out


@triton.jit
def _halves(x):
    """Left and right half of the columns, so that an epilogue holds half a tile at a time in registers."""
    pair = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
    return tl.split(pair)


@triton.jit
def linear_gelu_fwd_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    up_ptr,  # (M, N), x weight^T
    out_ptr,  # (M, N), gelu(up + bias)
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program = one tile of up and out."""
    pid_m, pid_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    left, right = _halves(_product(x_ptr, weight_ptr, offs_m, offs_n, M, N, 1, K, K, BLOCK_M, BLOCK_N, BLOCK_K))
    for half in tl.static_range(2):
        up = (left if half == 0 else right).to(up_ptr.dtype.element_ty)
        columns = pid_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        offs = offs_m[:, None].to(tl.int64) * N + columns[None, :]
        mask = (offs_m[:, None] < M) & (columns[None, :] < N)
        bias = tl.load(bias_ptr + columns, mask=columns < N).to(tl.float32)
        tl.store(up_ptr + offs, up, mask=mask)
        tl.store(out_ptr + offs, gelu(up.to(tl.float32) + bias[None, :]), mask=mask)


@triton.jit
def linear_gelu_bwd_kernel(
    dy_ptr,  # (M, K)
    weight_ptr,  # (K, N)
    up_ptr,  # (M, N)
    bias_ptr,  # (N,)
    dup_ptr,  # (M, N)
    out_ptr,  # (M, N), gelu(up + bias) again
    dbias_ptr,  # (row blocks, N) fp32
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program = one tile of dup and out, and its part of dbias."""
    pid_m, pid_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    left, right = _halves(_product(dy_ptr, weight_ptr, offs_m, offs_n, M, N, N, 1, K, BLOCK_M, BLOCK_N, BLOCK_K))
    for half in tl.static_range(2):
        dout = left if half == 0 else right
        columns = pid_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        offs = offs_m[:, None].to(tl.int64) * N + columns[None, :]
        mask = (offs_m[:, None] < M) & (columns[None, :] < N)
        bias = tl.load(bias_ptr + columns, mask=columns < N).to(tl.float32)
        y = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dup = tl.where(mask, dout * gelu_grad(y), 0.0)
        tl.store(dup_ptr + offs, dup, mask=mask)
        tl.store(out_ptr + offs, gelu(y), mask=mask)
        tl.store(dbias_ptr + pid_m * N + columns, tl.sum(dup, axis=0), mask=columns < N)


def _fused_settings(kernel: str, x: Tensor, K: int) -> dict[str, Any] | None:
    """Launch settings, or None where cuBLAS and a pass of GELU run."""
    settings = dict(launch.settings(kernel, x.device))
    runs = settings.pop("fused") and x.dtype != torch.float32 and K % settings["BLOCK_K"] == 0
    return settings if runs else None


def linear_gelu_fwd(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    """Writes x weight^T into ``up`` (rows, intermediate) and returns gelu(up + bias).

    x (rows, hidden), weight (intermediate, hidden), contiguous; bias (intermediate,); at least one row.
    """
    (M, K), N = x.shape, weight.shape[0]
    settings = _fused_settings("linear_gelu_fwd", x, K)
    if settings is None:
        torch.mm(x, weight.t(), out=up)
        return bias_gelu_fwd(up, bias)
    out = torch.empty_like(up)
    grid = (triton.cdiv(M, settings["BLOCK_M"]) * triton.cdiv(N, settings["BLOCK_N"]),)
    linear_gelu_fwd_kernel[grid](x, weight, bias, up, out, M, N, K=K, **settings)
    return out


def linear_gelu_bwd(dy: Tensor, weight: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From dy, the gradient of gelu(up + bias) weight^T: dup (rows, intermediate), dbias (intermediate,) in bias's
    dtype, and gelu(up + bias) again.

    dy (rows, hidden), weight (hidden, intermediate), up (rows, intermediate), contiguous; at least one row.
    """
    (M, K), N = dy.shape, weight.shape[1]
    settings = _fused_settings("linear_gelu_bwd", dy, K)
    if settings is None:
        return bias_gelu_bwd_with_out(dy @ weight, up, bias)
    dup, out = torch.empty_like(up), torch.empty_like(up)
    row_blocks = triton.cdiv(M, settings["BLOCK_M"])
    dbias = torch.empty(row_blocks, N, device=up.device, dtype=torch.float32)
    grid = (row_blocks * triton.cdiv(N, settings["BLOCK_N"]),)
    linear_gelu_bwd_kernel[grid](dy, weight, up, bias, dup, out, dbias, M, N, K=K, **settings)
    return dup, dbias.sum(0).to(bias.dtype), out
