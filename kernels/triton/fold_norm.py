"""A LayerNorm's parameters folded into the linear layer after it, and the gradient, each one pass over its weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.layer_norm import row_settings, sum_parts


@triton.jit
def fold_norm_fwd_kernel(
    weight_ptr,  # (M, N)
    bias_ptr,  # (M,)
    norm_weight_ptr,  # (N,)
    norm_bias_ptr,  # (N,)
    out_ptr,  # (M, WIDTH)
    M,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program = every num_programs(0)-th row: weight * norm_weight, then bias + weight . norm_bias, then zeros."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    norm_weight = tl.load(norm_weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        offs = tl.cast(row, tl.int64)
        weight = tl.load(weight_ptr + offs * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + row).to(tl.float32) + tl.sum(weight * norm_bias, axis=0)
        out = tl.where(offs_n == N, bias, weight * norm_weight)
        tl.store(out_ptr + offs * WIDTH + offs_n, out, mask=offs_n < WIDTH)


@triton.jit
def fold_norm_bwd_kernel(
    dout_ptr,  # (M, WIDTH)
    weight_ptr,  # (M, N)
    norm_weight_ptr,  # (N,)
    norm_bias_ptr,  # (N,)
    dweight_ptr,  # (M, N), with ADD added to
    dbias_ptr,  # (M,), with ADD added to
    parts_ptr,  # (row programs, 2, N) fp32: dnorm_weight, dnorm_bias
    M,
    N,
    WIDTH,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program = BLOCK_N columns of every num_programs(0)-th block of BLOCK_M rows, and their part of the sums."""
    pid_m = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    norm_weight = tl.load(norm_weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dnorm_weight = tl.zeros((BLOCK_N,), tl.float32)
    dnorm_bias = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(pid_m * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        first = offs_m.to(tl.int64)
        offs = first[:, None] * N + offs_n[None, :]
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dscaled = tl.load(dout_ptr + first[:, None] * WIDTH + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        dbias = tl.load(dout_ptr + first * WIDTH + N, mask=mask_m, other=0.0).to(tl.float32)
        dweight = dscaled * norm_weight[None, :] + dbias[:, None] * norm_bias[None, :]
        dnorm_weight += tl.sum(dscaled * weight, axis=0)
        dnorm_bias += tl.sum(dbias[:, None] * weight, axis=0)
        mask_bias = mask_m & (tl.program_id(1) == 0)
        if ADD:
            dweight += tl.load(dweight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dbias += tl.load(dbias_ptr + offs_m, mask=mask_bias, other=0.0).to(tl.float32)
        tl.store(dweight_ptr + offs, dweight, mask=mask)
        tl.store(dbias_ptr + offs_m, dbias, mask=mask_bias)
    parts_ptr += pid_m * 2 * N + offs_n
    tl.store(parts_ptr, dnorm_weight, mask=mask_n)
    tl.store(parts_ptr + N, dnorm_bias, mask=mask_n)


def fold_norm_fwd(
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """weight (out, in), bias (out,), norm_weight, norm_bias (in,), contiguous -> (out, width) of ``dtype``."""
    M, N = weight.shape
    out = torch.empty(M, width, device=weight.device, dtype=dtype)
    settings = row_settings("fold_norm_fwd", N, weight.device) | {"BLOCK_N": triton.next_power_of_2(width)}
    programs = min(M, settings.pop("programs") * launch.num_multiprocessors(weight.device))
    fold_norm_fwd_kernel[(programs,)](weight, bias, norm_weight, norm_bias, out, M, WIDTH=width, **settings)
    return out


def fold_norm_bwd(
    dout: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    totals: Sequence[Tensor] = (),
    add: bool = True,
    add_norm: bool = True,
) -> Sequence[Tensor]:
    """dout (out, width) contiguous -> gradients of the four parameters, written to ``totals`` if there are any; with
    ``add`` those of weight and bias are added, with ``add_norm`` the norm's.
    """
    M, N = weight.shape
    add, add_norm = (given and len(totals) > 0 for given in (add, add_norm))
    gradients = totals or [torch.empty_like(x) for x in (weight, bias, norm_weight, norm_bias)]
    settings = dict(launch.settings("fold_norm_bwd", weight.device))
    columns = triton.cdiv(N, settings["BLOCK_N"])
    row_programs = launch.row_programs(M, settings, weight.device, columns)
    parts = torch.empty(row_programs, 2, N, device=weight.device, dtype=torch.float32)
    fold_norm_bwd_kernel[(row_programs, columns)](
        dout, weight, norm_weight, norm_bias, *gradients[:2], parts, M, N, dout.shape[1], ADD=add, **settings
    )
    sum_parts(parts, *gradients[2:], add=add_norm)
    return gradients
