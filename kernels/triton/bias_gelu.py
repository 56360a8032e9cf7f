"""gelu(x + bias) and its gradient, each one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.layer_norm import sum_parts


@triton.jit
def normal_cdf(y):
    """Phi(y) and exp(-y^2 / 2) in fp32.

    Phi(-|y|) exp(y^2 / 2) is a polynomial in 1 / (1 + 0.3 |y|), fitted to 1.5e-7 relative error on [0, 14]: the form of
    Abramowitz and Stegun's 7.1.26, with more terms. The exponential is the density's too.
    """
    t = 1.0 / (1.0 + 0.3 * tl.abs(y))
    tail = 0.03567487688186328 * t - 0.15720349929455804
    tail = tail * t + 0.20635419566827093
    tail = tail * t - 0.05368424549942068
    tail = tail * t + 0.128561924188036
    tail = tail * t + 0.09991340876277541
    tail = tail * t + 0.12075396824861995
    tail = tail * t + 0.11962929810634824
    decay = tl.exp2(-0.7213475204444817 * y * y)
    tail *= t * decay
    return tl.where(y < 0, tail, 1.0 - tail), decay


@triton.jit
def gelu(y):
    """y Phi(y) in fp32."""
    cdf, _ = normal_cdf(y)
    return y * cdf


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
    dx_ptr,  # (M, N), may be dout
    parts_ptr,  # (row programs, N) fp32: dbias
    out_ptr,  # (M, N), made again, with WITH_OUT; may be x
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_OUT: tl.constexpr,
):
    """One program = BLOCK_N columns of every num_programs(0)-th block of BLOCK_M rows, and their part of dbias."""
    pid_m = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bias = tl.load(bias_ptr + offs_n, mask=mask_n).to(tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(pid_m * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m[:, None] < M) & mask_n[None, :]
        offs = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
        dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = x + bias[None, :]
        cdf, decay = normal_cdf(y)
        dx = dout * (cdf + y * decay * 0.3989422804014327)
        tl.store(dx_ptr + offs, dx, mask=mask)
        if WITH_OUT:
            tl.store(out_ptr + offs, y * cdf, mask=mask)
        dbias += tl.where(mask, dx, 0.0)
    tl.store(parts_ptr + pid_m * N + offs_n, tl.sum(dbias, axis=0), mask=mask_n)


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
    dx = torch.empty_like(x)
    return dx, _bias_gelu_bwd(dx, dout, x, bias, None, None)


def bias_gelu_bwd_in_place(
    dout: Tensor,
    x: Tensor,
    bias: Tensor,
    total: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = True,
) -> tuple[Tensor, Tensor]:
    """Overwrites dout with dx; returns dbias, written to ``total`` where it is given, with ``add`` added, and, for the
    gradient of the layer after it, the forward's output, in ``out``, which may be x.
    """
    if out is None:
        out = torch.empty_like(x)
    return _bias_gelu_bwd(dout, dout, x, bias, out, total, add), out


def _bias_gelu_bwd(
    dx: Tensor, dout: Tensor, x: Tensor, bias: Tensor, out: Tensor | None, total: Tensor | None, add: bool = False
) -> Tensor:
    M, N = x.shape
    settings = dict(launch.settings("bias_gelu_bwd", x.device))
    columns = triton.cdiv(N, settings["BLOCK_N"])
    row_programs = launch.row_programs(M, settings, x.device, columns)
    parts = torch.empty(row_programs, 1, N, device=x.device, dtype=torch.float32)
    if M:
        bias_gelu_bwd_kernel[(row_programs, columns)](
            dout, x, bias, dx, parts, out, M, N, WITH_OUT=out is not None, **settings
        )
    dbias = torch.empty_like(bias) if total is None else total
    sum_parts(parts, dbias, add=total is not None and add)
    return dbias
