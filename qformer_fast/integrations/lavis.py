"""LAVIS's Q-Former classes on this package's kernels.

In code of LAVIS, MiniGPT-4, Video-LLaMA and what grew out of them, ported to transformers 5, one import changes::

    from qformer_fast.integrations.lavis import BertConfig, BertLMHeadModel

Constructors, calls, names of modules and state dicts are those of LAVIS's ``Qformer.py`` (506965b), so that its
checkpoints load, parts can be taken away (``Qformer.cls = None``, ``layer.output = None``) or replaced, and
``Blip2Qformer.forward`` runs as it is. What differs:

- Text that ``attention_mask`` hides gives zeros, and so does a row that may look at nothing; the original fills them
  with numbers that no loss reads.
- The LM head takes the rows that have a label; ``logits`` beside a loss with gradients are made when they are first
  read, with the head's weights of that time.
- ``use_cache`` works with gradient checkpointing.
- The decoder stays tied to the word embeddings under transformers 5, also after resizing and loading.
- ``cross_attentions`` has None at layers without cross-attention, where the original puts keys and values.

On a GPU training runs as CUDA graphs from the second time on that shapes come, and so do queries alone without
gradients, see :func:`replace_qformer`; then backward through a call works once, without ``retain_graph``. Without
gradients a parameter's change is seen by its version; writing through ``.data`` is not, unless ``train`` or ``eval`` is
called after it.

A call runs on plain PyTorch with explicit attention probabilities, and then computes hidden text as the original does,
if it asks for ``output_attentions``, ``output_hidden_states`` or ``head_mask``, if a cross-attention layer has
``save_attention``, or if ``labels`` count text that ``attention_mask`` hides. So does, with a warning, every call of a
model that the kernels can't run: hooks on modules inside the encoder, layers that are neither ``nn.Linear`` nor LoRA
around one, another activation than gelu, dropouts, modes or LayerNorms that differ inside, modules of classes of one's
own, no cross-attention.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)

from qformer_fast import ops
from qformer_fast.config import QFormerConfig
from qformer_fast.integrations.hf import HOOKS
from qformer_fast.layout import Mask
from qformer_fast.models import padded
from qformer_fast.models.adapters import weight_of, why_no_weight
from qformer_fast.models.borrowed import BorrowedQFormer
from qformer_fast.models.generation import CACHE

__all__ = ["BertConfig", "BertLMHeadModel", "BertModel"]

logger = logging.getLogger(__name__)

LABEL_SMOOTHING = 0.1
KeysValues = tuple[Tensor, Tensor]
"""Keys and values of a layer's self-attention, each (batch, nheads, rows, headdim)."""


class BertEmbeddings(nn.Module):
    """Queries as they are, words with their positions; one LayerNorm and dropout for both."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """(batch, queries + text, hidden); the text's positions begin at ``past_key_values_length``."""
        embeds = query_embeds
        if input_ids is not None:
            if self.word_embeddings is None or self.position_embeddings is None:
                raise ValueError("input_ids need word and position embeddings, which were taken out of this model")
            end = past_key_values_length + input_ids.shape[1]
            if position_ids is None:
                position_ids = self.position_ids[:, past_key_values_length:end]
                if position_ids.shape[1] < input_ids.shape[1]:
                    positions = self.position_ids.shape[1]
                    raise ValueError(f"input_ids must end before position {positions}, got text up to {end}")
            embeds = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
            if query_embeds is not None:
                embeds = torch.cat((query_embeds.expand(len(embeds), -1, -1), embeds), dim=1)
        return self.dropout(self.LayerNorm(embeds))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig, is_cross_attention: bool):
        super().__init__()
        hidden = config.hidden_size
        if hidden % config.num_attention_heads:
            raise ValueError(
                f"config.hidden_size must be a multiple of num_attention_heads, got {hidden} and "
                f"{config.num_attention_heads}"
            )
        self.num_attention_heads = config.num_attention_heads
        self.is_cross_attention = is_cross_attention
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(config.encoder_width if is_cross_attention else hidden, hidden)
        self.value = nn.Linear(config.encoder_width if is_cross_attention else hidden, hidden)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.save_attention = False

    def save_attn_gradients(self, attn_gradients: Tensor) -> None:
        self.attn_gradients = attn_gradients

    def get_attn_gradients(self) -> Tensor:
        return self.attn_gradients

    def save_attention_map(self, attention_map: Tensor) -> None:
        self.attention_map = attention_map

    def get_attention_map(self) -> Tensor:
        return self.attention_map

    def forward(
        self,
        hidden_states: Tensor,
        allowed: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, Tensor, KeysValues]:
        """Attention with its probabilities.

        Args:
            hidden_states (Tensor): (batch, rows, hidden).
            allowed (Tensor, Optional): (batch, 1 or rows, keys) bool, True = may look.
            head_mask (Tensor, Optional): (1, nheads, 1, 1), which the dropped-out probabilities are multiplied with.
            encoder_hidden_states (Tensor, Optional): (batch, tokens, encoder_width), looked at instead of the rows.
            past (tuple, Optional): keys and values before those of the rows.

        Returns:
            tuple: (batch, rows, hidden); probabilities (batch, nheads, rows, keys); keys and values without ``past``.
        """
        looked_at = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = (self.query, hidden_states), (self.key, looked_at), (self.value, looked_at)
        heads = self.num_attention_heads, -1
        q, *both = (layer(x).unflatten(-1, heads).transpose(1, 2) for layer, x in inputs)
        k, v = both if past is None else (torch.cat(x, dim=2) for x in zip(past, both, strict=True))
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        if allowed is None:
            probs = scores.softmax(-1)
        else:
            hidden = ~allowed[:, None]
            probs = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
        if self.save_attention and encoder_hidden_states is not None:
            self.save_attention_map(probs)
            if probs.requires_grad:
                probs.register_hook(self.save_attn_gradients)
        dropped = self.dropout(probs)
        if head_mask is not None:
            dropped = dropped * head_mask
        return (dropped @ v).transpose(1, 2).flatten(2), probs, tuple(both)


class BertOutput(nn.Module):
    """The tail of a sub-layer."""

    def __init__(self, config: BertConfig, inputs: int):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig, is_cross_attention: bool = False):
        super().__init__()
        self.self = BertSelfAttention(config, is_cross_attention)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, KeysValues]:
        context, *others = self.self(hidden_states, *args, **options)
        return self.output(context, hidden_states), *others


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = _activation(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


def _activation(config: BertConfig) -> Callable[[Tensor], Tensor]:
    return ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig, layer_num: int):
        super().__init__()
        self.attention = BertAttention(config)
        self.layer_num = layer_num
        self.has_cross_attention = config.add_cross_attention and layer_num % config.cross_attention_freq == 0
        if self.has_cross_attention:
            self.crossattention = BertAttention(config, is_cross_attention=True)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)
        self.intermediate_query = BertIntermediate(config)
        self.output_query = BertOutput(config, config.intermediate_size)

    @property
    def has_text_branch(self) -> bool:
        return self.intermediate is not None and self.output is not None

    def forward(
        self,
        hidden_states: Tensor,
        num_queries: int,
        allowed: Tensor,
        head_mask: Tensor | None,
        image_embeds: Tensor | None,
        image_allowed: Tensor | None,
        past: KeysValues | None,
    ) -> tuple[Tensor, KeysValues, Tensor, Tensor | None]:
        """Rows, keys and values, and the probabilities of self- and cross-attention; see :class:`BertEncoder`."""
        rows, probs, keys_values = self.attention(hidden_states, allowed, head_mask, past=past)
        queries, text = rows[:, :num_queries], rows[:, num_queries:]
        parts, cross_probs = [], None
        if num_queries:
            if self.has_cross_attention:
                queries, cross_probs, _ = self.crossattention(queries, image_allowed, head_mask, image_embeds)
            parts.append(self.output_query(self.intermediate_query(queries), queries))
        if text.shape[1]:
            parts.append(self.output(self.intermediate(text), text))
        return torch.cat(parts, dim=1), keys_values, probs, cross_probs


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        num_queries: int,
        allowed: Tensor,
        *,
        head_masks: Sequence[Tensor | None],
        image_embeds: Tensor | None,
        image_allowed: Tensor | None,
        past: Sequence[KeysValues | None],
        checkpointing: bool,
    ) -> Iterator[tuple[Tensor, KeysValues, Tensor, Tensor | None]]:
        """Plain PyTorch, layer by layer.

        Args:
            hidden_states (Tensor): (batch, rows, hidden), embedded, ``num_queries`` queries first.
            allowed (Tensor): (batch, rows, past + rows) bool, True = may look.
            head_masks, past (Sequence): of each layer, as in :class:`BertSelfAttention`.
            image_embeds (Tensor, Optional): (batch, tokens, encoder_width).
            image_allowed (Tensor, Optional): (batch, 1 or num_queries, tokens) bool.
            checkpointing (bool): compute layers again in backward.

        Returns:
            Iterator: of each layer, its rows, its keys and values, and the probabilities of its self-attention and of
            its cross-attention, None where there is none.
        """
        for layer, head_mask, layer_past in zip(self.layer, head_masks, past, strict=True):
            run = functools.partial(checkpoint, layer, use_reentrant=False) if checkpointing else layer
            found = run(hidden_states, num_queries, allowed, head_mask, image_embeds, image_allowed, layer_past)
            hidden_states = found[0]
            yield found


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = _activation(config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class BertLMPredictionHead(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, sequence_output: Tensor) -> Tensor:
        return self.predictions(sequence_output)


class _Kernels:
    """The :class:`BorrowedQFormer` of a :class:`BertModel`, made again where a module was taken away or replaced.

    A copy begins empty, so that a copied or unpickled model runs on its own parameters.
    """

    def __init__(self) -> None:
        self._seen: list[dict[str, nn.Module | None]] = []
        self._warned: set[str] = set()
        self._qformer: BorrowedQFormer | None = None

    def __reduce__(self) -> tuple:
        return _Kernels, ()

    def find(self, bert: BertModel) -> BorrowedQFormer | None:
        """None where a call has to run on plain PyTorch."""
        if not self._seen or self._children != self._seen or self._settings() != self._seen_settings:
            self._look_at(bert)
        if any(x.save_attention for x in self._cross_attention):
            return None
        reason = self._reason or self._why_not(bert)
        if reason is None:
            return self._qformer
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s runs on plain PyTorch: %s", type(bert).__name__, reason)
        return None

    def _look_at(self, bert: BertModel) -> None:
        modules = list(bert.encoder.modules())
        self._children = [x._modules for x in (bert, bert.embeddings, *modules)]
        self._seen = [dict(x) for x in self._children]
        self._attributes = list(map(vars, modules))
        self._hooks = [x[kind] for x in self._attributes for kind in HOOKS]
        self._dropouts = [x for x in modules if isinstance(x, nn.Dropout)]
        self._norms = [x for x in modules if isinstance(x, nn.LayerNorm)]
        self._layers = [x for x in modules if isinstance(x, BertLayer)]
        self._seen_settings = self._settings()
        attention = [x for x in modules if isinstance(x, BertSelfAttention)]
        self._cross_attention = [x for x in attention if x.is_cross_attention]
        try:
            self._qformer, self._reason = _borrow(bert, attention, self._dropouts), None
        except (AttributeError, ValueError) as error:
            self._qformer, self._reason = None, str(error)

    def _settings(self) -> list[float | bool]:
        """What is no module and decides how the kernels run."""
        settings = [x.p for x in self._dropouts] + [x.eps for x in self._norms]
        return settings + [x.has_cross_attention for x in self._layers]

    def forget_packed_weights(self) -> None:
        if self._qformer is not None:
            self._qformer.forget_packed_weights()

    def _why_not(self, bert: BertModel) -> str | None:
        if any(self._hooks):
            return "a module inside has hooks"
        if any(map(operator.contains, self._attributes, itertools.repeat("forward"))):
            return "a module inside has a forward of its own"
        training = bert.encoder.training
        if any(x.training != training for x in self._dropouts):
            return "a dropout inside has another mode than the encoder"
        return None if self._qformer.reads_parameters() else self._qformer.why_not()


def _borrow(bert: BertModel, attention: list[BertSelfAttention], dropouts: list[nn.Dropout]) -> BorrowedQFormer:
    """Raises AttributeError or ValueError where the kernels can't run this."""
    config = bert.config
    if not config.add_cross_attention:
        raise ValueError("config.add_cross_attention is False")
    for module in bert.encoder.modules():
        _check_module(module, config)
    of_attention = {id(x.dropout) for x in attention}
    probabilities = {(id(x) in of_attention, x.p) for x in dropouts}
    if len(probabilities) != 2:
        raise ValueError("dropouts inside have different probabilities")
    sizes = dataclasses.replace(
        QFormerConfig.from_hf(config),
        num_hidden_layers=len(bert.encoder.layer),
        cross_attention_frequency=config.cross_attention_freq,
        encoder_hidden_size=config.encoder_width,
        use_qformer_text_input=bert.has_text_branch,
        hidden_dropout_prob=dict(probabilities)[False],
        attention_probs_dropout_prob=dict(probabilities)[True],
    )
    if any(layer.has_cross_attention != sizes.has_cross_attention(i) for i, layer in enumerate(bert.encoder.layer)):
        raise ValueError("cross-attention is not in every cross_attention_freq-th layer from the first")

    def renamed(name: str) -> str:
        return re.sub(r"attention\.attention$", "attention.self", name)

    return BorrowedQFormer(sizes, bert, norm="embeddings.LayerNorm", renamed=renamed)


def _check_module(module: nn.Module, config: BertConfig) -> None:
    """Raises ValueError for a module inside whose forward is not what the kernels compute."""
    name = type(module).__name__
    ours = BertEncoder | BertLayer | BertAttention | BertSelfAttention | BertIntermediate | BertOutput
    if isinstance(module, ours) and type(module).__module__ != __name__:
        raise ValueError(f"{name} is a class of its own")
    if isinstance(module, BertSelfAttention | BertOutput) and not isinstance(module.dropout, nn.Dropout):
        raise ValueError(f"the dropout of {name} is {type(module.dropout).__name__}, not nn.Dropout")
    if isinstance(module, BertIntermediate) and type(module.intermediate_act_fn) is not type(_activation(config)):
        raise ValueError(f"an activation inside is not config.hidden_act = {config.hidden_act!r}")
    if isinstance(module, nn.LayerNorm) and module.eps != config.layer_norm_eps:
        raise ValueError(f"a LayerNorm inside has another eps than config.layer_norm_eps = {config.layer_norm_eps}")


class BertPreTrainedModel(PreTrainedModel):
    config_class = BertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [r"pooler"]
    _keys_to_ignore_on_load_missing = [r"position_ids", r"predictions.decoder.bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """BERT's; the padding word keeps its draw."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        if isinstance(module, BertLMPredictionHead):
            init.zeros_(module.bias)
        if isinstance(module, BertEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[1])[None])


class BertModel(BertPreTrainedModel):
    """LAVIS's ``BertModel`` (Qformer.py:675-940), see the module's docstring.

    Args:
        config (BertConfig): with ``add_cross_attention``, ``encoder_width``, ``cross_attention_freq`` and
            ``query_length`` as LAVIS sets them.
        add_pooling_layer (bool): BERT's pooler on the first row. Default: False.

    Attributes:
        cuda_graphs (bool): as of :func:`replace_qformer`. Default: True.
    """

    cuda_graphs = True

    def __init__(self, config: BertConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f'config.position_embedding_type must be "absolute", got {config.position_embedding_type!r}'
            )
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self._kernels = _Kernels()
        self.post_init()

    def train(self, mode: bool = True) -> BertModel:
        self._kernels.forget_packed_weights()
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Embedding | None:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding | None) -> None:
        self.embeddings.word_embeddings = value

    @property
    def has_text_branch(self) -> bool:
        return all(layer.has_text_branch for layer in self.encoder.layer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Sequence[KeysValues] | Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        is_decoder: bool = False,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """Queries beside images, text, or both as [queries | text].

        Args:
            input_ids (Tensor, Optional): (batch, text) int64.
            attention_mask (Tensor, Optional): nonzero = may be looked at; (batch, past + queries + text), or (batch,
                queries + text, past + queries + text), which replaces ``is_decoder``. Default: `None`, all.
            position_ids (Tensor, Optional): (1 or batch, text). Default: `None`, columns, counted from the first token
                after the queries.
            head_mask (Tensor, Optional): (nheads,) or (layers, nheads), multiplied with attention probabilities.
            query_embeds (Tensor, Optional): (1 or batch, queries, hidden).
            encoder_hidden_states (Tensor, Optional): (batch, tokens, encoder_width), needed with queries.
            encoder_attention_mask (Tensor, Optional): (batch, tokens) or (batch, queries, tokens), nonzero = may be
                looked at.
            past_key_values (tuple or Cache, Optional): what ``use_cache`` returned for the rows before this text; a
                Cache is added to.
            use_cache (bool, Optional): return the keys and values of all rows so far: for each layer two (batch,
                nheads, rows, headdim), with gradients.
            output_attentions, output_hidden_states (bool, Optional): return these; then on plain PyTorch. Default:
                `None`, the config's.
            return_dict (bool, Optional): False gives a tuple. Default: `None`, the config's.
            is_decoder (bool): text looks at queries and earlier text alone, queries at queries. Default: False.

        Raises:
            ValueError: nothing to encode, sizes that disagree, a part that is needed and was taken away; the message
                names the argument.
        """
        if input_ids is None and query_embeds is None:
            raise ValueError("input_ids or query_embeds must be given, got neither")
        past_length = _length(past_key_values, len(self.encoder.layer))
        if past_length and query_embeds is not None:
            raise ValueError("query_embeds can't be given with past_key_values, which hold the queries")
        if input_ids is not None and not self.has_text_branch:
            raise ValueError(
                "input_ids need the text branch, but a layer's intermediate or output was taken out of this model"
            )
        if attention_mask is not None and attention_mask.ndim not in (2, 3):
            raise ValueError(f"attention_mask must have 2 or 3 dimensions, got {attention_mask.ndim}")
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        call = _Call(
            num_queries=0 if query_embeds is None else query_embeds.shape[1],
            attention_mask=attention_mask,
            is_decoder=is_decoder,
            image_embeds=None if query_embeds is None else encoder_hidden_states,
            image_mask=None if query_embeds is None else encoder_attention_mask,
            past=[(x[0], x[1]) for x in past_key_values] if past_length else None,
            past_length=past_length,
            checkpointing=self.training
            and (self.encoder.gradient_checkpointing or getattr(config, "gradient_checkpointing", False)),
        )
        if query_embeds is not None:
            _check_images(query_embeds, call, config)
        offset = past_length - config.query_length if past_length else 0
        embed = functools.partial(self.embeddings, input_ids, position_ids, query_embeds, offset)
        explicit = output_attentions or output_hidden_states or head_mask is not None
        qformer = None if explicit else self._kernels.find(self)
        keys_values: list[KeysValues] | None = [] if use_cache else None
        if qformer is not None:
            queries = query_embeds if input_ids is None else None
            found = {"last_hidden_state": self._run_kernels(qformer, call, embed, queries, keys_values)}
        else:
            found = self._run_plain(call, embed(), head_mask, keys_values)
            if not output_attentions:
                del found["attentions"], found["cross_attentions"]
            if not output_hidden_states:
                del found["hidden_states"]
        rows = found.pop("last_hidden_state")
        pooled = None if self.pooler is None else self.pooler(rows)
        past_key_values = _remember(past_key_values, keys_values) if use_cache else None
        if not return_dict:
            others = past_key_values, *(found.get(x) for x in ("hidden_states", "attentions", "cross_attentions"))
            return rows, pooled, *(x for x in others if x is not None)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=rows, pooler_output=pooled, **{CACHE: past_key_values}, **found
        )

    def _run_kernels(
        self,
        qformer: BorrowedQFormer,
        call: _Call,
        embed: Callable[[], Tensor],
        query_embeds: Tensor | None,
        keys_values: list[KeysValues] | None,
    ) -> Tensor:
        """(batch, rows, hidden); ``query_embeds`` where there is no text."""
        norm = qformer.layernorm.weight
        autocast = torch.is_autocast_enabled(norm.device.type)
        qformer.follow(self.encoder.training)
        qformer.cuda_graphs = self.cuda_graphs
        qformer.gradient_checkpointing = "layer" if call.checkpointing else "none"
        image_embeds, image_mask = call.image_embeds, call.image_mask
        if image_embeds is not None:
            image_embeds = image_embeds if autocast else image_embeds.to(norm.dtype)
        alone = query_embeds is not None and call.attention_mask is None and keys_values is None
        if alone and not (qformer.training or torch.is_grad_enabled()):
            image_mask = padded.image_attention_mask(image_mask, image_embeds, call.num_queries)
            if image_mask is None:
                out = qformer.encode_queries(query_embeds.to(norm.dtype), image_embeds)
                return out.to(torch.float32 if autocast else norm.dtype)
        rows = embed()
        if call.past is not None:
            mask = call.attention_mask
            text_mask = mask[:, call.past_length :] if mask is not None and mask.ndim == 2 else None
            out = qformer.encode_embedded_after(
                rows, call.past, call.allowed(rows), text_mask=text_mask, keys_values=keys_values
            )
        else:
            out = qformer.encode_embedded(
                rows,
                call.num_queries,
                attention_mask=call.attention_mask,
                image_embeds=image_embeds,
                image_mask=image_mask,
                mask=Mask.MULTIMODAL_CAUSAL if call.is_decoder else Mask.BIDIRECTIONAL,
                keys_values=keys_values,
            )
        return out.to(torch.float32 if autocast else norm.dtype)

    def _run_plain(
        self, call: _Call, rows: Tensor, head_mask: Tensor | None, keys_values: list[KeysValues] | None
    ) -> dict[str, Any]:
        image_embeds, image_allowed, layers = call.image_embeds, None, len(self.encoder.layer)
        if image_embeds is not None:
            rows = rows.expand(len(image_embeds), -1, -1)
            image_allowed = padded.image_attention_mask(call.image_mask, image_embeds, call.num_queries)
        head_masks = [None] * layers
        if head_mask is not None:
            head_masks = head_mask.to(rows.dtype).expand(layers, -1)[:, None, :, None, None].unbind()
        found = self.encoder(
            rows,
            call.num_queries,
            call.allowed(rows),
            head_masks=head_masks,
            image_embeds=image_embeds,
            image_allowed=image_allowed,
            past=call.past or [None] * layers,
            checkpointing=call.checkpointing,
        )
        hidden_states, new, attentions, cross_attentions = zip(*found, strict=True)
        if keys_values is not None:
            keys_values.extend(new)
        return dict(
            last_hidden_state=hidden_states[-1],
            hidden_states=(rows, *hidden_states),
            attentions=attentions,
            cross_attentions=cross_attentions,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A call of :class:`BertModel` after its checks."""

    num_queries: int
    attention_mask: Tensor | None
    is_decoder: bool
    image_embeds: Tensor | None
    image_mask: Tensor | None
    past: list[KeysValues] | None
    past_length: int
    checkpointing: bool

    def allowed(self, rows: Tensor) -> Tensor:
        """Who may look at whom, (batch, rows, past + rows) bool, for embedded ``rows`` (batch, rows, hidden)."""
        (batch, width, _), mask = rows.shape, self.attention_mask
        columns = self.past_length + width
        if mask is not None and mask.ndim == 3:
            if mask.shape != (batch, width, columns):
                raise ValueError(f"attention_mask must be {(batch, width, columns)}, got {tuple(mask.shape)}")
            return mask.bool()
        allowed = torch.ones(batch, width, columns, dtype=torch.bool, device=rows.device)
        if self.is_decoder:
            # a query sees all queries, a text token itself and what lies before it
            last_seen = torch.arange(self.past_length, columns, device=rows.device)
            last_seen = last_seen.clamp(min=self.past_length + self.num_queries - 1)
            allowed &= torch.arange(columns, device=rows.device) <= last_seen[:, None]
        if mask is None:
            return allowed
        if mask.shape == (batch, width - self.num_queries) and not self.past_length:
            mask = F.pad(mask, (self.num_queries, 0), value=1)
        if mask.shape != (batch, columns):
            raise ValueError(f"attention_mask must be {(batch, columns)}, got {tuple(mask.shape)}")
        return allowed & mask[:, None].bool()


def _check_images(query_embeds: Tensor, call: _Call, config: BertConfig) -> None:
    images = call.image_embeds
    if images is None:
        if config.add_cross_attention:
            raise ValueError("encoder_hidden_states must be given with query_embeds, got None")
        return
    if images.ndim != 3 or query_embeds.shape[0] not in (1, images.shape[0]):
        raise ValueError(
            f"encoder_hidden_states must be (batch, tokens, encoder_width) with the batch size of query_embeds, "
            f"{query_embeds.shape[0]}, got {tuple(images.shape)}"
        )


def _length(past: Sequence[KeysValues] | Cache | None, layers: int) -> int:
    """Rows in ``past``."""
    if past is None:
        return 0
    if isinstance(past, Cache):
        return past.get_seq_length()
    if len(past) != layers:
        raise ValueError(f"past_key_values must hold keys and values of {layers} layers, got {len(past)}")
    return past[0][0].shape[2]


def _remember(past: Sequence[KeysValues] | Cache | None, new: list[KeysValues]) -> tuple[KeysValues, ...] | Cache:
    if isinstance(past, Cache):
        for index, (k, v) in enumerate(new):
            past.update(k, v, index)
        return past
    if past is None:
        return tuple(new)
    return tuple(
        tuple(torch.cat(x, dim=2) for x in zip(before[:2], both, strict=True))
        for before, both in zip(past, new, strict=True)
    )


class LMOutput(CausalLMOutputWithCrossAttentions):
    """What :class:`BertLMHeadModel` returns; ``logits`` may be a function, which makes them when they are read, or when
    all values are.
    """

    @property
    def logits(self) -> Tensor | None:
        found = self.__dict__.get("logits")
        if callable(found):
            self["logits"] = found = found()
        return found

    @logits.setter
    def logits(self, value: Tensor | Callable[[], Tensor] | None) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        if key == "loss" or (key == 0 and self.loss is not None):
            return self.loss
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        found = super().get(key, default)
        return self.logits if callable(found) else found

    def __reduce__(self):
        _ = self.logits
        return super().__reduce__()

    def items(self):
        _ = self.logits
        return super().items()

    def values(self):
        _ = self.logits
        return super().values()


class BertLMHeadModel(BertPreTrainedModel, GenerationMixin):
    """LAVIS's ``BertLMHeadModel`` (Qformer.py:942-1140): the Q-Former and its LM head, see the module's docstring.

    Args:
        config (BertConfig): see :class:`BertModel`.
    """

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """What transformers ties; nothing where it was taken away."""
        return self.__dict__["all_tied_weights_keys"] if self._ties else {}

    @all_tied_weights_keys.setter
    def all_tied_weights_keys(self, keys: dict[str, str]) -> None:
        self.__dict__["all_tied_weights_keys"] = keys

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return super().get_expanded_tied_weights_keys(all_submodels) if self._ties else {}

    @property
    def _ties(self) -> bool:
        return self.cls is not None and self.get_input_embeddings() is not None

    def get_output_embeddings(self) -> nn.Linear | None:
        return None if self.cls is None else self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Sequence[KeysValues] | Cache | None = None,
        use_cache: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_logits: bool = False,
        is_decoder: bool = True,
        reduction: str = "mean",
    ) -> LMOutput | Tensor | tuple:
        """Text after queries: scores of the next token, and with ``labels`` their loss.

        Args:
            labels (Tensor, Optional): like ``input_ids``, -100 where nothing is to be predicted. They are shifted here:
                a token predicts the label after it. No cache is returned beside a loss.
            past_key_values (tuple or Cache, Optional): ``query_embeds`` are then taken to be in it.
            return_logits (bool): return the scores alone, without the last token's. Default: False.
            reduction (str): of the label-smoothed cross-entropy (0.1): "mean" over labels, "sum", or "none", which sums
                over each caption, (batch,). Default: "mean".

        The others are :meth:`BertModel.forward`'s.

        Raises:
            ValueError: as :meth:`BertModel.forward`; labels of another shape, or ``cls`` was taken away.
        """
        if self.cls is None:
            raise ValueError("the LM head cls was taken out of this model: call its bert")
        if input_ids is None:
            raise ValueError("input_ids must be given to predict tokens, got None")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels must be {tuple(input_ids.shape)} as input_ids, got {tuple(labels.shape)}")
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        if _length(past_key_values, len(self.bert.encoder.layer)):
            query_embeds = None
        asked = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            query_embeds=query_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache and labels is None,
            output_attentions=output_attentions,
            # rows of hidden text are computed on the path that gives hidden states
            output_hidden_states=asked or (labels is not None and _counts_hidden_text(labels, attention_mask)),
            return_dict=True,
            is_decoder=is_decoder,
        )
        rows = outputs.last_hidden_state[:, 0 if query_embeds is None else query_embeds.shape[1] :]
        if return_logits:
            return self.cls(rows)[:, :-1].contiguous()
        loss = None if labels is None else self._loss(rows, labels, reduction)
        out = LMOutput(
            loss=loss,
            logits=self.cls(rows) if loss is None or not loss.requires_grad else self._later(rows),
            hidden_states=outputs.hidden_states if asked else None,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            **{CACHE: outputs.get(CACHE)},
        )
        return out if return_dict else out.to_tuple()

    def _later(self, rows: Tensor) -> Callable[[], Tensor]:
        """The head of ``rows``, under the autocast of now and with gradients."""
        device = rows.device.type
        options = dict(dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))

        def make() -> Tensor:
            with torch.enable_grad(), torch.autocast(device, **options):
                return self.cls(rows)

        return make

    def _loss(self, rows: Tensor, labels: Tensor, reduction: str) -> Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        counted = (targets != -100).nonzero().squeeze(1)
        targets = targets.index_select(0, counted)
        head, options = self.cls.predictions, dict(label_smoothing=LABEL_SMOOTHING, reduction=reduction)
        hooks = any(vars(x)[kind] for x in self.cls.modules() for kind in HOOKS)
        if hooks or why_no_weight(head.decoder) is not None:
            loss = F.cross_entropy(self.cls(rows).flatten(0, 1).index_select(0, counted), targets, **options)
        else:
            rows = head.transform(rows.flatten(0, 1).index_select(0, counted))
            loss = ops.linear_cross_entropy(rows, weight_of(head.decoder), head.decoder.bias, targets, **options)
        if reduction == "none":
            return loss.new_zeros(len(labels)).index_add(0, counted // labels.shape[1], loss)
        return loss

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        query_embeds: Tensor,
        past: Cache | None = None,
        attention_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Any]:
        """What one step of ``generate`` calls :meth:`forward` with: the queries and the prompt first, then each new
        token after the cache.
        """
        past = model_kwargs.get(CACHE) if past is None else past
        num_queries, past_length = query_embeds.shape[1], _length(past, len(self.bert.encoder.layer))
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (num_queries, 0), value=1)
        return {
            "input_ids": input_ids[:, past_length - num_queries :] if past_length else input_ids,
            "query_embeds": query_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past,
            "use_cache": model_kwargs.get("use_cache", True),
            "encoder_hidden_states": model_kwargs.get("encoder_hidden_states"),
            "encoder_attention_mask": model_kwargs.get("encoder_attention_mask"),
            "is_decoder": True,
        }

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """transformers', but that what is repeated for the beams already, as LAVIS passes it, is left so, and queries
        that all images share.
        """
        names = "query_embeds", "encoder_hidden_states", "encoder_attention_mask"
        given = {name: model_kwargs[name] for name in names if model_kwargs.get(name) is not None}
        repeated = {name: x for name, x in given.items() if len(x) == expand_size * len(input_ids)}
        if len(given.get("query_embeds", ())) == 1:
            repeated["query_embeds"] = given["query_embeds"]
        model_kwargs = {name: x for name, x in model_kwargs.items() if name not in repeated}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | repeated


def _counts_hidden_text(labels: Tensor, attention_mask: Tensor | None) -> bool:
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.shape[1] < labels.shape[1]:
        return False
    hidden = ~attention_mask[:, -labels.shape[1] :].bool()
    return bool((hidden[:, :-1] & (labels[:, 1:] != -100)).any())
