"""Attention over any number of queries and keys: keys in blocks with an online softmax, forward and backward.

One set of kernels for both ops. In self-attention (SELF) readers and keys are the rows of a packed sequence under its
mask; in cross-attention readers are a sequence's query rows, keys the tokens of its image, ``image_mask`` says which.
Backward makes the softmax statistics again, so forward saves nothing; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.philox import dropout_keep
from qformer_fast.kernels.sequences import precision, sequence_rows, visible
from qformer_fast.reference.philox import GROUP, threshold_and_scale


@triton.jit
def _sequence(
    sequence,
    num_query_rows,
    num_queries,
    num_tokens,
    text_offsets_ptr,
    masks_ptr,
    image_index_ptr,
    SELF: tl.constexpr,
):
    """Queries, first query row, first text row, number of readers, number of keys, mask, image."""
    if SELF:
        queries, first_query, first_text, length = sequence_rows(
            sequence, num_query_rows, num_queries, text_offsets_ptr
        )
        return queries, first_query, first_text, length, length, tl.load(masks_ptr + sequence), first_query
    first_query = sequence.to(tl.int64) * num_queries
    image = tl.load(image_index_ptr + sequence)
    return num_queries, first_query, first_query, num_queries, num_tokens, image, image


@triton.jit
def _scores(
    q,  # (BLOCK_M, D)
    k,  # (BLOCK_N, D)
    offs_m,
    offs_n,
    readers,
    keys,
    queries,
    kind,
    image,
    image_mask_ptr,
    mask_readers,
    scale_log2,
    SELF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q k^T scale in units of log 2, -inf where a reader does not see a key: (BLOCK_M, BLOCK_N) fp32."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    seen = (offs_n[None, :] < keys) & (offs_m[:, None] < readers)
    if SELF:
        seen = seen & visible(offs_m[:, None], offs_n[None, :], queries, kind)
    if HAS_MASK:
        row = image * mask_readers + tl.minimum(offs_m, mask_readers - 1)
        allowed = tl.load(image_mask_ptr + row[:, None] * keys + offs_n[None, :], mask=seen, other=0)
        seen = seen & (allowed != 0)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _keep(
    seed_ptr,
    rows,  # (BLOCK_M,) reader rows
    offs_m,
    offs_n,
    sequence,
    head,
    nheads,
    num_tokens,
    groups,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELF: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) bool, the same as the one-tile kernels': 8 keys a counter in self-, 8 readers in
    cross-attention.
    """
    seed = tl.load(seed_ptr)
    if SELF:
        group = tl.min(offs_n) // 8 + tl.arange(0, BLOCK_N // 8)
        return dropout_keep(seed, (rows.to(tl.int32) * nheads + head)[:, None] * groups + group[None, :], threshold)
    group = tl.min(offs_m) // 8 + tl.arange(0, BLOCK_M // 8)
    counters = ((sequence * nheads + head) * num_tokens + offs_n)[:, None] * groups + group[None, :]
    return tl.trans(dropout_keep(seed, counters, threshold))


@triton.jit
def streamed_attention_fwd_kernel(
    q_ptr,  # (rows, ...), stride_qm between rows, heads HEADDIM apart
    k_ptr,  # self: as q; cross: (images, tokens, ...) with strides stride_kb, stride_kn
    v_ptr,  # as k
    out_ptr,  # (rows, nheads, HEADDIM)
    seed_ptr,  # (1,) int64, with DROPOUT
    text_offsets_ptr,
    masks_ptr,
    image_index_ptr,
    image_mask_ptr,  # (images, mask_readers, tokens) bool, with HAS_MASK
    num_query_rows,
    num_queries,
    num_tokens,
    nheads,
    stride_qm,
    stride_kb,
    stride_kn,
    mask_readers,
    scale_log2,
    threshold,
    keep_scale,
    groups,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = BLOCK_M readers of one head of one sequence."""
    sequence = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    queries, first_query, first_text, readers, keys, kind, image = _sequence(
        sequence, num_query_rows, num_queries, num_tokens, text_offsets_ptr, masks_ptr, image_index_ptr, SELF
    )
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(1) * BLOCK_M < readers:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d[None, :] < HEADDIM
        rows = tl.where(offs_m < queries, first_query + offs_m, first_text + offs_m - queries)
        mask_m = (offs_m[:, None] < readers) & mask_d
        q = tl.load(q_ptr + rows[:, None] * stride_qm + head * HEADDIM + offs_d[None, :], mask=mask_m, other=0.0)
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, keys, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            if SELF:
                key_rows = tl.where(offs_n < queries, first_query + offs_n, first_text + offs_n - queries) * stride_kn
            else:
                key_rows = image * stride_kb + offs_n.to(tl.int64) * stride_kn
            offs_k = key_rows[:, None] + head * HEADDIM + offs_d[None, :]
            mask_n = (offs_n[:, None] < keys) & mask_d
            k = tl.load(k_ptr + offs_k, mask=mask_n, other=0.0)
            v = tl.load(v_ptr + offs_k, mask=mask_n, other=0.0)
            scores = _scores(
                q, k, offs_m, offs_n, readers, keys, queries, kind, image, image_mask_ptr, mask_readers, scale_log2,
                SELF, HAS_MASK, PRECISION,
            )  # fmt: skip
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(highest - base)
            p = tl.exp2(scores - base[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            if DROPOUT:
                keep = _keep(
                    seed_ptr, rows, offs_m, offs_n, sequence, head, nheads, num_tokens, groups, threshold, BLOCK_M,
                    BLOCK_N, SELF,
                )  # fmt: skip
                p = tl.where(keep, p * keep_scale, 0.0)
            out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            highest = higher
        # a reader that sees nothing has no weight and gets zeros
        out = out / tl.where(total > 0, total, 1.0)[:, None]
        out_ptrs = out_ptr + (rows[:, None] * nheads + head) * HEADDIM + offs_d[None, :]
        tl.store(out_ptrs, out, mask=mask_m)


@triton.jit
def streamed_attention_bwd_dq_kernel(
    dout_ptr,  # (rows, nheads, HEADDIM)
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,  # strides of q
    lse_ptr,  # (sequences, nheads, max_readers) fp32, in units of log 2, +inf for a row that sees nothing
    delta_ptr,  # as lse: sum over keys of p dp
    seed_ptr,
    text_offsets_ptr,
    masks_ptr,
    image_index_ptr,
    image_mask_ptr,
    num_query_rows,
    num_queries,
    num_tokens,
    max_readers,
    nheads,
    stride_qm,
    stride_kb,
    stride_kn,
    mask_readers,
    scale,
    threshold,
    keep_scale,
    groups,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = dq of BLOCK_M readers of one head of one sequence, and their softmax statistics.

    The first sweep over the keys makes lse and delta, the second dq.
    """
    sequence = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    queries, first_query, first_text, readers, keys, kind, image = _sequence(
        sequence, num_query_rows, num_queries, num_tokens, text_offsets_ptr, masks_ptr, image_index_ptr, SELF
    )
    scale_log2 = scale * 1.4426950408889634
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(1) * BLOCK_M < readers:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d[None, :] < HEADDIM
        rows = tl.where(offs_m < queries, first_query + offs_m, first_text + offs_m - queries)
        mask_m = (offs_m[:, None] < readers) & mask_d
        q = tl.load(q_ptr + rows[:, None] * stride_qm + head * HEADDIM + offs_d[None, :], mask=mask_m, other=0.0)
        dout_ptrs = dout_ptr + (rows[:, None] * nheads + head) * HEADDIM + offs_d[None, :]
        dout = tl.load(dout_ptrs, mask=mask_m, other=0.0)
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        lse = tl.zeros((BLOCK_M,), tl.float32)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for sweep in range(2):
            for start in range(0, keys, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                if SELF:
                    key_rows = (
                        tl.where(offs_n < queries, first_query + offs_n, first_text + offs_n - queries) * stride_kn
                    )
                else:
                    key_rows = image * stride_kb + offs_n.to(tl.int64) * stride_kn
                offs_k = key_rows[:, None] + head * HEADDIM + offs_d[None, :]
                mask_n = (offs_n[:, None] < keys) & mask_d
                k = tl.load(k_ptr + offs_k, mask=mask_n, other=0.0)
                v = tl.load(v_ptr + offs_k, mask=mask_n, other=0.0)
                scores = _scores(
                    q, k, offs_m, offs_n, readers, keys, queries, kind, image, image_mask_ptr, mask_readers,
                    scale_log2, SELF, HAS_MASK, PRECISION,
                )  # fmt: skip
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                if DROPOUT:
                    keep = _keep(
                        seed_ptr, rows, offs_m, offs_n, sequence, head, nheads, num_tokens, groups, threshold,
                        BLOCK_M, BLOCK_N, SELF,
                    )  # fmt: skip
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                if sweep == 0:
                    higher = tl.maximum(highest, tl.max(scores, axis=1))
                    base = tl.where(higher == float("-inf"), 0.0, higher)
                    shrink = tl.exp2(highest - base)
                    p = tl.exp2(scores - base[:, None])
                    total = total * shrink + tl.sum(p, axis=1)
                    delta = delta * shrink + tl.sum(p * dp, axis=1)
                    highest = higher
                else:
                    p = tl.exp2(scores - lse[:, None])
                    ds = p * (dp - delta[:, None]) * scale
                    dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
            if sweep == 0:
                sees = total > 0
                total = tl.where(sees, total, 1.0)
                delta = delta / total
                lse = tl.where(sees, highest + tl.log2(total), float("inf"))
        statistics = (sequence * nheads + head) * max_readers + offs_m
        tl.store(lse_ptr + statistics, lse, mask=offs_m < readers)
        tl.store(delta_ptr + statistics, delta, mask=offs_m < readers)
        tl.store(dq_ptr + rows[:, None] * stride_qm + head * HEADDIM + offs_d[None, :], dq, mask=mask_m)


@triton.jit
def streamed_attention_bwd_dkv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dk_ptr,  # (strides stride_db, stride_dn)
    dv_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    text_offsets_ptr,
    masks_ptr,
    image_index_ptr,
    image_order_ptr,  # cross: (query sequences,) sequences in the order of their images
    image_offsets_ptr,  # cross: (images + 1,) where each image's begin in image_order
    image_mask_ptr,
    num_query_rows,
    num_queries,
    num_tokens,
    max_readers,
    nheads,
    stride_qm,
    stride_kb,
    stride_kn,
    stride_db,
    stride_dn,
    mask_readers,
    scale,
    threshold,
    keep_scale,
    groups,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = dk and dv of BLOCK_N keys of one head of one sequence or image, summed over all that read them."""
    owner = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    scale_log2 = scale * 1.4426950408889634
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEADDIM
    if SELF:
        begin = owner
        end = owner + 1
        queries, first_query, first_text, readers, keys, kind, image = _sequence(
            owner, num_query_rows, num_queries, num_tokens, text_offsets_ptr, masks_ptr, image_index_ptr, SELF
        )
        key_rows = tl.where(offs_n < queries, first_query + offs_n, first_text + offs_n - queries)
        offs_k = key_rows[:, None] * stride_kn
        offs_dk = key_rows[:, None] * stride_dn
    else:
        begin = tl.load(image_offsets_ptr + owner).to(tl.int32)
        end = tl.load(image_offsets_ptr + owner + 1).to(tl.int32)
        keys = num_tokens
        offs_k = owner.to(tl.int64) * stride_kb + offs_n[:, None].to(tl.int64) * stride_kn
        offs_dk = owner.to(tl.int64) * stride_db + offs_n[:, None].to(tl.int64) * stride_dn
    if tl.program_id(1) * BLOCK_N < keys:
        mask_n = (offs_n[:, None] < keys) & mask_d
        k = tl.load(k_ptr + offs_k + head * HEADDIM + offs_d[None, :], mask=mask_n, other=0.0)
        v = tl.load(v_ptr + offs_k + head * HEADDIM + offs_d[None, :], mask=mask_n, other=0.0)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for index in range(begin, end):
            if SELF:
                sequence = index
            else:
                sequence = tl.load(image_order_ptr + index).to(tl.int32)
            queries, first_query, first_text, readers, keys_, kind, image = _sequence(
                sequence, num_query_rows, num_queries, num_tokens, text_offsets_ptr, masks_ptr, image_index_ptr, SELF
            )
            for start in range(0, readers, BLOCK_M):
                offs_m = start + tl.arange(0, BLOCK_M)
                rows = tl.where(offs_m < queries, first_query + offs_m, first_text + offs_m - queries)
                mask_m = (offs_m[:, None] < readers) & mask_d
                q_ptrs = q_ptr + rows[:, None] * stride_qm + head * HEADDIM + offs_d[None, :]
                q = tl.load(q_ptrs, mask=mask_m, other=0.0)
                dout_ptrs = dout_ptr + (rows[:, None] * nheads + head) * HEADDIM + offs_d[None, :]
                dout = tl.load(dout_ptrs, mask=mask_m, other=0.0)
                statistics = (sequence * nheads + head) * max_readers + offs_m
                lse = tl.load(lse_ptr + statistics, mask=offs_m < readers, other=float("inf"))
                delta = tl.load(delta_ptr + statistics, mask=offs_m < readers, other=0.0)
                scores = _scores(
                    q, k, offs_m, offs_n, readers, keys, queries, kind, image, image_mask_ptr, mask_readers,
                    scale_log2, SELF, HAS_MASK, PRECISION,
                )  # fmt: skip
                p = tl.exp2(scores - lse[:, None])
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                dropped = p
                if DROPOUT:
                    keep = _keep(
                        seed_ptr, rows, offs_m, offs_n, sequence, head, nheads, num_tokens, groups, threshold,
                        BLOCK_M, BLOCK_N, SELF,
                    )  # fmt: skip
                    dropped = tl.where(keep, p * keep_scale, 0.0)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                dv += tl.dot(tl.trans(dropped.to(dout.dtype)), dout, input_precision=PRECISION)
                ds = (p * (dp - delta[:, None]) * scale).to(q.dtype)
                dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        dk_ptrs = dk_ptr + offs_dk + head * HEADDIM + offs_d[None, :]
        dv_ptrs = dv_ptr + offs_dk + head * HEADDIM + offs_d[None, :]
        if ACCUMULATE:
            dk += tl.load(dk_ptrs, mask=mask_n, other=0.0)
            dv += tl.load(dv_ptrs, mask=mask_n, other=0.0)
        tl.store(dk_ptrs, dk, mask=mask_n)
        tl.store(dv_ptrs, dv, mask=mask_n)


def _constants(x: Tensor, headdim: int, seed: Tensor | None) -> dict:
    return dict(
        HEADDIM=headdim,
        BLOCK_D=max(16, triton.next_power_of_2(headdim)),
        DROPOUT=seed is not None,
        PRECISION=precision(x),
        **launch.settings("streamed_attention_wide" if headdim > 64 else "streamed_attention", x.device),
    )


def self_attention_fwd(
    qkv: Tensor,
    text_offsets: Tensor,
    masks: Tensor,
    seed: Tensor | None,
    num_query_sequences: int,
    num_queries: int,
    max_text_length: int,
    softmax_scale: float,
    dropout_p: float,
) -> Tensor:
    """As query_text_attention_fwd."""
    rows, _, nheads, headdim = qkv.shape
    out = torch.empty(rows, nheads, headdim, device=qkv.device, dtype=qkv.dtype)
    q, k, v = qkv.unbind(1)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    width = num_queries + max_text_length
    constants = _constants(qkv, headdim, seed)
    grid = (masks.shape[0] * nheads, triton.cdiv(width, constants["BLOCK_M"]))
    streamed_attention_fwd_kernel[grid](
        q, k, v, out, seed, text_offsets, masks, None, None, num_query_sequences * num_queries, num_queries, 0, nheads,
        qkv.stride(0), 0, qkv.stride(0), 1, softmax_scale * 1.4426950408889634, threshold, keep_scale,
        triton.cdiv(width, GROUP), SELF=True, HAS_MASK=False, **constants,
    )  # fmt: skip
    return out


def self_attention_bwd(
    dout: Tensor,
    qkv: Tensor,
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
    nheads, headdim = qkv.shape[2:]
    dqkv = torch.empty_like(qkv)
    (q, k, v), (dq, dk, dv) = qkv.unbind(1), dqkv.unbind(1)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    width, num_query_rows = num_queries + max_text_length, num_query_sequences * num_queries
    groups, stride = triton.cdiv(width, GROUP), qkv.stride(0)
    lse, delta = torch.empty(2, masks.shape[0], nheads, width, device=qkv.device)
    constants = _constants(qkv, headdim, seed)
    grid = (masks.shape[0] * nheads, triton.cdiv(width, constants["BLOCK_M"]))
    streamed_attention_bwd_dq_kernel[grid](
        dout, q, k, v, dq, lse, delta, seed, text_offsets, masks, None, None, num_query_rows, num_queries, 0, width,
        nheads, stride, 0, stride, 1, softmax_scale, threshold, keep_scale, groups, SELF=True, HAS_MASK=False,
        **constants,
    )  # fmt: skip
    grid = (masks.shape[0] * nheads, triton.cdiv(width, constants["BLOCK_N"]))
    streamed_attention_bwd_dkv_kernel[grid](
        dout, q, k, v, dk, dv, lse, delta, seed, text_offsets, masks, None, None, None, None, num_query_rows,
        num_queries, 0, width, nheads, stride, 0, stride, 0, stride, 1, softmax_scale, threshold, keep_scale, groups,
        SELF=True, HAS_MASK=False, ACCUMULATE=False, **constants,
    )  # fmt: skip
    return dqkv


def cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    image_mask: Tensor | None,
    seed: Tensor | None,
    num_queries: int,
    softmax_scale: float,
    dropout_p: float,
) -> Tensor:
    """As image_cross_attention_fwd."""
    _, nheads, headdim = q.shape
    tokens = k.shape[1]
    out = torch.empty_like(q)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    constants = _constants(q, headdim, seed)
    grid = (image_index.shape[0] * nheads, triton.cdiv(num_queries, constants["BLOCK_M"]))
    streamed_attention_fwd_kernel[grid](
        q, k, v, out, seed, None, None, image_index, image_mask, q.shape[0], num_queries, tokens, nheads, q.stride(0),
        k.stride(0), k.stride(1), 1 if image_mask is None else image_mask.shape[1],
        softmax_scale * 1.4426950408889634, threshold, keep_scale, triton.cdiv(num_queries, GROUP), SELF=False,
        HAS_MASK=image_mask is not None, **constants,
    )  # fmt: skip
    return out


def cross_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    image_index: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    seed: Tensor | None,
    num_queries: int,
    softmax_scale: float,
    dropout_p: float,
    accumulate: bool,
) -> Tensor:
    """As image_cross_attention_bwd_into."""
    _, nheads, headdim = q.shape
    images, tokens = k.shape[:2]
    dq = torch.empty_like(q)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    groups, readers = triton.cdiv(num_queries, GROUP), 1 if image_mask is None else image_mask.shape[1]
    lse, delta = torch.empty(2, image_index.shape[0], nheads, num_queries, device=q.device)
    constants = _constants(q, headdim, seed)
    grid = (image_index.shape[0] * nheads, triton.cdiv(num_queries, constants["BLOCK_M"]))
    streamed_attention_bwd_dq_kernel[grid](
        dout, q, k, v, dq, lse, delta, seed, None, None, image_index, image_mask, q.shape[0], num_queries, tokens,
        num_queries, nheads, q.stride(0), k.stride(0), k.stride(1), readers, softmax_scale, threshold, keep_scale,
        groups, SELF=False, HAS_MASK=image_mask is not None, **constants,
    )  # fmt: skip
    grid = (images * nheads, triton.cdiv(tokens, constants["BLOCK_N"]))
    streamed_attention_bwd_dkv_kernel[grid](
        dout, q, k, v, dk, dv, lse, delta, seed, None, None, image_index, image_order, image_offsets, image_mask,
        q.shape[0], num_queries, tokens, num_queries, nheads, q.stride(0), k.stride(0), k.stride(1), dk.stride(0),
        dk.stride(1), readers, softmax_scale, threshold, keep_scale, groups, SELF=False,
        HAS_MASK=image_mask is not None, ACCUMULATE=accumulate, **constants,
    )  # fmt: skip
    return dq
