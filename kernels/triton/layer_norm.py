"""What the kernels that end in a LayerNorm share: statistics, gradient, dropout of whole rows, sums over programs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.philox import dropout_keep
from qformer_fast.reference.philox import GROUP

# wider rows take the table's "_wide" settings
WIDE = 1024


@triton.jit
def whole_rows(N: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns (CHUNKS, 1, BLOCK_N) of a tile of whole rows (CHUNKS, BLOCK_M, BLOCK_N), and which of them exist.

    With 256 columns of 16 bits a chunk, a row is one warp's work: 16 bytes a thread and chunk, sums by shuffles, and
    chunks past N fall away at compile time.
    """
    offs_n = tl.arange(0, CHUNKS)[:, None, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, None, :]
    return offs_n, offs_n < N


@triton.jit
def row_sum(x):
    """(CHUNKS, BLOCK_M, BLOCK_N) -> (1, BLOCK_M, 1)."""
    return tl.sum(tl.sum(x, axis=0), axis=1)[None, :, None]


@triton.jit
def keep_rows(
    seed_ptr,  # (1,) int64
    first,
    threshold,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(CHUNKS, BLOCK_M, BLOCK_N) bool: what dropout keeps of BLOCK_M rows, the first is ``first``, of N columns."""
    places = tl.arange(0, CHUNKS * BLOCK_M)
    counters = (first + places % BLOCK_M) * ((N + 7) // 8) + places // BLOCK_M * (BLOCK_N // 8)
    keep = dropout_keep(tl.load(seed_ptr), counters[:, None] + tl.arange(0, BLOCK_N // 8)[None, :], threshold)
    return tl.reshape(keep, (CHUNKS, BLOCK_M, BLOCK_N))


@triton.jit
def standardise(
    z,  # (CHUNKS, BLOCK_M, BLOCK_N) fp32, zero in masked columns
    mask_n,  # (CHUNKS, 1, BLOCK_N)
    eps,
    N: tl.constexpr,
):
    """(z - mean) / sqrt(variance + eps); mean and 1 / sqrt(variance + eps) as (1, BLOCK_M, 1)."""
    mean = row_sum(z) / N
    centred = tl.where(mask_n, z - mean, 0.0)
    rstd = tl.rsqrt(row_sum(centred * centred) / N + eps)
    return centred * rstd, mean, rstd


@triton.jit
def standardise_grad(
    dnormed,  # (CHUNKS, BLOCK_M, BLOCK_N) fp32, zero where masked
    normed,  # (CHUNKS, BLOCK_M, BLOCK_N) fp32
    rstd,  # (1, BLOCK_M, 1) fp32
    N: tl.constexpr,
):
    """Gradient of z under :func:`standardise`."""
    along = row_sum(dnormed * normed) / N
    mean = row_sum(dnormed) / N
    return (dnormed - mean - normed * along) * rstd


@triton.jit
def sum_parts_kernel(
    parts_ptr,  # (P, outputs, N) fp32
    first_ptr,  # (N,)
    second_ptr,  # (N,)
    third_ptr,  # (N,) or None
    P,
    N,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program = BLOCK_N columns of one output, summed over P in a fixed order."""
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
        tl.store(first_ptr + offs_n, column, mask=mask_n)
    elif output == 1:
        tl.store(second_ptr + offs_n, column, mask=mask_n)
    elif third_ptr is not None:
        tl.store(third_ptr + offs_n, column, mask=mask_n)


def sum_parts(parts: Tensor, *outputs: Tensor) -> None:
    """Sums (programs, outputs, width) fp32 over the programs into two or three outputs (width,) of any dtype."""
    settings = launch.settings("sum_parts", parts.device)
    programs, count, width = parts.shape
    grid = (triton.cdiv(width, settings["BLOCK_N"]), count)
    third = outputs[2] if count == 3 else None
    sum_parts_kernel[grid](parts, outputs[0], outputs[1], third, programs, width, **settings)


def row_settings(kernel: str, width: int, device: torch.device) -> tuple[dict[str, Any], int]:
    """Keyword arguments of a kernel on whole rows, and how many programs fill the device (its backward's)."""
    settings = dict(launch.settings(kernel if width <= WIDE else f"{kernel}_wide", device))
    programs = settings.pop("programs", 1) * launch.num_multiprocessors(device)
    settings["BLOCK_N"] = min(settings["BLOCK_N"], max(triton.next_power_of_2(width), GROUP))
    settings["CHUNKS"] = triton.next_power_of_2(triton.cdiv(width, settings["BLOCK_N"]))
    return settings, programs
