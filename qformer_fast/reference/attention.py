"""softmax(q k^T * softmax_scale) v over packed rows and over image tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.layout import SequenceLayout
from qformer_fast.reference.philox import attention_keep, threshold_and_scale

# sequences of at most this many rows are one tile of the kernels, whose backward needs no statistics from forward
MAX_TILE = 64

_recorded: list[Tensor] | None = None


def query_text_attention(
    qkv: Tensor, layout: SequenceLayout, *, softmax_scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Each sequence of ``layout`` attends within itself; shapes as :func:`qformer_fast.ops.query_text_attention`."""
    rows, _, nheads, headdim = qkv.shape
    padded = qkv.reshape(rows, -1).index_select(0, layout.padded_rows.flatten())
    q, k, v = padded.unflatten(-1, (3, nheads, headdim)).unflatten(0, layout.padded_rows.shape).permute(2, 0, 3, 1, 4)
    out = _attend(q, k, v, layout.padded_mask, dropout_p=dropout_p, scale=softmax_scale)
    return (
        out.transpose(1, 2).reshape(-1, nheads * headdim).index_select(0, layout.row_places).view(rows, nheads, headdim)
    )


def image_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    image_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Query rows attend to their image; shapes as :func:`qformer_fast.ops.image_cross_attention`."""
    rows, nheads, headdim = q.shape
    if _recorded is not None:
        probs = image_attention_probs(q, k, layout, image_mask=image_mask, softmax_scale=softmax_scale)
        if torch.is_grad_enabled():
            probs.requires_grad_()
        _recorded.append(probs)
        out = F.dropout(probs, dropout_p).to(v.dtype) @ v[layout.image_index].transpose(1, 2)
        return out.transpose(1, 2).reshape(rows, nheads, headdim)
    q = q.view(layout.num_query_sequences, layout.num_queries, nheads, headdim).transpose(1, 2)
    k, v = (x.index_select(0, layout.image_index).transpose(1, 2) for x in (k, v))
    mask = None if image_mask is None else image_mask[layout.image_index][:, None]
    out = _attend(q, k, v, mask, dropout_p=dropout_p, scale=softmax_scale)
    return out.transpose(1, 2).reshape(rows, nheads, headdim)


@contextlib.contextmanager
def recorded_probs() -> Iterator[list[Tensor]]:
    """A list to which each :func:`image_cross_attention` inside the block adds the probabilities of its output.

    They are :func:`image_attention_probs`. With gradients on they require grad, also where no input does, so that
    ``torch.autograd.grad`` can be asked for their gradients.
    """
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def image_attention_probs(
    q: Tensor,
    k: Tensor,
    layout: SequenceLayout,
    *,
    image_mask: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """The probabilities of :func:`image_cross_attention`: (query sequences, nheads, num_queries, tokens), without
    dropout, in fp32 at least; zeros where a query may look at nothing.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.view(layout.num_query_sequences, layout.num_queries, *q.shape[1:]).transpose(1, 2).to(dtype)
    scores = q @ k[layout.image_index].permute(0, 2, 3, 1).to(dtype) * (softmax_scale or q.shape[-1] ** -0.5)
    if image_mask is None:
        return scores.softmax(-1, dtype=dtype)
    mask, sees = _open_blind_rows(image_mask[layout.image_index][:, None])
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=dtype).masked_fill(~sees, 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float, scale: float | None) -> Tensor:
    """SDPA in which a row that may look at nothing gives zeros, and zero gradients on every device.

    SDPA's kernels disagree about such rows (in bf16 on a GPU their gradients are NaN), so they look at everything and
    what they saw is dropped.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    mask, sees = _open_blind_rows(mask)
    if mask.is_floating_point():
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(~sees, 0.0)


def _open_blind_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask in which rows that may look at nothing look at everything, and which rows are not such ones (..., 1)."""
    if mask.is_floating_point():
        sees = (mask > -torch.inf).any(-1, keepdim=True)
        return mask.masked_fill(~sees, 0.0), sees
    sees = mask.any(-1, keepdim=True)
    return mask | ~sees, sees


# The formulas that the kernels follow. With scores s = q k^T scale, p = softmax(s) and c the dropout mask (0, or 1 over
# the share that is kept): out = (p c) v, and backward dv = (p c)^T dout, dp = (dout v^T) c,
# ds = p (dp - sum(p dp)) scale, dq = ds k, dk = ds^T q.


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
    """out (rows, nheads, headdim) and lse (rows, nheads), log2-sum-exp; empty up to MAX_TILE rows."""
    sizes = num_query_sequences, num_queries, max_text_length, softmax_scale, dropout_p
    layout, _, _, v, scores, p, keep = _self_probabilities(qkv, text_offsets, masks, seed, *sizes)
    lse = _pack(scores.logsumexp(-1, keepdim=True), layout).squeeze(-1).float() / math.log(2)
    return _pack((p * keep) @ v, layout), lse if num_queries + max_text_length > MAX_TILE else lse[:0].clone()


def query_text_attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, text_offsets: Tensor, masks: Tensor, *others
) -> tuple[Tensor, Tensor]:
    """dqkv, twice as the kernels' backward, whose arguments these are; of them it needs neither out nor lse."""
    layout, q, k, v, _, p, keep = _self_probabilities(qkv, text_offsets, masks, *others)
    dout = _pad(dout, layout).masked_fill(~layout.is_row[:, None, :, None], 0.0)
    gradients = _attention_bwd(dout, q, k, v, p, keep, others[-2])
    dqkv = torch.stack([_pack(x, layout) for x in gradients], dim=1)
    return dqkv, dqkv


def _self_probabilities(
    qkv: Tensor,
    text_offsets: Tensor,
    masks: Tensor,
    seed: Tensor | None,
    num_query_sequences: int,
    num_queries: int,
    max_text_length: int,
    softmax_scale: float,
    dropout_p: float,
):
    rows, _, nheads, _ = qkv.shape
    layout = SequenceLayout(
        num_queries=num_queries,
        image_index=torch.zeros(num_query_sequences, dtype=torch.int64, device=qkv.device),
        text_offsets=text_offsets,
        masks=masks,
        num_text_rows=rows - num_query_sequences * num_queries,
        max_text_length=max_text_length,
    )
    q, k, v = (_pad(x, layout) for x in qkv.unbind(1))
    scores = (q @ k.transpose(-1, -2)) * softmax_scale
    scores = scores.masked_fill(~layout.padded_mask, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    if seed is None:
        return layout, q, k, v, scores, p, 1.0
    width = num_queries + max_text_length
    keep = attention_keep(seed, rows * nheads, width, dropout_p).view(rows, nheads, width)
    keep = keep[layout.padded_rows].transpose(1, 2)
    # positions count from a sequence's first row, which without queries is its first token
    alone = keep.roll(num_queries, -1)
    has_queries = torch.arange(len(masks), device=qkv.device) < num_query_sequences
    keep = torch.where(has_queries[:, None, None, None], keep, alone)
    return layout, q, k, v, scores, p, keep * threshold_and_scale(dropout_p)[1]


def _pad(x: Tensor, layout: SequenceLayout) -> Tensor:
    """(rows, nheads, headdim) -> (sequences, nheads, width, headdim)"""
    return x[layout.padded_rows].transpose(1, 2)


def _pack(x: Tensor, layout: SequenceLayout) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)[layout.row_places]


def _attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, keep, scale: float) -> tuple[Tensor, ...]:
    dv = (p * keep).transpose(-1, -2) @ dout
    dp = (dout @ v.transpose(-1, -2)) * keep
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, dv


def image_cross_attention_fwd(q: Tensor, k: Tensor, v: Tensor, *others) -> tuple[Tensor, Tensor]:
    """out as q, and lse (query rows, nheads), log2 of the sum of exponentials, +inf where nothing is seen.

    ``others``: image_order, image_offsets, image_mask, seed, num_queries, softmax_scale, dropout_p.
    """
    _, _, _, v, scores, p, keep = _cross_probabilities(q, k, v, *others)
    lse = scores.logsumexp(-1).transpose(1, 2).flatten(0, 1).float() / math.log(2)
    out = ((p * keep) @ v).transpose(1, 2).flatten(0, 1)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def image_cross_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; arguments as the kernels' backward, of which it needs neither out nor lse."""
    num_queries, softmax_scale = others[4:6]
    image_index, *probabilities = _cross_probabilities(q, k, v, *others)
    q, k_read, v_read, _, p, keep = probabilities
    dout = dout.unflatten(0, (-1, num_queries)).transpose(1, 2)
    dq, *gradients = _attention_bwd(dout, q, k_read, v_read, p, keep, softmax_scale)
    dk, dv = (torch.zeros_like(k).index_add_(0, image_index, x.transpose(1, 2)) for x in gradients)
    return dq.transpose(1, 2).flatten(0, 1), dk, dv


def image_cross_attention_bwd_into(
    dk: Tensor, dv: Tensor, *others, accumulate: bool, dq_parts: Tensor | None = None
) -> Tensor:
    """dq; dk and dv are written or added to, and the sums of dq over each image's readers written to ``dq_parts``."""
    dq, *gradients = image_cross_attention_bwd(*others)
    for total, gradient in zip((dk, dv), gradients, strict=True):
        total.copy_(total + gradient if accumulate else gradient)
    if dq_parts is not None:
        image_order, image_offsets, num_queries = others[6], others[7], others[10]
        of_sequences = dq.unflatten(0, (-1, num_queries)).sum(1, dtype=dq_parts.dtype)[image_order]
        images = torch.repeat_interleave(image_offsets.diff())
        dq_parts.zero_().index_add_(0, images, of_sequences)
    return dq


def _cross_probabilities(
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
):
    rows, tokens, nheads = q.shape[0], *k.shape[1:3]
    in_order = torch.searchsorted(image_offsets, torch.arange(len(image_order), device=q.device), right=True) - 1
    image_index = torch.empty_like(in_order).index_copy_(0, image_order, in_order)
    q = q.unflatten(0, (-1, num_queries)).transpose(1, 2)
    k, v = (x[image_index].transpose(1, 2) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * softmax_scale
    if image_mask is not None:
        scores = scores.masked_fill(~image_mask[image_index][:, None], -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    if seed is None:
        return image_index, q, k, v, scores, p, 1.0
    # dropout counts tokens from the second on, the first comes last
    keep = attention_keep(seed, rows * nheads, tokens, dropout_p).roll(1, -1)
    keep = keep.view(-1, num_queries, nheads, tokens).transpose(1, 2)
    return image_index, q, k, v, scores, p, keep * threshold_and_scale(dropout_p)[1]
