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
    words = tl.join(tl.join(a, c), tl.join(b, d)).to(tl.uint32, bitcast=True)
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (counters.shape[0], counters.shape[1] * 8)).to(tl.int32) >= threshold


@triton.jit
def attention_keep(
    seed_ptr,  # (1,) int64
    rows,  # (BLOCK_M,) reader rows
    head,
    nheads,
    groups,  # counters a row and head, one for 8 keys
    first_key,
    threshold,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) bool: what dropout keeps of these readers' weights of BLOCK_N keys from ``first_key`` on."""
    counters = (rows.to(tl.int32) * nheads + head)[:, None] * groups
    counters += (first_key // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
    return dropout_keep(tl.load(seed_ptr), counters, threshold)
