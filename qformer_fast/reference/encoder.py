"""The Q-Former on padded batches, layer by layer as the original runs it (LAVIS Qformer.py:380-560).

A function over the parameters of :class:`qformer_fast.QFormer`: dense masks, keys and values of the image projected in
every pass, attention by SDPA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from qformer_fast.models.qformer import QFormer, QFormerLayer

KeysValues = tuple[Tensor, Tensor]


def encode(
    qformer: QFormer,
    *,
    query_embeds: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor,
    image_embeds: Tensor | None = None,
    past: list[KeysValues] | None = None,
) -> tuple[Tensor, list[KeysValues]]:
    """One pass of the encoder.

    Args:
        qformer (QFormer): parameters; dropout where it is in training mode.
        query_embeds (Tensor, Optional): (batch, queries, hidden).
        input_ids (Tensor, Optional): (batch, text).
        attention_mask (Tensor): bool, True = may look; (batch, 1, rows, past + rows) or broadcastable to it.
        image_embeds (Tensor, Optional): (batch, tokens, encoder_hidden), after ``ln_vision``.
        past (list, Optional): keys and values (batch, nheads, past, headdim) of an earlier pass, per layer.

    Returns:
        tuple: (batch, rows, hidden), and keys and values of each layer, the past included.
    """
    config, num_queries = qformer.config, 0 if query_embeds is None else query_embeds.shape[1]
    x = query_embeds
    if input_ids is not None:
        words = qformer.embeddings.word_embeddings(input_ids)
        words = words + qformer.embeddings.position_embeddings.weight[: input_ids.shape[1]]
        x = words if x is None else torch.cat([x, words], dim=1)
    x = F.dropout(qformer.layernorm(x), config.hidden_dropout_prob, qformer.training)
    cache = []
    for i, layer in enumerate(qformer.encoder.layer):
        x, keys_values = _layer(layer, x, num_queries, attention_mask, image_embeds, past[i] if past else None)
        cache.append(keys_values)
    return x, cache


def _layer(
    layer: QFormerLayer,
    x: Tensor,
    num_queries: int,
    attention_mask: Tensor,
    image_embeds: Tensor | None,
    past: KeysValues | None,
) -> tuple[Tensor, KeysValues]:
    x, keys_values = _attention(layer.attention, x, x, attention_mask, past)
    if num_queries == 0:
        return _feed_forward(layer, x, "intermediate", "output"), keys_values
    queries, text = x[:, :num_queries], x[:, num_queries:]
    if hasattr(layer, "crossattention"):
        queries, _ = _attention(layer.crossattention, queries, image_embeds, None, None)
    queries = _feed_forward(layer, queries, "intermediate_query", "output_query")
    if text.shape[1]:
        queries = torch.cat([queries, _feed_forward(layer, text, "intermediate", "output")], dim=1)
    return queries, keys_values


def _attention(
    block, x: Tensor, read: Tensor, mask: Tensor | None, past: KeysValues | None
) -> tuple[Tensor, KeysValues]:
    config, projections = block.config, block.attention

    def heads(projection: torch.nn.Linear, rows: Tensor) -> Tensor:
        return projection(rows).unflatten(-1, (config.num_attention_heads, config.headdim)).transpose(1, 2)

    q, k, v = heads(projections.query, x), heads(projections.key, read), heads(projections.value, read)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    dropout_p = config.attention_probs_dropout_prob if block.training else 0.0
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return _add_norm(block.output, context.transpose(1, 2).flatten(2), x, config, block.training), (k, v)


def _feed_forward(layer: QFormerLayer, x: Tensor, up: str, down: str) -> Tensor:
    hidden = F.gelu(getattr(layer, up).dense(x))
    return _add_norm(getattr(layer, down), hidden, x, layer.config, layer.training)


def _add_norm(output, x: Tensor, residual: Tensor, config, training: bool) -> Tensor:
    return output.LayerNorm(F.dropout(output.dense(x), config.hidden_dropout_prob, training) + residual)
