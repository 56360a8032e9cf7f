"""Queries without text: Hugging Face's Q-Former as it is, in a CUDA graph and compiled, and with its forward swapped.

All rows of a shape come from one run, with the same weights and the same images. Before anything is timed every row
must agree with Hugging Face's module in fp32 as closely as that module does in the rows' dtype.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _breakdown import measure_breakdown
from _harness import seconds_in_a_row
from _machine import write_result
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from qformer_fast.integrations.hf import replace_qformer

ROWS = ("hf_eager", "hf_sdpa", "hf_graph", "hf_compiled", "ours")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# how much further from fp32 a row may be than Hugging Face's own code in the same dtype
FACTOR = 3.0


class Shape(NamedTuple):
    """Sizes of a Q-Former and what it is given; where ``shared`` one set of queries serves all images."""

    queries: int
    tokens: int
    config: dict[str, Any]
    shared: bool = True


SHAPES = {
    "blip2": Shape(32, 257, {}),
    # windows of 15 frames, 3 queries each
    "granite_speech": Shape(
        3,
        15,
        dict(
            hidden_size=1024,
            num_hidden_layers=2,
            num_attention_heads=16,
            intermediate_size=4096,
            encoder_hidden_size=1024,
            cross_attention_frequency=1,
        ),
    ),
    # windows of 8 x 8 patches, 4 x 4 queries that depend on the picture
    "granite_vision": Shape(
        16,
        64,
        dict(
            hidden_size=1152,
            num_hidden_layers=1,
            num_attention_heads=18,
            intermediate_size=3072,
            encoder_hidden_size=1152,
            cross_attention_frequency=1,
        ),
        shared=False,
    ),
}


def build(shape: Shape, dtype: torch.dtype, device: str) -> Blip2QFormerModel:
    torch.manual_seed(0)
    model = Blip2QFormerModel(Blip2QFormerConfig(**shape.config, attn_implementation="sdpa"))
    return model.to(device, dtype).eval()


def with_attention(model: Blip2QFormerModel, implementation: str) -> Blip2QFormerModel:
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return model


def graphed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` as a CUDA graph whose inputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def build_row(name: str, model: Blip2QFormerModel, queries: nn.Parameter, images: Tensor) -> Callable[[], Tensor]:
    def call(module: Callable) -> Tensor:
        given = queries.expand(len(images), -1, -1) if len(queries) == 1 else queries
        return module(query_embeds=given, encoder_hidden_states=images).last_hidden_state

    if name == "ours":
        module = copy.deepcopy(model)
        replace_qformer(module)
    else:
        module = with_attention(model, "eager" if name == "hf_eager" else "sdpa")
    if name == "hf_compiled":
        torch.compiler.reset()
        module = torch.compile(module, mode="max-autotune", dynamic=False)
    if name == "hf_graph":
        return graphed(lambda: call(module))
    return lambda: call(module)


def milliseconds(run: Callable[[], Tensor], repeats: int, device: str) -> dict[str, float]:
    """Of a call among some 20 ms of them after a rest, among 200 ms of them without one, which a GPU's power limit may
    slow down, and of one that is waited for. The host's time counts in all three.
    """
    one = seconds_in_a_row(run, 3, device)

    def sample(seconds: float) -> list[float]:
        times = max(1, int(seconds / one))
        found = []
        for _ in range(repeats):
            time.sleep(0.1)
            seconds_in_a_row(run, 1, device)  # wakes the host up
            found.append(seconds_in_a_row(run, times, device) * 1e3)
        return found

    short, alone = sample(0.02), sample(0.0)
    return {
        "ms": round(statistics.median(short), 4),
        "min_ms": round(min(short), 4),
        "sustained_ms": round(statistics.median(sample(0.2)), 4),
        "alone_ms": round(statistics.median(alone), 4),
    }


@torch.no_grad()
def measure(
    shape: Shape, batch: int, names: list[str], dtype: torch.dtype, repeats: int, device: str
) -> dict[str, Any]:
    model = build(shape, torch.float32, device)
    images = torch.randn(batch, shape.tokens, model.config.encoder_hidden_size, device=device)
    count = 1 if shape.shared else batch
    queries = torch.randn(count, shape.queries, model.config.hidden_size, device=device)
    truth = model(query_embeds=queries.expand(batch, -1, -1), encoder_hidden_states=images).last_hidden_state
    model, images, queries = model.to(dtype), images.to(dtype), nn.Parameter(queries.to(dtype))
    plain = build_row("hf_sdpa", model, queries, images)()
    allowed = FACTOR * float((plain.float() - truth).abs().max()) + 1e-5
    rows = {}
    for name in names:
        run = build_row(name, model, queries, images)
        for _ in range(3):
            found = run()
        error = float((found.float() - truth).abs().max())
        assert error <= allowed, f"{name} is {error} away from fp32, {allowed} is allowed"
        rows[name] = milliseconds(run, repeats, device) | {"error": round(error, 6)}
        if name == "ours" and device == "cuda":
            rows[name]["breakdown"] = measure_breakdown(run)
        del run, found
    others = {name: row["ms"] for name, row in rows.items() if name != "ours"}
    best = min(others, key=others.get, default=None)
    ratio = round(others[best] / rows["ours"]["ms"], 2) if best and "ours" in rows else None
    return {"rows": rows, "best_other": best, "times_as_fast": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="blip2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256], help="images, or windows")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--layers", type=int, help="of the Q-Former; the shape's by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file, written anew after every batch size")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = shape._replace(config=shape.config | {"num_hidden_layers": options.layers})
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result: dict[str, Any] = {"bench": "inference", "settings": settings, "batches": {}}
    for batch in options.batch:
        names = [name for name in options.rows if options.device == "cuda" or name != "hf_graph"]
        found = measure(shape, batch, names, DTYPES[options.precision], options.repeats, options.device)
        result["batches"][str(batch)] = found
        for name, row in found["rows"].items():
            print(
                f"{options.shape} {batch:>4} {name:<12} {row['ms']:>9} ms, sustained {row['sustained_ms']:>9}, "
                f"alone {row['alone_ms']:>9}",
                flush=True,
            )
            for family, (ms, launches) in row.get("breakdown", {}).get("families", {}).items():
                print(f"    {family:<36} {ms:>8.3f} ms {launches:>6} launches")
        if found["times_as_fast"] is not None:
            print(f"    {found['times_as_fast']} times as fast as {found['best_other']}", flush=True)
        if options.output:
            write_result(options.output, result)


if __name__ == "__main__":
    main()
