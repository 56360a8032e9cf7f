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
    loudest = tl.full((), float("-inf"), tl.float32)
    argbest = tl.full((), -1, tl.int32)
    argloudest = tl.full((), 0, tl.int32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = offs_n < N
        counters = row * ((N + 3) // 4) + start // 4 + tl.arange(0, BLOCK_N // 4)
        a, b, c, d = tl.randint4x(seed, counters, ROUNDS)
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_N,)).to(tl.uint32, bitcast=True)
        noise = tl.where(mask, gumbel(words), float("-inf"))
        logits = tl.load(logits_ptr + offs_n.to(tl.int64) * stride_ln, mask=mask, other=0.0).to(tl.float32)
        excluded = tl.load(excluded_ptr + offs_n.to(tl.int64) * stride_en, mask=mask, other=1) != 0
        logits = tl.where(logits == logits, logits, -LARGEST)
        logits = tl.minimum(tl.maximum(logits, -LARGEST), LARGEST)
        score = tl.where(excluded, float("-inf"), logits + noise)
        value, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
        argbest = tl.where(value > best, start + index, argbest)
        best = tl.maximum(best, value)
        value, index = tl.max(noise, axis=0, return_indices=True, return_indices_tie_break_left=True)
        argloudest = tl.where(value > loudest, start + index, argloudest)
        loudest = tl.maximum(loudest, value)
    tl.store(out_ptr + row, tl.where(argbest >= 0, argbest, argloudest).to(tl.int64))


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
