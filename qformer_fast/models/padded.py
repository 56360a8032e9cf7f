"""From the padded batches and masks of LAVIS and Hugging Face to packed rows and layouts."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

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
    """The layout of a padded batch in which sequence i looks at image i; ``attention_mask`` covers all its rows.

    Captions of ``text`` after the first ``batch`` are sequences without queries.
    """
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


class TextPlaces(NamedTuple):
    """Where packed text rows lie in padded texts (batch * width).

    Args:
        source (Tensor): (rows,) int64, where each row comes from; what fills up copies a row of the text.
        target (Tensor): (rows,) int64, where it goes; ``batch * width``, beyond the texts, for what fills up.
    """

    source: Tensor
    target: Tensor

    @classmethod
    def of(cls, text: PackedText, batch: int, width: int) -> TextPlaces:
        """Of ``batch`` captions and, after them, those that fill up."""
        captions = torch.arange(len(text), device=text.offsets.device)
        captions = torch.repeat_interleave(captions, text.lengths, output_size=text.num_rows)
        target = captions * width + text.position_ids
        if len(text) == batch:
            return cls(target, target)
        target = target.clamp(max=batch * width)
        source = torch.where(target < batch * width, target, target[:1]).clamp(max=batch * width - 1)
        return cls(source, target)


def gather_rows(padded: Tensor, places: TextPlaces | None) -> Tensor:
    """The packed rows of (batch * width, hidden); None: all are there."""
    return padded if places is None else padded.index_select(0, places.source)


def spread_rows(rows: Tensor, places: TextPlaces | None, num_places: int) -> Tensor:
    """``rows`` (rows, hidden) at their places (batch * width, hidden), zeros elsewhere; None: all are there."""
    if places is None:
        return rows
    return rows.new_zeros(num_places + 1, rows.shape[1]).index_copy(0, places.target, rows)[:num_places]
