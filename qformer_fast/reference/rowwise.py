"""Ops that treat each row by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact erf; x (rows, width), bias (width,)."""
    return F.gelu(x + bias)


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias).to(x.dtype)


def bias_gelu_bwd(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """With y = x + bias: dx = dout (Phi(y) + y phi(y)), Phi and phi the normal distribution and its density; dbias is
    the sum of dx over rows.
    """
    y = x + bias
    dx = dout * (torch.special.ndtr(y) + y * (-0.5 * y * y).exp() / math.sqrt(2 * math.pi))
    return dx.to(x.dtype), dx.sum(0).to(bias.dtype)


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
