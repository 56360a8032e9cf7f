"""layer_norm(dropout(x + x_bias) + residual) and its gradient, each one pass over the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.layer_norm import (
    keep_rows,
    row_settings,
    standardise,
    standardise_grad,
    sum_parts,
)
from qformer_fast.reference.philox import threshold_and_scale


@triton.jit
def _in_two(first_ptr, rest_ptr, offs, offs_m, num_first_rows, N: tl.constexpr):
    """Pointers to rows ``offs_m`` of a matrix whose rows from ``num_first_rows`` on lie elsewhere, if rest is given."""
    ptrs = first_ptr + offs
    if rest_ptr is not None:
        ptrs = tl.where(offs_m[:, None] < num_first_rows, ptrs, rest_ptr + offs - tl.cast(num_first_rows, tl.int64) * N)
    return ptrs


@triton.jit
def dropout_add_layer_norm_fwd_kernel(
    x_ptr,  # (M, N), or (PARTS, M, N) whose sum is x
    residual_ptr,  # (M, N)
    x_bias_ptr,  # (N,) or None
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    seed_ptr,  # (1,) int64 or None
    out_ptr,  # (M, N), or (num_first_rows, N) with a rest
    rest_ptr,  # (M - num_first_rows, N), the rows after those of out, or None
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    M,
    num_first_rows,
    eps,
    threshold,
    keep_scale,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program = BLOCK_M whole rows."""
    offs_n = tl.broadcast_to(tl.arange(0, BLOCK_N)[None, :], (BLOCK_M, BLOCK_N))
    mask_n = offs_n < N
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    mask = mask_m[:, None] & mask_n
    offs = offs_m[:, None].to(tl.int64) * N + offs_n
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        z += tl.load(x_ptr + part * M * N + offs, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        keep = keep_rows(tl.load(seed_ptr), offs_m, threshold, N, BLOCK_N)
        z = tl.where(keep, z * keep_scale, 0.0)
    normed, mean, rstd = standardise(z + residual, mask_n, eps, N)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(_in_two(out_ptr, rest_ptr, offs, offs_m, num_first_rows, N), normed * weight + bias, mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit
def dropout_add_layer_norm_bwd_kernel(
    dout_ptr,  # (M, N), or (num_first_rows, N) with a rest
    drest_ptr,  # (M - num_first_rows, N), the rows after those of dout, or None
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N)
    x_bias_ptr,  # (N,) or None
    weight_ptr,  # (N,)
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    seed_ptr,  # (1,) int64 or None
    dx_ptr,  # (M, N), may be x
    dresidual_ptr,  # (M, N), with a seed; else dx is written alone
    parts_ptr,  # (programs, 2 or 3, N) fp32: dweight, dbias, and dx_bias with x_bias
    M,
    num_first_rows,
    threshold,
    keep_scale,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program = every num_programs(0)-th block of BLOCK_M whole rows, and their part of the sums over rows."""
    pid = tl.program_id(0)
    offs_n = tl.broadcast_to(tl.arange(0, BLOCK_N)[None, :], (BLOCK_M, BLOCK_N))
    mask_n = offs_n < N
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    if x_bias_ptr is not None:
        x_bias = tl.load(x_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        dx_bias = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(pid * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n
        offs = offs_m[:, None].to(tl.int64) * N + offs_n
        z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dout_ptrs = _in_two(dout_ptr, drest_ptr, offs, offs_m, num_first_rows, N)
        dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        if x_bias_ptr is not None:
            z += x_bias
        if seed_ptr is not None:
            keep = keep_rows(seed, offs_m, threshold, N, BLOCK_N)
            z = tl.where(keep, z * keep_scale, 0.0)
        normed = (z + residual - mean[:, None]) * rstd[:, None]
        dx = standardise_grad(dout * weight, normed, rstd, N)
        if seed_ptr is not None:
            tl.store(dresidual_ptr + offs, dx, mask=mask)
            dx = tl.where(keep, dx * keep_scale, 0.0)
        tl.store(dx_ptr + offs, dx, mask=mask)
        dweight += tl.sum(dout * normed, axis=0)
        dbias += tl.sum(dout, axis=0)
        if x_bias_ptr is not None:
            dx_bias += tl.sum(dx, axis=0)
    offs_n = tl.arange(0, BLOCK_N)
    parts_ptr += pid * (2 if x_bias_ptr is None else 3) * N + offs_n
    tl.store(parts_ptr, dweight, mask=offs_n < N)
    tl.store(parts_ptr + N, dbias, mask=offs_n < N)
    if x_bias_ptr is not None:
        tl.store(parts_ptr + 2 * N, dx_bias, mask=offs_n < N)


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None = None,
    out: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    rest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """layer_norm(dropout(x + x_bias) + residual) * weight + bias; without ``seed`` nothing is dropped.

    Args:
        x, residual (Tensor): (rows, hidden) contiguous, slices of rows included; hidden up to 4096. x may be
            (parts, rows, hidden), whose sum is meant.
        weight, bias (Tensor): (hidden,).
        seed (Tensor, Optional): (1,) int64.
        x_bias (Tensor, Optional): (hidden,), the bias that the product which made x left out.
        out (Tensor, Optional): (rows, hidden) contiguous, to write into; with ``rest`` (first rows, hidden).
        statistics (tuple, Optional): mean and rstd to write into.
        rest (Tensor, Optional): (other rows, hidden) contiguous, to write the rows after those of ``out`` into.

    Returns:
        tuple: out (rows, hidden) in residual's dtype; mean and rstd (rows,) fp32.
    """
    M, N = residual.shape
    if out is None:
        out = torch.empty_like(residual)
    if statistics is None:
        statistics = tuple(torch.empty(M, device=x.device, dtype=torch.float32) for _ in range(2))
    mean, rstd = statistics
    if M:
        settings = row_settings("dropout_add_layer_norm_fwd", N, x.device)
        dropout_add_layer_norm_fwd_kernel[(triton.cdiv(M, settings["BLOCK_M"]),)](
            x, residual, x_bias, weight, bias, seed, out, rest, mean, rstd,
            M, out.shape[0], eps, *threshold_and_scale(dropout_p), PARTS=1 if x.ndim == 2 else len(x), **settings,
        )  # fmt: skip
    return out, mean, rstd


def dropout_add_layer_norm_bwd(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    x_bias: Tensor | None = None,
    totals: Sequence[Tensor] | None = None,
    dx: Tensor | None = None,
    add: bool = True,
    drest: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dx, dresidual (rows, hidden); dweight, dbias (hidden,) in weight's dtype; with ``x_bias`` also dx_bias.

    Without ``seed`` dresidual is dx, the same tensor. The parameters' gradients are written to ``totals`` where they
    are given, with ``add`` added; ``dx``, which may be x, is written to. ``drest``, if given, are dout's last rows.
    """
    M, N = x.shape
    settings = row_settings("dropout_add_layer_norm_bwd", N, x.device)
    programs = launch.row_programs(M, settings, x.device)
    if dx is None:
        dx = torch.empty_like(x)
    dresidual = dx if seed is None else torch.empty_like(x)
    parts = torch.empty(programs, 2 if x_bias is None else 3, N, device=x.device, dtype=torch.float32)
    if M:
        dropout_add_layer_norm_bwd_kernel[(programs,)](
            dout, drest, x, residual, x_bias, weight, mean, rstd, seed, dx, dresidual, parts,
            M, dout.shape[0], *threshold_and_scale(dropout_p), **settings,
        )  # fmt: skip
    parameters = (weight, weight) if x_bias is None else (weight, weight, x_bias)
    sums = [torch.empty_like(p) for p in parameters] if totals is None else totals
    sum_parts(parts, *sums, add=totals is not None and add)
    return dx, dresidual, *sums
