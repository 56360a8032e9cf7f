"""softmax(q k^T * softmax_scale) v over packed rows and over image tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.layout import SequenceLayout


def query_text_attention(
    qkv: Tensor, layout: SequenceLayout, *, softmax_scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Each sequence of ``layout`` attends within itself; shapes as :func:`qformer_fast.ops.query_text_attention`."""
    rows, _, nheads, headdim = qkv.shape
    padded = qkv.reshape(rows, -1).index_select(0, layout.padded_rows.flatten())
    q, k, v = padded.unflatten(-1, (3, nheads, headdim)).unflatten(0, layout.padded_rows.shape).permute(2, 0, 3, 1, 4)
    mask = layout.padded_mask
    if mask.is_floating_point():
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale)
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
    q = q.view(layout.num_query_sequences, layout.num_queries, nheads, headdim).transpose(1, 2)
    k, v = (x.index_select(0, layout.image_index).transpose(1, 2) for x in (k, v))
    mask = _sequence_mask(image_mask, layout, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale)
    return out.transpose(1, 2).reshape(rows, nheads, headdim)


def image_attention_probs(
    q: Tensor,
    k: Tensor,
    layout: SequenceLayout,
    *,
    image_mask: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """The probabilities of :func:`image_cross_attention`: (query sequences, nheads, num_queries, tokens), without
    dropout.
    """
    q = q.view(layout.num_query_sequences, layout.num_queries, *q.shape[1:]).transpose(1, 2)
    scores = q @ k[layout.image_index].permute(0, 2, 3, 1) * (softmax_scale or q.shape[-1] ** -0.5)
    mask = _sequence_mask(image_mask, layout, scores.dtype)
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def _sequence_mask(image_mask: Tensor | None, layout: SequenceLayout, dtype: torch.dtype) -> Tensor | None:
    """``image_mask`` of each sequence's image, broadcast over the heads: (query sequences, 1, 1 or num_queries,
    tokens).
    """
    if image_mask is None:
        return None
    mask = image_mask[layout.image_index][:, None]
    return mask.to(dtype) if mask.is_floating_point() else mask
