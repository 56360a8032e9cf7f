import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qformer_fast import Mask, PackedText, SequenceLayout

LIMITS = dict(vocab_size=100, max_position_embeddings=512)


def padded(rows: list[list[int]], width: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids, mask


captions = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(rows=captions, left=st.booleans(), extra=st.integers(0, 3))
def test_packing_keeps_tokens_and_columns(rows, left, extra):
    width = max(map(len, rows)) + extra
    text = PackedText.from_padded(*padded(rows, width, left), **LIMITS)
    assert text.input_ids.tolist() == [token for row in rows for token in row]
    columns = [range(width - len(row), width) if left else range(len(row)) for row in rows]
    assert text.position_ids.tolist() == [column for row in columns for column in row]
    assert text.lengths.tolist() == [len(row) for row in rows]
    assert text.max_length == max(map(len, rows))


@settings(deadline=None, max_examples=60)
@given(rows=captions, data=st.data())
def test_select_and_next_tokens(rows, data):
    text = PackedText.from_padded(*padded(rows, 9), **LIMITS)
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    chosen = text.select(torch.tensor(index), sum(len(rows[i]) for i in index))
    assert chosen.input_ids.tolist() == [token for i in index for token in rows[i]]
    assert chosen.offsets.diff().tolist() == [len(rows[i]) for i in index]
    where, following = text.next_tokens()
    assert following.tolist() == [token for row in rows for token in row[1:]]
    assert text.input_ids[where].tolist() == [token for row in rows for token in row[:-1]]
    begun = text.with_first_token(99, len(rows))
    assert begun.input_ids.tolist() == [token for row in rows for token in [99, *row[1:]]]


@settings(deadline=None, max_examples=60)
@given(rows=captions, extra=st.integers(0, 40), data=st.data())
def test_fillers_follow_the_captions(rows, extra, data):
    text = PackedText.from_padded(*padded(rows, 9), **LIMITS)
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    tokens = [token for i in index for token in rows[i]]
    chosen = text.select(torch.tensor(index), len(tokens))
    fill = extra + data.draw(st.integers(1, 20))
    filled = text.select(torch.tensor(index), len(tokens) + extra, fill=fill)
    also = chosen.filled(len(tokens) + extra, fill)
    assert torch.equal(also.offsets, filled.offsets) and also.input_ids.tolist()[: len(tokens)] == tokens
    assert torch.equal(also.position_ids[: len(tokens)], filled.position_ids[: len(tokens)])
    assert filled.num_rows == len(tokens) + extra == filled.offsets[-1] == also.num_rows
    assert len(filled) == len(index) + text.fillers(fill)
    assert filled.input_ids.tolist()[: len(tokens)] == tokens
    assert filled.lengths[: len(index)].tolist() == [len(rows[i]) for i in index]
    assert filled.lengths.min() >= 0 and filled.lengths.max() <= text.max_length
    begun = filled.with_first_token(99, len(index))
    assert begun.input_ids.tolist()[: len(tokens)] == [token for i in index for token in [99, *rows[i][1:]]]
    assert torch.equal(begun.input_ids[len(tokens) :], filled.input_ids[len(tokens) :])


def test_holes_in_a_mask_are_dropped():
    text = PackedText.from_padded(torch.tensor([[7, 8, 9]]), torch.tensor([[1, 0, 1]]), **LIMITS)
    assert text.input_ids.tolist() == [7, 9]
    assert text.position_ids.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        (torch.zeros(0, 4, dtype=torch.int64), None, r"input_ids must be \(batch, length\) with batch >= 1"),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 0]]), r"attention_mask .* rows \[1\]"),
        (torch.ones(1, 513, dtype=torch.int64), None, "input_ids is 513 tokens long, but there are 512"),
        (torch.tensor([[5, 100]]), None, r"input_ids must lie in \[0, 100\), got 100"),
        (torch.tensor([[5, -1]]), None, r"input_ids must lie in \[0, 100\), got -1"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4), r"attention_mask must be \(2, 3\) as input_ids"),
    ],
)
def test_bad_captions_are_named(ids, mask, match):
    with pytest.raises(ValueError, match=match):
        PackedText.from_padded(ids, mask, **LIMITS)


def brute_force_sees(layout_spec, reader, read):
    """Whether ``reader`` sees ``read``; both (kind, position) of one sequence; the paper's Fig. 2 in words."""
    mask, (reader_kind, i), (read_kind, j) = layout_spec, reader, read
    if mask is Mask.BIDIRECTIONAL:
        return True
    if mask is Mask.UNIMODAL:
        return reader_kind == read_kind
    if reader_kind == "query":
        return read_kind == "query"
    return read_kind == "query" or j <= i


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    alone=st.lists(st.integers(1, 5), max_size=3),
    data=st.data(),
)
def test_padded_form_agrees_with_the_rows(lengths, alone, data):
    num_queries, texts = 3, lengths + alone
    masks = [data.draw(st.sampled_from(list(Mask))) for _ in texts]
    layout = SequenceLayout.build(
        num_queries=num_queries, image_index=[0] * len(lengths), text_lengths=texts, masks=masks, num_images=1
    )
    width = num_queries + max(texts)
    assert layout.padded_rows.shape == (len(texts), width)
    query_row, text_row, seen_rows = 0, num_queries * len(lengths), []
    for s, length in enumerate(texts):
        members = [("query", i) for i in range(num_queries)] if s < len(lengths) else []
        rows = list(range(query_row, query_row + len(members)))
        query_row += len(members)
        places = list(range(len(members)))
        members += [("text", i) for i in range(length)]
        rows += list(range(text_row, text_row + length))
        places += list(range(num_queries, num_queries + length))
        text_row += length
        assert layout.padded_rows[s, places].tolist() == rows
        assert layout.row_places[rows].tolist() == [s * width + place for place in places]
        allowed = torch.zeros(width, width, dtype=torch.bool)
        for a, reader in zip(places, members, strict=True):
            for b, read in zip(places, members, strict=True):
                allowed[a, b] = brute_force_sees(masks[s], reader, read)
        assert torch.equal(layout.padded_mask[s, 0][places], allowed[places])
        seen_rows += rows
    assert sorted(seen_rows) == list(range(layout.num_rows))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_index": [0, 2]}, r"image_index must lie in \[0, 2\), got \[2\]"),
        ({"image_index": [0, -1]}, r"image_index must lie in \[0, 2\), got \[-1\]"),
        ({"image_index": [0, 1, 0, 1]}, "image_index has 4 sequences, but text_lengths only 3"),
        ({"text_lengths": [4, 0, 0]}, "text_lengths must be positive"),
        ({"text_lengths": [4, -1, 2]}, "text_lengths must be positive"),
        ({"text_lengths": []}, "text_lengths must name at least one sequence"),
        ({"num_queries": 0}, "num_queries must be positive"),
        ({"masks": [Mask.UNIMODAL]}, "masks must be one Mask or 3 of them"),
        ({"attention_mask": torch.ones(3, 7, 7)}, "attention_mask must be"),
    ],
)
def test_bad_layouts_are_named(change, match):
    good = dict(num_queries=3, image_index=[0, 1], text_lengths=[4, 0, 2], masks=Mask.BIDIRECTIONAL, num_images=2)
    SequenceLayout.build(**good)
    with pytest.raises(ValueError, match=match):
        SequenceLayout.build(**{**good, **change})
