"""The text branch as a decoder that transformers' ``generate`` can drive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

if TYPE_CHECKING:
    from qformer_fast.models.blip2_qformer import Blip2QFormer

# what transformers calls the cache: "cache" from 5.24 on
CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)


class CaptionDecoderConfig(PretrainedConfig):
    model_type = "qformer_fast_caption_decoder"


class CaptionDecoder(PreTrainedModel, GenerationMixin):
    """Image-grounded text generation, one token at a time (BLIP-2 sec. 3.2, ITG).

    Takes the queries' keys and values (``prefix``, from :meth:`QFormer.query_prefix`) once per image; each step adds
    one token's keys and values to the cache. Holds the stage-1 model without registering its parameters again.
    """

    config_class = CaptionDecoderConfig

    def __init__(self, model: Blip2QFormer):
        config = CaptionDecoderConfig(
            vocab_size=model.config.vocab_size,
            hidden_size=model.config.hidden_size,
            num_hidden_layers=model.config.num_hidden_layers,
            num_attention_heads=model.config.num_attention_heads,
            bos_token_id=model.dec_token_id,
            eos_token_id=model.sep_token_id,
            pad_token_id=model.config.pad_token_id,
        )
        super().__init__(config)
        object.__setattr__(self, "stage1", model)

    @property
    def device(self) -> torch.device:
        return self.stage1.temp.device

    @property
    def dtype(self) -> torch.dtype:
        return self.stage1.query_tokens.dtype

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, prefix: Tensor, **options
    ) -> dict[str, Tensor | DynamicCache]:
        cache = options[CACHE]
        return {"input_ids": input_ids[:, cache.get_seq_length() :], "prefix": prefix, CACHE: cache}

    def forward(self, input_ids: Tensor, prefix: Tensor, **options) -> CausalLMOutputWithPast:
        """Logits (captions, 1, vocab) after the new tokens ``input_ids`` (captions, new)."""
        cache = options[CACHE]
        for token in input_ids.unbind(1):
            rows = self.stage1.qformer.decode(token, prefix, cache)
        logits = self.stage1.next_token_logits(rows)
        return CausalLMOutputWithPast(logits=logits[:, None], **{CACHE: cache})
