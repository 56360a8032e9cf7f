"""A Q-Former that runs on the layers of another module tree, which stay where they are."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qformer_fast.config import QFormerConfig
from qformer_fast.layout import Mask, PackedText
from qformer_fast.models import padded
from qformer_fast.models.adapters import why_no_weight
from qformer_fast.models.graphed import Encode, Inputs, TrainingGraphs, can_capture
from qformer_fast.models.padded import TextPlaces
from qformer_fast.models.qformer import (
    CrossAttention,
    Dense,
    DenseLayerNorm,
    QFormer,
    QFormerLayer,
    QKVProjection,
    SelfAttention,
)


class _Shape(NamedTuple):
    """What :meth:`BorrowedQFormer._encode_padded` depends on besides tensors; its fields are of
    :meth:`BorrowedQFormer.encode_embedded`.
    """

    batch: int
    num_queries: int
    text_width: int
    max_text_length: int
    mask: Mask
    with_keys_values: bool


class BorrowedQFormer(QFormer):
    """A :class:`QFormer` without parameters of its own.

    The linear layers and LayerNorms are looked up in ``owner`` at each use, so that whatever an optimizer, a checkpoint
    or an adapter does to them is seen. Embeddings are the owner's business: :meth:`encode_embedded` takes their result.

    Args:
        config (QFormerConfig): sizes of ``owner``.
        owner (nn.Module): has a module of the same children for each of this class's that holds linear layers.
        norm (str): name of the LayerNorm of the owner's embeddings.
        renamed (Callable, Optional): this class's name of a module -> the owner's. Default: `None`, the same.
    """

    def __init__(
        self, config: QFormerConfig, owner: nn.Module, *, norm: str, renamed: Callable[[str], str] | None = None
    ):
        with torch.device("meta"):
            super().__init__(config)
        del self.layernorm
        if config.use_qformer_text_input:
            del self.embeddings
        parent, _, self._norm = norm.rpartition(".")
        self._norm_owner = owner.get_submodule(parent)._modules
        for name, module in self.named_modules():
            if isinstance(module, QKVProjection | DenseLayerNorm | Dense):
                # one dictionary: a layer that is replaced there is replaced here
                module._modules = owner.get_submodule(renamed(name) if renamed else name)._modules
        self._own = [m for m in self.modules() if isinstance(m, QFormerLayer | SelfAttention | CrossAttention)]
        self._leaves = [*self._find_leaves(), (self._norm_owner, self._norm)]
        self._training_graphs = collections.defaultdict(TrainingGraphs)

    @property
    def cuda_graphs(self) -> bool:
        """Whether calls on a GPU may run as CUDA graphs."""
        return self.query_encoder.graphs

    @cuda_graphs.setter
    def cuda_graphs(self, value: bool) -> None:
        self.query_encoder.graphs = value

    @property
    def layernorm(self) -> nn.Module:
        return self._norm_owner[self._norm]

    def follow(self, training: bool) -> None:
        """Takes the owner's mode; the owner's layers keep theirs."""
        if training != self.training:
            self.forget_packed_weights()
            for module in (self, *self._own):
                module.training = training

    def why_not(self) -> str | None:
        """Why the layers as they are now can't be run here, or None."""
        reasons = map(why_no_weight, self.layers_read())
        return next((reason for reason in reasons if reason is not None), None)

    def encode_embedded(
        self,
        rows: Tensor,
        num_queries: int,
        *,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        mask: Mask = Mask.BIDIRECTIONAL,
        keys_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Padded rows after embeddings, LayerNorm and dropout through all layers.

        Args:
            rows (Tensor): (1 or batch, num_queries + text, hidden), queries first.
            num_queries (int): 0 for text alone.
            attention_mask, image_mask (Tensor, Optional): as ``attention_mask`` and ``encoder_attention_mask`` of
                :meth:`QFormer.forward`.
            image_embeds (Tensor, Optional): (batch, tokens, encoder_hidden); needed with queries.
            mask (Mask): who sees whom. Default: bidirectional.
            keys_values (list, Optional): is given each layer's self-attention keys and values of the rows, (batch,
                nheads, num_queries + text, headdim), zeros at hidden text.

        Returns:
            Tensor: (batch, num_queries + text, hidden), zeros at text that ``attention_mask`` hides.

        Raises:
            ValueError: sizes that disagree; the message names the argument.
        """
        batch = rows.shape[0] if image_embeds is None or not num_queries else image_embeds.shape[0]
        text_width, readers, text = rows.shape[1] - num_queries, None, None
        if num_queries:
            self.check_queries(rows[:, :num_queries], image_embeds, batch)
            readers = padded.image_attention_mask(image_mask, image_embeds, num_queries)
        text_mask, whole_mask = padded.split_attention_mask(attention_mask, batch, num_queries, text_width)
        call = num_queries > 0, text_width > 0, keys_values is not None
        graphs = self._graphs_for(call, rows, image_embeds) if whole_mask is None else None
        if text_width:
            text = PackedText.places(text_mask, batch, text_width, rows.device)
            if graphs is not None and text_mask is not None:
                text = graphs.fill(text, text_width)
        shape = _Shape(
            batch, num_queries, text_width, 0 if text is None else text.max_length, mask, keys_values is not None
        )
        places = (None, None, None) if text is None else (*TextPlaces.of(text, batch, text_width), text.offsets)
        encode = functools.partial(self._encode_padded, shape, whole_mask)
        return self._run(graphs, encode, (rows, image_embeds, readers, *places), shape, keys_values)

    def _encode_padded(
        self,
        shape: _Shape,
        attention_mask: Tensor | None,
        rows: Tensor,
        image_embeds: Tensor | None,
        image_mask: Tensor | None,
        source: Tensor | None,
        target: Tensor | None,
        text_offsets: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Rows of all texts' places, and where they are wanted each layer's keys and its values."""
        batch, num_queries, text_width, max_text_length, mask, with_keys_values = shape
        text = places = None
        if text_offsets is not None:
            places = TextPlaces(source, target)
            # a layout reads neither ids nor positions
            text = PackedText(source, source, text_offsets, max_text_length)
        layout = padded.padded_layout(mask, attention_mask, text, batch, num_queries, rows.device)
        image_kv = self.image_kv(image_embeds, image_mask=image_mask) if num_queries else None
        rows = rows.expand(batch, -1, -1)
        parts = [rows[:, :num_queries].flatten(0, 1)] if num_queries else []
        if text is not None:
            parts.append(padded.gather_rows(rows[:, num_queries:].flatten(0, 1), places))
        packed = torch.cat(parts) if len(parts) > 1 else parts[0]
        weights = self.encoder_weights(packed)
        layer_inputs = []

        def keep(layer: int, rows: Tensor) -> Tensor:
            layer_inputs.append(rows)
            return rows

        at_layer = keep if with_keys_values else None
        out = self.encode_rows(packed, layout, image_kv=image_kv, weights=weights, at_layer=at_layer)

        def pad(rows: Tensor) -> Tensor:
            """(rows, width) -> (batch, num_queries + text, width)"""
            found = [rows[: layout.num_query_rows].unflatten(0, (batch, num_queries))] if num_queries else []
            if text is not None:
                spread = padded.spread_rows(rows[layout.num_query_rows :], places, batch * text_width)
                found.append(spread.unflatten(0, (batch, text_width)))
            return torch.cat(found, dim=1) if len(found) > 1 else found[0]

        found = [pad(out)]
        if with_keys_values:
            heads = self.config.num_attention_heads, self.config.headdim
            for layer, layer_rows, layer_weights in zip(self.encoder.layer, layer_inputs, weights.layers, strict=True):
                both = layer.attention.project(layer_rows, layer_weights.self_attention, keys_values_only=True)
                found += [pad(x.flatten(1)).unflatten(-1, heads).transpose(1, 2) for x in both]
        return tuple(found)

    def encode_embedded_after(
        self,
        rows: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        allowed: Tensor,
        *,
        text_mask: Tensor | None = None,
        keys_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Padded text after embeddings, LayerNorm and dropout that looks back at rows which were encoded before.

        Args:
            rows (Tensor): (batch, text, hidden).
            past, allowed: as in :meth:`QFormer.encode_after`.
            text_mask (Tensor, Optional): (batch, text), zero at padding. Default: `None`, none.
            keys_values (list, Optional): is given each layer's of the text, (batch, nheads, text, headdim), zeros at
                padding.

        Returns:
            Tensor: (batch, text, hidden), zeros at padding.
        """
        batch, width, _ = rows.shape
        call, with_keys_values = ("after", keys_values is not None), keys_values is not None
        # computed again in backward, PyTorch's attention would drop other weights in a capture
        checkpointing = self.training and self.gradient_checkpointing != "none"
        graphs = None if checkpointing else self._graphs_for(call, rows, *itertools.chain(*past))
        places = None, None
        if text_mask is not None:
            text = PackedText.places(text_mask, batch, width, rows.device)
            if graphs is not None:
                text = graphs.fill(text, width)
            if graphs is not None or text.num_rows < batch * width:
                places = TextPlaces.of(text, batch, width)

        def encode(
            rows: Tensor, allowed: Tensor, source: Tensor | None, target: Tensor | None, *past: Tensor
        ) -> tuple[Tensor, ...]:
            places = None if source is None else TextPlaces(source, target)
            found: list[tuple[Tensor, Tensor]] | None = [] if with_keys_values else None
            both = list(zip(past[::2], past[1::2], strict=True))
            out = self.encode_after(padded.gather_rows(rows.flatten(0, 1), places), both, allowed, places, found)
            out = padded.spread_rows(out, places, batch * width).unflatten(0, (batch, width))
            return out, *itertools.chain(*found or ())

        return self._run(graphs, encode, (rows, allowed, *places, *itertools.chain(*past)), call, keys_values)

    def _graphs_for(self, call: Hashable, *inputs: Tensor | None) -> TrainingGraphs | None:
        """Those of one way to call, for :meth:`_run`; None where it has to run without graphs."""
        if not (self.cuda_graphs and can_capture(self, self.layers_read(), inputs)):
            return None
        graphs = self._training_graphs[call]
        return graphs if graphs.takes_one_more else None

    def _run(
        self,
        graphs: TrainingGraphs | None,
        encode: Encode,
        inputs: Inputs,
        settings: Hashable,
        keys_values: list[tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """``encode``'s first result; the others, a layer's keys and values each, are added to ``keys_values``."""
        found = None if graphs is None else graphs.run(self, self.layers_read(), encode, inputs, settings)
        out, *both = encode(*inputs) if found is None else found
        if keys_values is not None:
            keys_values.extend(zip(both[::2], both[1::2], strict=True))
        return out
