"""Stage 1 over many ranks: contrast and negatives over all pairs, each pair matched where its image is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from qformer_fast.layout import PackedText
from qformer_fast.models.blip2_qformer import Blip2QFormer, Stage1Output

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


class DistributedStage1(nn.Module):
    """Stage 1 (:class:`Blip2QFormer`) on the pairs of all ranks of a process group, to be wrapped in DDP or FSDP.

    The original draws negatives from all ranks and for them gathers every rank's image tokens, with gradients (LAVIS
    506965b, blip2_qformer.py:118-209). Here captions travel instead: ITC features and captions are gathered, and the
    pair of a text and a negative image is matched on the rank that has the image. Each loss is a mean over the pairs,
    or of ITG over the tokens, of all ranks: a rank's is its share times the number of ranks, so that the mean over the
    ranks, which DDP makes of the gradients, is what one process with the whole batch has. Where ranks have the same
    number of pairs and of tokens to predict, these are the original's losses; its ITG is the mean of the ranks' means.

    Args:
        model (Blip2QFormer): the same on every rank.
        group (ProcessGroup, Optional): Default: `None`, all ranks.
        feature_dtype (torch.dtype): of ITC features on their way. Default: fp32.

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
        self.received = Counter()
        model, device = self.model, image_embeds.device
        batch = len(image_embeds)
        text = model.pack_captions(input_ids, attention_mask, batch).to(device)
        label_rows, labels = text.next_tokens()
        sizes = self._gather_sizes(text, image_ids is not None, labels)
        batches, *_, all_predicted = sizes
        pairs, first_pair = sum(batches), sum(batches[: self.rank])
        own = torch.arange(batch, device=device)
        everyone, ids = self._gather_captions(text, _numbers(image_ids, first_pair, batch), sizes)
        same_image = ids[first_pair : first_pair + batch, None] == ids[None, :]

        weights = model.qformer.encoder_weights(model.query_tokens)
        first = model.first_sweep(model.image_kv(image_embeds), text, label_rows, weights)
        contrast = model.contrast(first, same_image, lambda features: self._gather_features(features, batches))
        if negatives is None:
            negatives = model.draw_negatives(contrast, same_image)
        image_index, text_index = (index.to(device) for index in negatives)
        all_image_index = self._gather("negatives", image_index, batches)
        here = (all_image_index >= first_pair) & (all_image_index < first_pair + batch)
        # the step's host sync
        count, rows, negative_rows = torch.stack(
            [here.sum(), (here * everyone.lengths).sum(), everyone.lengths[text_index].sum()]
        ).tolist()
        texts = here.nonzero_static(size=count).squeeze(1)
        captions = torch.cat([first_pair + own, texts, text_index])
        logits = model.match_packed(
            first.image_kv,
            everyone.select(captions, text.num_rows + rows + negative_rows),
            torch.cat([own, all_image_index[texts] - first_pair, own]),
            weights,
        )
        itm_labels = (torch.arange(len(logits), device=device) < batch).long()
        share = self.world_size / pairs
        loss_itm = F.cross_entropy(logits, itm_labels, reduction="sum") * (share / 3)
        itg_share = all_predicted[self.rank] * self.world_size / sum(all_predicted)
        loss_itg = model.caption_loss(first.itg_rows, labels) * itg_share
        loss_itc = contrast.loss_itc * (batch * share)
        return RanksOutput(
            loss=loss_itc + loss_itm + loss_itg,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_itg=loss_itg,
            sim_i2t=contrast.sim_i2t.detach(),
            sim_t2i=contrast.sim_t2i.detach(),
            itm_logits=logits.detach(),
            itm_labels=itm_labels,
            negatives=(image_index, text_index),
            query_output=first.query_rows.unflatten(0, (batch, -1)),
            same_image=same_image,
        )

    def _gather_features(self, features: Tensor, batches: list[int]) -> Tensor:
        """Of all ranks; gradients come back to the ranks that the features are of."""
        narrow = features.to(self.feature_dtype)
        if self.model.local_gradients or not torch.is_grad_enabled():
            return self._gather("features", narrow.detach(), batches).to(features.dtype)
        return _Gather.apply(narrow, self, batches).to(features.dtype)

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
        lengths_and_ids = torch.stack([text.lengths, ids.to(text.lengths.device, non_blocking=True)], dim=1)
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


class _Gather(torch.autograd.Function):
    """:meth:`DistributedStage1._gather`, whose backward sums what the ranks send back."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: DistributedStage1, counts: list[int]) -> Tensor:
        ctx.ranks, ctx.counts = ranks, counts
        return ranks._gather("features", x, counts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks, counts = ctx.ranks, ctx.counts
        most = max(counts)
        padded = gradient.new_zeros(ranks.world_size, most, *gradient.shape[1:])
        for to, part in zip(padded, gradient.split(counts), strict=True):
            to[: len(part)] = part
        out = torch.empty_like(padded[0])
        _reduce_scatter(out, padded.flatten(0, 1), group=ranks.group)
        ranks.received["features"] += (ranks.world_size - 1) * out.nbytes
        return out[: counts[ranks.rank]], None, None


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
