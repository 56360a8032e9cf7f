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
    q = q.view(layout.num_query_sequences, layout.num_queries, nheads, headdim).transpose(1, 2)
    k, v = (x.index_select(0, layout.image_index).transpose(1, 2) for x in (k, v))
    mask = None if image_mask is None else image_mask[layout.image_index][:, None]
    out = _attend(q, k, v, mask, dropout_p=dropout_p, scale=softmax_scale)
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
    if image_mask is not None:
        mask = image_mask[layout.image_index][:, None]
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float, scale: float | None) -> Tensor:
    """SDPA in which a row that may look at nothing gives zeros, and zero gradients on every device.

    SDPA's kernels disagree about such rows (in bf16 on a GPU their gradients are NaN), so they look at everything and
    what they saw is dropped.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    if mask.is_floating_point():
        sees = (mask > -torch.inf).any(-1, keepdim=True)
        mask = mask.masked_fill(~sees, 0.0).to(q.dtype)
    else:
        sees = mask.any(-1, keepdim=True)
        mask = mask | ~sees
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(~sees, 0.0)
