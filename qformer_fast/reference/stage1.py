"""Stage 1 in the original's order: four passes over padded text (LAVIS 506965b, blip2_qformer.py:90-300).

The same parameters and results as :meth:`qformer_fast.Blip2QFormer.forward`; it shares none of its encoder, packing or
losses, which is what makes it a check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.reference.encoder import encode

if TYPE_CHECKING:
    from qformer_fast.models.blip2_qformer import Blip2QFormer, Stage1Output


def original_order_stage1(
    model: Blip2QFormer,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_ids: Sequence[str | int] | Tensor | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
) -> Stage1Output:
    """Arguments and result as :meth:`Blip2QFormer.forward`; text right-padded, ITC with local gradients."""
    from qformer_fast.models.blip2_qformer import Stage1Output

    batch, num_queries = image_embeds.shape[0], model.query_tokens.shape[1]
    tokens = model.ln_vision(image_embeds)
    keep = attention_mask.bool()
    queries = model.query_tokens.expand(batch, -1, -1)

    all_queries = keep.new_ones(batch, 1, num_queries, num_queries)
    query_output, cache = encode(model.qformer, query_embeds=queries, attention_mask=all_queries, image_embeds=tokens)
    text_output, _ = encode(model.qformer, input_ids=input_ids, attention_mask=keep[:, None, None, :])

    image_features = F.normalize(model.vision_proj(query_output), dim=-1)
    text_features = F.normalize(model.text_proj(text_output[:, 0]), dim=-1)
    sim_i2t = _max_over_queries(image_features, text_features.detach()) / model.temp
    sim_t2i = _max_over_queries(image_features.detach(), text_features).T / model.temp
    same_image = torch.eye(batch, dtype=torch.bool, device=image_embeds.device)
    if image_ids is None:
        targets = torch.arange(batch, device=image_embeds.device)
        loss_itc = (
            F.cross_entropy(sim_i2t, targets, label_smoothing=0.1)
            + F.cross_entropy(sim_t2i, targets, label_smoothing=0.1)
        ) / 2
    else:
        names = image_ids.tolist() if isinstance(image_ids, Tensor) else list(image_ids)
        same_image = torch.tensor([[a == b for b in names] for a in names], device=image_embeds.device)
        positive = same_image.to(sim_i2t.dtype)
        targets = 0.9 * positive / positive.sum(1, keepdim=True) + 0.1 * torch.ones_like(positive) / batch
        loss_i2t = -(F.log_softmax(sim_i2t, dim=1) * targets).sum(1).mean()
        loss_t2i = -(F.log_softmax(sim_t2i, dim=1) * targets).sum(1).mean()
        loss_itc = (loss_i2t + loss_t2i) / 2

    if negatives is None:
        with torch.no_grad():
            weights_t2i = sim_t2i.float().masked_fill(same_image, -10000).softmax(1)
            weights_i2t = sim_i2t.float().masked_fill(same_image, -10000).softmax(1)
            negatives = weights_t2i.multinomial(1).squeeze(1), weights_i2t.multinomial(1).squeeze(1)
    image_index, text_index = (index.to(image_embeds.device) for index in negatives)

    itm_ids = torch.cat([input_ids, input_ids, input_ids[text_index]])
    itm_keep = torch.cat([keep, keep, keep[text_index]])
    itm_keep = torch.cat([itm_keep.new_ones(3 * batch, num_queries), itm_keep], dim=1)
    itm_output, _ = encode(
        model.qformer,
        query_embeds=model.query_tokens.expand(3 * batch, -1, -1),
        input_ids=itm_ids,
        attention_mask=itm_keep[:, None, None, :],
        image_embeds=torch.cat([tokens, tokens[image_index], tokens]),
    )
    itm_logits = model.itm_head(itm_output[:, :num_queries]).mean(1)
    itm_labels = torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long().to(image_embeds.device)
    loss_itm = F.cross_entropy(itm_logits, itm_labels)

    loss_itg = _caption_loss(model, input_ids, keep, cache)
    return Stage1Output(
        loss=loss_itc + loss_itm + loss_itg,
        loss_itc=loss_itc,
        loss_itm=loss_itm,
        loss_itg=loss_itg,
        sim_i2t=sim_i2t.detach(),
        sim_t2i=sim_t2i.detach(),
        itm_logits=itm_logits.detach(),
        itm_labels=itm_labels,
        negatives=(image_index, text_index),
    )


def _max_over_queries(image_features: Tensor, text_features: Tensor) -> Tensor:
    """(images, queries, dim) x (texts, dim) -> (images, texts)."""
    products = torch.matmul(image_features.unsqueeze(1), text_features.unsqueeze(-1)).squeeze(-1)
    return products.max(-1).values


def _caption_loss(model: Blip2QFormer, input_ids: Tensor, keep: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
    """ITG over all padded rows, after the query-only pass's keys and values."""
    length, num_queries = input_ids.shape[1], model.query_tokens.shape[1]
    decoder_ids = torch.cat([torch.full_like(input_ids[:, :1], model.dec_token_id), input_ids[:, 1:]], dim=1)
    causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    causal = torch.cat([causal.new_ones(length, num_queries), causal], dim=1)
    columns = torch.cat([keep.new_ones(len(keep), num_queries), keep], dim=1)
    mask = causal[None, None] & columns[:, None, None, :]
    text_output, _ = encode(model.qformer, input_ids=decoder_ids, attention_mask=mask, past=cache)
    logits = F.linear(model.lm_head(text_output), model.qformer.embeddings.word_embeddings.weight, model.lm_head.bias)
    labels = decoder_ids.masked_fill(decoder_ids == model.config.pad_token_id, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)
