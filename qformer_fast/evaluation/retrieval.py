"""Image-text retrieval: similarities, ITM re-ranking and recall, as LAVIS measures them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qformer_fast import ops

if TYPE_CHECKING:
    from qformer_fast.models.blip2_qformer import Blip2QFormer

NOT_A_CANDIDATE = -100.0


def similarity(image_features: Tensor, text_features: Tensor, *, batch_size: int = 256) -> Tensor:
    """Cosine of each image and text, the largest over the image's queries; not divided by the temperature.

    Args:
        image_features (Tensor): (images, queries, dim), L2-normalised.
        text_features (Tensor): (texts, dim), L2-normalised.
        batch_size (int): images at a time; the product over all queries is held for these. Default: 256.

    Returns:
        Tensor: (images, texts).
    """
    parts = [ops.contrastive_similarity(images, text_features) for images in image_features.split(batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def embed(
    model: Blip2QFormer, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor, *, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """ITC features of images and captions, in eval mode, on the model's device.

    Args:
        model (Blip2QFormer): in eval mode.
        image_embeds (Tensor): (images, tokens, encoder_hidden), on any device, of any floating dtype.
        input_ids, attention_mask (Tensor): (texts, length).
        batch_size (int): images or captions a pass. Default: 256.

    Returns:
        tuple: (images, queries, embed_dim) and (texts, embed_dim).

    Raises:
        ValueError: a model in training mode, whose dropout would be measured.
    """
    _check_eval(model)
    like = model.query_tokens
    images = [model.image_features(tokens.to(like)) for tokens in image_embeds.split(batch_size)]
    texts = [
        model.text_features(ids, mask)
        for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
    ]
    return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def rerank(
    model: Blip2QFormer,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    similarities: Tensor,
    *,
    k: int = 128,
    image_batch_size: int = 64,
    pair_batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Scores the ``k`` nearest candidates of each image and of each text again, with image-text matching.

    Replaces LAVIS ``compute_sim_matrix`` (blip2.py:202-315 of LAVIS 506965b): score = ITM logit of class 1, mean over
    the queries, plus the cosine; -100 for what is no candidate. The original projects an image's keys and values again
    for each of its candidates; here once, and a pair that is a candidate both ways is matched once.

    Args:
        model (Blip2QFormer): in eval mode.
        image_embeds (Tensor): (images, tokens, encoder_hidden), on any device.
        input_ids, attention_mask (Tensor): (texts, length).
        similarities (Tensor): (images, texts), from :func:`similarity`.
        k (int): candidates; all where there are fewer. Default: 128.
        image_batch_size (int): images whose keys and values are held at once. Default: 64.
        pair_batch_size (int): pairs a forward pass. Default: 256.

    Returns:
        tuple: scores of texts for each image (images, texts) and of images for each text (texts, images).

    Raises:
        ValueError: sizes that disagree, k below 1, a model in training mode; the message names the argument.
    """
    _check_eval(model)
    shape = (len(image_embeds), len(input_ids))
    if tuple(similarities.shape) != shape:
        raise ValueError(f"similarities must be (images, texts) = {shape}, got {tuple(similarities.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    texts_of_image = _candidates(similarities, k)
    images_of_text = _candidates(similarities.T, k).T
    pairs = (texts_of_image | images_of_text).cpu()
    scores = torch.full(shape, NOT_A_CANDIDATE, dtype=torch.float32)
    for first in range(0, shape[0], image_batch_size):
        image_kv = model.image_kv(image_embeds[first : first + image_batch_size].to(model.query_tokens))
        images, texts = pairs[first : first + image_batch_size].nonzero(as_tuple=True)
        for image_index, text_index in zip(images.split(pair_batch_size), texts.split(pair_batch_size), strict=True):
            logits = model.match(image_kv, input_ids[text_index], attention_mask[text_index], image_index=image_index)
            scores[first + image_index, text_index] = logits[:, 1].float().cpu()
    scores = scores.to(similarities.device) + similarities.float()
    return (
        scores.masked_fill(~texts_of_image, NOT_A_CANDIDATE),
        scores.masked_fill(~images_of_text, NOT_A_CANDIDATE).T.contiguous(),
    )


def recall_at_k(scores: Tensor, relevant: Tensor, *, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share of rows with a relevant column among their ``k`` best, in percent.

    A row's rank is its best relevant column's; among equal scores the later column comes first, which is what the
    original's ``argsort()[::-1]`` means (tasks/retrieval.py:70-120 of LAVIS 506965b).

    Args:
        scores (Tensor): (queries, candidates), higher is better.
        relevant (Tensor): (queries, candidates) bool, at least one True a row.
        ks (Sequence): Default: (1, 5, 10).

    Returns:
        dict: {k: percent}.

    Raises:
        ValueError: shapes that differ, a row without a relevant column, NaN scores.
    """
    if scores.ndim != 2 or scores.shape != relevant.shape or 0 in scores.shape:
        raise ValueError(
            f"scores and relevant must both be (queries, candidates), got {tuple(scores.shape)} and "
            f"{tuple(relevant.shape)}"
        )
    if bool(scores.isnan().any()):
        raise ValueError("scores must be numbers, got NaN")
    relevant = relevant.bool()
    if not bool(relevant.any(1).all()):
        row = int((~relevant.any(1)).nonzero()[0])
        raise ValueError(f"relevant must have a True in each row, row {row} has none")
    order = scores.argsort(dim=1, stable=True).flip(1)
    ranks = relevant.gather(1, order).int().argmax(1)
    return {k: 100.0 * float((ranks < k).double().mean()) for k in ks}


def chance_at_k(relevant: Tensor, *, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """What :func:`recall_at_k` gives in the mean over random scores, in percent."""
    candidates, counts = relevant.shape[1], relevant.bool().sum(1).double()
    result = {}
    for k in ks:
        missed = torch.ones_like(counts)
        for drawn in range(min(k, candidates)):
            missed *= ((candidates - drawn - counts) / (candidates - drawn)).clamp_min(0)
        result[k] = 100.0 * float((1 - missed).mean())
    return result


def _candidates(similarities: Tensor, k: int) -> Tensor:
    """True at the ``k`` largest of each row."""
    chosen = torch.zeros_like(similarities, dtype=torch.bool)
    index = similarities.topk(min(k, similarities.shape[1]), dim=1).indices
    return chosen.scatter_(1, index, True)


def _check_eval(model: Blip2QFormer) -> None:
    if model.training:
        raise ValueError("model must be in eval mode, call model.eval() first")
