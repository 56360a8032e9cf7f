"""Word and position embeddings with their LayerNorm, and the gradients of the tables without atomics."""

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

COUNTED = 16384


@triton.jit
def _word_and_position(
    input_ids_ptr,  # (M,)
    position_ids_ptr,  # (M,)
    word_ptr,  # (words, N)
    position_ptr,  # (positions, N)
    offs_m,
    mask_m,
    offs_n,
    mask_n,
    words,
    positions,
    N: tl.constexpr,
):
    """word row + position row in fp32; an id outside its table adds zeros."""
    word = tl.load(input_ids_ptr + offs_m, mask=mask_m, other=-1).to(tl.int64)
    position = tl.load(position_ids_ptr + offs_m, mask=mask_m, other=-1).to(tl.int64)
    word_mask = ((word >= 0) & (word < words))[:, None] & mask_n
    position_mask = ((position >= 0) & (position < positions))[:, None] & mask_n
    z = tl.load(word_ptr + (word[:, None] * N + offs_n), mask=word_mask, other=0.0).to(tl.float32)
    return z + tl.load(position_ptr + (position[:, None] * N + offs_n), mask=position_mask, other=0.0).to(tl.float32)


@triton.jit
def embeddings_fwd_kernel(
    input_ids_ptr,  # (M,)
    position_ids_ptr,  # (M,)
    word_ptr,  # (words, N)
    position_ptr,  # (positions, N)
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    seed_ptr,  # (1,) int64 or None
    out_ptr,  # (M, N)
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    M,
    words,
    positions,
    eps,
    threshold,
    keep_scale,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program = BLOCK_M whole rows."""
    offs_n = tl.broadcast_to(tl.arange(0, BLOCK_N)[None, :], (BLOCK_M, BLOCK_N))
    mask_n = offs_n < N
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    z = _word_and_position(
        input_ids_ptr, position_ids_ptr, word_ptr, position_ptr, offs_m, mask_m, offs_n, mask_n, words, positions, N
    )
    normed, mean, rstd = standardise(z, mask_n, eps, N)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    out = normed * weight + bias
    if seed_ptr is not None:
        keep = keep_rows(tl.load(seed_ptr), offs_m, threshold, N, BLOCK_N)
        out = tl.where(keep, out * keep_scale, 0.0)
    tl.store(out_ptr + (offs_m[:, None].to(tl.int64) * N + offs_n), out, mask=mask_m[:, None] & mask_n)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit
def embeddings_bwd_kernel(
    dout_ptr,  # (M, N)
    input_ids_ptr,  # (M,)
    position_ids_ptr,  # (M,)
    word_ptr,  # (words, N)
    position_ptr,  # (positions, N)
    weight_ptr,  # (N,)
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    seed_ptr,  # (1,) int64 or None
    drows_ptr,  # (M, N): gradient of word row + position row
    keys_ptr,  # (2, M) int32: each row's word, and its position counted on from words; words + positions for none
    parts_ptr,  # (programs, 2, N) fp32: dweight, dbias
    M,
    words,
    positions,
    skipped,
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
    for first in tl.range(pid * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n
        offs = offs_m[:, None].to(tl.int64) * N + offs_n
        dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        z = _word_and_position(
            input_ids_ptr, position_ids_ptr, word_ptr, position_ptr, offs_m, mask_m, offs_n, mask_n, words, positions, N
        )
        normed = (z - mean[:, None]) * rstd[:, None]
        if seed_ptr is not None:
            keep = keep_rows(seed, offs_m, threshold, N, BLOCK_N)
            dout = tl.where(keep, dout * keep_scale, 0.0)
        tl.store(drows_ptr + offs, standardise_grad(dout * weight, normed, rstd, N), mask=mask)
        dweight += tl.sum(dout * normed, axis=0)
        dbias += tl.sum(dout, axis=0)
        word = tl.load(input_ids_ptr + offs_m, mask=mask_m, other=-1)
        position = tl.load(position_ids_ptr + offs_m, mask=mask_m, other=-1)
        has_word = (word >= 0) & (word < words) & (word != skipped)
        has_position = (position >= 0) & (position < positions)
        none = words + positions
        tl.store(keys_ptr + offs_m, tl.where(has_word, word, none), mask=mask_m)
        tl.store(keys_ptr + M + offs_m, tl.where(has_position, words + position, none), mask=mask_m)
    offs_n = tl.arange(0, BLOCK_N)
    parts_ptr += pid * 2 * N + offs_n
    tl.store(parts_ptr, dweight, mask=offs_n < N)
    tl.store(parts_ptr + N, dbias, mask=offs_n < N)


@triton.jit
def sort_keys_kernel(
    keys_ptr,  # (places,) int32
    sorted_ptr,  # (places,) int32
    order_ptr,  # (places,) int64
    places,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program = BLOCK_M keys, each stored where it belongs: after the smaller ones and its equals before it."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < places
    key = tl.load(keys_ptr + offs_m, mask=mask_m, other=0)
    earlier = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, places, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        other = tl.load(keys_ptr + offs_n, mask=offs_n < places, other=2147483647)[None, :]
        before = (other < key[:, None]) | ((other == key[:, None]) & (offs_n[None, :] < offs_m[:, None]))
        earlier += before.to(tl.int32)
    place = tl.sum(earlier, axis=1)
    tl.store(sorted_ptr + place, key, mask=mask_m)
    tl.store(order_ptr + place, offs_m.to(tl.int64), mask=mask_m)


@triton.jit
def sum_runs_kernel(
    rows_ptr,  # (M, N)
    keys_ptr,  # (places,) int32, sorted
    order_ptr,  # (places,) int64: where each sorted key stood
    word_ptr,  # (words, N)
    position_ptr,  # (positions, N)
    parts_ptr,  # (windows, 2, N) fp32
    M,
    places,
    words,
    positions,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One program = BLOCK_N columns of one window of WINDOW sorted places: the sum over the rows of each key.

    That of a key inside one window is added to its table. Of a longer one each window's sum is a part: parts[window, 1]
    where the key begins, parts[window, 0] further on.
    """
    window = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < N)[None, :]
    offs_w = tl.arange(0, WINDOW)
    place = window * WINDOW + offs_w
    end = (window + 1) * WINDOW
    key = tl.load(keys_ptr + place, mask=place < places, other=2147483647)
    begins = key != tl.load(keys_ptr + place - 1, mask=(place > 0) & (place < places), other=-1)
    goes_on = key == tl.load(keys_ptr + end, mask=end < places, other=-1)
    wanted = key < words + positions
    row = tl.load(order_ptr + place, mask=wanted, other=0) % M
    rows = tl.load(rows_ptr + row[:, None] * N + offs_n[None, :], mask=wanted[:, None] & mask_n, other=0.0)
    same = tl.where(key[:, None] == key[None, :], 1.0, 0.0)
    total = tl.dot(same, rows.to(tl.float32), input_precision="ieee")
    first = wanted & (begins | (offs_w == 0))
    whole = begins & ~goes_on
    is_word = key < words
    offs = key.to(tl.int64)[:, None] * N + offs_n[None, :]
    _add_to(word_ptr + offs, total, (first & whole & is_word)[:, None] & mask_n)
    offs = (key - words).to(tl.int64)[:, None] * N + offs_n[None, :]
    _add_to(position_ptr + offs, total, (first & whole & ~is_word)[:, None] & mask_n)
    offs = (2 * window + begins.to(tl.int32)).to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(parts_ptr + offs, total, mask=(first & ~whole)[:, None] & mask_n)


@triton.jit
def join_runs_kernel(
    keys_ptr,  # (places,) int32, sorted
    word_ptr,  # (words, N)
    position_ptr,  # (positions, N)
    parts_ptr,  # (windows, 2, N) fp32, of sum_runs_kernel
    places,
    words,
    positions,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One program = BLOCK_N columns of the key that begins in one window and goes on in the next, if there is one."""
    window = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    begin = window * WINDOW
    end = begin + WINDOW
    this = tl.load(keys_ptr + end, mask=end < places, other=-1)
    goes_on = (end < places) & (tl.load(keys_ptr + end - 1, mask=end < places, other=-1) == this)
    begins = (begin == 0) | (tl.load(keys_ptr + begin - 1, mask=begin > 0, other=0) != this)
    if goes_on & begins & (this < words + positions):
        offs_w = window + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        count = BLOCK_M
        while count == BLOCK_M:
            place = offs_w * WINDOW
            inside = (offs_w > window) & (place < places)
            same = (offs_w == window) | (tl.load(keys_ptr + place, mask=inside, other=-1) == this)
            slot = 2 * offs_w + (offs_w == window).to(tl.int32)
            mask = same[:, None] & mask_n[None, :]
            total += tl.load(parts_ptr + slot[:, None].to(tl.int64) * N + offs_n[None, :], mask=mask, other=0.0)
            count = tl.sum(same.to(tl.int32), axis=0)
            offs_w += BLOCK_M
        row = tl.sum(total, axis=0)
        if this < words:
            _add_to(word_ptr + this.to(tl.int64) * N + offs_n, row, mask_n)
        else:
            _add_to(position_ptr + (this - words).to(tl.int64) * N + offs_n, row, mask_n)


@triton.jit
def _add_to(ptrs, x, mask):
    tl.store(ptrs, x + tl.load(ptrs, mask=mask, other=0.0).to(tl.float32), mask=mask)


def sort_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """keys (places,) int32 in ascending order, and where each stood, int64; equal keys keep their order.

    Up to ``COUNTED`` keys each counts the smaller ones, in one launch; a radix sort of so few is mostly launches.
    """
    if len(keys) > COUNTED:
        return keys.sort(stable=True)
    found, order = torch.empty_like(keys), torch.empty_like(keys, dtype=torch.int64)
    settings = launch.settings("sort_keys", keys.device)
    grid = (triton.cdiv(len(keys), settings["BLOCK_M"]),)
    sort_keys_kernel[grid](keys, found, order, len(keys), **settings)
    return found, order


def sum_rows_by_key(rows: Tensor, keys: Tensor, dword: Tensor, dposition: Tensor) -> None:
    """Adds the ``rows`` of each key to its row of the tables.

    The same bits at every call: keys are sorted stably, and each row is summed in that order.

    Args:
        rows (Tensor): (rows, hidden) contiguous.
        keys (Tensor): (2, rows) int32, as embeddings_bwd_kernel writes them.
        dword, dposition (Tensor): (words, hidden), (positions, hidden).
    """
    M, N = rows.shape
    settings = dict(launch.settings("sum_runs", rows.device))
    join = {"BLOCK_M": settings.pop("BLOCK_M")}
    columns = triton.cdiv(N, settings["BLOCK_N"])
    windows = triton.cdiv(2 * M, settings["WINDOW"])
    keys, order = sort_keys(keys.flatten())
    parts = torch.empty(windows, 2, N, device=rows.device, dtype=torch.float32)
    sizes = 2 * M, dword.shape[0], dposition.shape[0]
    sum_runs_kernel[(windows, columns)](rows, keys, order, dword, dposition, parts, M, *sizes, N=N, **settings)
    if windows > 1:
        join_runs_kernel[(windows, columns)](keys, dword, dposition, parts, *sizes, N=N, **settings, **join)


def embeddings_fwd(
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (rows, hidden) of ``dtype``, mean and rstd (rows,) fp32; all arguments contiguous, hidden up to 4096."""
    M, N = input_ids.shape[0], word_weight.shape[1]
    out = torch.empty(M, N, device=word_weight.device, dtype=dtype)
    mean = torch.empty(M, device=out.device, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if M:
        settings = row_settings("embeddings_fwd", N, out.device)
        embeddings_fwd_kernel[(triton.cdiv(M, settings["BLOCK_M"]),)](
            input_ids, position_ids, word_weight, position_weight, weight, bias, seed, out, mean, rstd,
            M, word_weight.shape[0], position_weight.shape[0], eps, *threshold_and_scale(dropout_p),
            **settings,
        )  # fmt: skip
    return out, mean, rstd


def embeddings_bwd(
    dout: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    padding_idx: int | None,
    dropout_p: float,
    totals: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dword (words, hidden), dposition (positions, hidden), dweight, dbias (hidden,), each in its parameter's dtype, or
    added to ``totals``.
    """
    M, N = dout.shape
    settings = row_settings("embeddings_bwd", N, dout.device)
    programs = launch.row_programs(M, settings, dout.device)
    if totals is None:
        tables = torch.zeros_like(word_weight), torch.zeros_like(position_weight)
        dword, dposition, dweight, dbias = *tables, torch.empty_like(weight), torch.empty_like(weight)
    else:
        dword, dposition, dweight, dbias = totals
    drows = torch.empty(M, N, device=dout.device, dtype=word_weight.dtype)
    keys = torch.empty(2, M, device=dout.device, dtype=torch.int32)
    parts = torch.empty(programs, 2, N, device=dout.device, dtype=torch.float32)
    if M:
        embeddings_bwd_kernel[(programs,)](
            dout, input_ids, position_ids, word_weight, position_weight, weight, mean, rstd, seed, drows, keys, parts,
            M, word_weight.shape[0], position_weight.shape[0], -1 if padding_idx is None else padding_idx,
            *threshold_and_scale(dropout_p), **settings,
        )  # fmt: skip
        sum_rows_by_key(drows, keys, dword, dposition)
    sum_parts(parts, dweight, dbias, add=totals is not None)
    return dword, dposition, dweight, dbias
