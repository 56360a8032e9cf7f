"""What the attention kernels share: where a sequence's rows lie, who sees whom, and how exactly products are taken."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sequence_rows(sequence, num_query_rows, num_queries, text_offsets_ptr):
    """Queries of a sequence, its first query row, its first text row, its length; rows in int64."""
    queries = tl.where(sequence * num_queries < num_query_rows, num_queries, 0)
    begin = tl.load(text_offsets_ptr + sequence)
    end = tl.load(text_offsets_ptr + sequence + 1)
    first_query = sequence.to(tl.int64) * num_queries
    first_text = num_query_rows + begin
    return queries, first_query, first_text, queries + (end - begin).to(tl.int32)


@triton.jit
def visible_range(reader, queries, length, kind):
    """First and end of the positions that position ``reader`` of [queries | text] sees; ``kind`` is a value of
    layout.Mask. A reader past the end sees all.
    """
    reads_text = reader >= queries
    first = tl.where((kind == 0) & reads_text & (reader < length), queries, 0)
    unimodal = tl.where(reads_text, length, queries)
    causal = tl.where(reads_text, tl.minimum(reader + 1, length), queries)
    return first, tl.where(kind == 0, unimodal, tl.where(kind == 1, causal, length))


def precision(x: Tensor) -> str:
    """tl.dot's input_precision: fp32 products are taken in fp32, not in tf32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
