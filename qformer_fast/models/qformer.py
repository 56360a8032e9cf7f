"""The Q-Former encoder on packed rows, and its padded interface.

Parameter names are Hugging Face's ``Blip2QFormerModel``'s; the modules hold parameters, the ops do the work.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from qformer_fast import backend as backends
from qformer_fast import ops, reference
from qformer_fast.config import Checkpointing, QFormerConfig
from qformer_fast.integrations.checkpoints import CheckpointMixin
from qformer_fast.layout import Mask, PackedText, SequenceLayout
from qformer_fast.models import padded
from qformer_fast.models.adapters import PLAIN, weight_of
from qformer_fast.models.image_kv import ImageKV, LayerKV
from qformer_fast.models.inference import Kept, QueryEncoder
from qformer_fast.models.packing import (
    BlockWeights,
    EncoderWeights,
    GradientBuffers,
    Group,
    LayerWeights,
    stack_weights,
)
from qformer_fast.ops._checks import autocast_dtype
from qformer_fast.ops._seeds import same_seeds
from qformer_fast.ops.image_key_value import image_key_value_bwd


class QFormerOutput(NamedTuple):
    """What :class:`QFormer` returns.

    Args:
        last_hidden_state (Tensor): (batch, num_queries + text, hidden), zeros at padding.
        query_output (Tensor, Optional): (batch, num_queries, hidden); None without queries.
        text_output (Tensor, Optional): (batch, text, hidden), zeros at padding; None without text.
    """

    last_hidden_state: Tensor
    query_output: Tensor | None
    text_output: Tensor | None


class QKVProjection(nn.Module):
    layers = ("query", "key", "value")

    def __init__(self, hidden: int, kv_input: int):
        super().__init__()
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(kv_input, hidden)
        self.value = nn.Linear(kv_input, hidden)


class DenseLayerNorm(nn.Module):
    layers = ("dense", "LayerNorm")

    def __init__(self, inputs: int, hidden: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(inputs, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)

    @property
    def groups(self) -> list[Group]:
        parameters = weight_of(self.dense), self.dense.bias, self.LayerNorm.weight, self.LayerNorm.bias
        return [(parameter,) for parameter in parameters]


class Dense(nn.Module):
    layers = ("dense",)

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)


class SelfAttention(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.attention = QKVProjection(config.hidden_size, config.hidden_size)
        self.output = DenseLayerNorm(config.hidden_size, config.hidden_size, config.layer_norm_eps)

    @property
    def groups(self) -> list[Group]:
        """Parameters in the order of :func:`ops.self_attention_block`, those of one argument together."""
        layers = self.attention.query, self.attention.key, self.attention.value
        return [tuple(map(weight_of, layers)), tuple(x.bias for x in layers), *self.output.groups]

    def forward(self, rows: Tensor, layout: SequenceLayout, weights: BlockWeights) -> tuple[Tensor, Tensor]:
        return ops.self_attention_block(
            rows,
            layout,
            *weights.parameters,
            nheads=self.config.num_attention_heads,
            eps=self.config.layer_norm_eps,
            attention_dropout_p=self.config.attention_probs_dropout_prob if self.training else 0.0,
            hidden_dropout_p=self.config.hidden_dropout_prob if self.training else 0.0,
            gradients=weights.gradients,
            add_gradients=weights.add_gradients,
            split=True,
        )

    def project(self, rows: Tensor, weights: BlockWeights, *, keys_values_only: bool = False) -> tuple[Tensor, ...]:
        """Queries, keys and values of rows (..., hidden), each (..., nheads, headdim)."""
        first = self.config.hidden_size if keys_values_only else 0
        weight, bias, *_ = weights.parameters
        out = F.linear(rows, weight[first:], bias[first:])
        return out.unflatten(-1, (-1, self.config.num_attention_heads, self.config.headdim)).unbind(-3)


class CrossAttention(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.attention = QKVProjection(config.hidden_size, config.encoder_hidden_size)
        self.output = DenseLayerNorm(config.hidden_size, config.hidden_size, config.layer_norm_eps)

    @property
    def groups(self) -> list[Group]:
        """Parameters in the order of :func:`ops.cross_attention_block`."""
        return [(weight_of(self.attention.query),), (self.attention.query.bias,), *self.output.groups]

    def forward(self, query_rows: Tensor, image_kv: LayerKV, layout: SequenceLayout, weights: BlockWeights) -> Tensor:
        return ops.cross_attention_block(
            query_rows,
            image_kv.k,
            image_kv.v,
            layout,
            *weights.parameters,
            image_mask=image_kv.mask,
            eps=self.config.layer_norm_eps,
            attention_dropout_p=self.config.attention_probs_dropout_prob if self.training else 0.0,
            hidden_dropout_p=self.config.hidden_dropout_prob if self.training else 0.0,
            gradients=weights.gradients,
            add_gradients=weights.add_gradients,
            kv_gradients=image_kv.gradients,
            accumulate=image_kv.accumulate,
        )

    def attend(
        self, query_rows: Tensor, q: Tensor, image_kv: LayerKV, layout: SequenceLayout, weights: BlockWeights
    ) -> Tensor:
        """:meth:`forward` in eval mode with the queries ``q`` (query rows, nheads, headdim) projected already."""
        context = ops.image_cross_attention(q, image_kv.k, image_kv.v, layout, image_mask=image_kv.mask)
        _, _, out_weight, out_bias, *norm = weights.parameters
        out = F.linear(context.flatten(1), out_weight, out_bias.to(out_weight.dtype))
        return ops.dropout_add_layer_norm(out, query_rows, *norm, eps=self.config.layer_norm_eps)


class QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries, feed-forward layers of their own."""

    def __init__(self, config: QFormerConfig, index: int):
        super().__init__()
        self.config = config
        hidden, wide = config.hidden_size, config.intermediate_size
        self.attention = SelfAttention(config)
        if config.has_cross_attention(index):
            self.crossattention = CrossAttention(config)
        if config.use_qformer_text_input:
            self.intermediate = Dense(hidden, wide)
            self.output = DenseLayerNorm(wide, hidden, config.layer_norm_eps)
        self.intermediate_query = Dense(hidden, wide)
        self.output_query = DenseLayerNorm(wide, hidden, config.layer_norm_eps)

    def forward(
        self,
        rows: Tensor,
        layout: SequenceLayout,
        image_kv: LayerKV | None,
        weights: LayerWeights,
        recompute_feed_forward: bool = False,
        text_index: Tensor | None = None,
    ) -> Tensor:
        query_rows, text_rows = self.attention(rows, layout, weights.self_attention)
        if image_kv is not None:
            query_rows = self.crossattention(query_rows, image_kv, layout, weights.cross_attention)
        if text_index is not None:
            text_rows = text_rows.index_select(0, text_index)
        if recompute_feed_forward:
            return _again_in_backward(self.feed_forward, query_rows, text_rows, weights)
        return self.feed_forward(query_rows, text_rows, weights)

    @property
    def groups(self) -> dict[str, list[Group]]:
        """Field of :class:`LayerWeights` -> its parameters, those of one argument together."""

        def feed_forward(up: Dense, down: DenseLayerNorm) -> list[Group]:
            return [(weight_of(up.dense),), (up.dense.bias,), *down.groups]

        groups = {
            "self_attention": self.attention.groups,
            "query_feed_forward": feed_forward(self.intermediate_query, self.output_query),
        }
        if hasattr(self, "crossattention"):
            groups["cross_attention"] = self.crossattention.groups
        if self.config.use_qformer_text_input:
            groups["text_feed_forward"] = feed_forward(self.intermediate, self.output)
        return groups

    def feed_forward(self, query_rows: Tensor, text_rows: Tensor, weights: LayerWeights) -> Tensor:
        both = weights.query_feed_forward, weights.text_feed_forward or BlockWeights(None)
        return ops.split_feed_forward_block(
            query_rows,
            text_rows,
            *(weights.parameters for weights in both),
            eps=self.config.layer_norm_eps,
            dropout_p=self.config.hidden_dropout_prob if self.training else 0.0,
            gradients=None if both[0].gradients is None else [weights.gradients for weights in both],
            add_gradients=both[0].add_gradients,
        )

    def decode(self, rows: Tensor, prefix: Tensor, cache: Cache, index: int, weights: LayerWeights) -> Tensor:
        """One more text token of each caption; arguments as :meth:`QFormer.decode`, ``index`` is this layer's."""
        q, k, v = (x.unsqueeze(2) for x in self.attention.project(rows, weights.self_attention))
        k, v = (torch.cat(x, dim=2) for x in zip(prefix.unbind(1), cache.update(k, v, index), strict=True))
        context = F.scaled_dot_product_attention(q, k, v).flatten(1)
        _, _, out_weight, out_bias, *norm = weights.self_attention.parameters
        out = F.linear(context, out_weight, out_bias)
        rows = ops.dropout_add_layer_norm(out, rows, *norm, eps=self.config.layer_norm_eps)
        return self.feed_forward(rows[:0], rows, weights)

    def look_back(
        self,
        rows: Tensor,
        past: tuple[Tensor, Tensor],
        allowed: Tensor,
        places: padded.TextPlaces | None,
        weights: LayerWeights,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text after rows whose keys and values are ``past``; arguments as :meth:`QFormer.encode_after`.

        Returns:
            tuple: rows like ``rows``, and their keys and values, each (batch, nheads, text, headdim).
        """
        (batch, width, _), config = allowed.shape, self.config
        weight, bias, out_weight, out_bias, *norm = weights.self_attention.parameters
        qkv = padded.spread_rows(F.linear(rows, weight, bias), places, batch * width)
        q, k, v = qkv.view(batch, width, 3, config.num_attention_heads, config.headdim).permute(2, 0, 3, 1, 4)
        keys, values = (torch.cat(x, dim=2) for x in zip(past, (k, v), strict=True))
        attention_dropout_p = config.attention_probs_dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(q, keys, values, allowed[:, None], attention_dropout_p)
        context = context.transpose(1, 2).flatten(2).flatten(0, 1)
        out = F.linear(padded.gather_rows(context, places), out_weight, out_bias)
        hidden_dropout_p = config.hidden_dropout_prob if self.training else 0.0
        rows = ops.dropout_add_layer_norm(out, rows, *norm, eps=config.layer_norm_eps, dropout_p=hidden_dropout_p)
        return self.feed_forward(rows[:0], rows, weights), k, v


def _again_in_backward(part: Callable[..., Any], *inputs: Any) -> Any:
    """``part(*inputs)``; what backward needs of it is computed again there, with the same dropout."""
    if torch.compiler.is_compiling():
        return checkpoint(part, *inputs, use_reentrant=False)
    # a capture can't read random states; the kernels don't need them
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=not capturing, context_fn=same_seeds)


class QFormerEncoder(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList(QFormerLayer(config, i) for i in range(config.num_hidden_layers))


class TextEmbeddings(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)


class QFormer(CheckpointMixin, nn.Module):
    """The Querying Transformer of BLIP-2 (Li et al. 2023, arXiv:2301.12597, sec. 3.1).

    Computes what LAVIS ``BertModel`` (Qformer.py:675-940) and Hugging Face's ``Blip2QFormerModel`` compute, on packed
    rows (:meth:`encode`); :meth:`forward` is the padded interface around it. Queries are a caller's tensor, not a
    parameter here.

    State dicts convert to and from the original's ``BertModel`` and Hugging Face's ``Blip2QFormerModel`` and
    ``InstructBlipQFormerModel``.

    Args:
        config (QFormerConfig): sizes.
    """

    name_prefixes = {"lavis": "Qformer.bert.", "hf": "qformer.", "qformer_fast": "qformer."}

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing: Checkpointing = "none"
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.use_qformer_text_input:
            self.embeddings = TextEmbeddings(config)
        self.encoder = QFormerEncoder(config)
        self._leaves = [*self._find_leaves(), (self._modules, "layernorm")]
        self._layers_seen: list[nn.Module] = []
        self.query_encoder = QueryEncoder()
        self._weights = Kept()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """BERT's: N(0, initializer_range) weights, zero biases (Qformer.py:638-648); the padding word keeps its
        draw.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> QFormer:
        """Also forgets weights that were packed for inference, so that what no version counts, such as writing through
        ``.data``, is seen after ``eval()``.
        """
        self.forget_packed_weights()
        return super().train(mode)

    def forget_packed_weights(self) -> None:
        self.query_encoder.forget()
        self._weights = Kept()

    def gradient_checkpointing_enable(self, level: Checkpointing = "layer") -> None:
        """Computes parts again in backward instead of keeping them.

        Args:
            level (str): "layer" keeps each layer's input alone; "feed_forward" drops what the feed-forward sub-layers
                keep, the widest of it all. Default: "layer".

        Raises:
            ValueError: another level.
        """
        if level not in get_args(Checkpointing):
            raise ValueError(f"level must be one of {get_args(Checkpointing)}, got {level!r}")
        self.gradient_checkpointing = level

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing = "none"

    @property
    def dropout_p(self) -> float:
        return self.config.hidden_dropout_prob if self.training else 0.0

    def image_kv(
        self,
        image_embeds: Tensor,
        *,
        norm: nn.LayerNorm | None = None,
        image_mask: Tensor | None = None,
        weights: Sequence[Tensor] | None = None,
        standardized: bool = False,
    ) -> ImageKV:
        """Keys and values of all cross-attention layers, one matrix product.

        Args:
            image_embeds (Tensor): (images, tokens, encoder_hidden).
            norm (nn.LayerNorm, Optional): applied to the tokens first, folded into the weights.
            image_mask (Tensor, Optional): see :class:`ImageKV`.
            weights (Sequence, Optional): of :meth:`kv_weights` with ``norm``. Default: `None`, made here.
            standardized (bool): they are :meth:`Blip2QFormer.standardize`'s. Default: False.

        Raises:
            ValueError: another width than ``config.encoder_hidden_size``, no token, weights made for another ``norm``,
                or, where a look costs no host sync, NaN or Inf.
        """
        self._check_image_embeds(image_embeds, standardized)
        if weights is None:
            weights = self.kv_weights(norm)
        expected = 2 if norm is None else 4
        if len(weights) != expected:
            raise ValueError(f"weights must be {expected} tensors, of kv_weights(norm), got {len(weights)}")
        eps = {} if norm is None else {"eps": norm.eps}
        out = ops.image_key_value(image_embeds, *weights, **eps, standardized=standardized)
        sizes = (len(self.config.cross_attention_layers), 2, self.config.num_attention_heads, self.config.headdim)
        return ImageKV(out.unflatten(-1, sizes), image_mask)

    def _check_image_embeds(self, image_embeds: Tensor, standardized: bool = False) -> None:
        width = self.config.encoder_hidden_size
        if standardized:
            width = reference.standardized_width(width)
        if image_embeds.ndim != 3 or image_embeds.shape[-1] != width or 0 in image_embeds.shape:
            raise ValueError(f"image_embeds must be (images, tokens, {width}), got {tuple(image_embeds.shape)}")
        if image_embeds.device.type == "cpu" and not bool(image_embeds.detach().isfinite().all()):
            raise ValueError("image_embeds must be finite, got NaN or Inf")

    def kv_weights(self, norm: nn.LayerNorm | None = None) -> list[Tensor]:
        """Weight and bias of all layers' keys and values, stacked, and ``norm``'s."""
        everything = range(len(self.config.cross_attention_layers))
        return [*map(torch.cat, self.kv_groups(everything)), *([] if norm is None else [norm.weight, norm.bias])]

    @property
    def kv_parts(self) -> list[range]:
        """Which of the cross-attention layers have gradients of their keys' and values' weights made together, in this
        order: few are last, for which ranks wait.
        """
        count = len(self.config.cross_attention_layers)
        few = count // 3
        return [part for part in (range(few, count), range(few)) if part]

    def kv_groups(self, part: range) -> list[Group]:
        """Weights and biases of keys and values of some of the cross-attention layers."""
        layers = [self.encoder.layer[self.config.cross_attention_layers[i]].crossattention.attention for i in part]
        both = [p for layer in layers for p in (layer.key, layer.value)]
        return [tuple(map(weight_of, both)), tuple(p.bias for p in both)]

    def image_kv_backward(
        self,
        image_embeds: Tensor,
        gradient: Tensor,
        *,
        norm: nn.LayerNorm,
        weights: Sequence[Tensor],
        gradients: GradientBuffers,
        add: bool = True,
    ) -> Iterator[None]:
        """Backward of :meth:`image_kv` of standardized tokens where autograd did not follow it; yields after each of
        :attr:`kv_parts`.

        Args:
            image_embeds (Tensor): (images, tokens, standardized width).
            gradient (Tensor): of :class:`ImageKV`'s buffer.
            norm (nn.LayerNorm), weights (Sequence): as given to :meth:`image_kv`.
            gradients (GradientBuffers): to which those of the keys' and values' and the norm's parameters are written.
            add (bool): they are added. Default: True.
        """
        rows_a_layer = 2 * self.config.hidden_size
        weight, bias, *of_norm = weights
        for number, part in enumerate(self.kv_parts):
            rows = slice(rows_a_layer * part.start, rows_a_layer * part.stop)
            image_key_value_bwd(
                gradient[:, :, part.start : part.stop].flatten(2),
                image_embeds,
                (weight[rows], bias[rows], *of_norm),
                [gradients[group] for group in (*self.kv_groups(part), (norm.weight,), (norm.bias,))],
                add=add,
                add_norm=add or number > 0,
            )
            yield

    def embed_queries(self, query_embeds: Tensor, num_sequences: int, dtype: torch.dtype | None = None) -> Tensor:
        """LayerNorm and dropout of the queries: (1 or num_sequences, queries, hidden) -> (num_sequences * queries,
        hidden), of ``dtype`` where it is given.
        """
        rows = self.layernorm(query_embeds)
        rows = rows.to(dtype or rows.dtype).expand(num_sequences, -1, -1).flatten(0, 1)
        return F.dropout(rows, self.dropout_p)

    @property
    def _embedding_groups(self) -> list[Group]:
        tables = self.embeddings.word_embeddings, self.embeddings.position_embeddings
        return [*((table.weight,) for table in tables), (self.layernorm.weight,), (self.layernorm.bias,)]

    def embed_text(self, text: PackedText, gradients: list[Tensor] | None = None) -> Tensor:
        """Word and position embeddings, LayerNorm and dropout: (text rows, hidden)."""
        return ops.embeddings(
            text.input_ids,
            text.position_ids,
            *(parameter for (parameter,) in self._embedding_groups),
            gradients=gradients,
            eps=self.config.layer_norm_eps,
            padding_idx=self.config.pad_token_id,
            dropout_p=self.dropout_p,
        )

    def encode(
        self,
        layout: SequenceLayout,
        *,
        query_embeds: Tensor | None = None,
        text: PackedText | None = None,
        image_kv: ImageKV | None = None,
        weights: EncoderWeights | None = None,
        text_index: Tensor | None = None,
        at_layer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Runs the packed rows through all layers.

        Args:
            layout (SequenceLayout): which rows form which sequence.
            query_embeds (Tensor, Optional): (1 or query sequences, num_queries, hidden).
            text (PackedText, Optional): the text rows in the order of the sequences.
            image_kv (ImageKV, Optional): must be given with queries.
            weights (EncoderWeights, Optional): of :meth:`encoder_weights`, to be shared. Default: `None`, made here.
            text_index (Tensor, Optional): (n,) int64, which text rows are wanted, in which order: the last feed-forward
                takes no others. Default: `None`, all.
            at_layer (Callable, Optional): is given a layer's number and its rows, and gives those that it takes.

        Returns:
            Tensor: (rows, hidden), query rows first.
        """
        if weights is None:
            weights = self.encoder_weights(self.layernorm.weight if query_embeds is None else query_embeds)
        parts = [] if text is None else [self.embed_text(text, weights.embedding_gradients)]
        if query_embeds is not None:
            dtype = None if text is None else parts[0].dtype
            parts.insert(0, self.embed_queries(query_embeds, layout.num_query_sequences, dtype))
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.encode_rows(
            rows, layout, image_kv=image_kv, weights=weights, text_index=text_index, at_layer=at_layer
        )

    def encode_rows(
        self,
        rows: Tensor,
        layout: SequenceLayout,
        *,
        image_kv: ImageKV | None = None,
        weights: EncoderWeights | None = None,
        text_index: Tensor | None = None,
        at_layer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """:meth:`encode` of rows (rows, hidden) that are embedded already."""
        if weights is None:
            weights = self.encoder_weights(rows)
        last = self.encoder.layer[-1]
        for i, (layer, layer_kv, layer_weights) in enumerate(self.layers_with(image_kv, weights)):
            if at_layer is not None:
                rows = at_layer(i, rows)
            level = self.gradient_checkpointing if self.training else "none"
            wanted = text_index if layer is last else None
            inputs = (rows, layout, layer_kv, layer_weights, level == "feed_forward", wanted)
            rows = _again_in_backward(layer, *inputs) if level == "layer" else layer(*inputs)
        return rows

    @property
    def groups(self) -> list[Group]:
        """Parameters whose gradients are made together: keys' and values' by :attr:`kv_parts`, others as
        :meth:`encoder_weights` takes them, one group a tensor there.
        """
        kv = map(self.kv_groups, self.kv_parts)
        blocks = [*kv, *(groups for layer in self.encoder.layer for groups in layer.groups.values())]
        return [group for groups in blocks for group in groups]

    def encoder_weights(
        self, rows: Tensor, gradients: GradientBuffers | None = None, *, add_gradients: bool = True
    ) -> EncoderWeights:
        """The parameters as the ops take them for ``rows``: stacked, and cast to autocast's dtype where it is on.

        Made once for all encodings of a step, which then share the casts of weights and of their gradients.

        Args:
            rows (Tensor): of the dtype and on the device that the encoder is to run with.
            gradients (GradientBuffers, Optional): the kernels add gradients to these; then the weights are leaves of
                autograd, with the gradients of ops that run without kernels. Default: `None`, autograd's.
            add_gradients (bool): False: the layers' gradients are written instead. Default: True.
        """
        dtype = autocast_dtype(rows)
        inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if gradients is None and inference:
            return self.encoder_weights_in(dtype)
        return self._make_encoder_weights(dtype, gradients, add_gradients)

    def encoder_weights_in(self, dtype: torch.dtype) -> EncoderWeights:
        """:meth:`encoder_weights` for rows of ``dtype``, without gradients: kept until a parameter changes."""
        parameters = self.parameters_read()
        if parameters is None:
            return self._make_encoder_weights(dtype)
        return self._weights.get(parameters, dtype, lambda: self._make_encoder_weights(dtype))

    def parameters_read(self) -> list[Tensor] | None:
        """The parameters of the layers and of the queries' LayerNorm; None where a layer is not PyTorch's own class, so
        that its weight may depend on anything.
        """
        return [parameters[name] for parameters, name in self._places] if self.reads_parameters() else None

    def reads_parameters(self) -> bool:
        """Whether :meth:`parameters_read` finds them."""
        layers = self.layers_read()
        if len(layers) != len(self._layers_seen) or not all(map(operator.is_, layers, self._layers_seen)):
            plain = all(type(layer) in PLAIN for layer in layers)
            self._places = (
                [(layer._parameters, name) for layer in layers for name in layer._parameters] if plain else None
            )
            self._layers_seen = layers
        return self._places is not None

    def layers_read(self) -> list[nn.Module]:
        """The encoder's linear layers and LayerNorms and the queries' LayerNorm as they are now."""
        return [modules[name] for modules, name in self._leaves]

    def _find_leaves(self) -> list[tuple[dict[str, nn.Module], str]]:
        """The encoder's linear layers and LayerNorms, each as the modules that it is among and its name there."""
        parents = (x for x in self.encoder.modules() if isinstance(x, QKVProjection | DenseLayerNorm | Dense))
        return [(parent._modules, name) for parent in parents for name in parent.layers]

    def _make_encoder_weights(
        self, dtype: torch.dtype, gradients: GradientBuffers | None = None, add_gradients: bool = True
    ) -> EncoderWeights:
        layers = [layer.groups for layer in self.encoder.layer]
        groups = [group for blocks in layers for block in blocks.values() for group in block]
        # vectors of one parameter are read in fp32 by kernels; others go to products
        stacked = [group for group in groups if group[0].ndim > 1 or len(group) > 1]
        with contextlib.nullcontext() if gradients is None else torch.no_grad():
            made = dict(zip(map(id, stacked), stack_weights(stacked, dtype), strict=True))
        stacks = iter([made.get(id(group), group[0]) for group in groups])

        def block(of_block: list[Group]) -> BlockWeights:
            return BlockWeights.make(of_block, [next(stacks) for _ in of_block], gradients, add_gradients)

        embeddings = None
        if gradients is not None and self.config.use_qformer_text_input:
            embeddings = [gradients[group] for group in self._embedding_groups]
        weights = [LayerWeights(**{name: block(of_block) for name, of_block in blocks.items()}) for blocks in layers]
        return EncoderWeights(weights, embeddings)

    def layers_with(self, image_kv: ImageKV | None, weights: EncoderWeights) -> list[tuple]:
        """Each layer with its slice of ``image_kv``, or None where it has no cross-attention, and its weights."""
        kv = dict(zip(self.config.cross_attention_layers, image_kv.layers, strict=True)) if image_kv else {}
        return [(layer, kv.get(i), weights.layers[i]) for i, layer in enumerate(self.encoder.layer)]

    def forward(
        self,
        query_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        mask: str = "bidirectional",
    ) -> QFormerOutput:
        """The padded interface.

        Args:
            query_embeds (Tensor, Optional): (1 or batch, queries, hidden); one row of queries is broadcast over the
                images.
            input_ids (Tensor, Optional): (batch, text) integers.
            attention_mask (Tensor, Optional): nonzero = may be looked at. 2-D (batch, text) or (batch, queries +
                text), left- or right-padded or with holes; 3-D (batch, width, width) or 4-D (batch, 1, width, width)
                with width = queries + text, where a float 4-D mask is added to the scores. A 3-D or 4-D mask replaces
                ``mask``; a 2-D one that hides queries is applied on top of it. These run on the reference backend.
            encoder_hidden_states (Tensor, Optional): (batch, tokens, encoder_hidden), used as they are; needed with
                queries.
            encoder_attention_mask (Tensor, Optional): nonzero = may be looked at; (batch, tokens), (batch, queries or
                1, tokens) or (batch, 1, queries or 1, tokens).
            mask (str): "bidirectional", "multimodal_causal" or "unimodal", see :class:`Mask`.

        Returns:
            QFormerOutput: padded; text that ``attention_mask`` hides gives zeros.

        Raises:
            ValueError: nothing to encode, sizes that disagree, an unknown mask; the message names the argument.
        """
        if query_embeds is None and input_ids is None:
            raise ValueError("query_embeds or input_ids must be given, got neither")
        if mask.upper() not in Mask.__members__:
            raise ValueError(f"mask must be one of {[m.name.lower() for m in Mask]}, got {mask!r}")
        given = [x for x in (input_ids, encoder_hidden_states, query_embeds) if x is not None]
        batch, device = max(x.shape[0] for x in given), given[-1].device
        num_queries, text, text_width, image_kv = 0, None, 0, None
        if query_embeds is not None:
            self.check_queries(query_embeds, encoder_hidden_states, batch)
            num_queries = query_embeds.shape[1]
            readers = padded.image_attention_mask(encoder_attention_mask, encoder_hidden_states, num_queries)
            if input_ids is None and attention_mask is None and readers is None:
                query_output = self.encode_queries(query_embeds, encoder_hidden_states)
                return QFormerOutput(query_output, query_output, None)
            image_kv = self.image_kv(encoder_hidden_states, image_mask=readers)
        if input_ids is not None:
            if input_ids.shape[0] != batch:
                raise ValueError(f"input_ids must have batch size {batch}, got {input_ids.shape[0]}")
            text_width = input_ids.shape[1]
        text_mask, whole_mask = padded.split_attention_mask(attention_mask, batch, num_queries, text_width)
        if input_ids is not None:
            text = self.pack_text(input_ids, text_mask)
        layout = padded.padded_layout(Mask[mask.upper()], whole_mask, text, batch, num_queries, device)
        rows = self.encode(layout, query_embeds=query_embeds, text=text, image_kv=image_kv)
        query_output = text_output = None
        if num_queries:
            query_output = rows[: layout.num_query_rows].unflatten(0, (batch, num_queries))
        if text is not None:
            places = padded.TextPlaces.of(text, batch, text_width)
            text_output = padded.spread_rows(rows[layout.num_query_rows :], places, batch * text_width)
            text_output = text_output.unflatten(0, (batch, text_width))
        parts = [part for part in (query_output, text_output) if part is not None]
        return QFormerOutput(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], query_output, text_output)

    def encode_queries(self, query_embeds: Tensor, image_embeds: Tensor, *, norm: nn.LayerNorm | None = None) -> Tensor:
        """Queries beside images, without text.

        In eval mode without gradients what does not depend on the images is computed once for queries that all images
        share, and on a CUDA device one launch or a CUDA graph runs the layers (:class:`QueryEncoder`).

        Args:
            query_embeds (Tensor): (1 or images, queries, hidden).
            image_embeds (Tensor): (images, tokens, encoder_hidden).
            norm (nn.LayerNorm, Optional): applied to the tokens first. Default: `None`.

        Returns:
            Tensor: (images, queries, hidden).
        """
        images = image_embeds.shape[0]
        shared = query_embeds.shape[0] == 1 or query_embeds.stride(0) == 0
        inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        # plain PyTorch's LayerNorm gives fp32 rows under autocast, which are kept here in its dtype as the kernels do
        rounds = torch.is_autocast_enabled(query_embeds.device.type) and not backends.chooses_kernels(query_embeds)
        if inference and not rounds:
            self._check_image_embeds(image_embeds)
            given = query_embeds[:1] if shared else query_embeds
            out = self.query_encoder.encode(self, given, image_embeds, norm)
            if out is not None:
                return out
        layout = padded.padded_layout(Mask.UNIMODAL, None, None, images, query_embeds.shape[1], query_embeds.device)
        image_kv = self.image_kv(image_embeds, norm=norm)
        return self.encode(layout, query_embeds=query_embeds, image_kv=image_kv).unflatten(0, (images, -1))

    def check_queries(self, query_embeds: Tensor, encoder_hidden_states: Tensor | None, batch: int) -> None:
        """Raises ValueError unless these are (1 or batch, queries, hidden) queries and ``batch`` images."""
        hidden = self.config.hidden_size
        if query_embeds.ndim != 3 or query_embeds.shape[0] not in (1, batch) or 0 in query_embeds.shape[1:]:
            raise ValueError(f"query_embeds must be (1 or {batch}, queries, {hidden}), got {tuple(query_embeds.shape)}")
        if query_embeds.shape[2] != hidden:
            raise ValueError(f"query_embeds must be {hidden} wide, got {query_embeds.shape[2]}")
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given with query_embeds, got None")
        if encoder_hidden_states.shape[0] != batch:
            raise ValueError(
                f"encoder_hidden_states must have batch size {batch}, got {encoder_hidden_states.shape[0]}"
            )

    def pack_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> PackedText:
        """Captions (batch, text) without their padding; see :meth:`PackedText.from_padded`."""
        if not self.config.use_qformer_text_input:
            raise ValueError("input_ids need a text branch, but config.use_qformer_text_input is False")
        return PackedText.from_padded(
            input_ids,
            attention_mask,
            vocab_size=self.config.vocab_size,
            max_position_embeddings=self.config.max_position_embeddings,
        )

    def query_prefix(self, query_embeds: Tensor, image_kv: ImageKV) -> Tensor:
        """Self-attention keys and values of the queries, which captions being generated look back at.

        Args:
            query_embeds (Tensor): (1 or images, queries, hidden).
            image_kv (ImageKV): the images.

        Returns:
            Tensor: (images, layers, 2, nheads, queries, headdim); keys at 0, values at 1.
        """
        images, num_queries = image_kv.num_images, query_embeds.shape[1]
        layout = padded.padded_layout(Mask.UNIMODAL, None, None, images, num_queries, query_embeds.device)
        rows = self.embed_queries(query_embeds, images)
        prefix = []
        for layer, layer_kv, weights in self.layers_with(image_kv, self.encoder_weights(rows)):
            keys_values = layer.attention.project(
                rows.unflatten(0, (images, num_queries)), weights.self_attention, keys_values_only=True
            )
            prefix.append(torch.stack(keys_values, dim=1).transpose(2, 3))
            rows = layer(rows, layout, layer_kv, weights)
        return torch.stack(prefix, dim=1)

    def decode(self, input_ids: Tensor, prefix: Tensor, cache: Cache) -> Tensor:
        """One more token of each caption, after :meth:`query_prefix`; in eval mode.

        Args:
            input_ids (Tensor): (captions,) int64.
            prefix (Tensor): (captions, layers, 2, nheads, queries, headdim), as :meth:`query_prefix` returns it.
            cache (transformers.Cache): keys and values of the captions' earlier tokens; this token's are added.

        Returns:
            Tensor: (captions, hidden).
        """
        position_ids = torch.full_like(input_ids, cache.get_seq_length())
        rows = self.embed_text(PackedText(input_ids, position_ids, torch.arange(len(input_ids) + 1), 1))
        weights = self.encoder_weights(rows)
        for index, (layer, layer_prefix) in enumerate(zip(self.encoder.layer, prefix.unbind(1), strict=True)):
            rows = layer.decode(rows, layer_prefix, cache, index, weights.layers[index])
        return rows

    def encode_after(
        self,
        rows: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        allowed: Tensor,
        places: padded.TextPlaces | None = None,
        keys_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Embedded text that looks back at rows which were encoded before; attention runs through PyTorch's.

        Args:
            rows (Tensor): (rows, hidden), text without its padding.
            past (Sequence): of each layer, self-attention keys and values (batch, nheads, past, headdim).
            allowed (Tensor): (batch, text, past + text) bool, True = may look.
            places (TextPlaces, Optional): where each row lies in (batch * text). Default: `None`, all are there.
            keys_values (list, Optional): is given each layer's keys and values of the text, (batch, nheads, text,
                headdim), zeros where there is no row.

        Returns:
            Tensor: (rows, hidden).
        """
        weights = self.encoder_weights(rows)
        checkpointing = self.training and self.gradient_checkpointing != "none"
        for layer, layer_past, layer_weights in zip(self.encoder.layer, past, weights.layers, strict=True):
            inputs = rows, layer_past, allowed, places, layer_weights
            rows, *both = _again_in_backward(layer.look_back, *inputs) if checkpointing else layer.look_back(*inputs)
            if keys_values is not None:
                keys_values.append(tuple(both))
        return rows

    @torch.no_grad()
    def cross_attention_maps(
        self,
        layout: SequenceLayout,
        *,
        query_embeds: Tensor,
        text: PackedText | None = None,
        image_kv: ImageKV,
        layers: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:
        """Where each query looks; arguments and result as the maps of :meth:`encode_with_maps`."""
        inputs = dict(query_embeds=query_embeds, text=text, image_kv=image_kv)
        return self.encode_with_maps(layout, **inputs, layers=layers)[1]

    def encode_with_maps(
        self,
        layout: SequenceLayout,
        *,
        query_embeds: Tensor,
        text: PackedText | None = None,
        image_kv: ImageKV,
        layers: Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """:meth:`encode` without dropout and on the reference backend, with the probabilities of cross-attention.

        Args:
            layout, query_embeds, text, image_kv: as in :meth:`encode`.
            layers (Sequence, Optional): which of ``config.cross_attention_layers``. Default: `None`, all.

        Returns:
            tuple: the query rows (query rows, hidden), and {layer: probabilities (query sequences, nheads, queries,
            tokens)} in the order asked, each row summing to 1. With gradients on, the rows are a function of the
            probabilities, which require grad also where no parameter does.

        Raises:
            ValueError: a layer without cross-attention.
        """
        possible = self.config.cross_attention_layers
        layers = possible if layers is None else layers
        if unknown := [layer for layer in layers if layer not in possible]:
            raise ValueError(f"layers must be among those with cross-attention, {possible}, got {unknown}")
        no_text = layout.text_offsets.new_empty(0)
        with in_eval_mode(self), backends.use_backend("reference"), reference.recorded_probs() as probs:
            rows = self.encode(layout, query_embeds=query_embeds, text=text, image_kv=image_kv, text_index=no_text)
        found = dict(zip(possible, probs, strict=True))
        return rows, {layer: found[layer] for layer in layers}


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, after which each part has the mode that it had."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
