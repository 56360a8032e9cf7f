"""Ops that treat each row by itself."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact erf; x (rows, width), bias (width,)."""
    return F.gelu(x + bias)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float = 0.0
) -> Tensor:
    """layer_norm(dropout(x) + residual) * weight + bias; x and residual (rows, hidden)."""
    return F.layer_norm(F.dropout(x, dropout_p) + residual, weight.shape, weight, bias, eps)


def embeddings(
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(layer_norm(word[input_ids] + position[position_ids])): (rows, hidden)."""
    words = F.embedding(input_ids, word_weight, padding_idx=padding_idx)
    rows = words + F.embedding(position_ids, position_weight)
    return F.dropout(F.layer_norm(rows, weight.shape, weight, bias, eps), dropout_p)
