"""Self-attention of packed sequences [queries | text]: a tile of 64 rows holds one head of a sequence, or two or four
of a short one; the three masks from positions.

Sequences of more than 64 rows run in streamed_attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.philox import attention_keep
from qformer_fast.kernels.sequences import precision, sequence_rows, visible_range
from qformer_fast.kernels.streamed_attention import streamed_attention_bwd, streamed_attention_fwd
from qformer_fast.reference.attention import MAX_TILE
from qformer_fast.reference.philox import threshold_and_scale

LOG2E = 1.4426950408889634


@triton.jit
def _rows_of_tile(
    first_head,
    nheads,
    queries,
    first_query,
    first_text,
    length,
    kind,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Of each tile row: first and end of the tile's columns that it sees, its head, its row of the matrices, and
    whether there is such a row.

    HEADS heads of the sequence stand below each other, BLOCK / HEADS rows each, and their keys beside each other.
    """
    SPAN: tl.constexpr = BLOCK // HEADS
    place = tl.arange(0, BLOCK) % SPAN
    nth_head = tl.arange(0, BLOCK) // SPAN
    first, end = visible_range(place, queries, length, kind)
    row = tl.where(place < queries, first_query + place, first_text + place - queries)
    head = first_head + nth_head
    return nth_head * SPAN + first, nth_head * SPAN + end, head, row, (place < length) & (head < nheads)


@triton.jit
def _exponentials(
    q,  # (BLOCK, D)
    k,  # (BLOCK, D)
    first,  # (BLOCK,)
    end,  # (BLOCK,)
    scale_log2,
    PRECISION: tl.constexpr,
):
    """softmax(q k^T scale) over the columns from ``first`` to ``end``, (BLOCK, BLOCK) fp32, but for its divisor,
    (BLOCK,). Rows that do not exist hold finite numbers.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    column = tl.arange(0, q.shape[0])[None, :]
    scores = tl.where((column >= first[:, None]) & (column < end[:, None]), scores, float("-inf"))
    p = tl.exp2(scores * scale_log2 - (tl.max(scores, axis=1) * scale_log2)[:, None])
    return p, tl.sum(p, axis=1)


@triton.jit
def _keep(seed_ptr, row, head, nheads, width, threshold, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """(BLOCK, BLOCK) bool: what dropout keeps of a tile; a row reads it among its own head's keys."""
    SPAN: tl.constexpr = BLOCK // HEADS
    keep = attention_keep(seed_ptr, row, head, nheads, width, 0, threshold, SPAN)
    return tl.reshape(tl.broadcast_to(keep[:, None, :], (BLOCK, HEADS, SPAN)), (BLOCK, BLOCK))


@triton.jit
def _fwd_tile(
    qkv_ptr,
    out_ptr,
    seed_ptr,
    queries,
    first_query,
    first_text,
    length,
    kind,
    first_head,
    nheads,
    scale_log2,
    threshold,
    keep_scale,
    width,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, end, head, row, exists = _rows_of_tile(
        first_head, nheads, queries, first_query, first_text, length, kind, BLOCK, HEADS
    )
    offs_d = tl.arange(0, BLOCK_D)
    hidden = nheads * HEADDIM
    mask = exists[:, None] & (offs_d[None, :] < HEADDIM)
    ptrs = qkv_ptr + (row * (3 * hidden) + head * HEADDIM)[:, None] + offs_d[None, :]
    q = tl.load(ptrs, mask=mask, other=0.0)
    k = tl.load(ptrs + hidden, mask=mask, other=0.0)
    v = tl.load(ptrs + 2 * hidden, mask=mask, other=0.0)
    p, total = _exponentials(q, k, first, end, scale_log2, PRECISION)
    if DROPOUT:
        p = tl.where(_keep(seed_ptr, row, head, nheads, width, threshold, BLOCK, HEADS), p, 0.0)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (keep_scale / total)[:, None]
    tl.store(out_ptr + (row * hidden + head * HEADDIM)[:, None] + offs_d[None, :], out, mask=mask)


@triton.jit
def query_text_attention_fwd_kernel(
    qkv_ptr,  # (rows, 3, nheads, HEADDIM)
    text_offsets_ptr,  # (sequences + 1,) int64
    masks_ptr,  # (sequences,) int64
    out_ptr,  # (rows, nheads, HEADDIM)
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
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = one sequence and as many of its heads as one tile holds; those of a program that comes before."""
    sequence = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    queries, first_query, first_text, length = sequence_rows(sequence, num_query_rows, num_queries, text_offsets_ptr)
    kind = tl.load(masks_ptr + sequence)
    if length <= BLOCK // 4:
        if head % 4 == 0:
            _fwd_tile(
                qkv_ptr, out_ptr, seed_ptr, queries, first_query, first_text, length, kind, head, nheads, scale_log2,
                threshold, keep_scale, width, HEADDIM, BLOCK_D, BLOCK, 4, DROPOUT, PRECISION,
            )  # fmt: skip
    elif length <= BLOCK // 2:
        if head % 2 == 0:
            _fwd_tile(
                qkv_ptr, out_ptr, seed_ptr, queries, first_query, first_text, length, kind, head, nheads, scale_log2,
                threshold, keep_scale, width, HEADDIM, BLOCK_D, BLOCK, 2, DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        _fwd_tile(
            qkv_ptr, out_ptr, seed_ptr, queries, first_query, first_text, length, kind, head, nheads, scale_log2,
            threshold, keep_scale, width, HEADDIM, BLOCK_D, BLOCK, 1, DROPOUT, PRECISION,
        )  # fmt: skip


@triton.jit
def _bwd_tile(
    dout_ptr,
    qkv_ptr,
    dqkv_ptr,
    dbias_ptr,
    seed_ptr,
    queries,
    first_query,
    first_text,
    length,
    kind,
    first_head,
    nheads,
    scale,
    threshold,
    keep_scale,
    width,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, end, head, row, exists = _rows_of_tile(
        first_head, nheads, queries, first_query, first_text, length, kind, BLOCK, HEADS
    )
    offs_d = tl.arange(0, BLOCK_D)
    hidden = nheads * HEADDIM
    mask = exists[:, None] & (offs_d[None, :] < HEADDIM)
    offs_qkv = (row * (3 * hidden) + head * HEADDIM)[:, None] + offs_d[None, :]
    q = tl.load(qkv_ptr + offs_qkv, mask=mask, other=0.0)
    k = tl.load(qkv_ptr + offs_qkv + hidden, mask=mask, other=0.0)
    v = tl.load(qkv_ptr + offs_qkv + 2 * hidden, mask=mask, other=0.0)
    offs_out = (row * hidden + head * HEADDIM)[:, None] + offs_d[None, :]
    dout = tl.load(dout_ptr + offs_out, mask=mask, other=0.0)
    p, total = _exponentials(q, k, first, end, scale * 1.4426950408889634, PRECISION)
    p *= (1.0 / total)[:, None]
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        keep = _keep(seed_ptr, row, head, nheads, width, threshold, BLOCK, HEADS)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dv = tl.dot(tl.trans(dropped.to(v.dtype)), dout, input_precision=PRECISION)
    ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale).to(q.dtype)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    tl.store(dqkv_ptr + offs_qkv, dq, mask=mask)
    tl.store(dqkv_ptr + offs_qkv + hidden, dk, mask=mask)
    tl.store(dqkv_ptr + offs_qkv + 2 * hidden, dv, mask=mask)
    # rows past the sequence's end are zero, but NaN where it has none: their dout is, and no reader sees them. A shift
    # of all keys moves no softmax, so the sum of dk is zero
    heads = first_head + tl.arange(0, HEADS)
    offs_bias = (heads * HEADDIM)[:, None] + offs_d[None, :]
    mask_bias = (heads < nheads)[:, None] & (offs_d[None, :] < HEADDIM)
    tl.store(dbias_ptr + offs_bias, _head_sums(dq, length, HEADS), mask=mask_bias)
    tl.store(dbias_ptr + hidden + offs_bias, tl.zeros((HEADS, BLOCK_D), tl.float32), mask=mask_bias)
    tl.store(dbias_ptr + 2 * hidden + offs_bias, _head_sums(dv, length, HEADS), mask=mask_bias)


@triton.jit
def _head_sums(rows, length, HEADS: tl.constexpr):
    """(BLOCK, D) -> (HEADS, D), zero for a sequence without rows."""
    by_head = tl.reshape(rows, (HEADS, rows.shape[0] // HEADS, rows.shape[1]))
    return tl.where(length > 0, tl.sum(by_head, axis=1), 0.0)


@triton.jit
def query_text_attention_bwd_kernel(
    dout_ptr,  # (rows, nheads, HEADDIM)
    qkv_ptr,  # (rows, 3, nheads, HEADDIM)
    text_offsets_ptr,  # (sequences + 1,) int64
    masks_ptr,  # (sequences,) int64
    dqkv_ptr,  # (rows, 3, nheads, HEADDIM)
    dbias_ptr,  # (sequences, 3, nheads, HEADDIM) fp32, each sequence's sum of dqkv over its rows
    seed_ptr,  # (1,) int64, with DROPOUT
    num_query_rows,
    num_queries,
    nheads,
    scale,
    threshold,
    keep_scale,
    width,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As the forward kernel: probabilities made again, dq, dk and dv written once."""
    sequence = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    queries, first_query, first_text, length = sequence_rows(sequence, num_query_rows, num_queries, text_offsets_ptr)
    kind = tl.load(masks_ptr + sequence)
    dbias_ptr += sequence * 3 * nheads * HEADDIM
    if length <= BLOCK // 4:
        if head % 4 == 0:
            _bwd_tile(
                dout_ptr, qkv_ptr, dqkv_ptr, dbias_ptr, seed_ptr, queries, first_query, first_text, length, kind, head,
                nheads, scale, threshold, keep_scale, width, HEADDIM, BLOCK_D, BLOCK, 4, DROPOUT, PRECISION,
            )  # fmt: skip
    elif length <= BLOCK // 2:
        if head % 2 == 0:
            _bwd_tile(
                dout_ptr, qkv_ptr, dqkv_ptr, dbias_ptr, seed_ptr, queries, first_query, first_text, length, kind, head,
                nheads, scale, threshold, keep_scale, width, HEADDIM, BLOCK_D, BLOCK, 2, DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        _bwd_tile(
            dout_ptr, qkv_ptr, dqkv_ptr, dbias_ptr, seed_ptr, queries, first_query, first_text, length, kind, head,
            nheads, scale, threshold, keep_scale, width, HEADDIM, BLOCK_D, BLOCK, 1, DROPOUT, PRECISION,
        )  # fmt: skip


def query_text_attention_fwd(
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
    """qkv (rows, 3, nheads, headdim) contiguous -> out (rows, nheads, headdim), and what backward needs beside it: lse
    (rows, nheads), or nothing (0, nheads) where a sequence is one tile.
    """
    rows, _, nheads, headdim = qkv.shape
    width = num_queries + max_text_length
    if width > MAX_TILE:
        return streamed_attention_fwd(
            qkv, text_offsets, masks, seed, num_query_sequences, num_queries, max_text_length, softmax_scale, dropout_p
        )
    out = torch.empty(rows, nheads, headdim, device=qkv.device, dtype=qkv.dtype)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    query_text_attention_fwd_kernel[(masks.shape[0] * nheads,)](
        qkv,
        text_offsets,
        masks,
        out,
        seed,
        num_query_sequences * num_queries,
        num_queries,
        nheads,
        softmax_scale * LOG2E,
        threshold,
        keep_scale,
        width,
        HEADDIM=headdim,
        BLOCK_D=max(16, triton.next_power_of_2(headdim)),
        BLOCK=MAX_TILE,
        DROPOUT=seed is not None,
        PRECISION=precision(qkv),
        **launch.settings("query_text_attention_fwd", qkv.device),
    )
    return out, qkv.new_empty(0, nheads, dtype=torch.float32)


def query_text_attention_bwd(
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
) -> tuple[Tensor, Tensor]:
    """dout, out (rows, nheads, headdim), qkv (rows, 3, nheads, headdim), contiguous -> dqkv, and (n, 3, nheads,
    headdim) whose sum over n is the gradient of the projections' bias.
    """
    nheads, headdim = qkv.shape[2:]
    width = num_queries + max_text_length
    if width > MAX_TILE:
        dqkv = streamed_attention_bwd(
            dout,
            qkv,
            out,
            lse,
            text_offsets,
            masks,
            seed,
            num_query_sequences,
            num_queries,
            max_text_length,
            softmax_scale,
            dropout_p,
        )
        return dqkv, dqkv
    dqkv = torch.empty_like(qkv)
    sequences = masks.shape[0]
    dbias = torch.empty(sequences, 3, nheads, headdim, device=qkv.device, dtype=torch.float32)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    query_text_attention_bwd_kernel[(sequences * nheads,)](
        dout,
        qkv,
        text_offsets,
        masks,
        dqkv,
        dbias,
        seed,
        num_query_sequences * num_queries,
        num_queries,
        nheads,
        softmax_scale,
        threshold,
        keep_scale,
        width,
        HEADDIM=headdim,
        BLOCK_D=max(16, triton.next_power_of_2(headdim)),
        BLOCK=MAX_TILE,
        DROPOUT=seed is not None,
        PRECISION=precision(qkv),
        **launch.settings("query_text_attention_bwd", qkv.device),
    )
    return dqkv, dbias
