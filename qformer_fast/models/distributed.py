"""Stage 1 over many ranks: contrast and negatives over all pairs, each pair matched where its image is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from qformer_fast.layout import PackedText
from qformer_fast.models.blip2_qformer import Blip2QFormer, Contrast, Exchange, Stage1Output
from qformer_fast.models.image_kv import ImageKV
from qformer_fast.models.packing import EncoderWeights

# the names that torch 2.14 gave them, or the older ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RanksOutput(Stage1Output):
    """What :meth:`DistributedStage1.forward` returns.

    Args:
        same_image (Tensor): (batch, pairs of all ranks) bool, True where two pairs show one image.
    """

    same_image: Tensor


class Pairs(NamedTuple):
    """The pairs of all ranks, as one of them knows them.

    Args:
        captions (PackedText): in the ranks' order.
        own_rows (int): text rows of the rank's own.
        same_image (Tensor): (batch, pairs of all ranks) bool.
        batches (list): pairs of each rank.
        first (int): the rank's first pair.
        share (float): of a pair in ITC's and ITM's means, times the number of ranks.
        itg_share (float): of the rank's mean over its tokens in that over all, times the number of ranks.
    """

    captions: PackedText
    own_rows: int
    same_image: Tensor
    batches: list[int]
    first: int
    share: float
    itg_share: float

    @property
    def itm_share(self) -> float:
        """Of a pair in :func:`match`'s sum, of which each caption has three."""
        return self.share / 3


class Matching(NamedTuple):
    """The pairs that a rank matches.

    Args:
        negatives (tuple): of its texts and of its images.
        images (Tensor): (pairs of all ranks,), the negative image of each text.
        here (Tensor): (pairs of all ranks,) bool, whether it is one of the rank's.
        sizes (Tensor): (3,), how many are, their captions' rows, and those of the negative texts.
    """

    negatives: tuple[Tensor, Tensor]
    images: Tensor
    here: Tensor
    sizes: Tensor


class MatchRoom(NamedTuple):
    """What :class:`MatchInputs` has room for: pairs, their captions' rows, at most ``filler_rows`` of these taken by no
    caption, and a caption's tokens.
    """

    pairs: int
    text_rows: int
    filler_rows: int
    max_length: int


class MatchInputs(NamedTuple):
    """What ITM of a rank's pairs reads.

    Args:
        text (PackedText): a caption each pair; more than these are encoded alone.
        image_index (Tensor): (pairs,) int64, of the rank's images.
        labels (Tensor): (pairs,) int64, 1 for those that belong together.
        counts (Tensor): (pairs,) int64, 0 for what only takes room and 1 for others.
        room (MatchRoom, Optional): what all this is filled up to; `None`, nothing is.
    """

    text: PackedText
    image_index: Tensor
    labels: Tensor
    counts: Tensor
    room: MatchRoom | None


class DistributedStage1(nn.Module):
    """Stage 1 (:class:`Blip2QFormer`) on the pairs of all ranks of a process group, to be wrapped in DDP or FSDP.

    The original draws negatives from all ranks and for them gathers every rank's image tokens, with gradients (LAVIS
    506965b, blip2_qformer.py:118-209), and for ITC the features of all queries. Here texts travel instead: their ITC
    features and tokens are gathered, each rank compares its images with all texts and sends the others the similarities
    of theirs, and the pair of a text and a negative image is matched on the rank that has the image.

    Each loss is a mean over the pairs, or of ITG over the tokens, of all ranks: a rank's is its share times the number
    of ranks, so that the mean over the ranks, which DDP makes of the gradients, is what one process with the whole
    batch has. Where ranks have the same number of pairs and of tokens to predict, these are the original's losses; its
    ITG is the mean of the ranks' means.

    Args:
        model (Blip2QFormer): the same on every rank.
        group (ProcessGroup, Optional): Default: `None`, all ranks.
        feature_dtype (torch.dtype): of texts' ITC features on their way; their gradients travel in fp32. Default: fp32.

    A rank's backward of ITC waits for that of all others: none may leave it out.

    ``received`` counts the bytes that the last step received from other ranks, by what they are.

    Raises:
        ValueError: models that differ between the ranks; the message names the rank and what differs.
    """

    def __init__(
        self,
        model: Blip2QFormer,
        group: dist.ProcessGroup | None = None,
        *,
        feature_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.model, self.group, self.feature_dtype = model, group, feature_dtype
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.received: Counter[str] = Counter()
        about = {"config": model.config.to_dict(), "feature_dtype": str(feature_dtype), **model.init_options()}
        self._check_same(about)

    def forward(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Sequence[str | int] | Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> RanksOutput:
        """This rank's share of the losses; batches may differ in size between ranks.

        Args:
            image_embeds, input_ids, attention_mask: see :meth:`Blip2QFormer.forward`, this rank's pairs.
            image_ids (Sequence or Tensor, Optional): (batch,), equal across ranks where pairs show one image; on all
                ranks or on none. Default: `None`, all images differ.
            negatives (tuple, Optional): as of :meth:`Blip2QFormer.forward`, indices into the pairs of all ranks, in the
                ranks' order.

        Returns:
            RanksOutput: ``sim_i2t`` and ``sim_t2i`` (batch, pairs of all ranks), ``negatives`` as above; ITM's pairs
            are those that this rank matched, first its own ``batch``, then of its images with texts that they are
            negatives of, then of its images with negative texts.

        Raises:
            ValueError: what :meth:`Blip2QFormer.forward` refuses, image_ids on some ranks alone.
        """
        model, device = self.model, image_embeds.device
        batch = len(image_embeds)
        text = model.pack_captions(input_ids, attention_mask, batch)
        label_rows, labels = text.next_tokens()
        pairs = self.gather_pairs(text, image_ids, labels, device)
        text, label_rows, labels = text.to(device), label_rows.to(device), labels.to(device)
        weights = model.qformer.encoder_weights(model.query_tokens)
        first = model.first_sweep(model.image_kv(image_embeds), text, label_rows, weights)
        contrast = self.contrast(model.features(first), pairs)
        matching = self.matching(contrast, pairs, negatives)
        given = self.pair_up(matching, matching.sizes.tolist(), pairs)  # the step's host sync
        matched = match(model, first.image_kv, weights, given)
        loss_itg = model.caption_loss(first.itg_rows, labels)
        out = self.output(contrast, matched, loss_itg, matching.negatives, given, pairs)
        return replace(out, query_output=first.query_rows.unflatten(0, (batch, -1)))

    def gather_pairs(
        self,
        text: PackedText,
        image_ids: Sequence[str | int] | Tensor | None,
        labels: Tensor,
        device: torch.device,
    ) -> Pairs:
        """The captions and images' names of all ranks, on ``device``; a step's first exchange, on the host where the
        group has a backend for it, so that it does not wait for the device.
        """
        self.received.clear()
        meet = torch.device("cpu") if "cpu:" in dist.get_backend_config(self.group) else device
        text, labels = PackedText(*(_to(x, meet) for x in text.tensors), text.max_length), _to(labels, meet)
        sizes = self._gather_sizes(text, image_ids is not None, labels)
        batches, *_, all_predicted = sizes
        batch, first = len(text), sum(batches[: self.rank])
        captions, ids = self._gather_captions(text, _numbers(image_ids, first, batch), sizes)
        return Pairs(
            captions=PackedText(*(_to(x, device) for x in captions.tensors), captions.max_length),
            own_rows=text.num_rows,
            same_image=_to(ids[first : first + batch, None] == ids[None, :], device),
            batches=batches,
            first=first,
            share=self.world_size / sum(batches),
            itg_share=all_predicted[self.rank] * self.world_size / sum(all_predicted),
        )

    def contrast(self, features: tuple[Tensor, Tensor], pairs: Pairs) -> Contrast:
        """With the candidates of all ranks; its loss is the rank's share. Texts' features travel to the images, and the
        similarities back to the texts.
        """
        exchange = Exchange(
            gather=lambda texts: _AllGather.apply(texts, self, pairs.batches),
            to_texts=lambda similarities: _AllToAll.apply(similarities, self, pairs.batches),
        )
        found = self.model.contrast(features, pairs.same_image, exchange)
        return found._replace(loss_itc=found.loss_itc * (len(pairs.same_image) * pairs.share))

    def matching(self, contrast: Contrast, pairs: Pairs, negatives: tuple[Tensor, Tensor] | None = None) -> Matching:
        """Which pairs this rank matches, of ``negatives`` or of those drawn here."""
        if negatives is None:
            negatives = self.model.draw_negatives(contrast, pairs.same_image)
        image_index, text_index = (index.to(pairs.same_image.device) for index in negatives)
        images = self._gather("negatives", image_index, pairs.batches)
        here = (images >= pairs.first) & (images < pairs.first + len(image_index))
        lengths = pairs.captions.lengths
        sizes = torch.stack([here.sum(), (here * lengths).sum(), lengths[text_index].sum()])
        return Matching((image_index, text_index), images, here, sizes)

    def pair_up(self, matching: Matching, sizes: list[int], pairs: Pairs, room: MatchRoom | None = None) -> MatchInputs:
        """The pairs that this rank matches, filled up to ``room``; ``sizes`` are ``matching.sizes`` on the host."""
        count, *rows = sizes
        batch, device = len(pairs.same_image), pairs.same_image.device
        own = torch.arange(batch, device=device)
        texts = matching.here.nonzero_static(size=count).squeeze(1)
        captions = torch.cat([pairs.first + own, texts, matching.negatives[1]])
        images = torch.cat([own, matching.images[texts] - pairs.first, own])
        if room is None:
            missing, text = 0, pairs.captions.select(captions, pairs.own_rows + sum(rows))
        else:
            missing = room.pairs - len(captions)
            index = F.pad(captions, (0, missing), value=len(pairs.captions))
            text = pairs.captions.with_empty().select(index, room.text_rows, fill=room.filler_rows)
        number = torch.arange(len(captions) + missing, device=device)
        labels, counts = (number < batch).long(), (number < len(captions)).long()
        return MatchInputs(text, F.pad(images, (0, missing)), labels, counts, room)

    def output(
        self,
        contrast: Contrast,
        matched: tuple[Tensor, Tensor],
        loss_itg: Tensor,
        negatives: tuple[Tensor, Tensor],
        given: MatchInputs,
        pairs: Pairs,
    ) -> RanksOutput:
        """Of :meth:`contrast`, :func:`match` of ``given``, and ITG's mean over the rank's tokens."""
        total, logits = matched
        loss_itm, loss_itg = total * pairs.itm_share, loss_itg * pairs.itg_share
        return RanksOutput(
            loss=contrast.loss_itc + loss_itm + loss_itg,
            loss_itc=contrast.loss_itc,
            loss_itm=loss_itm,
            loss_itg=loss_itg,
            sim_i2t=contrast.sim_i2t,
            sim_t2i=contrast.sim_t2i,
            itm_logits=logits.detach(),
            itm_labels=given.labels[: len(logits)],
            negatives=negatives,
            same_image=pairs.same_image,
        )

    def _gather_sizes(self, text: PackedText, has_ids: bool, labels: Tensor) -> list[list[int]]:
        """Of every rank: pairs, text rows, longest caption, whether there are image ids, tokens to predict."""
        known = labels.new_tensor([len(text), text.num_rows, text.max_length, has_ids])
        predicted = (labels != self.model.config.pad_token_id).sum()
        own = torch.cat([known, predicted[None]])
        found = self._gather("sizes", own[None], [1] * self.world_size).T.tolist()
        if len(set(found[3])) > 1:
            raise ValueError(f"image_ids must be given on all ranks or on none, rank {self.rank} got {has_ids}")
        return found

    def _gather_captions(self, text: PackedText, ids: Tensor, sizes: list[list[int]]) -> tuple[PackedText, Tensor]:
        """The captions and the image ids of all ranks."""
        batches, rows, longest, *_ = sizes
        narrow = torch.int16 if self.model.config.vocab_size <= 2**15 else torch.int32
        tokens = torch.stack([text.input_ids, text.position_ids], dim=1).to(narrow)
        all_tokens = self._gather("captions", tokens, rows).long()
        lengths_and_ids = torch.stack([text.lengths, ids.to(text.lengths.device)], dim=1)
        all_lengths, all_ids = self._gather("captions", lengths_and_ids, batches).unbind(1)
        offsets = F.pad(all_lengths.cumsum(0), (1, 0))
        return PackedText(*all_tokens.unbind(1), offsets, max(longest)), all_ids

    def _gather(self, name: str, x: Tensor, counts: list[int]) -> Tensor:
        """Rows of all ranks in their order, ``counts`` of each; they travel as bytes, as many of each rank."""
        most = max(counts)
        padded = F.pad(x.flatten(1) if x.ndim > 1 else x[:, None], (0, 0, 0, most - len(x))).contiguous()
        out = padded.new_empty(self.world_size * most, padded.shape[1])
        _all_gather(out.view(torch.uint8), padded.view(torch.uint8), group=self.group)
        self.received[name] += (self.world_size - 1) * padded.nbytes
        parts = [part[:count] for part, count in zip(out.split(most), counts, strict=True)]
        return torch.cat(parts).view(-1, *x.shape[1:])

    def _all_to_all(self, name: str, x: Tensor, batches: list[int]) -> Tensor:
        """Of ``x`` each rank's part, which has an element for each of its pairs and each of this rank's, to that rank;
        theirs in the ranks' order.
        """
        sizes = [batches[self.rank] * count for count in batches]
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, sizes, sizes, group=self.group)
        self.received[name] += (len(out) - sizes[self.rank]) * out.itemsize
        return out

    def _check_same(self, about: dict[str, Any]) -> None:
        from qformer_fast import __version__

        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, about | {"version": __version__}, group=self.group)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"model must be the same on all ranks: {name} is {value} on rank 0 and {theirs.get(name)} on "
                        f"rank {rank}"
                    )


def _to(x: Tensor, device: torch.device) -> Tensor:
    """``x`` there; the host does not wait for what a device has to do before it takes it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def match(
    model: Blip2QFormer,
    image_kv: ImageKV,
    weights: EncoderWeights,
    given: MatchInputs,
    at_layer: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the pairs' ITM losses, and the logits (pairs, 2); ``at_layer`` as of :meth:`QFormer.encode`."""
    logits = model.match_packed(image_kv, given.text, given.image_index, weights, at_layer)
    return (F.cross_entropy(logits, given.labels, reduction="none") * given.counts).sum(), logits


def shard_parameters(stage1: DistributedStage1, **options: Any) -> DistributedStage1:
    """FSDP2's ``fully_shard`` of all parameters but the temperature, a scalar, which it can't shard: every rank has it,
    with the mean of the ranks' gradients.

    Args:
        stage1 (DistributedStage1): changed in place.
        options: of ``torch.distributed.fsdp.fully_shard``.
    """
    from torch.distributed.fsdp import fully_shard

    temp = stage1.model.temp

    def average(parameter: Tensor) -> None:
        dist.all_reduce(parameter.grad, group=stage1.group)
        parameter.grad /= stage1.world_size

    temp.register_post_accumulate_grad_hook(average)
    return fully_shard(stage1, ignored_params={temp}, **options)


class _AllGather(torch.autograd.Function):
    """Features (batch, dim) of all ranks' pairs; backward sums what the ranks send back."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: DistributedStage1, batches: list[int]) -> Tensor:
        ctx.ranks, ctx.batches = ranks, batches
        return ranks._gather("features", x.to(ranks.feature_dtype), batches).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks, batches = ctx.ranks, ctx.batches
        most = max(batches)
        parts = gradient.split(batches)
        padded = [part if len(part) == most else F.pad(part, (0, 0, 0, most - len(part))) for part in parts]
        out = gradient.new_empty(most, gradient.shape[1])
        _reduce_scatter(out, torch.cat(padded), group=ranks.group)
        ranks.received["features"] += (ranks.world_size - 1) * out.nbytes
        return out[: batches[ranks.rank]], None, None


class _AllToAll(torch.autograd.Function):
    """(pairs of all ranks, batch) of all texts and the rank's images -> (batch, pairs of all ranks) of the rank's texts
    and all images; backward sends gradients the same way back.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ranks: DistributedStage1, batches: list[int]) -> Tensor:
        ctx.ranks, ctx.batches = ranks, batches
        batch = batches[ranks.rank]
        flat = ranks._all_to_all("similarities", x.flatten(), batches)
        parts = flat.split([batch * count for count in batches])
        return torch.cat([part.view(batch, -1) for part in parts], dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks, batches = ctx.ranks, ctx.batches
        sent = torch.cat([part.flatten() for part in gradient.split(batches, dim=1)])
        flat = ranks._all_to_all("similarities", sent, batches)
        return flat.view(-1, batches[ranks.rank]), None, None


def _numbers(image_ids: Sequence[str | int] | Tensor | None, first_pair: int, batch: int) -> Tensor:
    """(batch,) int64, the same for an image on every rank."""
    if image_ids is None:
        return torch.arange(first_pair, first_pair + batch)
    if not isinstance(image_ids, Tensor):
        image_ids = torch.tensor([_number(name) for name in image_ids], dtype=torch.int64)
    if image_ids.numel() != batch:
        raise ValueError(f"image_ids must name {batch} images, got {image_ids.numel()}")
    return image_ids.flatten().long()


def _number(name: str | int) -> int:
    if isinstance(name, int):
        return name
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
