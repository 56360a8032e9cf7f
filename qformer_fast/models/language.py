"""Query outputs as the prefix of a frozen language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from qformer_fast import ops
from qformer_fast.data.files import check_folder_or_id
from qformer_fast.data.language import IGNORED
from qformer_fast.integrations.checkpoints import StateDict

# what models do to the head's product before they take its softmax: such a loss is no linear cross-entropy
LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


def load_language_model(name: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal or an encoder-decoder language model.

    A T5 with the tanh form of GELU, as Flan-T5, gets the exact one, with which the original trains and Hugging Face's
    converted checkpoints run (LAVIS 506965b, blip2_t5.py:88-91).

    Args:
        name (str): a folder, or an id on the Hugging Face hub.
        dtype (dtype or str): of its parameters. Default: "auto", the checkpoint's.

    Raises:
        OSError: nothing there.
    """
    check_folder_or_id(name, "language_model")
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "t5" and config.dense_act_fn == "gelu_new":
        config.dense_act_fn = "gelu"
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name, config=config, dtype=dtype)


class LanguageProjection(nn.Linear):
    """The linear layer from the queries' width to a frozen language model's, and that model.

    The language model is held, not registered: it is in no ``state_dict`` and its parameters, which no longer require
    grad, are not in ``parameters()``; it follows ``to(...)`` and the like. It runs in its own dtype, outside autocast
    where that is a 16-bit one.

    Args:
        hidden_size (int): of the queries.
        language_model (PreTrainedModel or str): with ``get_input_embeddings`` and a linear ``get_output_embeddings``; a
            str names a folder or an id on the hub.
        dropout (bool): its dropout is on in training mode, as in the original, which freezes it without ``eval()``
            (LAVIS 506965b, blip2_opt.py:71-90). Default: False.

    Raises:
        ValueError: no model, one without a linear head, or one whose logits are more than its head's product.
    """

    def __init__(self, hidden_size: int, language_model: PreTrainedModel | str, *, dropout: bool = False):
        if isinstance(language_model, str):
            language_model = load_language_model(language_model)
        if not isinstance(language_model, nn.Module):
            raise ValueError(f"language_model must be a model of transformers, got {type(language_model).__name__}")
        head, config = language_model.get_output_embeddings(), language_model.config.get_text_config(decoder=True)
        if not isinstance(head, nn.Linear):
            raise ValueError(f"language_model must have a linear LM head, got {type(head).__name__}")
        for name in LOGIT_CHANGES:
            if (value := getattr(config, name, None)) not in (None, 1):
                raise ValueError(f"language_model's logits must be its head's product, got config.{name} = {value}")
        # what BART's kind adds to them, zeros in most
        if getattr(language_model, "final_logits_bias", None) is not None and language_model.final_logits_bias.any():
            raise ValueError("language_model's logits must be its head's product, got a final_logits_bias")
        super().__init__(hidden_size, language_model.get_input_embeddings().weight.shape[1])
        language_model.requires_grad_(False)
        self._held = (language_model,)
        self.dropout = dropout
        self.train()

    @property
    def language_model(self) -> PreTrainedModel:
        return self._held[0]

    @property
    def encoder_decoder(self) -> bool:
        return self.language_model.config.is_encoder_decoder

    def init_options(self) -> dict[str, Any]:
        """What a model with this layer saves of it: arguments of its constructor."""
        return {"language_model": self.language_model.name_or_path or None, "language_model_dropout": self.dropout}

    def as_lavis(self, weights: StateDict) -> StateDict:
        """LAVIS's names of a model with this layer: ``opt_proj``, or ``t5_proj`` with an encoder-decoder."""
        if not self.encoder_decoder:
            return weights
        return {name.replace("opt_proj.", "t5_proj."): x for name, x in weights.items()}

    def train(self, mode: bool = True) -> LanguageProjection:
        self.language_model.train(mode and self.dropout)
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> LanguageProjection:
        self.language_model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def loss(self, query_output: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Next-token loss of text after the images' prefix (blip2_opt.py:95-150, blip2_t5.py:95-150 of LAVIS 506965b).

        Only positions with a label reach the head. Text on the CPU costs no wait for the device.

        Args:
            query_output (Tensor): (batch, queries, hidden).
            input_ids, attention_mask (Tensor): (batch, length), right-padded.
            labels (Tensor): of a causal model (batch, length), the input_ids themselves, which are shifted here so that
                the last query predicts the first; of an encoder-decoder (batch, target length). -100 is not predicted.

        Returns:
            Tensor: 0-dim fp32, nats, mean over the labels.

        Raises:
            ValueError: shapes that disagree, no label at all, more tokens than the language model has positions.
        """
        batch, num_queries, _ = query_output.shape
        device = query_output.device
        expected = (batch, *(labels.shape[1:] if self.encoder_decoder else input_ids.shape[1:]))
        if tuple(labels.shape) != expected or labels.ndim != 2:
            raise ValueError(f"labels must be {expected}, got {tuple(labels.shape)}")
        kept = (labels != IGNORED).flatten().nonzero().flatten()
        if len(kept) == 0:
            raise ValueError(f"labels must have at least one that is not {IGNORED}, got none")
        targets = labels.flatten()[kept].to(device, non_blocking=True)
        inputs = self._inputs(query_output, input_ids, attention_mask)
        if self.encoder_decoder:
            prepared = self.language_model.prepare_decoder_input_ids_from_labels(labels=labels)
            inputs["decoder_input_ids"] = prepared.to(device, non_blocking=True)
        elif attention_mask.device.type == "cpu" and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            # no token looks at the padding after it; with a mask the model would wait for the device to look at it
            del inputs["attention_mask"]
        head = self.language_model.get_output_embeddings()
        with self._own_precision(device):
            rows = self._head_inputs(head, inputs)
            if not self.encoder_decoder:
                rows = rows[:, num_queries - 1 : -1]
            rows = rows.flatten(0, 1).index_select(0, kept.to(device, non_blocking=True))
        # under autocast plain PyTorch's losses are fp32 too
        with torch.autocast(device.type, rows.dtype, enabled=rows.dtype.itemsize == 2):
            return ops.linear_cross_entropy(rows, head.weight, head.bias, targets)

    def _head_inputs(self, head: nn.Linear, inputs: dict[str, Tensor]) -> Tensor:
        """What the language model gives its head: (batch, length, width); the head itself gets nothing to do."""
        seen = []

        def record(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            seen.append(args[0])
            return (args[0][:, :0],)

        hook = head.register_forward_pre_hook(record)
        try:
            self.language_model(**inputs, use_cache=False)
        finally:
            hook.remove()
        return seen[0]

    @torch.no_grad()
    def generate(
        self, query_output: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, **options
    ) -> Tensor:
        """Text after the images' prefix and a prompt.

        Args:
            query_output (Tensor): (batch, queries, hidden).
            input_ids, attention_mask (Tensor, Optional): (batch, length), left-padded for a causal model. Default:
                `None`, what tokenizers make of no text: the first token alone, none where the config names none, an
                encoder-decoder's end.
            options: of transformers' ``generate``.

        Returns:
            Tensor: (batch * num_return_sequences, new tokens) int64; an encoder-decoder's begin with its start.

        Raises:
            ValueError: shapes that disagree, more tokens with the new ones than the language model has positions.
        """
        if input_ids is None:
            config = self.language_model.config
            first = config.eos_token_id if self.encoder_decoder else config.bos_token_id
            tokens = [] if first is None else [first]
            input_ids = torch.tensor([tokens] * len(query_output), dtype=torch.int64, device=query_output.device)
        new = 0 if self.encoder_decoder else options.get("max_new_tokens") or 0
        inputs = self._inputs(query_output, input_ids, attention_mask, new_tokens=new)
        with self._own_precision(query_output.device):
            return self.language_model.generate(**inputs, **options)

    def _inputs(
        self, query_output: Tensor, input_ids: Tensor, attention_mask: Tensor | None, *, new_tokens: int = 0
    ) -> dict[str, Tensor]:
        """[queries | text] as embeddings, and who may be looked at; ``new_tokens`` are to follow."""
        if input_ids.ndim != 2 or len(input_ids) != len(query_output):
            raise ValueError(f"input_ids must be ({len(query_output)}, length), got {tuple(input_ids.shape)}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must be {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}")
        num_queries, length = query_output.shape[1], input_ids.shape[1]
        positions = getattr(self.language_model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and num_queries + length + new_tokens > positions:
            raise ValueError(
                f"input_ids must leave room in the language model's {positions} positions for {num_queries} queries "
                f"and {new_tokens} new tokens, got {length}"
            )
        device = query_output.device
        words = self.language_model.get_input_embeddings()(input_ids.to(device, non_blocking=True))
        queries = attention_mask.new_ones(query_output.shape[:2])
        mask = torch.cat([queries, attention_mask], dim=1).to(device, non_blocking=True)
        prefix = self(query_output).to(words.dtype)
        with torch.autocast(device.type, enabled=False):  # which joins no bf16 rows where it is fp16
            return {"inputs_embeds": torch.cat([prefix, words], dim=1), "attention_mask": mask}

    def _own_precision(self, device: torch.device) -> Any:
        """Outside autocast where the language model's parameters are 16 bits wide, whose rows stay that wide then."""
        wide = self.language_model.get_input_embeddings().weight.dtype == torch.float32
        return torch.autocast(device.type, enabled=wide and torch.is_autocast_enabled(device.type))
