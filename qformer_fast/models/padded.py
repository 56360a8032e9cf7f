"""From the padded batches and masks of LAVIS and Hugging Face to packed rows and layouts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qformer_fast.layout import Mask, PackedText, SequenceLayout


def split_attention_mask(
    attention_mask: Tensor | None, batch: int, num_queries: int, text_width: int
) -> tuple[Tensor | None, Tensor | None]:
    """The text columns of a 2-D mask, (batch, text), where it hides text alone, else the whole mask for
    :func:`padded_layout`; the other one, or both, None.

    Raises:
        ValueError: not one of the shapes that :meth:`QFormer.forward` lists.
    """
    if attention_mask is None:
        return None, None
    width = num_queries + text_width
    shapes = {(batch, text_width), (batch, width), (batch, width, width), (batch, 1, width, width)}
    if tuple(attention_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask must have one of the shapes {sorted(shapes)}, got {tuple(attention_mask.shape)}"
        )
    if attention_mask.ndim > 2:
        return None, attention_mask
    covers_queries = num_queries > 0 and attention_mask.shape[1] == width
    if covers_queries and not bool(attention_mask[:, :num_queries].all()):
        return None, attention_mask
    return (attention_mask[:, -text_width:] if text_width else None), None


def padded_layout(
    mask: Mask,
    attention_mask: Tensor | None,
    text: PackedText | None,
    batch: int,
    num_queries: int,
    device: torch.device,
) -> SequenceLayout:
    """The layout of a padded batch in which sequence i looks at image i; ``attention_mask`` covers all its rows."""
    layout = SequenceLayout(
        num_queries=num_queries,
        image_index=torch.arange(batch if num_queries else 0, device=device),
        text_offsets=torch.zeros(batch + 1, dtype=torch.int64, device=device) if text is None else text.offsets,
        masks=torch.full((batch if text is None else len(text),), int(mask), device=device),
        num_text_rows=0 if text is None else text.num_rows,
        max_text_length=0 if text is None else text.max_length,
    )
    if attention_mask is None:
        return layout
    if attention_mask.ndim == 2:
        allowed = layout.padded_mask[:, 0] & attention_mask[:, None, :].bool()
    elif attention_mask.ndim == 4 and attention_mask.is_floating_point():
        allowed = attention_mask[:, 0]
    else:
        allowed = attention_mask.reshape(batch, *attention_mask.shape[-2:]).bool()
    return dataclasses.replace(layout, attention_mask=allowed)


def image_attention_mask(attention_mask: Tensor | None, image_embeds: Tensor, num_queries: int) -> Tensor | None:
    """The mask of :class:`ImageKV`: (images, 1 or num_queries, tokens), or None where nothing is hidden.

    Raises:
        ValueError: not one of the shapes that :meth:`QFormer.forward` lists.
    """
    if attention_mask is None:
        return None
    images, tokens, _ = image_embeds.shape
    shape = tuple(attention_mask.shape)
    readers = (1, num_queries)
    shapes = {(images, tokens), *((images, n, tokens) for n in readers), *((images, 1, n, tokens) for n in readers)}
    if shape not in shapes:
        raise ValueError(f"encoder_attention_mask must have one of the shapes {sorted(shapes, key=len)}, got {shape}")
    if attention_mask.ndim == 4 and attention_mask.is_floating_point():
        return attention_mask[:, 0]
    mask = attention_mask.bool().reshape(images, shape[-2] if len(shape) > 2 else 1, tokens)
    return None if bool(mask.all()) else mask


def places_of(text: PackedText, batch: int, width: int) -> Tensor:
    """(rows,) int64: the place of each text row in (batch * width), ``batch * width`` for what fills up."""
    captions = torch.arange(len(text), device=text.offsets.device)
    captions = torch.repeat_interleave(captions, text.lengths, output_size=text.num_rows)
    return (captions * width + text.position_ids).clamp(max=batch * width)


def gather_rows(padded: Tensor, places: Tensor | None) -> Tensor:
    """The rows at ``places`` of (num_places, width), some row for what fills up; None: all."""
    return padded if places is None else padded.index_select(0, places.clamp(max=len(padded) - 1))


def spread_rows(rows: Tensor, places: Tensor | None, num_places: int) -> Tensor:
    """``rows`` (rows, width) at their places (num_places, width), zeros elsewhere; None: they are all there."""
    if places is None:
        return rows
    return rows.new_zeros(num_places + 1, rows.shape[1]).index_copy(0, places, rows)[:num_places]
