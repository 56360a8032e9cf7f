"""Dropout masks by Philox: made again wherever they are needed, never stored."""

from __future__ import annotations

import triton
import triton.language as tl

from qformer_fast.reference import philox

ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def dropout_keep(seed, counters, threshold):
    """(R, G) counters -> (R, 8 G) bool, column c of the result decided by 16 of the 128 bits of counter c // 8.

    Keeps where the 16 bits are at least ``threshold``, which is the probability of dropping times 65536.
    """
    a, b, c, d = tl.randint4x(seed, counters, ROUNDS)
    keep = _keep_halves(tl.join(tl.join(a, c), tl.join(b, d)), threshold)
    return tl.reshape(keep, (counters.shape[0], counters.shape[1] * 8))


@triton.jit
def _keep_halves(words, threshold):
    """(..., 2) bool: whether the lower and the upper 16 bits of 32 are at least ``threshold``."""
    words = words.to(tl.uint32, bitcast=True)
    limit = tl.cast(threshold, tl.uint32) << 16
    return tl.join((words << 16) >= limit, words >= limit)


@triton.jit
def first_counter(rows, head, nheads, keys):
    """(BLOCK_M,) the first of the counters that decide the weights of a row and head, four for 32 keys."""
    return (rows.to(tl.int32) * nheads + head) * ((keys + 31) // 32 * 4)


@triton.jit
def attention_keep(
    seed_ptr,  # (1,) int64
    rows,  # (BLOCK_M,) reader rows
    head,
    nheads,
    keys,
    first_key,
    threshold,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) bool: what dropout keeps of these readers' weights of BLOCK_N keys from ``first_key`` on.

    ``first_key`` is a multiple of 32. Counter t of 32 keys decides keys 8 j + 2 t and 8 j + 2 t + 1 by its word j: what
    one thread holds of a row of a tensor-core product, so that no choice has to move between threads.
    """
    COUNTERS: tl.constexpr = max(BLOCK_N // 8, 4)
    counters = first_counter(rows, head, nheads, keys)[:, None] + first_key // 8 + tl.arange(0, COUNTERS)[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), counters, ROUNDS)
    words = tl.join(a, b) if BLOCK_N == 16 else tl.join(tl.join(a, c), tl.join(b, d))
    keep = tl.reshape(_keep_halves(words, threshold), (rows.shape[0], COUNTERS // 4, 4, BLOCK_N // COUNTERS // 2, 2))
    return tl.reshape(tl.permute(keep, (0, 1, 3, 2, 4)), (rows.shape[0], BLOCK_N))
