"""Few images, queries without text: Hugging Face's Q-Former eager and compiled, our CUDA graphs, and all layers in one
launch (csrc/query_encoder.cuh), beside the memory's copy bandwidth measured in the same run.

Our two rows leave out what the public call does on the host to notice changed weights; every row must agree with
Hugging Face's module in fp32 as closely as that module does in the rows' dtype.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import write_result
from bench_inference import DTYPES, FACTOR, SHAPES, build, build_row, milliseconds
from torch import Tensor, nn

from qformer_fast.integrations.hf import STATE, replace_qformer
from qformer_fast.models.inference import _Runner
from qformer_fast.models.one_launch import why_not

ROWS = ("hf_eager", "hf_compiled", "graphs", "one_launch")


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), 3, "cuda").values())
    return 2 * source.numel() / best * 1e3


def our_rows(model: nn.Module, queries: nn.Parameter, images: Tensor) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """Our rows, and the bytes of weights that one launch and the product before it read."""
    module = copy.deepcopy(model)
    replace_qformer(module)
    qformer = module.__dict__[STATE].qformer
    if reason := why_not(qformer.config, queries.shape[1], queries.dtype, queries.device):
        raise SystemExit(f"one launch: {reason}")
    runner, graphs = (_Runner(qformer, queries, queries.dtype, None) for _ in range(2))
    graphs.one_launch, one = None, runner.one_launch
    rows = {
        "graphs": lambda: graphs.run(queries, images, True, True),
        "one_launch": lambda: one.run(runner.project(images.flatten(0, 1)), len(images)),
    }
    return rows, one.weights.nbytes + runner.kv_weight.nbytes


@torch.no_grad()
def measure(batch: int, names: list[str], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    shape = SHAPES["blip2"]
    model = build(shape, torch.float32, "cuda")
    images = torch.randn(batch, shape.tokens, model.config.encoder_hidden_size, device="cuda")
    queries = torch.randn(1, shape.queries, model.config.hidden_size, device="cuda")
    truth = model(query_embeds=queries.expand(batch, -1, -1), encoder_hidden_states=images).last_hidden_state
    model, images, queries = model.to(dtype), images.to(dtype), nn.Parameter(queries.to(dtype))
    plain = build_row("hf_sdpa", model, queries, images)()
    allowed = FACTOR * float((plain.float() - truth).abs().max()) + 1e-5
    ours, weights = our_rows(model, queries, images)
    rows = {}
    for name in names:
        run = ours[name] if name in ours else build_row(name, model, queries, images)
        for _ in range(3):
            found = run()
        error = float((found.float() - truth).abs().max())
        assert error <= allowed, f"{name} is {error} away from fp32, {allowed} is allowed"
        rows[name] = milliseconds(run, repeats, "cuda") | {"error": round(error, 6)}
        if name == "one_launch":
            rows[name]["weights_bytes_per_second"] = round(weights / rows[name]["ms"] * 1e3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="images")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a JSON file, written anew after every batch size")
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result: dict[str, Any] = {"bench": "one_launch", "settings": settings, "copy_bytes_per_second": copy_bandwidth()}
    result["batches"] = {}
    for batch in options.batch:
        result["batches"][str(batch)] = measure(batch, options.rows, DTYPES[options.precision], options.repeats)
        for name, row in result["batches"][str(batch)].items():
            print(f"{batch:>2} {name:<12} {row}", flush=True)
        if options.output:
            write_result(options.output, result)


if __name__ == "__main__":
    main()
