"""Self-attention of packed sequences too long for one tile: keys in blocks with an online softmax, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.philox import attention_keep
from qformer_fast.kernels.sequences import precision, sequence_rows, visible_range
from qformer_fast.reference.philox import threshold_and_scale

LOG2E = 1.4426950408889634


@triton.jit
def _rows(position, queries, first_query, first_text):
    """Packed rows of positions in a sequence."""
    return tl.where(position < queries, first_query + position, first_text + position - queries)


@triton.jit
def _scores(q, k, offs_m, offs_n, length, queries, kind, scale_log2, PRECISION: tl.constexpr):
    """q k^T scale in units of log 2, -inf where a reader does not see a key: (BLOCK_M, BLOCK_N) fp32."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    first, end = visible_range(offs_m, queries, length, kind)
    seen = (offs_n[None, :] >= first[:, None]) & (offs_n[None, :] < end[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def streamed_attention_fwd_kernel(
    qkv_ptr,  # (rows, 3, nheads, HEADDIM)
    text_offsets_ptr,  # (sequences + 1,) int64
    masks_ptr,  # (sequences,) int64
    out_ptr,  # (rows, nheads, HEADDIM)
    lse_ptr,  # (rows, nheads) fp32, log2 of the sum of exponentials
    seed_ptr,  # (1,) int64, with DROPOUT
    num_query_rows,
    num_queries,
    nheads,
    scale_log2,
    threshold,
    keep_scale,
    width,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = BLOCK_M readers of one head of one sequence."""
    sequence = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    queries, first_query, first_text, length = sequence_rows(sequence, num_query_rows, num_queries, text_offsets_ptr)
    kind = tl.load(masks_ptr + sequence)
    if tl.program_id(1) * BLOCK_M < length:
        hidden = nheads * HEADDIM
        offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d[None, :] < HEADDIM
        rows = _rows(offs_m, queries, first_query, first_text)
        mask_m = (offs_m[:, None] < length) & mask_d
        columns = head * HEADDIM + offs_d[None, :]
        q = tl.load(qkv_ptr + rows[:, None] * (3 * hidden) + columns, mask=mask_m, other=0.0)
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, length, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            offs_k = _rows(offs_n, queries, first_query, first_text)[:, None] * (3 * hidden) + columns
            mask_n = (offs_n[:, None] < length) & mask_d
            k = tl.load(qkv_ptr + offs_k + hidden, mask=mask_n, other=0.0)
            v = tl.load(qkv_ptr + offs_k + 2 * hidden, mask=mask_n, other=0.0)
            scores = _scores(q, k, offs_m, offs_n, length, queries, kind, scale_log2, PRECISION)
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(highest - shift)
            p = tl.exp2(scores - shift[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            if DROPOUT:
                keep = attention_keep(seed_ptr, rows, head, nheads, width, start, threshold, BLOCK_N)
                p = tl.where(keep, p * keep_scale, 0.0)
            out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            highest = higher
        total = tl.where(offs_m < length, total, 1.0)
        tl.store(out_ptr + rows[:, None] * hidden + columns, out / total[:, None], mask=mask_m)
        tl.store(lse_ptr + rows * nheads + head, highest + tl.log2(total), mask=offs_m < length)


@triton.jit
def streamed_attention_bwd_dq_kernel(
    dout_ptr,  # (rows, nheads, HEADDIM)
    qkv_ptr,
    out_ptr,
    lse_ptr,
    text_offsets_ptr,
    masks_ptr,
    dqkv_ptr,  # (rows, 3, nheads, HEADDIM)
    delta_ptr,  # (rows, nheads) fp32, sum of dout * out, made here
    seed_ptr,
    num_query_rows,
    num_queries,
    nheads,
    scale,
    threshold,
    keep_scale,
    width,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = dq of BLOCK_M readers of one head of one sequence."""
    sequence = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    queries, first_query, first_text, length = sequence_rows(sequence, num_query_rows, num_queries, text_offsets_ptr)
    kind = tl.load(masks_ptr + sequence)
    if tl.program_id(1) * BLOCK_M < length:
        hidden = nheads * HEADDIM
        offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d[None, :] < HEADDIM
        rows = _rows(offs_m, queries, first_query, first_text)
        mask_m = (offs_m[:, None] < length) & mask_d
        columns = head * HEADDIM + offs_d[None, :]
        q = tl.load(qkv_ptr + rows[:, None] * (3 * hidden) + columns, mask=mask_m, other=0.0)
        dout = tl.load(dout_ptr + rows[:, None] * hidden + columns, mask=mask_m, other=0.0)
        out = tl.load(out_ptr + rows[:, None] * hidden + columns, mask=mask_m, other=0.0)
        lse = tl.load(lse_ptr + rows * nheads + head, mask=offs_m < length, other=float("inf"))
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, length, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            offs_k = _rows(offs_n, queries, first_query, first_text)[:, None] * (3 * hidden) + columns
            mask_n = (offs_n[:, None] < length) & mask_d
            k = tl.load(qkv_ptr + offs_k + hidden, mask=mask_n, other=0.0)
            v = tl.load(qkv_ptr + offs_k + 2 * hidden, mask=mask_n, other=0.0)
            scores = _scores(q, k, offs_m, offs_n, length, queries, kind, scale * 1.4426950408889634, PRECISION)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = attention_keep(seed_ptr, rows, head, nheads, width, start, threshold, BLOCK_N)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = tl.exp2(scores - lse[:, None]) * (dp - delta[:, None]) * scale
            dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        tl.store(delta_ptr + rows * nheads + head, delta, mask=offs_m < length)
        tl.store(dqkv_ptr + rows[:, None] * (3 * hidden) + columns, dq, mask=mask_m)


@triton.jit
def streamed_attention_bwd_dkv_kernel(
    dout_ptr,
    qkv_ptr,
    lse_ptr,
    delta_ptr,
    text_offsets_ptr,
    masks_ptr,
    dqkv_ptr,
    seed_ptr,
    num_query_rows,
    num_queries,
    nheads,
    scale,
    threshold,
    keep_scale,
    width,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = dk and dv of BLOCK_N keys of one head of one sequence."""
    sequence = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    queries, first_query, first_text, length = sequence_rows(sequence, num_query_rows, num_queries, text_offsets_ptr)
    kind = tl.load(masks_ptr + sequence)
    if tl.program_id(1) * BLOCK_N < length:
        hidden = nheads * HEADDIM
        first_key = tl.program_id(1) * BLOCK_N
        offs_n = first_key + tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d[None, :] < HEADDIM
        mask_n = (offs_n[:, None] < length) & mask_d
        columns = head * HEADDIM + offs_d[None, :]
        offs_k = _rows(offs_n, queries, first_query, first_text)[:, None] * (3 * hidden) + columns
        k = tl.load(qkv_ptr + offs_k + hidden, mask=mask_n, other=0.0)
        v = tl.load(qkv_ptr + offs_k + 2 * hidden, mask=mask_n, other=0.0)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, length, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            rows = _rows(offs_m, queries, first_query, first_text)
            mask_m = (offs_m[:, None] < length) & mask_d
            q = tl.load(qkv_ptr + rows[:, None] * (3 * hidden) + columns, mask=mask_m, other=0.0)
            dout = tl.load(dout_ptr + rows[:, None] * hidden + columns, mask=mask_m, other=0.0)
            lse = tl.load(lse_ptr + rows * nheads + head, mask=offs_m < length, other=float("inf"))
            delta = tl.load(delta_ptr + rows * nheads + head, mask=offs_m < length, other=0.0)
            scores = _scores(q, k, offs_m, offs_n, length, queries, kind, scale * 1.4426950408889634, PRECISION)
            p = tl.exp2(scores - lse[:, None])
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            dropped = p
            if DROPOUT:
                keep = attention_keep(seed_ptr, rows, head, nheads, width, first_key, threshold, BLOCK_N)
                dropped = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv += tl.dot(tl.trans(dropped.to(dout.dtype)), dout, input_precision=PRECISION)
            ds = (p * (dp - delta[:, None]) * scale).to(q.dtype)
            dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        tl.store(dqkv_ptr + offs_k + hidden, dk, mask=mask_n)
        tl.store(dqkv_ptr + offs_k + 2 * hidden, dv, mask=mask_n)


def _constants(qkv: Tensor, seed: Tensor | None) -> dict:
    headdim = qkv.shape[3]
    wide = headdim > 64 or qkv.dtype == torch.float32
    return dict(
        HEADDIM=headdim,
        BLOCK_D=max(16, triton.next_power_of_2(headdim)),
        DROPOUT=seed is not None,
        PRECISION=precision(qkv),
        **launch.settings("streamed_attention_wide" if wide else "streamed_attention", qkv.device),
    )


def streamed_attention_fwd(
    qkv: Tensor,
    text_offsets: Tensor,
    masks: Tensor,
    seed: Tensor | None,
    num_query_sequences: int,
    num_queries: int,
    max_text_length: int,
    softmax_scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """As query_text_attention_fwd."""
    rows, _, nheads, headdim = qkv.shape
    out = torch.empty(rows, nheads, headdim, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(rows, nheads, device=qkv.device, dtype=torch.float32)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    width = num_queries + max_text_length
    constants = _constants(qkv, seed)
    streamed_attention_fwd_kernel[(masks.shape[0] * nheads, triton.cdiv(width, constants["BLOCK_M"]))](
        qkv,
        text_offsets,
        masks,
        out,
        lse,
        seed,
        num_query_sequences * num_queries,
        num_queries,
        nheads,
        softmax_scale * LOG2E,
        threshold,
        keep_scale,
        width,
        **constants,
    )
    return out, lse


def streamed_attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    text_offsets: Tensor,
    masks: Tensor,
    seed: Tensor | None,
    num_query_sequences: int,
    num_queries: int,
    max_text_length: int,
    softmax_scale: float,
    dropout_p: float,
) -> Tensor:
    """As query_text_attention_bwd."""
    nheads = qkv.shape[2]
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    width = num_queries + max_text_length
    sizes = (
        num_query_sequences * num_queries,
        num_queries,
        nheads,
        softmax_scale,
        threshold,
        keep_scale,
        width,
    )
    constants = _constants(qkv, seed)
    streamed_attention_bwd_dq_kernel[(masks.shape[0] * nheads, triton.cdiv(width, constants["BLOCK_M"]))](
        dout, qkv, out, lse, text_offsets, masks, dqkv, delta, seed, *sizes, **constants
    )
    streamed_attention_bwd_dkv_kernel[(masks.shape[0] * nheads, triton.cdiv(width, constants["BLOCK_N"]))](
        dout, qkv, lse, delta, text_offsets, masks, dqkv, seed, *sizes, **constants
    )
    return dqkv
