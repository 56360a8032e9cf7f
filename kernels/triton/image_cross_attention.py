"""Attention of query rows to their image: one program holds all keys of one head of one image and serves every
sequence that looks at it, so keys and values are read once, and their gradients are summed in registers.

Up to 257 tokens without a mask; 2^n + 1 tokens are the class token, taken apart, and 2^n others without any masking. More
tokens, and masks, run in streamed_attention.py.

Scores are kept transposed, (keys, queries): keys fill the tensor cores' long side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch, streamed_attention
from qformer_fast.kernels.philox import dropout_keep
from qformer_fast.kernels.sequences import precision
from qformer_fast.reference.philox import GROUP, threshold_and_scale

MAX_KEYS = 256
MAX_HEADDIM = 64


@triton.jit
def _keep(seed_ptr, sequence, head, nheads, tokens, token, groups, first_group, threshold, BLOCK_M: tl.constexpr):
    """(len(token), BLOCK_M) bool: dropout's choice for these tokens and BLOCK_M readers."""
    counters = ((sequence * nheads + head) * tokens + token)[:, None] * groups
    counters += first_group + tl.arange(0, BLOCK_M // 8)[None, :]
    return dropout_keep(tl.load(seed_ptr), counters, threshold)


@triton.jit
def image_cross_attention_fwd_kernel(
    q_ptr,  # (query rows, nheads, HEADDIM)
    k_ptr,  # (images, tokens, nheads, HEADDIM), strides stride_kb, stride_kn
    v_ptr,  # as k
    image_order_ptr,  # (query sequences,) sequences in the order of their images
    image_offsets_ptr,  # (images + 1,) where each image's begin in image_order
    out_ptr,  # (query rows, nheads, HEADDIM)
    seed_ptr,  # (1,) int64, with DROPOUT
    num_queries,
    tokens,
    nheads,
    stride_kb,
    stride_kn,
    scale_log2,
    threshold,
    keep_scale,
    groups,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CLASS_TOKEN: tl.constexpr,
    EVEN_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = one head of one image."""
    image = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    begin = tl.load(image_offsets_ptr + image).to(tl.int32)
    end = tl.load(image_offsets_ptr + image + 1).to(tl.int32)
    if begin < end:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEADDIM
        token = CLASS_TOKEN + tl.arange(0, BLOCK_N)
        base = image.to(tl.int64) * stride_kb + head * HEADDIM
        offs_k = base + token[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
        if EVEN_N and BLOCK_D == HEADDIM:
            k = tl.load(k_ptr + offs_k)
            v = tl.load(v_ptr + offs_k)
        else:
            mask_k = (token[:, None] < tokens) & mask_d[None, :]
            k = tl.load(k_ptr + offs_k, mask=mask_k, other=0.0)
            v = tl.load(v_ptr + offs_k, mask=mask_k, other=0.0)
        if CLASS_TOKEN:
            class_k = tl.load(k_ptr + base + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            class_v = tl.load(v_ptr + base + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        for index in range(begin, end):
            sequence = tl.load(image_order_ptr + index).to(tl.int32)
            for start in range(0, num_queries, BLOCK_M):
                offs_m = start + tl.arange(0, BLOCK_M)
                rows = sequence.to(tl.int64) * num_queries + offs_m
                mask_q = (offs_m[None, :] < num_queries) & mask_d[:, None]
                # transposed: (HEADDIM, readers)
                offs_q = (rows[None, :] * nheads + head) * HEADDIM + offs_d[:, None]
                q = tl.load(q_ptr + offs_q, mask=mask_q, other=0.0)
                scores = tl.dot(k, q, input_precision=PRECISION) * scale_log2
                if not EVEN_N:
                    scores = tl.where(token[:, None] < tokens, scores, float("-inf"))
                highest = tl.max(scores, axis=0)
                if CLASS_TOKEN:
                    class_score = tl.sum(q.to(tl.float32) * class_k[:, None], axis=0) * scale_log2
                    highest = tl.maximum(highest, class_score)
                p = tl.exp2(scores - highest[None, :])
                total = tl.sum(p, axis=0)
                if DROPOUT:
                    keep = _keep(
                        seed_ptr, sequence, head, nheads, tokens, token, groups, start // 8, threshold, BLOCK_M
                    )
                    dropped = tl.where(keep, p * keep_scale, 0.0)
                else:
                    dropped = p
                out = tl.dot(tl.trans(v), dropped.to(v.dtype), input_precision=PRECISION)
                if CLASS_TOKEN:
                    class_p = tl.exp2(class_score - highest)
                    total += class_p
                    if DROPOUT:
                        first = tl.zeros((1,), tl.int32)
                        class_keep = _keep(
                            seed_ptr, sequence, head, nheads, tokens, first, groups, start // 8, threshold, BLOCK_M
                        )
                        class_p = tl.where(tl.reshape(class_keep, (BLOCK_M,)), class_p * keep_scale, 0.0)
                    out += class_v[:, None] * class_p[None, :]
                tl.store(out_ptr + offs_q, out / total[None, :], mask=mask_q)


@triton.jit
def image_cross_attention_bwd_kernel(
    dout_ptr,  # (query rows, nheads, HEADDIM)
    q_ptr,
    k_ptr,
    v_ptr,
    image_order_ptr,
    image_offsets_ptr,
    dq_ptr,  # (query rows, nheads, HEADDIM)
    dk_ptr,  # (images, tokens, nheads, HEADDIM), strides stride_db, stride_dn
    dv_ptr,  # as dk
    seed_ptr,
    num_queries,
    tokens,
    nheads,
    stride_kb,
    stride_kn,
    stride_db,
    stride_dn,
    scale,
    threshold,
    keep_scale,
    groups,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CLASS_TOKEN: tl.constexpr,
    EVEN_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = one head of one image: probabilities made again, dq of its readers, dk and dv in registers."""
    image = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    begin = tl.load(image_offsets_ptr + image).to(tl.int32)
    end = tl.load(image_offsets_ptr + image + 1).to(tl.int32)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEADDIM
    token = CLASS_TOKEN + tl.arange(0, BLOCK_N)
    mask_k = (token[:, None] < tokens) & mask_d[None, :]
    base = image.to(tl.int64) * stride_kb + head * HEADDIM
    offs_k = base + token[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
    k = tl.load(k_ptr + offs_k, mask=mask_k, other=0.0)
    v = tl.load(v_ptr + offs_k, mask=mask_k, other=0.0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if CLASS_TOKEN:
        class_k = tl.load(k_ptr + base + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        class_v = tl.load(v_ptr + base + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        class_dk = tl.zeros((BLOCK_D,), tl.float32)
        class_dv = tl.zeros((BLOCK_D,), tl.float32)
    for index in range(begin, end):
        sequence = tl.load(image_order_ptr + index).to(tl.int32)
        for start in range(0, num_queries, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            rows = sequence.to(tl.int64) * num_queries + offs_m
            mask_q = (offs_m[:, None] < num_queries) & mask_d[None, :]
            offs_q = (rows[:, None] * nheads + head) * HEADDIM + offs_d[None, :]
            q = tl.load(q_ptr + offs_q, mask=mask_q, other=0.0)
            dout = tl.load(dout_ptr + offs_q, mask=mask_q, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)
            if not EVEN_N:
                scores = tl.where(token[:, None] < tokens, scores, float("-inf"))
            highest = tl.max(scores, axis=0)
            if CLASS_TOKEN:
                q32 = q.to(tl.float32)
                dout32 = dout.to(tl.float32)
                class_score = tl.sum(q32 * class_k[None, :], axis=1) * (scale * 1.4426950408889634)
                highest = tl.maximum(highest, class_score)
            p = tl.exp2(scores - highest[None, :])
            total = tl.sum(p, axis=0)
            if CLASS_TOKEN:
                class_p = tl.exp2(class_score - highest)
                total += class_p
                class_p = class_p / total
                class_dp = tl.sum(dout32 * class_v[None, :], axis=1)
                class_dropped = class_p
                if DROPOUT:
                    first = tl.zeros((1,), tl.int32)
                    class_keep = _keep(
                        seed_ptr, sequence, head, nheads, tokens, first, groups, start // 8, threshold, BLOCK_M
                    )
                    class_keep = tl.reshape(class_keep, (BLOCK_M,))
                    class_dropped = tl.where(class_keep, class_p * keep_scale, 0.0)
                    class_dp = tl.where(class_keep, class_dp * keep_scale, 0.0)
            p = p / total[None, :]
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            if DROPOUT:
                keep = _keep(seed_ptr, sequence, head, nheads, tokens, token, groups, start // 8, threshold, BLOCK_M)
                dropped = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            else:
                dropped = p
            dv += tl.dot(dropped.to(dout.dtype), dout, input_precision=PRECISION)
            delta = tl.sum(p * dp, axis=0)
            if CLASS_TOKEN:
                delta += class_p * class_dp
            ds = (p * (dp - delta[None, :]) * scale).to(q.dtype)
            dk += tl.dot(ds, q, input_precision=PRECISION)
            dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))
            if CLASS_TOKEN:
                class_ds = class_p * (class_dp - delta) * scale
                dq += class_ds[:, None] * class_k[None, :]
                class_dk += tl.sum(class_ds[:, None] * q32, axis=0)
                class_dv += tl.sum(class_dropped[:, None] * dout32, axis=0)
            tl.store(dq_ptr + offs_q, dq, mask=mask_q)
    base = image.to(tl.int64) * stride_db + head * HEADDIM
    offs_dk = base + token[:, None].to(tl.int64) * stride_dn + offs_d[None, :]
    if ACCUMULATE:
        dk += tl.load(dk_ptr + offs_dk, mask=mask_k, other=0.0)
        dv += tl.load(dv_ptr + offs_dk, mask=mask_k, other=0.0)
    tl.store(dk_ptr + offs_dk, dk, mask=mask_k)
    tl.store(dv_ptr + offs_dk, dv, mask=mask_k)
    if CLASS_TOKEN:
        if ACCUMULATE:
            class_dk += tl.load(dk_ptr + base + offs_d, mask=mask_d, other=0.0)
            class_dv += tl.load(dv_ptr + base + offs_d, mask=mask_d, other=0.0)
        tl.store(dk_ptr + base + offs_d, class_dk, mask=mask_d)
        tl.store(dv_ptr + base + offs_d, class_dv, mask=mask_d)


def _fits_one_block(k: Tensor, image_mask: Tensor | None) -> bool:
    tokens, headdim = k.shape[1], k.shape[3]
    return image_mask is None and tokens <= MAX_KEYS + 1 and headdim <= MAX_HEADDIM and k.dtype != torch.float32


def _constants(kernel: str, q: Tensor, tokens: int, seed: Tensor | None) -> dict:
    class_token = tokens > 16 and (tokens - 1).bit_count() == 1
    block = max(16, triton.next_power_of_2(tokens - class_token))
    return dict(
        HEADDIM=q.shape[2],
        BLOCK_D=max(16, triton.next_power_of_2(q.shape[2])),
        BLOCK_N=block,
        CLASS_TOKEN=int(class_token),
        EVEN_N=block + class_token == tokens,
        DROPOUT=seed is not None,
        PRECISION=precision(q),
        **launch.settings(kernel, q.device),
    )


def image_cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    seed: Tensor | None,
    num_queries: int,
    softmax_scale: float,
    dropout_p: float,
) -> Tensor:
    """q (query rows, nheads, headdim) contiguous; k, v (images, tokens, nheads, headdim), heads contiguous, equal
    strides -> (query rows, nheads, headdim).
    """
    if not _fits_one_block(k, image_mask):
        return streamed_attention.cross_attention_fwd(
            q, k, v, image_index, image_mask, seed, num_queries, softmax_scale, dropout_p
        )
    out = torch.empty_like(q)
    images, tokens, nheads, _ = k.shape
    threshold, keep_scale = threshold_and_scale(dropout_p)
    image_cross_attention_fwd_kernel[(images * nheads,)](
        q,
        k,
        v,
        image_order,
        image_offsets,
        out,
        seed,
        num_queries,
        tokens,
        nheads,
        k.stride(0),
        k.stride(1),
        softmax_scale * 1.4426950408889634,
        threshold,
        keep_scale,
        triton.cdiv(num_queries, GROUP),
        **_constants("image_cross_attention_fwd", q, tokens, seed),
    )
    return out


def image_cross_attention_bwd_into(
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    seed: Tensor | None,
    num_queries: int,
    softmax_scale: float,
    dropout_p: float,
    *,
    accumulate: bool,
) -> Tensor:
    """Returns dq and writes dk and dv, or adds to them: (images, tokens, nheads, headdim), heads contiguous, equal
    strides.
    """
    if not _fits_one_block(k, image_mask):
        return streamed_attention.cross_attention_bwd(
            dout, q, k, v, dk, dv, image_index, image_order, image_offsets, image_mask, seed, num_queries,
            softmax_scale, dropout_p, accumulate,
        )  # fmt: skip
    dq = torch.empty_like(q)
    images, tokens, nheads, _ = k.shape
    threshold, keep_scale = threshold_and_scale(dropout_p)
    image_cross_attention_bwd_kernel[(images * nheads,)](
        dout,
        q,
        k,
        v,
        image_order,
        image_offsets,
        dq,
        dk,
        dv,
        seed,
        num_queries,
        tokens,
        nheads,
        k.stride(0),
        k.stride(1),
        dk.stride(0),
        dk.stride(1),
        softmax_scale,
        threshold,
        keep_scale,
        triton.cdiv(num_queries, GROUP),
        ACCUMULATE=accumulate,
        **_constants("image_cross_attention_bwd", q, tokens, seed),
    )
    return dq


def image_cross_attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous; ``others`` as image_cross_attention_fwd takes them after v."""
    dk, dv = (torch.empty(k.shape, device=k.device, dtype=k.dtype) for _ in range(2))
    return image_cross_attention_bwd_into(dk, dv, dout, q, k, v, *others, accumulate=False), dk, dv
