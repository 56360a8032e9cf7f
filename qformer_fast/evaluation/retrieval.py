"""Image-text retrieval: similarities, ITM re-ranking and recall, as LAVIS measures them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from qformer_fast import ops
from qformer_fast.data.features import FeatureCache
from qformer_fast.evaluation.journal import Journal
from qformer_fast.layout import PackedText
from qformer_fast.models.image_kv import ImageKV

if TYPE_CHECKING:
    from qformer_fast.models.blip2_qformer import Blip2QFormer

NOT_A_CANDIDATE = -100.0
IMAGE_BATCH_SIZE = 64
PAIR_BATCH_SIZE = 1024
SHOWN = 10

Score = Literal["itm+itc", "itm"]


class ImageTokens(Protocol):
    """Tokens of many images, read slice by slice; a tensor (images, tokens, encoder_hidden) is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class CachedTokens:
    """The images ``keys`` of a feature cache, read from disk as they are sliced."""

    cache: FeatureCache
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: slice, /) -> Tensor:
        return self.cache.rows(self.keys[index])


@dataclass(frozen=True, eq=False)
class RankOutput:
    """What :meth:`Blip2QFormer.rank` returns; of each row the best are ``scores.topk(n)``.

    Args:
        image_to_text (Tensor): (images, texts) fp32, scores of each image's candidates, -100 elsewhere.
        text_to_image (Tensor): (texts, images) fp32, scores of each text's candidates, -100 elsewhere.
        similarities (Tensor): (images, texts), the cosines that chose the candidates.
    """

    image_to_text: Tensor
    text_to_image: Tensor
    similarities: Tensor


@dataclass(frozen=True)
class RetrievalMetrics:
    """What :func:`evaluate` returns.

    Args:
        itc, reranked (dict): {"TR@1", "TR@5", "TR@10" (image to text), "IR@1", "IR@5", "IR@10" (text to image), "mean"}
            in percent.
        pairs (int): matched.
        seconds, pairs_per_second (float, Optional): of the re-ranking, a journal's writing included; `None` where some
            of it had been done before.
        per_image, per_text (list): of each image and of each text {"rank" (of the best relevant one, 0 is the first,
            `None` if none was a candidate), "best" (the numbers of the ten candidates with the best scores, best
            first)}, re-ranked.
    """

    itc: dict[str, float]
    reranked: dict[str, float]
    pairs: int
    seconds: float | None
    pairs_per_second: float | None
    per_image: list[dict[str, Any]]
    per_text: list[dict[str, Any]]


def similarity(image_features: Tensor, text_features: Tensor, *, batch_size: int = 256) -> Tensor:
    """Cosine of each image and text, the largest over the image's queries; not divided by the temperature.

    Args:
        image_features (Tensor): (images, queries, dim), L2-normalised.
        text_features (Tensor): (texts, dim), L2-normalised.
        batch_size (int): images at a time; the product over all queries is held for these. Default: 256.

    Returns:
        Tensor: (images, texts), in the features' dtype under autocast too: bf16 cosines would tie.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        parts = [ops.contrastive_similarity(images, text_features) for images in image_features.split(batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def embed(
    model: Blip2QFormer,
    image_embeds: ImageTokens | FeatureCache,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    image_batch_size: int = IMAGE_BATCH_SIZE,
    text_batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """ITC features of images and captions, in eval mode, on the model's device.

    Args:
        model (Blip2QFormer): in eval mode.
        image_embeds (Tensor, FeatureCache or ImageTokens): (images, tokens, encoder_hidden), on any device, of any
            floating dtype.
        input_ids, attention_mask (Tensor): (texts, length).
        image_batch_size, text_batch_size (int): images and captions a pass. Default: 64 and 256.

    Returns:
        tuple: (images, queries, embed_dim) and (texts, embed_dim).

    Raises:
        ValueError: a model in training mode, whose dropout would be measured; no image.
    """
    _check_eval(model)
    images = [model.image_features(tokens) for _, tokens in _chunks(model, image_embeds, image_batch_size)]
    texts = [
        model.text_features(ids, mask)
        for ids, mask in zip(input_ids.split(text_batch_size), attention_mask.split(text_batch_size), strict=True)
    ]
    return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def rerank(
    model: Blip2QFormer,
    image_embeds: ImageTokens | FeatureCache,
    input_ids: Tensor,
    attention_mask: Tensor,
    similarities: Tensor,
    *,
    k: int = 128,
    score: Score = "itm+itc",
    image_batch_size: int = IMAGE_BATCH_SIZE,
    pair_batch_size: int = PAIR_BATCH_SIZE,
    progress: bool = False,
    journal: Journal | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores the ``k`` nearest candidates of each image and of each text again, with image-text matching.

    Replaces LAVIS ``compute_sim_matrix`` (blip2.py:202-315 of LAVIS 506965b): score = ITM logit of class 1, mean over
    the queries, plus the cosine; -100 for what is no candidate. The original projects an image's keys and values again
    for each of its candidates and pads captions to 35 tokens; here an image is projected once, captions are packed, and
    a pair that is a candidate both ways is matched once. The device is not waited for between the passes.

    Args:
        model (Blip2QFormer): in eval mode.
        image_embeds (Tensor, FeatureCache or ImageTokens): (images, tokens, encoder_hidden), on any device; from there
            ``image_batch_size`` at a time go to the model's.
        input_ids, attention_mask (Tensor): (texts, length); best on the CPU, where they are packed.
        similarities (Tensor): (images, texts), from :func:`similarity`.
        k (int): candidates; all where there are fewer. Default: 128.
        score (str): "itm+itc", or "itm" for the logit alone. Default: "itm+itc".
        image_batch_size (int): images whose keys and values are held at once, 12.5 MB each in bf16 at BLIP-2's size
            with 677 tokens. Default: 64.
        pair_batch_size (int): most pairs a forward pass. Default: 1024.
        progress (bool): show a bar. Default: False.
        journal (Journal, Optional): keeps {"logits"} of ``image_batch_size`` images at a time, for which the device is
            waited then, and gives what it has. Default: `None`, nothing is kept.

    Returns:
        tuple: scores of texts for each image (images, texts) and of images for each text (texts, images), where
        ``similarities`` lie.

    Raises:
        ValueError: sizes that disagree, k or a batch size below 1, another score, a model in training mode; the message
            names the argument.
    """
    _check_eval(model)
    shape = (len(image_embeds), len(input_ids))
    if tuple(similarities.shape) != shape:
        raise ValueError(f"similarities must be (images, texts) = {shape}, got {tuple(similarities.shape)}")
    _check_positive(k=k, pair_batch_size=pair_batch_size)
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {get_args(Score)}, got {score!r}")
    texts_of_image = _candidates(similarities, k)
    images_of_text = _candidates(similarities.T, k).T
    pairs = (texts_of_image | images_of_text).nonzero()
    text = model.qformer.pack_text(input_ids.cpu(), attention_mask.cpu())
    known = [] if journal is None else [torch.tensor(entry["logits"]) for entry in journal.entries]
    chunks = _chunks(model, image_embeds, image_batch_size, start=len(known) * image_batch_size)
    logits = torch.empty(len(pairs), dtype=torch.float32, device=model.temp.device)
    done = 0
    with tqdm(total=len(pairs), unit="pair", disable=None if progress else True) as bar:
        new = _match_pairs(model, chunks, text, pairs, pair_batch_size)
        for number, found in enumerate(itertools.chain(known, new)):
            logits[done : done + len(found)] = found
            done += len(found)
            bar.update(len(found))
            if journal is not None and number >= len(known):
                journal.append([{"logits": found.tolist()}])
    scores = torch.zeros(shape, dtype=torch.float32, device=similarities.device)
    scores[pairs[:, 0], pairs[:, 1]] = logits.to(scores.device)
    if score == "itm+itc":
        scores += similarities
    return (
        scores.masked_fill(~texts_of_image, NOT_A_CANDIDATE),
        scores.masked_fill(~images_of_text, NOT_A_CANDIDATE).T.contiguous(),
    )


def _match_pairs(
    model: Blip2QFormer, chunks: Iterator[tuple[int, Tensor]], text: PackedText, pairs: Tensor, batch_size: int
) -> Iterator[Tensor]:
    """ITM logits of class 1 of ``pairs`` (n, 2), (image, text) in the images' order: those of each chunk of images.

    A pass gets only the images that it looks at. What the host must know of the pairs it knows before the first pass.
    """
    host = pairs.cpu()
    images, lengths = host[:, 0].contiguous(), text.lengths[host[:, 1]]
    text, pairs = text.to(model.temp.device), pairs.to(model.temp.device)
    for first, tokens in chunks:
        image_kv = model.image_kv(tokens)
        begin, end = torch.searchsorted(images, torch.tensor([first, first + len(tokens)])).tolist()
        passes = math.ceil((end - begin) / batch_size)
        bounds = [begin + (end - begin) * i // passes for i in range(passes + 1)]
        logits = []
        for part in map(slice, bounds, bounds[1:]):
            low, high = int(images[part.start]), int(images[part.stop - 1])
            shown = ImageKV(image_kv.buffer[low - first : high + 1 - first])
            captions = text.select(pairs[part, 1], int(lengths[part].sum()))
            captions = dataclasses.replace(captions, max_length=int(lengths[part].max()))
            logits.append(model.match_packed(shown, captions, pairs[part, 0] - low)[:, 1].float())
        yield torch.cat(logits)


@torch.no_grad()
def evaluate(
    model: Blip2QFormer,
    image_embeds: ImageTokens | FeatureCache,
    input_ids: Tensor,
    attention_mask: Tensor,
    relevant: Tensor,
    *,
    k: int = 128,
    score: Score = "itm+itc",
    image_batch_size: int = IMAGE_BATCH_SIZE,
    pair_batch_size: int = PAIR_BATCH_SIZE,
    open_journal: Callable[[Tensor], Journal] | None = None,
) -> RetrievalMetrics:
    """Recall at 1, 5 and 10 both ways, by ITC alone and re-ranked, as LAVIS reports it (tasks/retrieval.py:70-120).

    Args:
        model, image_embeds, input_ids, attention_mask, k, score, image_batch_size, pair_batch_size: see :func:`rerank`.
        relevant (Tensor): (images, texts) bool, which texts describe which image.
        open_journal (Callable, Optional): gives a journal for the pairs (images, texts), True where one is a candidate.
            Default: `None`, nothing is kept.
    """
    inputs = model, image_embeds, input_ids, attention_mask
    similarities = similarity(*embed(*inputs, image_batch_size=image_batch_size))
    journal = None
    if open_journal is not None:
        journal = open_journal(_candidates(similarities, k) | _candidates(similarities.T, k).T)
    _wait(similarities)
    begin = time.perf_counter()
    i2t, t2i = rerank(
        *inputs,
        similarities,
        k=k,
        score=score,
        image_batch_size=image_batch_size,
        pair_batch_size=pair_batch_size,
        progress=True,
        journal=journal,
    )
    _wait(similarities)
    seconds = time.perf_counter() - begin
    relevant = relevant.to(similarities.device)
    pairs = int(((i2t != NOT_A_CANDIDATE) | (t2i.T != NOT_A_CANDIDATE)).sum())
    timed = journal is None or not journal.entries
    return RetrievalMetrics(
        itc=_recalls(similarities, similarities.T.contiguous(), relevant),
        reranked=_recalls(i2t, t2i, relevant),
        pairs=pairs,
        seconds=round(seconds, 6) if timed else None,
        pairs_per_second=round(pairs / seconds, 1) if timed else None,
        per_image=_found(i2t, relevant),
        per_text=_found(t2i, relevant.T),
    )


def _recalls(image_to_text: Tensor, text_to_image: Tensor, relevant: Tensor) -> dict[str, float]:
    both = {"TR": (image_to_text, relevant), "IR": (text_to_image, relevant.T)}
    found = {f"{name}@{k}": value for name, pair in both.items() for k, value in recall_at_k(*pair).items()}
    found["mean"] = sum(found.values()) / len(found)
    return {name: round(value, 2) for name, value in found.items()}


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
    ranks = relevant.gather(1, _order(scores)).int().argmax(1)
    return {k: 100.0 * float((ranks < k).double().mean()) for k in ks}


def _order(scores: Tensor) -> Tensor:
    """Of each row the columns, best first; among equal ones the later first."""
    return scores.argsort(dim=1, stable=True).flip(1)


def _found(scores: Tensor, relevant: Tensor) -> list[dict[str, Any]]:
    order = _order(scores)
    ranks = relevant.gather(1, order).int().argmax(1).tolist()
    counts = (scores != NOT_A_CANDIDATE).sum(1).tolist()
    return [
        {"rank": rank if rank < count else None, "best": best[:count]}
        for rank, count, best in zip(ranks, counts, order[:, :SHOWN].tolist(), strict=True)
    ]


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


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _chunks(
    model: Blip2QFormer, image_embeds: ImageTokens | FeatureCache, batch_size: int, start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """The number of the first image and the tokens of ``batch_size`` images at a time, as the model takes them, from
    image ``start`` on.

    Raises:
        ValueError: no image, no batch.
    """
    _check_positive(image_batch_size=batch_size)
    if isinstance(image_embeds, FeatureCache):
        image_embeds = CachedTokens(image_embeds, image_embeds.keys)
    if len(image_embeds) == 0:
        raise ValueError("image_embeds must hold at least one image, got none")
    like = model.query_tokens
    for first in range(start, len(image_embeds), batch_size):
        tokens = image_embeds[first : first + batch_size]
        if like.is_cuda and not tokens.is_cuda:
            tokens = tokens.pin_memory()
        # the device casts: what is stored may be half as wide
        yield first, tokens.to(like.device, non_blocking=True).to(like.dtype)
