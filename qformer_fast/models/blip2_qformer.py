"""BLIP-2 stage 1: image-text contrast, image-text matching and image-grounded text generation on one Q-Former."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer_fast import ops
from qformer_fast.backend import kernel_or_formula
from qformer_fast.config import Checkpointing, QFormerConfig
from qformer_fast.data.features import FeatureCache
from qformer_fast.evaluation import retrieval
from qformer_fast.integrations.checkpoints import CheckpointMixin, LoadReport, load_into
from qformer_fast.layout import Mask, PackedText, SequenceLayout
from qformer_fast.models.generation import CaptionDecoder
from qformer_fast.models.image_kv import ImageKV
from qformer_fast.models.packing import EncoderWeights, GradientBuffers, Group
from qformer_fast.models.padded import padded_layout
from qformer_fast.models.qformer import DenseLayerNorm, QFormer
from qformer_fast.ops._checks import check_shape
from qformer_fast.reference import standardized_width

LABEL_SMOOTHING = 0.1


@dataclass(frozen=True, eq=False)
class Stage1Output:
    """What :meth:`Blip2QFormer.forward` returns.

    Args:
        loss (Tensor): 0-dim, the unweighted sum of the three losses.
        loss_itc, loss_itm, loss_itg (Tensor): 0-dim, nats.
        sim_i2t, sim_t2i (Tensor): (batch, batch), cosine over temperature, row = image or text; detached.
        itm_logits (Tensor): (3*batch, 2), detached; pairs in the order matching, negative image, negative text.
        itm_labels (Tensor): (3*batch,), 1 = match.
        negatives (tuple): (image_index, text_index), each (batch,): of each text the negative image, of each image the
            negative text.
        query_output (Tensor, Optional): (batch, queries, hidden), which saw the images and no text, with gradients;
            None where backward ran already.
    """

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    loss_itg: Tensor
    sim_i2t: Tensor
    sim_t2i: Tensor
    itm_logits: Tensor
    itm_labels: Tensor
    negatives: tuple[Tensor, Tensor]
    query_output: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FirstSweep:
    """What sweep 1 leaves for ITC, for the captions' loss and for sweep 2.

    Args:
        image_kv (ImageKV): of the batch's images.
        weights (EncoderWeights): which both sweeps share.
        query_rows (Tensor): (batch * queries, hidden), which did not see the caption: ITC's image side.
        first_rows (Tensor): (batch, hidden), the first token of each caption alone: ITC's text side.
        itg_rows (Tensor): (label rows, hidden), of captions that begin with [DEC] and saw their image the tokens that a
            token follows.
    """

    image_kv: ImageKV
    weights: EncoderWeights
    query_rows: Tensor
    first_rows: Tensor
    itg_rows: Tensor

    def again(self) -> FirstSweep:
        """For sweep 2, whose kernels add to the gradients that sweep 1's backward wrote."""
        image_kv = dataclasses.replace(self.image_kv, accumulate=True)
        return dataclasses.replace(self, image_kv=image_kv, weights=self.weights.adding())


class Exchange(NamedTuple):
    """What ranks exchange for ITC, both with gradients.

    Args:
        gather (Callable): features (batch, dim) of the rank's texts -> (candidates, dim), of all ranks' texts.
        to_texts (Callable): (candidates, batch) of all texts with the rank's images -> (batch, candidates) of the
            rank's texts with all images.
    """

    gather: Callable[[Tensor], Tensor]
    to_texts: Callable[[Tensor], Tensor]


class Contrast(NamedTuple):
    """ITC of a batch; the similarities as in :class:`Stage1Output`."""

    loss_itc: Tensor
    sim_i2t: Tensor
    sim_t2i: Tensor


class LMHead(nn.Module):
    """BERT's prediction head without its decoder matrix, which is the word embeddings (Qformer.py:575-625)."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.transform = DenseLayerNorm(config.hidden_size, config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, rows: Tensor) -> Tensor:
        """layer_norm(gelu(dense(rows))): (rows, hidden) -> (rows, hidden)."""
        return self.transform.LayerNorm(F.gelu(self.transform.dense(rows)))


class Blip2QFormer(CheckpointMixin, nn.Module):
    """Stage 1 of BLIP-2 (Li et al. 2023, arXiv:2301.12597, sec. 3.2), as LAVIS ``Blip2Qformer`` computes it, in two
    sweeps.

    The original runs the Q-Former four times over padded text. Here sweep 1 encodes each pair as [queries | caption]
    under the multi-modal causal mask, which gives ITC's image side and ITG, and each caption alone, which gives ITC's
    text side; sweep 2 encodes the three ITM pairs of each image. Keys and values are projected once per image, text
    is not padded. The losses and gradients are the original's (LAVIS 506965b, blip2_qformer.py:90-300).

    Args:
        config (QFormerConfig): sizes; with a text branch.
        embed_dim (int): width of the ITC features. Default: 256.
        local_gradients (bool): with True an image's ITC gradient comes from image-to-text rows alone and a text's from
            text-to-image rows, as in the original, which detaches what it gathers (base_model.py:240-256). With False
            both flow, as in CLIP. Default: True.
        dec_token_id (int): [DEC], which a caption to be generated begins with. Default: 30522.
        sep_token_id (int): [SEP], which ends captions. Default: 102.
        ln_vision_eps (float): added to the image tokens' variance. Default: 1e-5, LAVIS's (blip2.py:81); checkpoints of
            Hugging Face say their own, 1e-6.

    Raises:
        ValueError: a config without a text branch, or whose vocabulary lacks [DEC] or [SEP].
    """

    def __init__(
        self,
        config: QFormerConfig,
        *,
        embed_dim: int = 256,
        local_gradients: bool = True,
        dec_token_id: int = 30522,
        sep_token_id: int = 102,
        ln_vision_eps: float = 1e-5,
    ):
        super().__init__()
        if not config.use_qformer_text_input:
            raise ValueError("config.use_qformer_text_input must be True for stage 1, got False")
        for name, token in (("dec_token_id", dec_token_id), ("sep_token_id", sep_token_id)):
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"{name} must lie in the vocabulary [0, {config.vocab_size}), got {token}")
        self.config = config
        self.embed_dim = embed_dim
        self.local_gradients = local_gradients
        self.dec_token_id = dec_token_id
        self.sep_token_id = sep_token_id
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=ln_vision_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size))
        self.qformer = QFormer(config)
        self.lm_head = LMHead(config)
        self.vision_proj = nn.Linear(config.hidden_size, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        nn.init.normal_(self.lm_head.transform.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.lm_head.transform.dense.bias)

    def init_options(self) -> dict[str, Any]:
        names = ("embed_dim", "local_gradients", "dec_token_id", "sep_token_id")
        return {name: getattr(self, name) for name in names} | {"ln_vision_eps": self.ln_vision.eps}

    @classmethod
    def options_from_hf(cls, config: Any) -> dict[str, Any]:
        return {"embed_dim": config.image_text_hidden_size, "ln_vision_eps": config.vision_config.layer_norm_eps}

    def gradient_checkpointing_enable(self, level: Checkpointing = "layer") -> None:
        """See :meth:`QFormer.gradient_checkpointing_enable`; works with all three losses."""
        self.qformer.gradient_checkpointing_enable(level)

    def gradient_checkpointing_disable(self) -> None:
        self.qformer.gradient_checkpointing_disable()

    @property
    def groups(self) -> list[Group]:
        """All parameters, those that the encoder stacks together."""
        groups = self.qformer.groups
        stacked = {id(parameter) for group in groups for parameter in group}
        return groups + [(parameter,) for parameter in self.parameters() if id(parameter) not in stacked]

    def standardize(self, image_embeds: Tensor, out: Tensor | None = None) -> Tensor:
        """``ln_vision`` without its weight and bias, and a column of ones: (images, tokens, encoder_hidden) -> (images,
        tokens, :func:`reference.standardized_width`) for :meth:`image_kv`, without gradient. ``out`` may be of another
        dtype.

        Raises:
            ValueError: another width than ``config.encoder_hidden_size``.
        """
        width = self.config.encoder_hidden_size
        check_shape("image_embeds", image_embeds, "images", "tokens", width)
        if out is None:
            out = image_embeds.new_empty(*image_embeds.shape[:-1], standardized_width(width))
        run = kernel_or_formula("standardize_into", image_embeds)
        return run(out, image_embeds.detach().contiguous(), self.ln_vision.eps)

    def image_kv(
        self, image_embeds: Tensor, weights: Sequence[Tensor] | None = None, *, standardized: bool = False
    ) -> ImageKV:
        """``ln_vision`` and the keys and values of all cross-attention layers.

        Args:
            image_embeds (Tensor): (images, tokens, encoder_hidden), the image encoder's tokens, finite.
            weights (Sequence, Optional): of :meth:`QFormer.kv_weights` with ``ln_vision``. Default: `None`, made here.
            standardized (bool): they went through :meth:`standardize`. Default: False.
        """
        return self.qformer.image_kv(image_embeds, norm=self.ln_vision, weights=weights, standardized=standardized)

    def forward(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Sequence[str | int] | Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> Stage1Output:
        """The three losses of a batch of image-caption pairs.

        Args:
            image_embeds (Tensor): (batch, tokens, encoder_hidden), the image encoder's tokens before ``ln_vision``. No
                gradient product is run for them unless they require grad.
            input_ids (Tensor): (batch, length) int64, [CLS] ... [SEP] and padding.
            attention_mask (Tensor, Optional): (batch, length), nonzero for tokens. Default: `None`, no padding.
            image_ids (Sequence or Tensor, Optional): (batch,) names or numbers; pairs of one image are each other's
                matches in ITC and never each other's negatives. Default: `None`, all images differ.
            negatives (tuple, Optional): (image_index, text_index), each (batch,) int64 in [0, batch), instead of the
                draw: the negative image of each text and the negative text of each image.

        Returns:
            Stage1Output: losses, and what metrics need.

        Raises:
            ValueError: sizes that disagree, an empty caption, indices out of range, non-finite image tokens (on CPU);
                the message names the argument.
        """
        batch, device = image_embeds.shape[0], image_embeds.device
        text = self.pack_captions(input_ids, attention_mask, batch).to(device)
        same_image = self.same_image(image_ids, batch, device)
        weights = self.qformer.encoder_weights(self.query_tokens)
        label_rows, labels = text.next_tokens()
        first = self.first_sweep(self.image_kv(image_embeds), text, label_rows, weights)
        contrast = self.contrast(self.features(first), same_image)
        if negatives is None:
            negatives = self.draw_negatives(contrast, same_image)
        image_index, text_index = self._check_negatives(negatives, batch, device)
        negative_rows = self._count_negative_rows(text, image_index, text_index)
        loss_itg = self.caption_loss(first.itg_rows, labels)
        pairs = text.select(pairs_of(text_index), 2 * text.num_rows + negative_rows)
        loss_itm, itm_logits = self.second_sweep(first, pairs, self.pair_layout(pairs, image_index))
        return Stage1Output(
            loss=contrast.loss_itc + loss_itm + loss_itg,
            loss_itc=contrast.loss_itc,
            loss_itm=loss_itm,
            loss_itg=loss_itg,
            sim_i2t=contrast.sim_i2t,
            sim_t2i=contrast.sim_t2i,
            itm_logits=itm_logits.detach(),
            itm_labels=self.match_labels(batch),
            negatives=(image_index, text_index),
            query_output=first.query_rows.unflatten(0, (batch, -1)),
        )

    def pack_captions(self, input_ids: Tensor, attention_mask: Tensor | None, batch: int) -> PackedText:
        """The captions of ``batch`` images without padding, on the device of ``input_ids``.

        Raises:
            ValueError: another number of captions, an empty one, or none with a token to predict.
        """
        if input_ids.shape[0] != batch:
            raise ValueError(f"input_ids must have batch size {batch} as image_embeds, got {input_ids.shape[0]}")
        text = self.qformer.pack_text(input_ids, attention_mask)
        if text.num_rows == batch:
            raise ValueError(
                "attention_mask must keep at least two tokens of some caption, or ITG has nothing to predict"
            )
        return text

    def first_sweep(
        self, image_kv: ImageKV, text: PackedText, label_rows: Tensor, weights: EncoderWeights
    ) -> FirstSweep:
        """Each pair as [queries | caption] and each caption alone.

        Args:
            image_kv (ImageKV): of the batch's images.
            text (PackedText): the batch's captions; captions after these are encoded and not read.
            label_rows (Tensor): (n,) int64, which of the text rows predict a token.
            weights (EncoderWeights): of ``self.qformer``.
        """
        batch, device = image_kv.num_images, label_rows.device
        both = PackedText.concatenate(text.with_first_token(self.dec_token_id, batch), text)
        unimodal = _filled(len(both) - batch, Mask.UNIMODAL, device)
        layout = SequenceLayout(
            num_queries=self.query_tokens.shape[1],
            image_index=torch.arange(batch, device=device),
            text_offsets=both.offsets,
            masks=torch.cat([_filled(batch, Mask.MULTIMODAL_CAUSAL, device), unimodal]),
            num_text_rows=both.num_rows,
            max_text_length=both.max_length,
        )
        rows = self.qformer.encode(
            layout,
            query_embeds=self.query_tokens,
            text=both,
            image_kv=image_kv,
            weights=weights,
            text_index=torch.cat([label_rows, text.num_rows + text.offsets[:batch]]),
        )
        query_rows, itg_rows, first_rows = rows.split([layout.num_query_rows, len(label_rows), batch])
        return FirstSweep(image_kv, weights, query_rows, first_rows, itg_rows)

    def features(self, first: FirstSweep) -> tuple[Tensor, Tensor]:
        """ITC's of the batch: images' (batch, queries, embed_dim) and texts' (batch, embed_dim)."""
        return self._image_features(first.query_rows), self._text_features(first.first_rows)

    def contrast(
        self,
        features: tuple[Tensor, Tensor],
        same_image: Tensor,
        exchange: Exchange | None = None,
    ) -> Contrast:
        """ITC of the batch.

        Args:
            features (tuple): the batch's :meth:`features`.
            same_image (Tensor): (batch, candidates) bool, True where two pairs show one image.
            exchange (Exchange, Optional): Default: `None`, the batch is all there is.
        """
        similarities = self._similarities(*features, exchange)
        found = ops.contrastive_loss(*similarities, self.temp, same_image, label_smoothing=LABEL_SMOOTHING)
        return Contrast(*found)

    def caption_loss(self, itg_rows: Tensor, labels: Tensor, gradients: GradientBuffers | None = None) -> Tensor:
        """Next-token loss (Qformer.py:1069-1083) of ``itg_rows`` (n, hidden) with ``labels`` (n,), -100 and padding
        ignored. The kernels add the head's gradients to ``gradients``.
        """
        parameters = self.qformer.embeddings.word_embeddings.weight, self.lm_head.bias
        return ops.linear_cross_entropy(
            self.lm_head(itg_rows),
            *parameters,
            labels.masked_fill(labels == self.config.pad_token_id, -100),
            label_smoothing=LABEL_SMOOTHING,
            gradients=None if gradients is None else [gradients[(parameter,)] for parameter in parameters],
        )

    def pair_layout(self, pairs: PackedText, image_index: Tensor) -> SequenceLayout:
        """Captions [own, own, negative], ``pairs``, with images [own, ``image_index``, own]; captions after these are
        encoded alone.
        """
        own = torch.arange(len(image_index), device=image_index.device)
        return SequenceLayout(
            num_queries=self.query_tokens.shape[1],
            image_index=torch.cat([own, image_index, own]),
            text_offsets=pairs.offsets,
            masks=_filled(len(pairs), Mask.BIDIRECTIONAL, own.device),
            num_text_rows=pairs.num_rows,
            max_text_length=pairs.max_length,
        )

    def second_sweep(self, first: FirstSweep, pairs: PackedText, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """ITM on :meth:`pair_layout`'s pairs (blip2_qformer.py:211-238): the loss and the logits (3 * batch, 2)."""
        query_rows = self.qformer.encode(
            layout,
            query_embeds=self.query_tokens,
            text=pairs,
            image_kv=first.image_kv,
            weights=first.weights,
            text_index=pairs.offsets.new_empty(0),
        )
        logits = self._match_logits(query_rows)
        return F.cross_entropy(logits, self.match_labels(first.image_kv.num_images)), logits

    def match_labels(self, batch: int) -> Tensor:
        return (torch.arange(3 * batch, device=self.temp.device) < batch).long()

    def _image_features(self, query_rows: Tensor) -> Tensor:
        features = F.normalize(_at_least_fp32(self.vision_proj(query_rows)), dim=-1)
        return features.unflatten(0, (-1, self.query_tokens.shape[1]))

    def _text_features(self, first_rows: Tensor) -> Tensor:
        return F.normalize(_at_least_fp32(self.text_proj(first_rows)), dim=-1)

    def _similarities(self, images: Tensor, texts: Tensor, exchange: Exchange | None) -> tuple[Tensor, Tensor]:
        """(batch, candidates) each, of images with all texts and of texts with all images: the same values, of which
        each rank has those of its images and passes on those of other ranks' texts.

        Outside autocast: a bf16 cosine near 1 is exact to 1/256 only, which the temperature makes 0.06.
        """
        with torch.autocast(images.device.type, enabled=False):
            all_texts = texts if exchange is None else exchange.gather(texts)
            if self.local_gradients:
                i2t, t2i = ops.contrastive_similarity(images, all_texts, apart=True)
            else:
                i2t = ops.contrastive_similarity(images, all_texts)
                t2i = i2t.T
            return i2t, t2i if exchange is None else exchange.to_texts(t2i)

    def same_image(self, image_ids: Sequence[str | int] | Tensor | None, batch: int, device: torch.device) -> Tensor:
        """(batch, batch) bool, True where two pairs show one image."""
        if image_ids is None:
            return torch.eye(batch, dtype=torch.bool, device=device)
        if not isinstance(image_ids, Tensor):
            numbers = {name: number for number, name in enumerate(dict.fromkeys(image_ids))}
            image_ids = torch.tensor([numbers[name] for name in image_ids], dtype=torch.int64)
        image_ids = image_ids.to(device, non_blocking=True).flatten()
        if image_ids.shape != (batch,):
            raise ValueError(f"image_ids must name {batch} images, got {image_ids.shape[0]}")
        return image_ids[:, None] == image_ids[None, :]

    def draw_negatives(self, contrast: Contrast, same_image: Tensor) -> tuple[Tensor, Tensor]:
        """Of each text an image and of each image a text, (batch,) each, likely where ITC finds them alike."""
        with torch.no_grad():
            return tuple(ops.sample_negatives(x, same_image) for x in (contrast.sim_t2i, contrast.sim_i2t))

    def _check_negatives(
        self, negatives: tuple[Tensor, Tensor], batch: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        image_index, text_index = (torch.as_tensor(index, device=device) for index in negatives)
        for index in (image_index, text_index):
            if index.shape != (batch,):
                raise ValueError(f"negatives must be two indices of shape ({batch},), got {tuple(index.shape)}")
        return image_index, text_index

    def _count_negative_rows(self, text: PackedText, image_index: Tensor, text_index: Tensor) -> int:
        """Tokens of the negative captions: the step's one host sync after the captions were packed."""
        batch = len(text)
        negative_rows, *ends = torch.stack(
            [text.lengths[text_index.clamp(0, batch - 1)].sum(), *image_index.aminmax(), *text_index.aminmax()]
        ).tolist()
        if min(ends) < 0 or max(ends) >= batch:
            raise ValueError(f"negatives must lie in [0, {batch}), got {min(ends) if min(ends) < 0 else max(ends)}")
        return negative_rows

    def _match_logits(self, query_rows: Tensor) -> Tensor:
        """Mean over the queries of the head's logits: (pairs * queries, hidden) -> (pairs, 2)."""
        return self.itm_head(query_rows).unflatten(0, (-1, self.query_tokens.shape[1])).mean(1)

    def image_features(self, image_embeds: Tensor | ImageKV) -> Tensor:
        """ITC features of images: (images, tokens, encoder_hidden) or their keys and values -> (images, queries,
        embed_dim).

        L2-normalised; the cosine with a text is the largest over the queries.
        """
        if isinstance(image_embeds, ImageKV):
            layout = self._query_layout(image_embeds.num_images)
            rows = self.qformer.encode(layout, query_embeds=self.query_tokens, image_kv=image_embeds)
        else:
            rows = self.qformer.encode_queries(self.query_tokens, image_embeds, norm=self.ln_vision).flatten(0, 1)
        return self._image_features(rows)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """ITC features of captions: (batch, length) ids and mask -> (batch, embed_dim), L2-normalised."""
        text = self.qformer.pack_text(input_ids, attention_mask).to(self.temp.device)
        layout = padded_layout(Mask.UNIMODAL, None, text, len(text), 0, self.temp.device)
        return self._text_features(self.qformer.encode(layout, text=text)[text.offsets[:-1]])

    def match(
        self,
        image_embeds: Tensor | ImageKV,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_index: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """ITM logits of image-text pairs; class 1 = match.

        Args:
            image_embeds (Tensor or ImageKV): (images, tokens, encoder_hidden), or their keys and values.
            input_ids, attention_mask (Tensor): (pairs, length).
            image_index (Tensor or Sequence, Optional): (pairs,) in [0, images). Default: `None`, text i with image i.

        Returns:
            Tensor: (pairs, 2).

        Raises:
            ValueError: an index out of range, sizes that disagree, an empty caption.
        """
        return self._match(*self._pairs(image_embeds, input_ids, attention_mask, image_index))

    def _pairs(
        self,
        image_embeds: Tensor | ImageKV,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_index: Tensor | Sequence[int] | None = None,
    ) -> tuple[SequenceLayout, PackedText, ImageKV]:
        """What encodes ITM's pairs; arguments as :meth:`match`."""
        image_kv = self._as_image_kv(image_embeds)
        text = self.qformer.pack_text(input_ids, attention_mask).to(self.temp.device)
        index = torch.arange(image_kv.num_images) if image_index is None else image_index
        if len(index) != len(text):
            raise ValueError(f"image_index must name one image for each of {len(text)} texts, got {len(index)}")
        layout = SequenceLayout.build(
            num_queries=self.query_tokens.shape[1],
            image_index=index,
            text_lengths=text.lengths,
            masks=Mask.BIDIRECTIONAL,
            num_images=image_kv.num_images,
            device=self.temp.device,
        )
        return layout, text, image_kv

    def match_packed(
        self,
        image_kv: ImageKV,
        text: PackedText,
        image_index: Tensor,
        weights: EncoderWeights | None = None,
        at_layer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """:meth:`match` of packed captions on the model's device, without a check and without waiting for the device.

        Args:
            image_kv (ImageKV): images.
            text (PackedText): a caption each pair; more than these are encoded alone.
            image_index (Tensor): (pairs,) int64 in [0, images).
            weights (EncoderWeights, Optional): of ``self.qformer``. Default: `None`, made here.
            at_layer (Callable, Optional): as of :meth:`QFormer.encode`.
        """
        layout = SequenceLayout(
            num_queries=self.query_tokens.shape[1],
            image_index=image_index,
            text_offsets=text.offsets,
            masks=_filled(len(text), Mask.BIDIRECTIONAL, image_index.device),
            num_text_rows=text.num_rows,
            max_text_length=text.max_length,
        )
        return self._match(layout, text, image_kv, weights, at_layer)

    def _match(
        self,
        layout: SequenceLayout,
        text: PackedText,
        image_kv: ImageKV,
        weights: EncoderWeights | None = None,
        at_layer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        rows = self.qformer.encode(
            layout,
            query_embeds=self.query_tokens,
            text=text,
            image_kv=image_kv,
            weights=weights,
            text_index=text.offsets.new_empty(0),
            at_layer=at_layer,
        )
        # averaged in fp32: scores to be ranked would tie in bf16
        return _at_least_fp32(self.itm_head(rows)).unflatten(0, (-1, self.query_tokens.shape[1])).mean(1)

    @torch.no_grad()
    def rank(
        self,
        image_embeds: retrieval.ImageTokens | FeatureCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        k: int = 128,
        score: retrieval.Score = "itm+itc",
        image_batch_size: int = retrieval.IMAGE_BATCH_SIZE,
        pair_batch_size: int = retrieval.PAIR_BATCH_SIZE,
        progress: bool = False,
    ) -> retrieval.RankOutput:
        """Retrieval both ways: ITC finds ``k`` candidates of each image and of each text, ITM scores them.

        Runs in eval mode and, under autocast, in its dtype. Images stream to the model's device, so that a data set
        need not fit there; the scores of all pairs do, 4 bytes each in a few copies.

        Args:
            image_embeds (Tensor, FeatureCache or ImageTokens): (images, tokens, encoder_hidden), before ``ln_vision``,
                on any device, of any floating dtype; :class:`retrieval.CachedTokens` are chosen images of a cache.
            input_ids, attention_mask (Tensor): (texts, length); LAVIS cuts captions to 35 tokens here.
            k, score, image_batch_size, pair_batch_size, progress: see :func:`retrieval.rerank`.

        Returns:
            RankOutput: scores both ways, and the cosines.

        Raises:
            ValueError: a model in training mode, no image, and what :func:`retrieval.rerank` refuses.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = self, image_embeds, input_ids, attention_mask
        similarities = retrieval.similarity(*retrieval.embed(*inputs, image_batch_size=image_batch_size))
        scores = retrieval.rerank(
            *inputs,
            similarities,
            k=k,
            score=score,
            image_batch_size=image_batch_size,
            pair_batch_size=pair_batch_size,
            progress=progress,
        )
        return retrieval.RankOutput(*scores, similarities)

    @torch.no_grad()
    def generate(self, image_embeds: Tensor | ImageKV, *, max_new_tokens: int = 30, **options) -> Tensor:
        """Captions from the text branch: greedy, beam search or nucleus sampling, with cached keys and values.

        Args:
            image_embeds (Tensor or ImageKV): (images, tokens, encoder_hidden), or their keys and values.
            max_new_tokens (int): longest caption, in tokens after [DEC]. Default: 30.
            options: of transformers' ``generate``: ``num_beams``, ``do_sample``, ``top_p``, ``min_new_tokens``,
                ``length_penalty``, ``repetition_penalty``, ``num_return_sequences`` and their like.

        Returns:
            Tensor: (images * num_return_sequences, length) int64: [DEC], the caption, [SEP], padding.
        """
        was_training = self.training
        self.eval()
        try:
            prefix = self.qformer.query_prefix(self.query_tokens, self._as_image_kv(image_embeds))
            start = torch.full((prefix.shape[0], 1), self.dec_token_id, device=prefix.device)
            return CaptionDecoder(self).generate(start, prefix=prefix, max_new_tokens=max_new_tokens, **options)
        finally:
            self.train(was_training)

    def next_token_logits(self, rows: Tensor) -> Tensor:
        """LM head: (rows, hidden) -> (rows, vocab_size)."""
        return F.linear(self.lm_head(rows), self.qformer.embeddings.word_embeddings.weight, self.lm_head.bias)

    def cross_attention_maps(
        self,
        image_embeds: Tensor | ImageKV,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:
        """Where each query looks, with text i beside image i (as in ITM) or without text.

        Args:
            image_embeds (Tensor or ImageKV): (images, tokens, encoder_hidden), or their keys and values.
            input_ids, attention_mask (Tensor, Optional): (images, length). Default: `None`, without text.
            layers (Sequence, Optional): which of ``config.cross_attention_layers``. Default: `None`, all.

        Returns:
            dict: {layer: (images, nheads, queries, tokens)} in the order asked, without dropout, each row summing to 1.

        Raises:
            ValueError: a layer without cross-attention, and what :meth:`match` refuses.
        """
        if input_ids is None:
            text, image_kv = None, self._as_image_kv(image_embeds)
            layout = self._query_layout(image_kv.num_images)
        else:
            layout, text, image_kv = self._pairs(image_embeds, input_ids, attention_mask)
        inputs = dict(query_embeds=self.query_tokens, text=text, image_kv=image_kv)
        return self.qformer.cross_attention_maps(layout, **inputs, layers=layers)

    @torch.inference_mode(False)
    def grad_cam(
        self,
        image_embeds: Tensor | ImageKV,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:
        """What of image i speaks for text i: Grad-CAM of the ITM score on the cross-attention.

        With P a layer's attention probabilities and s the logit of "match", averaged over the queries as in
        :meth:`match`, the map is the mean over the heads of ``P * max(ds/dP, 0)``. This is LAVIS ``compute_gradcam``
        (blip_image_text_matching.py:151) with BLIP-2's queries where BLIP has text tokens; it goes back to ALBEF (Li et
        al. 2021, arXiv:2107.07651) and Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391).

        Computed without dropout and outside autocast, also inside ``torch.no_grad()`` and with frozen parameters; the
        model, its parameters' ``.grad`` included, stays as it is.

        Args:
            image_embeds (Tensor or ImageKV): (pairs, tokens, encoder_hidden), or their keys and values.
            input_ids, attention_mask (Tensor): (pairs, length).
            layers (Sequence, Optional): which of ``config.cross_attention_layers``. Default: `None`, all.

        Returns:
            dict: {layer: (pairs, queries, tokens)} in the order asked, not negative, fp32 at least, detached.

        Raises:
            ValueError: a layer without cross-attention, and what :meth:`match` refuses.
        """
        with torch.autocast(self.temp.device.type, enabled=False):
            with torch.no_grad():
                layout, text, image_kv = self._pairs(image_embeds, input_ids, attention_mask)
            with torch.enable_grad():
                inputs = dict(query_embeds=self.query_tokens, text=text, image_kv=image_kv)
                rows, maps = self.qformer.encode_with_maps(layout, **inputs, layers=layers)
                score = self._match_logits(rows)[:, 1].sum()
            gradients = torch.autograd.grad(score, list(maps.values()))
        return {
            layer: (probs.detach() * gradient.clamp_min(0)).mean(1)
            for (layer, probs), gradient in zip(maps.items(), gradients, strict=True)
        }

    def _query_layout(self, images: int) -> SequenceLayout:
        return padded_layout(Mask.UNIMODAL, None, None, images, self.query_tokens.shape[1], self.temp.device)

    def _as_image_kv(self, images: Tensor | ImageKV) -> ImageKV:
        return images if isinstance(images, ImageKV) else self.image_kv(images)


def pairs_of(text_index: Tensor) -> Tensor:
    """Sweep 2's captions: own, own, negative."""
    own = torch.arange(len(text_index), device=text_index.device)
    return torch.cat([own, own, text_index])


def _filled(sequences: int, mask: Mask, device: torch.device) -> Tensor:
    return torch.full((sequences,), int(mask), device=device)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def init_from_bert(model: Blip2QFormer, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """BERT's weights into a new stage-1 model, as the original does it (blip2.py:47-62, blip2_qformer.py:72-78).

    Embeddings, self-attention and text feed-forward layers come from BERT, the query feed-forward layers are copies
    of the text ones; cross-attention, queries, [DEC] and the heads keep their fresh values. BERT's token types and
    pooler are not used. A prediction head (``cls.predictions``) is taken where there is one.

    Args:
        model (Blip2QFormer): of BERT's width, with at most its layers.
        state_dict (Mapping): of a ``BertModel`` or a BERT with heads, old LayerNorm names (gamma, beta) included.

    Returns:
        LoadReport: missing = what keeps fresh values, unexpected = what of BERT was not used.

    Raises:
        ValueError: a shape that differs.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith("cls.predictions."):
            renamed["lm_head." + name.removeprefix("cls.predictions.")] = tensor
        else:
            name = name.replace("embeddings.LayerNorm.", "layernorm.").replace(
                ".attention.self.", ".attention.attention."
            )
            renamed["qformer." + name] = tensor
    for name in [name for name in renamed if ".layer." in name]:
        twin = name.replace(".intermediate.", ".intermediate_query.").replace(".output.", ".output_query.")
        if twin != name and ".attention.output." not in name:
            renamed[twin] = renamed[name]
    own = model.state_dict()
    for name in ("qformer.embeddings.word_embeddings.weight", "lm_head.bias"):
        if name in renamed and len(renamed[name]) < len(own[name]):
            renamed[name] = torch.cat([renamed[name].to(own[name]), own[name][len(renamed[name]) :]])
    return load_into(model, renamed, strict=False)
