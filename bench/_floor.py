"""The matrix products that a step of stage 1 needs, whoever runs it: what its time is held against."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import torch
from _harness import PRODUCTS, Setup, seconds_in_a_row, time_products

from qformer_fast import QFormerConfig

Products = Counter[tuple[str, tuple[int, int, int]]]


def stage1_products(
    config: QFormerConfig, *, batch: int, tokens: int, text_rows: int, negative_rows: int, embed_dim: int = 256
) -> Products:
    """Of forward and backward in two sweeps over packed rows, keys and values once an image; attention's own are not
    among them.

    Args:
        batch, tokens (int): images, and tokens of each.
        text_rows, negative_rows (int): tokens of the batch's captions, and of the negative captions.
        embed_dim (int): width of the ITC features.

    Returns:
        Counter: (key of ``PRODUCTS``, (rows, out, in)) -> how often.
    """
    hidden, wide, found = config.hidden_size, config.intermediate_size, Counter()

    def linear(rows: int, out: int, width: int, *names: str) -> None:
        found.update((name, (rows, out, width)) for name in names or ("out", "dx", "dweight"))

    images = len(config.cross_attention_layers)
    linear(batch * tokens, images * 2 * hidden, config.encoder_hidden_size, "out", "dweight")
    queries = batch * config.num_query_tokens
    # the last feed-forward layer's text: what predicts a token and each caption's first; nothing that ITM reads
    sweeps = (queries, 2 * text_rows, text_rows), (3 * queries, 2 * text_rows + negative_rows, 0)
    for query_rows, rows, last_rows in sweeps:
        for layer in range(config.num_hidden_layers):
            linear(query_rows + rows, 3 * hidden, hidden)
            linear(query_rows + rows, hidden, hidden)
            if config.has_cross_attention(layer):
                linear(query_rows, hidden, hidden)
                linear(query_rows, hidden, hidden)
            feed_forward_rows = query_rows, rows if layer < config.num_hidden_layers - 1 else last_rows
            for count in filter(None, feed_forward_rows):
                linear(count, wide, hidden)
                linear(count, hidden, wide)
    linear(text_rows - batch, hidden, hidden)
    # cuBLAS is twice as slow on a vocabulary that is no multiple of 8
    linear(text_rows - batch, -(-config.vocab_size // 64) * 64, hidden)
    linear(queries, embed_dim, hidden)
    linear(batch, embed_dim, hidden)
    linear(3 * queries, 2, hidden)
    return found


def flops(products: Products) -> int:
    return sum(2 * rows * out * width * count for (_, (rows, out, width)), count in products.items())


def time_floor(products: Products, setup: Setup, in_a_row: int) -> dict[str, Any]:
    """Milliseconds of all ``products``, each timed by itself in a CUDA graph, with rests between samples of 2 ms; of
    one graph of them all, replayed ``in_a_row`` times without a rest, where a GPU's power may not suffice for the same
    clocks; and their GFLOP.
    """
    alone = time_products(products, setup)["p50_us"] / 1e3
    together = time_together(products, setup, in_a_row)
    return {
        "ms": round(alone, 2),
        "in_a_row_ms": round(together, 2),
        "gflop": round(flops(products) / 1e9, 1),
    }


def time_together(products: Products, setup: Setup, in_a_row: int) -> float:
    """Milliseconds: the median over ``setup.repeats``."""
    factors = [PRODUCTS[name][0](*shape) for name, shape in products]
    pools = [setup.new(max(a * b for a, b in sides)) for sides in zip(*factors, strict=True)]
    calls = []
    for (name, _), shapes, count in zip(products, factors, products.values(), strict=True):
        a, b = (pool[: rows * width].view(rows, width) for pool, (rows, width) in zip(pools, shapes, strict=True))
        # spread over the graph, as the layers' products are
        calls += [((i + 0.5) / count, PRODUCTS[name][1], a, b) for i in range(count)]
    calls.sort(key=lambda call: call[0])

    def run() -> None:
        for _, multiply, a, b in calls:
            multiply(a, b)

    if setup.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with setup.stream():
            run()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                run()
        run = graph.replay
    return statistics.median(seconds_in_a_row(run, in_a_row, setup.device) * 1e3 for _ in range(setup.repeats))
