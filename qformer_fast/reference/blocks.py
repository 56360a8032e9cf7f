"""The three sub-layers that the encoder is made of, composed of the small ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.layout import SequenceLayout
from qformer_fast.reference.attention import image_cross_attention, query_text_attention
from qformer_fast.reference.rowwise import dropout_add_layer_norm


def self_attention_block(
    rows: Tensor,
    layout: SequenceLayout,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    nheads: int,
    eps: float,
    attention_dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    split: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """layer_norm(rows + dropout(out(attention(qkv(rows))))); shapes as
    :func:`qformer_fast.ops.self_attention_block`.
    """
    qkv = _linear(rows, qkv_weight, qkv_bias).unflatten(-1, (3, nheads, -1))
    context = query_text_attention(qkv, layout, dropout_p=attention_dropout_p).flatten(1)
    out = _linear(context, out_weight, out_bias)
    out = dropout_add_layer_norm(out, rows, norm_weight, norm_bias, eps=eps, dropout_p=hidden_dropout_p)
    return out.split([layout.num_query_rows, layout.num_text_rows]) if split else out


def cross_attention_block(
    query_rows: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    image_mask: Tensor | None = None,
    eps: float,
    attention_dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
) -> Tensor:
    """layer_norm(rows + dropout(out(attention(q(rows), k, v)))); shapes as
    :func:`qformer_fast.ops.cross_attention_block`.
    """
    q = _linear(query_rows, q_weight, q_bias).unflatten(-1, (k.shape[-2], -1))
    context = image_cross_attention(q, k, v, layout, image_mask=image_mask, dropout_p=attention_dropout_p).flatten(1)
    out = _linear(context, out_weight, out_bias)
    return dropout_add_layer_norm(out, query_rows, norm_weight, norm_bias, eps=eps, dropout_p=hidden_dropout_p)


def split_feed_forward_block(
    query_rows: Tensor,
    text_rows: Tensor,
    query_parameters: tuple[Tensor, ...] | None,
    text_parameters: tuple[Tensor, ...] | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Feed-forward layers of their own for query and text rows, as
    :func:`qformer_fast.ops.split_feed_forward_block`.
    """
    parts = [(query_rows, query_parameters), (text_rows, text_parameters)]
    outs = [_feed_forward(x, *parameters, eps=eps, dropout_p=dropout_p) for x, parameters in parts if x.shape[0]]
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of weights cast to 16 bits, whose biases are not."""
    return F.linear(x, weight, bias.to(weight.dtype))


def _feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    dropout_p: float,
) -> Tensor:
    hidden = F.gelu(_linear(x, up_weight, up_bias))
    out = _linear(hidden, down_weight, down_bias)
    return dropout_add_layer_norm(out, x, norm_weight, norm_bias, eps=eps, dropout_p=dropout_p)
