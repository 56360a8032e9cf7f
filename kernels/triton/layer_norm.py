"""What the kernels that end in a LayerNorm share: statistics, gradient, dropout of whole rows, sums over programs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast import overlap
from qformer_fast.kernels import launch
from qformer_fast.kernels.philox import dropout_keep
from qformer_fast.reference.philox import GROUP

# wider rows take the table's "_wide" settings
WIDE = 1024


@triton.jit
def keep_rows(
    seed,
    rows,  # (BLOCK_M,)
    threshold,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) bool: what dropout keeps of ``rows`` of a matrix with N columns."""
    counters = rows[:, None] * ((N + 7) // 8) + tl.arange(0, BLOCK_N // 8)[None, :]
    return dropout_keep(seed, counters, threshold)


@triton.jit
def standardise(
    z,  # (BLOCK_M, BLOCK_N) fp32, zero in masked columns
    mask_n,  # (BLOCK_M, BLOCK_N)
    eps,
    N: tl.constexpr,
):
    """(z - mean) / sqrt(variance + eps), mean, 1 / sqrt(variance + eps)."""
    mean = tl.sum(z, axis=1) / N
    centred = tl.where(mask_n, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def standardise_grad(
    dnormed,  # (BLOCK_M, BLOCK_N) fp32, zero where masked
    normed,  # (BLOCK_M, BLOCK_N) fp32
    rstd,  # (BLOCK_M,) fp32
    N: tl.constexpr,
):
    """Gradient of z under :func:`standardise`."""
    along = tl.sum(dnormed * normed, axis=1) / N
    mean = tl.sum(dnormed, axis=1) / N
    return (dnormed - mean[:, None] - normed * along[:, None]) * rstd[:, None]


@triton.jit
def sum_parts_kernel(
    parts_ptr,  # (P, outputs, N) fp32
    first_ptr,  # (N,)
    second_ptr,  # (N,) or None
    third_ptr,  # (N,) or None
    P,
    N,
    ADD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program = BLOCK_N columns of one output, summed over P in a fixed order, with ADD added to it."""
    output = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    parts_ptr += output * N + offs_n[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p[:, None] < P) & mask_n[None, :]
        total += tl.load(parts_ptr + offs_p[:, None] * (tl.num_programs(1) * N), mask=mask, other=0.0)
    column = tl.sum(total, axis=0)
    if output == 0:
        _store_sum(first_ptr, column, offs_n, mask_n, ADD)
    elif output == 1:
        if second_ptr is not None:
            _store_sum(second_ptr, column, offs_n, mask_n, ADD)
    elif third_ptr is not None:
        _store_sum(third_ptr, column, offs_n, mask_n, ADD)


@triton.jit
def _store_sum(out_ptr, column, offs_n, mask_n, ADD: tl.constexpr):
    if ADD:
        column += tl.load(out_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_n, column, mask=mask_n)


def sum_parts(parts: Tensor, *outputs: Tensor, add: bool = False) -> None:
    """Sums (programs, outputs, width) fp32 over the programs into one to three outputs (width,) of any dtype, or adds
    the sums to them; aside (:mod:`qformer_fast.overlap`).
    """
    settings = launch.settings("sum_parts", parts.device)
    programs, count, width = parts.shape
    grid = (triton.cdiv(width, settings["BLOCK_N"]), count)

    def run() -> None:
        sum_parts_kernel[grid](parts, *outputs, *[None] * (3 - count), programs, width, ADD=add, **settings)

    overlap.aside(run, parts)


def row_settings(kernel: str, width: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a kernel whose programs take whole rows."""
    settings = launch.settings(kernel if width <= WIDE else f"{kernel}_wide", device)
    return settings | {"N": width, "BLOCK_N": max(triton.next_power_of_2(width), GROUP)}
