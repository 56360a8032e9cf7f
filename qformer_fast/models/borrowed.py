"""A Q-Former that runs on the layers of another module tree, which stay where they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qformer_fast.config import QFormerConfig
from qformer_fast.layout import Mask, PackedText
from qformer_fast.models import padded
from qformer_fast.models.adapters import why_no_weight
from qformer_fast.models.qformer import (
    CrossAttention,
    Dense,
    DenseLayerNorm,
    QFormer,
    QFormerLayer,
    QKVProjection,
    SelfAttention,
)


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

    @property
    def layernorm(self) -> nn.Module:
        return self._norm_owner[self._norm]

    def follow(self, training: bool) -> None:
        """Takes the owner's mode; the owner's layers keep theirs."""
        if training != self.training:
            self.forget_packed_weights()
            for module in (self, *self._own):
                module.training = training

    def layers_read(self) -> list[nn.Module]:
        """The owner's linear layers and LayerNorms as they are now."""
        return [modules[name] for modules, name in self._leaves]

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
        text_width = rows.shape[1] - num_queries
        image_kv, text = None, None
        if num_queries:
            self.check_queries(rows[:, :num_queries], image_embeds, batch)
            readers = padded.image_attention_mask(image_mask, image_embeds, num_queries)
            image_kv = self.image_kv(image_embeds, image_mask=readers)
        text_mask, whole_mask = padded.split_attention_mask(attention_mask, batch, num_queries, text_width)
        rows = rows.expand(batch, -1, -1)
        parts = [rows[:, :num_queries].flatten(0, 1)] if num_queries else []
        if text_width:
            text = PackedText.places(text_mask, batch, text_width, rows.device)
            parts.append(padded.pack_text(rows[:, num_queries:], text))
        layout = padded.padded_layout(mask, whole_mask, text, batch, num_queries, rows.device)
        packed = torch.cat(parts) if len(parts) > 1 else parts[0]
        weights = self.encoder_weights(packed)
        layer_inputs = None if keys_values is None else []
        out = self.encode_rows(packed, layout, image_kv=image_kv, weights=weights, layer_inputs=layer_inputs)

        def pad(rows: Tensor) -> Tensor:
            """(rows, width) -> (batch, num_queries + text, width)"""
            found = [rows[: layout.num_query_rows].unflatten(0, (batch, num_queries))] if num_queries else []
            if text is not None:
                found.append(padded.unpack_text(rows[layout.num_query_rows :], text, text_width))
            return torch.cat(found, dim=1) if len(found) > 1 else found[0]

        if keys_values is not None:
            for layer, rows, layer_weights in zip(self.encoder.layer, layer_inputs, weights.layers, strict=True):
                both = layer.attention.project(rows, layer_weights.self_attention, keys_values_only=True)
                heads = self.config.num_attention_heads, self.config.headdim
                keys_values.append(tuple(pad(x.flatten(1)).unflatten(-1, heads).transpose(1, 2) for x in both))
        return pad(out)
