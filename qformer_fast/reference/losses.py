"""What the three losses of stage 1 are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.reference.philox import random_words
from qformer_fast.reference.rowwise import put_into

# what sample_negatives' kernel takes larger logits for, and its negative for NaN
LARGEST = 1e38
# of an LM head, for whose weight's gradient no second product has to be added up
ROWS_OF_ONE_PRODUCT = 4096


def contrastive_similarity(
    image_features: Tensor, text_features: Tensor, apart: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """max over queries of the dot products: (images, queries, dim) x (texts, dim) -> (images, texts); ``apart``: this
    with gradients of the images alone, and (texts, images) with gradients of the texts alone.
    """
    if apart:
        i2t = contrastive_similarity(image_features, text_features.detach())
        return i2t, contrastive_similarity(image_features.detach(), text_features).T
    return torch.einsum("iqd,td->itq", image_features, text_features).max(-1).values


def contrastive_similarity_fwd(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """out, and in int16 the first query of the largest product."""
    out, argmax = torch.einsum("iqd,td->itq", image_features, text_features).max(-1)
    return out, argmax.to(torch.int16)


def contrastive_similarity_bwd_image(dout: Tensor, argmax: Tensor, text_features: Tensor, queries: int) -> Tensor:
    """dimage[i, q] = sum of dout[i, t] text[t] over the t whose largest product with image i is query q's."""
    return torch.einsum("itq,td->iqd", _chosen(dout, argmax, queries), text_features)


def contrastive_similarity_bwd_text(dout: Tensor, argmax: Tensor, image_features: Tensor) -> Tensor:
    """dtext[t] = sum over i of dout[i, t] image[i, argmax[i, t]]"""
    return torch.einsum("itq,iqd->td", _chosen(dout, argmax, image_features.shape[1]), image_features)


def _chosen(dout: Tensor, argmax: Tensor, queries: int) -> Tensor:
    return dout[..., None] * F.one_hot(argmax.long(), queries)


def contrastive_loss(
    sim_i2t: Tensor, sim_t2i: Tensor, temp: Tensor, same_image: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of both ways' cross-entropies, and the similarities (rows, candidates) over the temperature."""
    logits = _wide_logits(sim_i2t, sim_t2i, temp)
    targets = _targets(same_image, label_smoothing, logits.dtype)
    loss = sum(F.cross_entropy(x, targets) for x in logits) / 2
    return loss.to(sim_i2t.dtype), *logits.detach().to(sim_i2t.dtype)


def contrastive_loss_fwd(
    sim_i2t: Tensor, sim_t2i: Tensor, temp: Tensor, same_image: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """losses (2, rows), logits (2, rows, candidates), lse_parts (2, 2, rows), a row's largest logit and what is left of
    its log sum exp, and columns of a row's image (rows,).
    """
    logits = _wide_logits(sim_i2t, sim_t2i, temp)
    top = logits.amax(-1)
    lse_parts = torch.stack([top, (logits - top[..., None]).exp().sum(-1).log()])
    losses = lse_parts.sum(0) - (_targets(same_image, label_smoothing, logits.dtype) * logits).sum(-1)
    return losses, logits.to(sim_i2t.dtype), lse_parts, same_image.sum(1).to(lse_parts.dtype)


def contrastive_loss_bwd(
    dlosses: Tensor,
    lse_parts: Tensor,
    counts: Tensor,
    sim_i2t: Tensor,
    sim_t2i: Tensor,
    temp: Tensor,
    same_image: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the similarities (2, rows, candidates), and of temp (2, rows)."""
    logits = _wide_logits(sim_i2t, sim_t2i, temp)
    top, rest = lse_parts[..., None]
    difference = (logits - top - rest).exp() - _targets(same_image, label_smoothing, logits.dtype)
    dsims = difference * (dlosses / temp)[..., None]
    return dsims.to(sim_i2t.dtype), -(dsims * logits).sum(-1)


def _wide_logits(sim_i2t: Tensor, sim_t2i: Tensor, temp: Tensor) -> Tensor:
    """(2, rows, candidates), at least fp32."""
    dtype = torch.promote_types(sim_i2t.dtype, torch.float32)
    return torch.stack([sim_i2t, sim_t2i]).to(dtype) / temp.to(dtype)


def _targets(same_image: Tensor, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """(rows, candidates), each row spread over the columns of its image, and smoothed."""
    targets = same_image.to(dtype) / same_image.sum(1, keepdim=True)
    return (1 - label_smoothing) * targets + label_smoothing / same_image.shape[1]


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


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    with_gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, divisor, and for a loss that is reduced dx, dweight and dbias of the losses' sum; arguments and results as
    the kernels' forward.
    """
    losses, dlogits = _losses_and_dlogits(x, weight, bias, labels, label_smoothing, ignore_index)
    if reduction == "none":
        return losses, losses.new_empty(0), *(losses.new_empty(0) for _ in range(3))
    count = (labels != ignore_index).sum().to(losses.dtype) if reduction == "mean" else losses.new_ones(())
    dx, dweight, dbias = _linear_gradients(dlogits, x, weight, with_gradients)
    dweight = dweight.to(weight_gradient_dtype(x, weight, with_gradients))
    return losses.sum() / count, count.clamp_min(1), dx.to(x.dtype), dweight, dbias


def weight_gradient_dtype(x: Tensor, weight: Tensor, with_gradients: list[bool]) -> torch.dtype:
    """Of forward's dweight: fp32, or bf16 for a weight in bf16 and few rows: that halves what is written and read."""
    if with_gradients[1] and x.dtype == weight.dtype == torch.bfloat16 and x.shape[0] <= ROWS_OF_ONE_PRODUCT:
        return torch.bfloat16
    return torch.promote_types(x.dtype, torch.float32)


def linear_cross_entropy_bwd(
    dout: Tensor,
    divisor: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    totals: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss is the losses' sum / divisor, so its gradients are those of the sum times dout / divisor."""
    scale = dout / divisor
    gradients = (dweight * scale).to(weight_dtype), (dbias * scale).to(bias_dtype)
    return (dx * scale).to(dx.dtype), *put_into(totals, gradients)


def linear_cross_entropy_rows_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    with_gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for dout (rows,)."""
    _, dlogits = _losses_and_dlogits(x, weight, bias, labels, label_smoothing, ignore_index)
    dx, dweight, dbias = _linear_gradients(dlogits * dout[:, None], x, weight, with_gradients)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _losses_and_dlogits(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """With target t = label_smoothing / vocab everywhere and 1 - label_smoothing more at the label: loss -t log p and
    its gradient p - t by the logits; zero for ``ignore_index``, NaN for another label outside the vocabulary.
    """
    dtype, vocab = torch.promote_types(x.dtype, torch.float32), weight.shape[0]
    logits = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    log_p = logits.log_softmax(1)
    target = torch.full_like(log_p, label_smoothing / vocab)
    target.scatter_add_(1, labels.clamp(0, vocab - 1)[:, None], torch.full_like(log_p[:, :1], 1 - label_smoothing))
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    counted = (labels != ignore_index).to(dtype).masked_fill(outside, torch.nan)
    return -(target * log_p).sum(1) * counted, (log_p.exp() - target) * counted[:, None]


def _linear_gradients(
    dlogits: Tensor, x: Tensor, weight: Tensor, with_gradients: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dlogits weight, dlogits^T x and the sum of dlogits over rows; without elements where not asked for."""
    empty, dtype = dlogits.new_empty, dlogits.dtype
    return (
        dlogits @ weight.to(dtype) if with_gradients[0] else empty(0),
        dlogits.t() @ x.to(dtype) if with_gradients[1] else empty(0),
        dlogits.sum(0) if with_gradients[2] else empty(0),
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


def sample_negatives_fwd(logits: Tensor, excluded: Tensor, seed: Tensor) -> Tensor:
    """The kernel's draw: g = -log(-log(1 - v)) with v = (w + 1/2) / 2^32 in fp32, w the word of row and column.

    log(1 - v) is taken as -(v + v^2 / 2) where v < 2^-11; -log(1 - v) and so g stay finite.
    """
    rows, candidates = logits.shape
    v = (random_words(seed, rows, candidates).float() + 0.5).mul(2**-32).clamp_max(1 - 2**-24)
    noise = -torch.where(v < 2**-11, v + 0.5 * v * v, -(1 - v).log()).log()
    scores = logits.float().nan_to_num(-LARGEST).clamp(-LARGEST, LARGEST) + noise
    scores = torch.where(excluded.all(1, keepdim=True), noise, scores.masked_fill(excluded, -torch.inf))
    return scores.argmax(1)
