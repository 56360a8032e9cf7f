"""BLIP-2 stage 2: the Q-Former's queries as the prefix of a frozen language model."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from qformer_fast.config import Checkpointing, QFormerConfig
from qformer_fast.integrations.checkpoints import CheckpointMixin, StateDict, load_into
from qformer_fast.layout import Mask, PackedText, round_up
from qformer_fast.models.blip2_qformer import Blip2QFormer
from qformer_fast.models.graphed import TrainingGraphs, can_capture
from qformer_fast.models.language import LanguageProjection
from qformer_fast.models.padded import padded_layout
from qformer_fast.models.qformer import QFormer, in_eval_mode

WIDTH_STEP = 8
"""Texts of widths between two multiples of it share CUDA graphs."""


@dataclass(frozen=True, eq=False)
class Stage2Output:
    """What :meth:`Blip2OPT.forward` returns.

    Args:
        loss (Tensor): 0-dim, nats, the language model's.
    """

    loss: Tensor


class Blip2OPT(CheckpointMixin, nn.Module):
    """Stage 2 of BLIP-2 (Li et al. 2023, arXiv:2301.12597, sec. 3.3) with any frozen language model of transformers:
    causal ones as LAVIS ``Blip2OPT`` uses OPT, encoder-decoders as ``Blip2T5`` uses T5.

    With a text branch the Q-Former may be given text beside the image, as InstructBLIP's is (Dai et al. 2023,
    arXiv:2305.06500); without one (``config.use_qformer_text_input`` False) it is the original's stage 2, which takes
    the branch away.

    Args:
        config (QFormerConfig): sizes.
        language_model (PreTrainedModel or str): it is frozen; a str names a folder or an id on the hub.
        language_model_dropout (bool): see :class:`LanguageProjection`. Default: False.
        qformer_prompts (bool, Optional), text_end (str): how texts are written with it, which training sets and
            checkpoints keep: the Q-Former reads the prompts too, and what a causal model's texts end with ("" is its
            own end). Default: `None`, where it has a text branch; a new line.
        ln_vision_eps (float): as of :class:`Blip2QFormer`. Default: 1e-5.

    On a GPU the Q-Former's training runs as CUDA graphs from the second step of a shape on, and its inference always
    or in one launch; ``model.cuda_graphs = False`` turns the former off.
    """

    def __init__(
        self,
        config: QFormerConfig,
        language_model: PreTrainedModel | str,
        *,
        language_model_dropout: bool = False,
        qformer_prompts: bool | None = None,
        text_end: str = "\n",
        ln_vision_eps: float = 1e-5,
    ):
        if qformer_prompts and not config.use_qformer_text_input:
            raise ValueError("qformer_prompts must be False without config.use_qformer_text_input, got True")
        super().__init__()
        self.config = config
        self.qformer_prompts = config.use_qformer_text_input if qformer_prompts is None else qformer_prompts
        self.text_end = text_end
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=ln_vision_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size))
        self.qformer = QFormer(config)
        self.language_projection = LanguageProjection(
            config.hidden_size, language_model, dropout=language_model_dropout
        )
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        self.cuda_graphs = True
        self._graphs = TrainingGraphs()

    @classmethod
    def from_stage1(
        cls,
        stage1: Blip2QFormer,
        language_model: PreTrainedModel | str,
        *,
        keep_text: bool = False,
        language_model_dropout: bool = False,
    ) -> Blip2OPT:
        """A model that starts from copies of stage 1's weights; the projection is new.

        Args:
            stage1 (Blip2QFormer): stays as it is.
            language_model, language_model_dropout: as of the constructor.
            keep_text (bool): keep the text branch. Default: False.
        """
        model = cls(
            dataclasses.replace(stage1.config, use_qformer_text_input=keep_text),
            language_model,
            language_model_dropout=language_model_dropout,
            ln_vision_eps=stage1.ln_vision.eps,
        )
        load_into(model, stage1.state_dict(), strict=False)
        return model.to(stage1.query_tokens.device)

    @classmethod
    def from_hf_model(cls, hf: PreTrainedModel, **options) -> Blip2OPT:
        """The Q-Former and the projection of a Hugging Face ``Blip2ForConditionalGeneration`` or
        ``InstructBlipForConditionalGeneration``, copied, around its own language model, which is frozen; ``options``
        are the constructor's.
        """
        config = QFormerConfig.from_hf(hf.config)
        model = cls(config, hf.language_model, **(cls.options_from_hf(hf.config) | options))
        weights = {name: x for name, x in hf.state_dict().items() if not name.startswith("language_model.")}
        model.load_hf_state_dict(weights)
        return model.to(hf.device).eval()

    def init_options(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("qformer_prompts", "text_end")}
        return own | {"ln_vision_eps": self.ln_vision.eps} | self.language_projection.init_options()

    @classmethod
    def options_from_hf(cls, config: Any) -> dict[str, Any]:
        end = "" if config.model_type == "instructblip" else "\n"
        return {"ln_vision_eps": config.vision_config.layer_norm_eps, "text_end": end}

    @classmethod
    def from_hf_folder(
        cls, folder: Path, *, language_model: PreTrainedModel | str | None = None, **options
    ) -> Blip2OPT:
        if language_model is not None:
            return super().from_hf_folder(folder, language_model=language_model, **options)
        return cls.from_hf_model(AutoModelForImageTextToText.from_pretrained(folder, dtype="auto"), **options)

    def to_lavis_state_dict(self) -> StateDict:
        """The Q-Former and the projection under the original's names: ``opt_proj``, or ``t5_proj`` of T5's kind."""
        return self.language_projection.as_lavis(super().to_lavis_state_dict())

    @property
    def language_model(self) -> PreTrainedModel:
        return self.language_projection.language_model

    def gradient_checkpointing_enable(self, level: Checkpointing = "layer") -> None:
        """Of the Q-Former, see :meth:`QFormer.gradient_checkpointing_enable`."""
        self.qformer.gradient_checkpointing_enable(level)

    def gradient_checkpointing_disable(self) -> None:
        self.qformer.gradient_checkpointing_disable()

    def encode_images(
        self,
        image_embeds: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The queries' outputs: (images, queries, hidden).

        Args:
            image_embeds (Tensor): (images, tokens, encoder_hidden), before ``ln_vision``.
            qformer_input_ids, qformer_attention_mask (Tensor, Optional): (images, length), BERT's [CLS] ... [SEP], text
                that the queries see and that sees them. Default: `None`, none.

        Raises:
            ValueError: text without a text branch, sizes that disagree.
        """
        no_gradients = not (self.training or torch.is_grad_enabled())
        if qformer_input_ids is None and no_gradients:
            return self.qformer.encode_queries(self.query_tokens, image_embeds, norm=self.ln_vision)
        images, device = len(image_embeds), image_embeds.device
        layers = [*self.qformer.layers_read(), self.ln_vision]
        inputs, max_length = [self.query_tokens, image_embeds], 0
        graphed = self.cuda_graphs and self._graphs.takes_one_more and can_capture(self.qformer, layers, inputs)
        if qformer_input_ids is not None:
            text = self.qformer.pack_text(qformer_input_ids, qformer_attention_mask)
            if len(text) != images:
                raise ValueError(f"qformer_input_ids must have batch size {images} as image_embeds, got {len(text)}")
            if graphed:
                text = self._graphs.fill(text, round_up(qformer_input_ids.shape[1], WIDTH_STEP))
            text, max_length = text.to(device), text.max_length
            layers += self.qformer.embeddings.children()
            inputs += [text.input_ids, text.position_ids, text.offsets]
        encode = functools.partial(self._encode, max_length)
        found = self._graphs.run(self.qformer, layers, encode, inputs, max_length) if graphed else None
        (query_output,) = encode(*inputs) if found is None else found
        return query_output

    def _encode(
        self, max_length: int, query_tokens: Tensor, image_embeds: Tensor, *packed: Tensor
    ) -> tuple[Tensor, ...]:
        """:meth:`encode_images` of packed text: its ids, positions and offsets, or none of them."""
        text = PackedText(*packed, max_length) if packed else None
        layout = padded_layout(
            Mask.BIDIRECTIONAL, None, text, len(image_embeds), query_tokens.shape[1], image_embeds.device
        )
        rows = self.qformer.encode(
            layout,
            query_embeds=query_tokens,
            text=text,
            image_kv=self.qformer.image_kv(image_embeds, norm=self.ln_vision),
            text_index=None if text is None else text.offsets.new_empty(0),
        )
        return (rows.unflatten(0, (len(image_embeds), -1)),)

    def forward(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Stage2Output:
        """The language model's loss on text after images.

        Args:
            image_embeds, qformer_input_ids, qformer_attention_mask: see :meth:`encode_images`.
            input_ids, attention_mask, labels: see :meth:`LanguageProjection.loss`; of
                :meth:`qformer_fast.data.language.LanguageTokenizer.targets`.
        """
        query_output = self.encode_images(image_embeds, qformer_input_ids, qformer_attention_mask)
        return Stage2Output(self.language_projection.loss(query_output, input_ids, attention_mask, labels))

    @torch.no_grad()
    def generate(
        self,
        image_embeds: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        max_new_tokens: int = 30,
        **options,
    ) -> Tensor:
        """Captions or answers, in eval mode: greedy, beam search or nucleus sampling.

        Args:
            image_embeds, qformer_input_ids, qformer_attention_mask: see :meth:`encode_images`.
            input_ids, attention_mask (Tensor, Optional): (images, length), prompts, left-padded for a causal model
                (:meth:`qformer_fast.data.language.LanguageTokenizer.prompts`). Default: `None`, no text.
            max_new_tokens (int): longest text in tokens. Default: 30.
            options: of transformers' ``generate``: ``num_beams``, ``do_sample``, ``top_p``, ``length_penalty``,
                ``eos_token_id``, ``num_return_sequences`` and their like.

        Returns:
            Tensor: (images * num_return_sequences, length) int64, the new tokens.
        """
        with in_eval_mode(self), in_eval_mode(self.language_model):
            query_output = self.encode_images(image_embeds, qformer_input_ids, qformer_attention_mask)
            options["max_new_tokens"] = max_new_tokens
            return self.language_projection.generate(query_output, input_ids, attention_mask, **options)
