"""What the three losses of stage 1 are made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """max over queries of the dot products: (images, queries, dim) x (texts, dim) -> (images, texts)."""
    return torch.einsum("iqd,td->itq", image_features, text_features).max(-1).values


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(x weight^T + bias, labels); x (rows, hidden), weight (vocab, hidden), labels (rows,)."""
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(
        logits, labels, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
    )


def sample_negatives(logits: Tensor, excluded: Tensor) -> Tensor:
    """One index a row, drawn from softmax(logits) over what is not excluded, by Gumbel-max.

    argmax(logits + g) with g = -log(-log(u)) has the distribution of softmax followed by multinomial (Gumbel 1954),
    needs no probabilities and can't meet NaN. Where a row excludes everything the draw is uniform, as the original's
    softmax over equal -10000 is.

    Shapes: logits, excluded (rows, candidates) -> (rows,) int64.
    """
    nothing_left = excluded.all(1, keepdim=True)
    logits = logits.float().masked_fill(nothing_left, 0.0).masked_fill(excluded & ~nothing_left, -torch.inf)
    noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).argmax(1)
