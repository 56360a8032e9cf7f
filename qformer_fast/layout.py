"""Which packed rows form which sequence, under which mask.

Packed rows are one matrix ``(rows, hidden)`` without padding: the query rows of all sequences first, then the text
rows of all sequences, each block in the order of the sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor


class Mask(IntEnum):
    """Who sees whom inside a sequence [queries | text] (Li et al. 2023, arXiv:2301.12597, Fig. 2).

    Rows are readers, columns what they read, for two queries q and two text tokens t::

        UNIMODAL    MULTIMODAL_CAUSAL    BIDIRECTIONAL
          qqtt            qqtt               qqtt
        q 1100          q 1100             q 1111
        q 1100          q 1100             q 1111
        t 0011          t 1110             t 1111
        t 0011          t 1111             t 1111
    """

    UNIMODAL = 0
    MULTIMODAL_CAUSAL = 1
    BIDIRECTIONAL = 2


def _lengths_to_offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _rows_of(index: Tensor, offsets: Tensor, new_offsets: Tensor, num_rows: int) -> Tensor:
    """Row numbers of the sequences ``index`` under ``offsets``, laid one after the other; no host sync."""
    rows = torch.arange(num_rows, device=offsets.device)
    sequence = torch.bucketize(rows, new_offsets[1:], right=True)
    return rows + (offsets[index] - new_offsets[:-1])[sequence]


def round_up(rows: int, bucket: int) -> int:
    return -(-rows // bucket) * bucket


def room_for(rows: int, bucket: int, known: set[int]) -> int:
    """A multiple of ``bucket``, at least ``rows`` and less than two buckets more, if possible of the ``known``."""
    room = round_up(rows, bucket)
    larger = room + bucket
    return larger if room not in known and (larger in known or room > max(known, default=room)) else room


@dataclass(frozen=True, eq=False)
class PackedText:
    """Captions without their padding.

    Args:
        input_ids (Tensor): (rows,) int64, the captions one after the other.
        position_ids (Tensor): (rows,) int64, index into the position embeddings.
        offsets (Tensor): (captions + 1,) int64; caption ``i`` is rows ``offsets[i]`` to ``offsets[i + 1]``.
        max_length (int): at least the longest caption, in tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    offsets: Tensor
    max_length: int

    @classmethod
    def from_padded(
        cls, input_ids: Tensor, attention_mask: Tensor | None, *, vocab_size: int, max_position_embeddings: int
    ) -> PackedText:
        """Drops the padding of a batch of captions, left or right; one host sync when the tensors are on a device.

        A token's position is its column, as in the original (Qformer.py:81-84), so left padding shifts positions.

        Args:
            input_ids (Tensor): (batch, length) integers below ``vocab_size``.
            attention_mask (Tensor, Optional): (batch, length), nonzero for tokens. Default: `None`, no padding.
            vocab_size, max_position_embeddings (int): what the ids and the length must stay under.

        Raises:
            ValueError: no caption, a caption of only padding, an id outside the vocabulary, a text too long.
        """
        if input_ids.ndim != 2 or input_ids.shape[0] == 0:
            raise ValueError(f"input_ids must be (batch, length) with batch >= 1, got {tuple(input_ids.shape)}")
        if input_ids.is_floating_point():
            raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
        length = input_ids.shape[1]
        if length > max_position_embeddings:
            raise ValueError(f"input_ids is {length} tokens long, but there are {max_position_embeddings} positions")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            have, want = tuple(attention_mask.shape), tuple(input_ids.shape)
            raise ValueError(f"attention_mask must be {want} as input_ids, got {have}")
        keep = attention_mask.to(device=input_ids.device).bool()
        lengths = keep.sum(1)
        ends = torch.stack(input_ids.aminmax()) if length else input_ids.new_zeros(2)
        *host_lengths, low, high = torch.cat([lengths, ends]).tolist()
        empty = [i for i, n in enumerate(host_lengths) if n == 0]
        if empty:
            raise ValueError(f"attention_mask must keep at least one token of every caption, none in rows {empty}")
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids must lie in [0, {vocab_size}), got {low if low < 0 else high}")
        kept = keep.flatten().nonzero_static(size=sum(host_lengths)).squeeze(1)
        return cls(input_ids.flatten()[kept].long(), kept % length, _lengths_to_offsets(lengths), max(host_lengths))

    @classmethod
    def places(
        cls, attention_mask: Tensor | None, batch: int, length: int, device: torch.device | str | None = None
    ) -> PackedText:
        """Where padded texts (batch, length) have tokens, for rows that are embedded already: all ids are zero.

        As :meth:`from_padded`, but that a text may be all padding, which only sequences with queries may have, and that
        without a mask there is no host sync.
        """
        if attention_mask is None:
            position_ids = torch.arange(length, device=device).repeat(batch)
            offsets = torch.arange(0, (batch + 1) * length, length, device=device)
            return cls(torch.zeros_like(position_ids), position_ids, offsets, length)
        keep = attention_mask.to(device=device).bool()
        lengths = keep.sum(1)
        host_lengths = lengths.tolist()
        kept = keep.flatten().nonzero_static(size=sum(host_lengths)).squeeze(1)
        return cls(torch.zeros_like(kept), kept % length, _lengths_to_offsets(lengths), max(host_lengths))

    @property
    def lengths(self) -> Tensor:
        """(captions,) int64, tokens of each caption."""
        return self.offsets.diff()

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    def with_empty(self) -> PackedText:
        """One caption more, without tokens, which only sequences with queries may have."""
        offsets = torch.cat([self.offsets, self.offsets[-1:]])
        return PackedText(self.input_ids, self.position_ids, offsets, self.max_length)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input_ids, self.position_ids, self.offsets

    def to(self, device: torch.device | str) -> PackedText:
        """The same captions on ``device``; from page-locked memory the copy does not wait."""
        moved = [x.to(device, non_blocking=True) for x in self.tensors]
        return PackedText(*moved, self.max_length)

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def with_first_token(self, token_id: int, captions: int) -> PackedText:
        """The same, the first ``captions`` beginning with ``token_id``, as ITG puts [DEC] in the place of [CLS]."""
        input_ids = self.input_ids.index_fill(0, self.offsets[:captions], token_id)
        return PackedText(input_ids, self.position_ids, self.offsets, self.max_length)

    def next_tokens(self) -> tuple[Tensor, Tensor]:
        """The rows that predict a next token, all but each caption's last, and the ids of those next tokens."""
        not_last = torch.ones_like(self.input_ids, dtype=torch.bool).index_fill(0, self.offsets[1:] - 1, False)
        rows = not_last.nonzero_static(size=self.num_rows - len(self)).squeeze(1)
        return rows, self.input_ids[rows + 1]

    def select(self, index: Tensor, num_rows: int, *, fill: int = 0) -> PackedText:
        """Captions ``index`` in that order, repeats allowed; ``num_rows`` is the sum of their lengths, or with ``fill``
        as in :meth:`filled`.
        """
        offsets = _lengths_to_offsets(self.lengths[index])
        if fill:
            offsets = self._with_fillers(offsets, num_rows, fill)
            index = torch.nn.functional.pad(index, (0, self.fillers(fill)))
        rows = _rows_of(index, self.offsets, offsets, num_rows)
        if fill:
            rows = rows.clamp(max=self.num_rows - 1)
        return PackedText(self.input_ids[rows], self.position_ids[rows], offsets, self.max_length)

    def filled(self, num_rows: int, fill: int) -> PackedText:
        """The same up to ``num_rows``, at most ``fill`` of them more: then captions of arbitrary tokens follow,
        ``fillers(fill)`` of them, some empty, so that shapes depend on these two numbers alone.
        """
        missing = num_rows - self.num_rows
        ids = (torch.nn.functional.pad(x, (0, missing)) for x in (self.input_ids, self.position_ids))
        return PackedText(*ids, self._with_fillers(self.offsets, num_rows, fill), self.max_length)

    def _with_fillers(self, offsets: Tensor, num_rows: int, fill: int) -> Tensor:
        fillers = torch.arange(1, self.fillers(fill) + 1, device=offsets.device)
        return torch.cat([offsets, (offsets[-1] + self.max_length * fillers).clamp(max=num_rows)])

    def fillers(self, fill: int) -> int:
        """How many captions of at most ``max_length`` tokens ``fill`` rows take."""
        return -(-fill // self.max_length)

    @staticmethod
    def concatenate(*texts: PackedText) -> PackedText:
        return PackedText(
            torch.cat([text.input_ids for text in texts]),
            torch.cat([text.position_ids for text in texts]),
            _lengths_to_offsets(torch.cat([text.lengths for text in texts])),
            max(text.max_length for text in texts),
        )


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Which packed rows form which sequence, under which mask, looking at which image.

    Sequences with queries come first and all have ``num_queries`` of them: sequence ``s`` owns query rows
    ``s * num_queries`` up to ``(s + 1) * num_queries``. Its text rows are ``text_offsets[s]`` to ``text_offsets[s +
    1]``, counted from the first text row. :meth:`build` checks its arguments; the bare constructor trusts them.

    Args:
        num_queries (int): queries of each sequence that has any; 0 when none has.
        image_index (Tensor): (query sequences,) int64, the image that each sequence with queries looks at.
        text_offsets (Tensor): (sequences + 1,) int64.
        masks (Tensor): (sequences,) int64, values of :class:`Mask`.
        num_text_rows, max_text_length (int): known on the host; the second at least the longest text.
        attention_mask (Tensor, Optional): (sequences, width, width) with ``width = num_queries + max_text_length``, for
            masks that no :class:`Mask` describes; bool (True = may look) or float (added to the scores). All texts are
            then ``max_text_length`` long. Only the reference backend takes it.
    """

    num_queries: int
    image_index: Tensor
    text_offsets: Tensor
    masks: Tensor
    num_text_rows: int
    max_text_length: int
    attention_mask: Tensor | None = None
    _by_image: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        *,
        num_queries: int,
        image_index: Tensor | list[int],
        text_lengths: Tensor | list[int],
        masks: Mask | list[Mask],
        num_images: int,
        attention_mask: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> SequenceLayout:
        """A checked layout.

        Args:
            num_queries (int): queries of each of the first ``len(image_index)`` sequences.
            image_index (Tensor or list): (query sequences,) images in [0, num_images).
            text_lengths (Tensor or list): (sequences,) tokens, 0 allowed where there are queries.
            masks (Mask or list): one for all sequences, or one each.
            num_images (int): images that the sequences may look at.
            attention_mask (Tensor, Optional): see the class.
            device (torch.device, Optional): where the layout lives.

        Raises:
            ValueError: an index out of range, an empty sequence, lengths that disagree; the message names the argument.
        """
        image_index = torch.as_tensor(image_index, dtype=torch.int64, device=device)
        text_lengths = torch.as_tensor(text_lengths, dtype=torch.int64, device=device)
        images, lengths = image_index.tolist(), text_lengths.tolist()
        if not lengths:
            raise ValueError("text_lengths must name at least one sequence, got none")
        if num_queries < 0 or (images and num_queries == 0):
            raise ValueError(f"num_queries must be positive where image_index names sequences, got {num_queries}")
        if len(images) > len(lengths):
            raise ValueError(f"image_index has {len(images)} sequences, but text_lengths only {len(lengths)}")
        if any(not 0 <= i < num_images for i in images):
            raise ValueError(
                f"image_index must lie in [0, {num_images}), got {[i for i in images if not 0 <= i < num_images]}"
            )
        if min(lengths) < 0 or any(n == 0 for n in lengths[len(images) :]):
            raise ValueError(f"text_lengths must be positive (0 only beside queries), got {lengths}")
        each = [masks] * len(lengths) if isinstance(masks, Mask) else list(masks)
        if len(each) != len(lengths):
            raise ValueError(f"masks must be one Mask or {len(lengths)} of them, got {len(each)}")
        if attention_mask is not None:
            width = (num_queries if images else 0) + max(lengths)
            if len(set(lengths)) > 1 or attention_mask.shape != (len(lengths), width, width):
                raise ValueError(
                    f"attention_mask must be ({len(lengths)}, {width}, {width}) over texts of one length, got "
                    f"{tuple(attention_mask.shape)} over lengths {sorted(set(lengths))}"
                )
        return cls(
            num_queries=num_queries if images else 0,
            image_index=image_index,
            text_offsets=_lengths_to_offsets(text_lengths),
            masks=torch.tensor([int(mask) for mask in each], device=text_lengths.device),
            num_text_rows=sum(lengths),
            max_text_length=max(lengths),
            attention_mask=attention_mask,
        )

    @property
    def num_sequences(self) -> int:
        return self.masks.shape[0]

    @property
    def num_query_sequences(self) -> int:
        return self.image_index.shape[0]

    @property
    def num_query_rows(self) -> int:
        return self.num_query_sequences * self.num_queries

    @property
    def num_rows(self) -> int:
        return self.num_query_rows + self.num_text_rows

    def sequences_by_image(self, num_images: int) -> tuple[Tensor, Tensor]:
        """The query sequences in the order of their images, and where each image's begin among them.

        Shapes: (query sequences,) and (num_images + 1,), int64.
        """
        if num_images not in self._by_image:
            images, order = self.image_index.sort(stable=True)
            bounds = torch.arange(num_images + 1, device=images.device)
            self._by_image[num_images] = order, torch.searchsorted(images, bounds)
        return self._by_image[num_images]

    @cached_property
    def is_row(self) -> Tensor:
        """(sequences, width) bool: the places of the padded form that hold a row."""
        sequences = torch.arange(self.num_sequences, device=self.masks.device)
        columns = torch.arange(self.max_text_length, device=self.masks.device)
        queries = (sequences < self.num_query_sequences)[:, None].expand(-1, self.num_queries)
        return torch.cat([queries, columns < self.text_offsets.diff()[:, None]], dim=1)

    @cached_property
    def padded_rows(self) -> Tensor:
        """(sequences, width) int64: the packed row at each place of the padded form [queries | text]; row 0 at
        padding.
        """
        sequences = torch.arange(self.num_sequences, device=self.masks.device)[:, None]
        queries = sequences * self.num_queries + torch.arange(self.num_queries, device=self.masks.device)
        columns = torch.arange(self.max_text_length, device=self.masks.device)
        text = self.num_query_rows + self.text_offsets[:-1, None] + columns
        return torch.cat([queries, text], dim=1).masked_fill(~self.is_row, 0)

    @cached_property
    def row_places(self) -> Tensor:
        """(rows,) int64: where each packed row lies in the flattened padded form, the inverse of ``padded_rows``."""
        width = self.num_queries + self.max_text_length
        queries = torch.arange(self.num_query_sequences, device=self.masks.device)[:, None] * width
        queries = (queries + torch.arange(self.num_queries, device=self.masks.device)).flatten()
        begin = torch.arange(self.num_sequences, device=self.masks.device) * width + self.num_queries
        shift = begin - self.text_offsets[:-1]
        text = torch.repeat_interleave(shift, self.text_offsets.diff(), output_size=self.num_text_rows)
        return torch.cat([queries, text + torch.arange(self.num_text_rows, device=self.masks.device)])

    @cached_property
    def padded_mask(self) -> Tensor:
        """(sequences, 1, width, width): who may look at whom in the padded form, as SDPA's ``attn_mask`` takes it."""
        if self.attention_mask is not None:
            return self.attention_mask[:, None]
        places = torch.arange(self.num_queries + self.max_text_length, device=self.masks.device)
        reader, read = places[:, None], places[None, :]
        query_reader, query_read = reader < self.num_queries, read < self.num_queries
        sees = torch.stack(
            [
                query_reader == query_read,
                query_read | (~query_reader & (read <= reader)),
                torch.ones_like(query_reader | query_read),
            ]
        )
        return (sees[self.masks] & self.is_row[:, None, :])[:, None]
