"""Draws from softmax by Gumbel-max, the noise made where it is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.philox import ROUNDS
from qformer_fast.reference import losses

LARGEST = tl.constexpr(losses.LARGEST)


@triton.jit
def gumbel(words):
    """-log(-log(u)) with u = 1 - (words + 1/2) / 2^32, exact to fp32 where u is near 1, finite for all words."""
    v = tl.minimum((words.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 1.0 - 1.0 / 16777216.0)
    return -tl.log(tl.where(v < 1.0 / 2048.0, v + 0.5 * v * v, -tl.log(1.0 - v)))


@triton.jit
def _noise(seed, row, start, N, BLOCK_N: tl.constexpr):
    """(BLOCK_N,) of the columns from ``start`` on, -inf past the last."""
    counters = row * ((N + 3) // 4) + start // 4 + tl.arange(0, BLOCK_N // 4)
    a, b, c, d = tl.randint4x(seed, counters, ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_N,)).to(tl.uint32, bitcast=True)
    return tl.where(start + tl.arange(0, BLOCK_N) < N, gumbel(words), float("-inf"))


@triton.jit
def _keep_larger(best, argbest, scores, start):
    """The largest so far and its column, after the columns from ``start`` on."""
    value, index = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    return tl.maximum(best, value), tl.where(value > best, start + index, argbest)


@triton.jit
def sample_negatives_fwd_kernel(
    logits_ptr,  # (M, N) with strides
    excluded_ptr,  # (M, N) bool with strides
    seed_ptr,  # (1,) int64
    out_ptr,  # (M,) int64
    N,
    stride_lm,
    stride_ln,
    stride_em,
    stride_en,
    BLOCK_N: tl.constexpr,
):
    """One program = one row: the column with the largest logit + noise, and with the largest noise if none is left."""
    row = tl.program_id(0)
    seed = tl.load(seed_ptr)
    logits_ptr += row.to(tl.int64) * stride_lm
    excluded_ptr += row.to(tl.int64) * stride_em
    best = tl.full((), float("-inf"), tl.float32)
    drawn = tl.full((), -1, tl.int32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = offs_n < N
        logits = tl.load(logits_ptr + offs_n.to(tl.int64) * stride_ln, mask=mask, other=0.0).to(tl.float32)
        excluded = tl.load(excluded_ptr + offs_n.to(tl.int64) * stride_en, mask=mask, other=1) != 0
        logits = tl.where(logits == logits, logits, -LARGEST)
        logits = tl.minimum(tl.maximum(logits, -LARGEST), LARGEST)
        scores = tl.where(excluded, float("-inf"), logits + _noise(seed, row, start, N, BLOCK_N))
        best, drawn = _keep_larger(best, drawn, scores, start)
    if drawn < 0:
        for start in range(0, N, BLOCK_N):
            best, drawn = _keep_larger(best, drawn, _noise(seed, row, start, N, BLOCK_N), start)
    tl.store(out_ptr + row, drawn.to(tl.int64))


def sample_negatives_fwd(logits: Tensor, excluded: Tensor, seed: Tensor) -> Tensor:
    """logits, excluded (rows, candidates), seed (1,) int64 -> (rows,) int64."""
    M, N = logits.shape
    out = logits.new_empty(M, dtype=torch.int64)
    settings = launch.settings("sample_negatives_fwd", logits.device)
    settings = settings | {"BLOCK_N": min(settings["BLOCK_N"], max(16, triton.next_power_of_2(N)))}
    if M:
        sample_negatives_fwd_kernel[(M,)](
            logits, excluded, seed, out, N, *logits.stride(), *excluded.stride(), **settings
        )
    return out
