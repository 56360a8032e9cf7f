"""Attention of query rows to their image, forward and backward.

One program serves all sequences that look at one head of one image: the queries of several sequences share a tile, so
keys and values are read once and their gradients are summed in registers. Tokens are visited in the order 1, 2, ...,
0: of 2^n + 1 tokens the class token, the first, is taken apart and the others fill whole blocks without any masking.
Dropout counts keys in that order: token t has slot t - 1, token 0 the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.philox import ROUNDS, attention_keep, first_counter
from qformer_fast.kernels.sequences import precision
from qformer_fast.reference.philox import threshold_and_scale

MAX_BLOCK_M = 128
LOG2E = 1.4426950408889634


@triton.jit
def _readers(
    first,
    end,
    num_queries,
    chunks,
    image_order_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """The tile's query rows, each reader's number in its sequence, and which of the BLOCK_M readers there are.

    A unit is BLOCK_Q queries of one sequence, ``chunks`` units make a sequence; the tile holds units from ``first`` on.
    """
    offs_m = tl.arange(0, BLOCK_M)
    unit = first + offs_m // BLOCK_Q
    reader = (unit % chunks) * BLOCK_Q + offs_m % BLOCK_Q
    exists = (unit < end) & (reader < num_queries)
    sequence = tl.load(image_order_ptr + unit // chunks, mask=exists, other=0)
    return sequence * num_queries + reader, reader, exists


@triton.jit
def _keep_first(seed_ptr, rows, head, nheads, tokens, threshold):
    """(BLOCK_M,) bool: dropout's choice for token 0, whose slot is a multiple of 32."""
    counters = first_counter(rows, head, nheads, tokens) + (tokens - 1) // 8
    word = tl.randint4x(tl.load(seed_ptr), counters, ROUNDS)[0]
    return (word & 0xFFFF) >= threshold


@triton.jit
def image_cross_attention_fwd_kernel(
    q_ptr,  # (query rows, nheads, HEADDIM)
    k_ptr,  # (images, tokens, nheads, HEADDIM), strides stride_kb, stride_kn
    v_ptr,  # as k
    image_order_ptr,  # (query sequences,) int64, sequences in the order of their images
    image_offsets_ptr,  # (images + 1,) int64, where each image's begin in image_order
    image_mask_ptr,  # (images, mask_readers, tokens) bool, with HAS_MASK
    out_ptr,  # (query rows, nheads, HEADDIM)
    lse_ptr,  # (query rows, nheads) fp32, log2 of the sum of exponentials; +inf for a row that sees nothing
    seed_ptr,  # (1,) int64, with DROPOUT
    num_queries,
    chunks,
    tokens,
    nheads,
    stride_kb,
    stride_kn,
    mask_readers,
    scale_log2,
    threshold,
    keep_scale,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_FIRST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = every num_programs(1)-th tile of the readers of one head of one image."""
    image = (tl.program_id(0) // nheads).to(tl.int64)
    head = tl.program_id(0) % nheads
    begin = tl.load(image_offsets_ptr + image).to(tl.int32) * chunks
    end = tl.load(image_offsets_ptr + image + 1).to(tl.int32) * chunks
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEADDIM
    k_ptr += image * stride_kb + head * HEADDIM
    v_ptr += image * stride_kb + head * HEADDIM
    slots = tokens - SPLIT_FIRST
    units = BLOCK_M // BLOCK_Q
    for first in range(begin + tl.program_id(1) * units, end, tl.num_programs(1) * units):
        rows, reader, exists = _readers(first, end, num_queries, chunks, image_order_ptr, BLOCK_M, BLOCK_Q)
        mask_m = exists[:, None] & mask_d[None, :]
        offs_q = (rows[:, None] * nheads + head) * HEADDIM + offs_d[None, :]
        q = tl.load(q_ptr + offs_q, mask=mask_m, other=0.0)
        if SPLIT_FIRST:
            first_k = tl.load(k_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            first_v = tl.load(v_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            highest = tl.sum(q.to(tl.float32) * first_k[None, :], axis=1)
            total = tl.full((BLOCK_M,), 1.0, tl.float32)
            weight = total
            if DROPOUT:
                first_keep = _keep_first(seed_ptr, rows, head, nheads, tokens, threshold)
                weight = tl.where(first_keep, 1.0, 0.0)
            out = weight[:, None] * first_v[None, :]
        else:
            highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, slots, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            if SPLIT_FIRST:
                offs_k = (slot + 1)[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
                mask_n = mask_d[None, :]
            else:
                token = tl.where(slot == tokens - 1, 0, slot + 1)
                offs_k = token[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
                mask_n = (slot[:, None] < tokens) & mask_d[None, :]
            k = tl.load(k_ptr + offs_k, mask=mask_n, other=0.0)
            v = tl.load(v_ptr + offs_k, mask=mask_n, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if not SPLIT_FIRST:
                scores = tl.where(slot[None, :] < tokens, scores, float("-inf"))
            if HAS_MASK:
                offs_mask = (image * mask_readers + tl.minimum(reader, mask_readers - 1)) * tokens
                seen = tl.load(
                    image_mask_ptr + offs_mask[:, None] + token[None, :],
                    mask=exists[:, None] & (slot[None, :] < tokens),
                    other=0,
                )
                scores = tl.where(seen != 0, scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            shift = tl.where(higher == float("-inf"), 0.0, higher) if HAS_MASK else higher
            shrink = tl.exp2((highest - shift) * scale_log2)
            p = tl.exp2(scores * scale_log2 - (shift * scale_log2)[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            if DROPOUT:
                keep = attention_keep(seed_ptr, rows, head, nheads, tokens, start, threshold, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            highest = higher
        # a reader that sees nothing has no weight and gets zeros
        sees = total > 0
        total = tl.where(sees, total, 1.0)
        lse = tl.where(sees, highest * scale_log2 + tl.log2(total), float("inf"))
        tl.store(out_ptr + offs_q, out * (keep_scale / total)[:, None], mask=mask_m)
        tl.store(lse_ptr + rows * nheads + head, lse, mask=exists)


@triton.jit
def image_cross_attention_bwd_kernel(
    dout_ptr,  # (query rows, nheads, HEADDIM)
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    image_order_ptr,
    image_offsets_ptr,
    image_mask_ptr,
    dq_ptr,  # (query rows, nheads, HEADDIM)
    dk_ptr,  # (images, tokens, nheads, HEADDIM), strides stride_db, stride_dn
    dv_ptr,  # as dk
    parts_ptr,  # (images, nheads, HEADDIM) fp32: the sum of dq over the readers of each image, or None
    seed_ptr,
    num_queries,
    chunks,
    tokens,
    nheads,
    stride_kb,
    stride_kn,
    stride_db,
    stride_dn,
    mask_readers,
    scale,
    threshold,
    keep_scale,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_FIRST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = one head of one image: dq of its readers in registers over all tokens, dk and dv block by block.

    An image with more readers than a tile holds takes several rounds, which add to its dk and dv in memory.
    """
    image = (tl.program_id(0) // nheads).to(tl.int64)
    head = tl.program_id(0) % nheads
    begin = tl.load(image_offsets_ptr + image).to(tl.int32) * chunks
    end = tl.load(image_offsets_ptr + image + 1).to(tl.int32) * chunks
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEADDIM
    k_ptr += image * stride_kb + head * HEADDIM
    v_ptr += image * stride_kb + head * HEADDIM
    dk_ptr += image * stride_db + head * HEADDIM
    dv_ptr += image * stride_db + head * HEADDIM
    scale_log2 = scale * 1.4426950408889634
    slots = tokens - SPLIT_FIRST
    # at least one round, so that an image that no one looks at gets zeros
    for first in range(begin, tl.maximum(end, begin + 1), BLOCK_M // BLOCK_Q):
        adds = first > begin
        if ACCUMULATE:
            adds = first >= begin
        rows, reader, exists = _readers(first, end, num_queries, chunks, image_order_ptr, BLOCK_M, BLOCK_Q)
        mask_m = exists[:, None] & mask_d[None, :]
        offs_q = (rows[:, None] * nheads + head) * HEADDIM + offs_d[None, :]
        q = tl.load(q_ptr + offs_q, mask=mask_m, other=0.0)
        dout = tl.load(dout_ptr + offs_q, mask=mask_m, other=0.0)
        out = tl.load(out_ptr + offs_q, mask=mask_m, other=0.0)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        lse = tl.load(lse_ptr + rows * nheads + head, mask=exists, other=float("inf"))
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if SPLIT_FIRST:
            first_k = tl.load(k_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            first_v = tl.load(v_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            first_p = tl.exp2(tl.sum(q.to(tl.float32) * first_k[None, :], axis=1) * scale_log2 - lse)
            first_dp = tl.sum(dout.to(tl.float32) * first_v[None, :], axis=1)
            weight = first_p
            if DROPOUT:
                first_keep = _keep_first(seed_ptr, rows, head, nheads, tokens, threshold)
                weight = tl.where(first_keep, first_p * keep_scale, 0.0)
                first_dp = tl.where(first_keep, first_dp * keep_scale, 0.0)
            first_ds = first_p * (first_dp - delta) * scale
            dq = first_ds[:, None] * first_k[None, :]
            first_dk = tl.sum(first_ds[:, None] * q.to(tl.float32), axis=0)
            first_dv = tl.sum(weight[:, None] * dout.to(tl.float32), axis=0)
            first_dk += tl.load(dk_ptr + offs_d, mask=mask_d & adds, other=0.0).to(tl.float32)
            first_dv += tl.load(dv_ptr + offs_d, mask=mask_d & adds, other=0.0).to(tl.float32)
            tl.store(dk_ptr + offs_d, first_dk, mask=mask_d)
            tl.store(dv_ptr + offs_d, first_dv, mask=mask_d)
        for start in range(0, slots, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            if SPLIT_FIRST:
                token = slot + 1
                mask_n = (slot[:, None] < slots) & mask_d[None, :]
            else:
                token = tl.where(slot == tokens - 1, 0, slot + 1)
                mask_n = (slot[:, None] < tokens) & mask_d[None, :]
            offs_k = token[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
            k = tl.load(k_ptr + offs_k, mask=mask_n, other=0.0)
            v = tl.load(v_ptr + offs_k, mask=mask_n, other=0.0)
            offs_dk = token[:, None].to(tl.int64) * stride_dn + offs_d[None, :]
            if ACCUMULATE:
                earlier_dk = tl.load(dk_ptr + offs_dk, mask=mask_n, other=0.0)
                earlier_dv = tl.load(dv_ptr + offs_dk, mask=mask_n, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            p = tl.exp2(scores - lse[:, None])
            if not SPLIT_FIRST:
                p = tl.where(slot[None, :] < tokens, p, 0.0)
            if HAS_MASK:
                offs_mask = (image * mask_readers + tl.minimum(reader, mask_readers - 1)) * tokens
                seen = tl.load(
                    image_mask_ptr + offs_mask[:, None] + token[None, :],
                    mask=exists[:, None] & (slot[None, :] < tokens),
                    other=0,
                )
                p = tl.where(seen != 0, p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            dropped = p
            if DROPOUT:
                keep = attention_keep(seed_ptr, rows, head, nheads, tokens, start, threshold, BLOCK_N)
                dropped = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp, 0.0)
            dv = tl.dot(tl.trans(dropped.to(dout.dtype)), dout, input_precision=PRECISION)
            ds = (p * (dp * (keep_scale * scale) - (delta * scale)[:, None])).to(q.dtype)
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
            dq += tl.dot(ds, k, input_precision=PRECISION)
            if ACCUMULATE:
                dk += earlier_dk.to(tl.float32)
                dv += earlier_dv.to(tl.float32)
            elif adds:
                dk += tl.load(dk_ptr + offs_dk, mask=mask_n, other=0.0).to(tl.float32)
                dv += tl.load(dv_ptr + offs_dk, mask=mask_n, other=0.0).to(tl.float32)
            tl.store(dk_ptr + offs_dk, dk, mask=mask_n)
            tl.store(dv_ptr + offs_dk, dv, mask=mask_n)
        tl.store(dq_ptr + offs_q, dq, mask=mask_m)
        if parts_ptr is not None:
            offs_parts = (image * nheads + head) * HEADDIM + offs_d
            earlier = tl.load(parts_ptr + offs_parts, mask=mask_d & (first > begin), other=0.0)
            tl.store(parts_ptr + offs_parts, earlier + tl.sum(dq, axis=0), mask=mask_d)


def _tile(
    kernel: str, q: Tensor, k: Tensor, sequences: int, num_queries: int, has_mask: bool, few: bool, drops: bool = True
) -> dict:
    """Block sizes and launch settings.

    The table has an entry for the readers that an image has on average, 32, 64 or 128; its BLOCK_M may be smaller.
    Another one is for ``few`` heads of images, which leave multiprocessors idle. Where dropout ``drops`` nothing, 32
    readers have one of their own.
    """
    images, tokens, _, headdim = k.shape
    block_q = max(16, triton.next_power_of_2(num_queries))
    readers = block_q * triton.next_power_of_2(triton.cdiv(sequences, images))
    wide = headdim > 64 or q.dtype == torch.float32
    entry = "wide" if wide else "few" if few else min(MAX_BLOCK_M, max(32, readers))
    if entry == 32 and not drops:
        entry = "32_keeping_all"
    settings = launch.settings(f"{kernel}_{entry}", q.device)
    return dict(
        HEADDIM=headdim,
        BLOCK_D=max(16, triton.next_power_of_2(headdim)),
        BLOCK_Q=min(block_q, settings["BLOCK_M"]),
        SPLIT_FIRST=int(tokens > 1 and tokens % settings["BLOCK_N"] == 1 and not has_mask),
        HAS_MASK=has_mask,
        PRECISION=precision(q),
        **settings,
    )


def image_cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    seed: Tensor | None,
    num_queries: int,
    softmax_scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Attention and its log2-sum-exp2.

    q (query rows, nheads, headdim) contiguous; k, v (images, tokens, nheads, headdim), heads contiguous, equal strides
    -> out as q, lse (query rows, nheads) fp32.
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], device=q.device, dtype=torch.float32)
    images, tokens, nheads, _ = k.shape
    sequences = image_order.shape[0]
    few = images * nheads < launch.num_multiprocessors(q.device)
    tile = _tile(
        "image_cross_attention_fwd", q, k, sequences, num_queries, image_mask is not None, few, seed is not None
    )
    chunks = triton.cdiv(num_queries, tile["BLOCK_Q"])
    units = tile["BLOCK_M"] // tile["BLOCK_Q"]
    splits = triton.cdiv(triton.cdiv(sequences, images) * chunks, units) if few else 1
    threshold, keep_scale = threshold_and_scale(dropout_p)
    image_cross_attention_fwd_kernel[(images * nheads, max(1, splits))](
        q,
        k,
        v,
        image_order,
        image_offsets,
        image_mask,
        out,
        lse,
        seed,
        num_queries,
        chunks,
        tokens,
        nheads,
        k.stride(0),
        k.stride(1),
        1 if image_mask is None else image_mask.shape[1],
        softmax_scale * LOG2E,
        threshold,
        keep_scale,
        DROPOUT=seed is not None,
        **tile,
    )
    return out, lse


def image_cross_attention_bwd_into(
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    seed: Tensor | None,
    num_queries: int,
    softmax_scale: float,
    dropout_p: float,
    *,
    accumulate: bool,
    dq_parts: Tensor | None = None,
) -> Tensor:
    """Returns dq and writes dk and dv, or adds to them: (images, tokens, nheads, headdim), heads contiguous, equal
    strides.

    Of each image it also writes the sum of dq over its readers to ``dq_parts`` (images, nheads, headdim) fp32.
    """
    dq = torch.empty_like(q)
    images, tokens, nheads, _ = k.shape
    tile = _tile("image_cross_attention_bwd", q, k, image_order.shape[0], num_queries, image_mask is not None, False)
    threshold, keep_scale = threshold_and_scale(dropout_p)
    image_cross_attention_bwd_kernel[(images * nheads,)](
        dout,
        q,
        k,
        v,
        out,
        lse,
        image_order,
        image_offsets,
        image_mask,
        dq,
        dk,
        dv,
        dq_parts,
        seed,
        num_queries,
        triton.cdiv(num_queries, tile["BLOCK_Q"]),
        tokens,
        nheads,
        k.stride(0),
        k.stride(1),
        dk.stride(0),
        dk.stride(1),
        1 if image_mask is None else image_mask.shape[1],
        softmax_scale,
        threshold,
        keep_scale,
        DROPOUT=seed is not None,
        ACCUMULATE=accumulate,
        **tile,
    )
    return dq


def image_cross_attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous; ``others`` as image_cross_attention_bwd_into takes them after v."""
    dk, dv = (torch.empty(k.shape, device=k.device, dtype=k.dtype) for _ in range(2))
    return image_cross_attention_bwd_into(dk, dv, dout, q, k, v, *others, accumulate=False), dk, dv
