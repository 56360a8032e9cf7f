"""gelu(x + bias) and its gradient, each one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch


@triton.jit
def gelu(y):
    """y/2 (1 + erf(y / sqrt 2)) in fp32."""
    return 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))


@triton.jit
def gelu_grad(y):
    """d gelu / dy = Phi(y) + y phi(y) in fp32."""
    return 0.5 * (1.0 + tl.math.erf(y * 0.7071067811865476)) + y * tl.exp(-0.5 * y * y) * 0.3989422804014327


@triton.jit
def bias_gelu_fwd_kernel(
    x_ptr,  # (M, N)
    bias_ptr,  # (N,)
    out_ptr,  # (M, N), x's dtype
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program = one tile (BLOCK_M, BLOCK_N)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    offs = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N).to(tl.float32)
    tl.store(out_ptr + offs, gelu(x + bias[None, :]), mask=mask)


@triton.jit
def bias_gelu_bwd_kernel(
    dout_ptr,  # (M, N)
    x_ptr,  # (M, N)
    bias_ptr,  # (N,)
    dx_ptr,  # (M, N)
    dbias_ptr,  # (row programs, N), fp32
    out_ptr,  # (M, N), made again, with WITH_OUT
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WITH_OUT: tl.constexpr,
):
    """One program = BLOCK_N columns of every num_programs(0)-th block of BLOCK_M rows, and their part of dbias."""
    pid_m = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bias = tl.load(bias_ptr + offs_n, mask=mask_n).to(tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(pid_m * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m[:, None] < M) & mask_n[None, :]
        offs = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
        dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = x + bias[None, :]
        dx = dout * gelu_grad(y)
        tl.store(dx_ptr + offs, dx, mask=mask)
        if WITH_OUT:
            tl.store(out_ptr + offs, gelu(y), mask=mask)
        dbias += tl.where(mask, dx, 0.0)
    tl.store(dbias_ptr + pid_m * N + offs_n, tl.sum(dbias, axis=0), mask=mask_n)


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """x (rows, width) contiguous, bias (width,) -> (rows, width)."""
    out = torch.empty_like(x)
    M, N = x.shape
    settings = launch.settings("bias_gelu_fwd", x.device)
    grid = (triton.cdiv(M, settings["BLOCK_M"]), triton.cdiv(N, settings["BLOCK_N"]))
    if M:
        bias_gelu_fwd_kernel[grid](x, bias, out, M, N, **settings)
    return out


def bias_gelu_bwd(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """dout, x (rows, width) contiguous, bias (width,) -> dx (rows, width), dbias (width,) in bias's dtype."""
    return _bias_gelu_bwd(dout, x, bias, None)


def bias_gelu_bwd_with_out(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As bias_gelu_bwd, and the forward's output again, for the gradient of the layer after it."""
    out = torch.empty_like(x)
    return *_bias_gelu_bwd(dout, x, bias, out), out


def _bias_gelu_bwd(dout: Tensor, x: Tensor, bias: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    M, N = x.shape
    settings = launch.settings("bias_gelu_bwd", x.device)
    row_programs = min(triton.cdiv(M, settings["BLOCK_M"]), launch.num_multiprocessors(x.device))
    dbias = torch.empty(row_programs, N, device=x.device, dtype=torch.float32)
    if M:
        grid = (row_programs, triton.cdiv(N, settings["BLOCK_N"]))
        bias_gelu_bwd_kernel[grid](dout, x, bias, dx, dbias, out, M, N, WITH_OUT=out is not None, **settings)
    return dx, dbias.sum(0).to(bias.dtype)
