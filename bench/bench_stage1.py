"""Forward + backward of stage 1: the packed two-sweep path, on a GPU also as CUDA graphs, the original-order reference,
the original's own code, and that code with the one import changed that integrations.lavis asks for.

All rows of a batch size come from one run: the same weights, the same batch, taken in turn. Before anything is timed
the three losses of all rows must agree. FLOPs are counted, not estimated: those of the matrix products that each row
really ran.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import _original
import torch
from _breakdown import measure_breakdown
from _floor import stage1_products, time_floor
from _harness import Setup, graph_pools, seconds_in_a_row
from _machine import write_result
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.backend import use_backend
from qformer_fast.config import Checkpointing
from qformer_fast.models.blip2_qformer import Stage1Output
from qformer_fast.reference import encoder
from qformer_fast.reference.stage1 import original_order_stage1
from qformer_fast.training.graphs import GraphedStage1

ROWS = ("packed", "graphs", "reference", "original", "original_drop_in")
# the same with their encoder's layers under torch.compile
COMPILED_ROWS = ("reference_compiled", "original_compiled")
LOSSES = ("loss_itc", "loss_itm", "loss_itg")
PADDED_LENGTH = 32
# steps of a sample, between which the device has no rest
IN_A_ROW = {"cpu": 1, "cuda": 4}
# losses of one batch in one precision, different orders of summation: fp32 path error, and bf16's 8 bits under autocast
AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}


def make_batch(batch: int, tokens: int, shortest: int, longest: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens, and captions of uniformly drawn lengths padded to 32 as the original does."""
    lengths = torch.randint(shortest, longest + 1, (batch,))
    input_ids = torch.randint(1000, 30522, (batch, PADDED_LENGTH))
    columns = torch.arange(PADDED_LENGTH)
    input_ids[:, 0] = 101
    input_ids[torch.arange(batch), lengths - 1] = 102
    input_ids[columns >= lengths[:, None]] = 0
    images = torch.randn(batch, tokens, 1408)
    return images.to(device), input_ids.to(device), (input_ids != 0).long().to(device)


def build_rows(
    model: Blip2QFormer, batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype | None, names: Sequence[str]
) -> dict[str, tuple[torch.nn.Module, Callable]]:
    """Name -> (module whose gradients count, forward of the batch; with graphs its backward too)."""
    images, input_ids, mask = batch
    rows: dict[str, tuple[torch.nn.Module, Callable]] = {}
    if "packed" in names:
        rows["packed"] = (model, lambda **o: model(images, input_ids, mask, **o))
    if images.is_cuda and "graphs" in names:
        graphed = GraphedStage1(model, dtype=dtype)
        captions = input_ids.cpu(), mask.cpu()
        rows["graphs"] = (model, lambda: graphed(images, *captions))
    for name, layers in (("reference", encoder._layer), ("reference_compiled", _compile(encoder._layer))):
        if name in names:
            rows[name] = (model, functools.partial(_reference_step, layers, model, images, input_ids, mask))
    for name in ("original", "original_drop_in", "original_compiled"):
        if name in names:
            original = _original.build_stage1(model, drop_in=name == "original_drop_in")
            if name == "original_compiled":
                for layer in original.Qformer.bert.encoder.layer:
                    layer.forward = _compile(layer.forward)
            rows[name] = (original, lambda step=original: step({"image": images, "text_input": (input_ids, mask)}))
    return rows


def _compile(layer: Callable) -> Callable:
    """Layer by layer: layers that are alike share what was compiled, so it takes seconds where whole encoders take
    minutes."""
    torch._dynamo.config.recompile_limit = 64  # kinds of layers times passes times modes
    return torch.compile(layer, dynamic=False)


def _reference_step(layer: Callable, *args, **options) -> Stage1Output:
    with mock.patch.object(encoder, "_layer", layer):
        return original_order_stage1(*args, **options)


def check_agreement(model, rows, batch: int, autocast, tolerance: float) -> dict[str, list[float]]:
    """The three losses of every row with dropout off and fixed negatives; a row that lacks memory is taken out.

    Raises:
        AssertionError: they differ; nothing is timed then.
    """
    negatives = ((torch.arange(batch) + 1) % batch, (torch.arange(batch) + 2) % batch)
    losses = {}

    def check(name: str, forward: Callable) -> None:
        if name == "graphs":
            if "packed" in rows:
                _check_graphs(rows, autocast, tolerance)
            return
        with torch.no_grad(), autocast():
            if name.startswith("original"):
                with _original.fixed_negatives(*negatives):
                    out = forward()
                out.loss_itg = out.loss_lm
            else:
                out = forward(negatives=negatives)
        losses[name] = [float(getattr(out, loss)) for loss in LOSSES]

    for name, (module, forward) in list(rows.items()):
        module.eval()
        if not _fits(functools.partial(check, name, forward)):
            _drop(rows, name)
        module.train()
    truth = losses.get("reference", next(iter(losses.values()), []))
    for name, values in losses.items():
        worst = max(abs(a - b) for a, b in zip(values, truth, strict=True))
        assert worst <= tolerance, (
            f"losses of {name} differ from the reference's or the first row's by {worst}: {losses}"
        )
    return losses


def _check_graphs(rows, autocast, tolerance: float) -> None:
    """Graphs draw their own negatives: the packed path gets the same ones."""
    out = rows["graphs"][1]()
    with torch.no_grad(), autocast():
        expected = rows["packed"][1](negatives=out.negatives)
    worst = max(abs(float(getattr(out, loss)) - float(getattr(expected, loss))) for loss in LOSSES)
    assert worst <= tolerance, f"losses of graphs differ from the packed path's by {worst}"


def measure(rows, autocast, repeats: int, device: str) -> dict[str, dict[str, Any]]:
    """Of every row the seconds of forward and backward, taken in turn; then forward's alone, and of a whole step with
    AdamW; FLOPs; on a GPU also the peak of memory, and for our own rows what the time goes to.

    On a GPU a time is the mean of steps in a row, which no host sync of ours parts, as in training. A row that lacks
    memory is taken out of ``rows``.
    """

    def forward_backward(module: torch.nn.Module, forward: Callable) -> None:
        module.zero_grad(set_to_none=True)
        with autocast():
            loss = forward().loss
        if loss.requires_grad:
            loss.backward()

    def forward_only(module: torch.nn.Module, forward: Callable) -> None:
        with autocast():
            forward()

    def seconds(run: Callable, module: torch.nn.Module, forward: Callable) -> float:
        return seconds_in_a_row(functools.partial(run, module, forward), IN_A_ROW[device], device)

    # peak_gib: what a step takes, its module's parameters and, held between steps, the pools of its graphs and the
    # gradients of "graphs"
    results: dict[str, dict[str, Any]] = {}
    checked = pools = graph_pools() if device == "cuda" else 0
    for name, row in list(rows.items()):
        if not _fits(functools.partial(seconds, forward_backward, *row)):
            del row
            _drop(rows, name)
            continue
        results[name] = {"seconds": []}
        if device == "cuda":
            row[0].zero_grad(set_to_none=True)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            seconds(forward_backward, *row)
            peak = torch.cuda.max_memory_allocated() - before
            held = sum(p.nbytes for p in row[0].parameters())
            held += held + checked if name == "graphs" else 0
            held += graph_pools() - pools
            pools = graph_pools()
            results[name]["peak_gib"] = round((peak + held) / 2**30, 2)
        if name == "graphs" or name in COMPILED_ROWS:
            plain = "packed" if name == "graphs" else name.removesuffix("_compiled")
            results[name]["gflop"] = results.get(plain, {}).get("gflop")
            continue
        results[name]["gflop"] = _gflop(functools.partial(forward_backward, *row))
    for _ in range(repeats):
        for name, row in rows.items():
            results[name]["seconds"].append(round(seconds(forward_backward, *row), 4))
    for name, (module, forward) in rows.items():
        result = results[name]
        if name != "graphs":
            result["forward"] = round(seconds(forward_only, module, forward), 4)
        if device == "cuda" and name in ("packed", "graphs"):
            result["breakdown"] = measure_breakdown(functools.partial(forward_backward, module, forward))
        # last of all, as it changes the weights
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=device == "cuda")

        def whole_step(module: torch.nn.Module, forward: Callable, optimizer=optimizer) -> None:
            forward_backward(module, forward)
            optimizer.step()

        if _fits(functools.partial(seconds, whole_step, module, forward)):
            result["step"] = round(seconds(whole_step, module, forward), 4)
        del optimizer, whole_step
        module.zero_grad(set_to_none=True)
    return results


def _fits(run: Callable[[], Any]) -> bool:
    try:
        run()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def _drop(rows: dict[str, tuple[torch.nn.Module, Callable]], name: str) -> None:
    module, _ = rows.pop(name)
    module.zero_grad(set_to_none=True)
    del module
    gc.collect()
    torch.cuda.empty_cache()


def _gflop(run: Callable[[], None]) -> float | None:
    """Of the products of ``run``, or None where the reference backend, which the counter sees into, lacks memory."""
    with use_backend("reference"), FlopCounterMode(display=False) as flops:
        fits = _fits(run)
    return round(flops.get_total_flops() / 1e9, 1) if fits else None


def bench_batch(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Losses, rows and, on a GPU, the floor of ``size`` pairs."""

    def autocast() -> torch.autocast:
        return torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")

    torch.manual_seed(0)
    config = QFormerConfig(
        num_hidden_layers=options.layers,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
    )
    model = Blip2QFormer(config).to(options.device).train()
    model.gradient_checkpointing_enable(options.checkpointing)
    batch = make_batch(size, options.tokens, *options.lengths, options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else None
    rows = build_rows(model, batch, dtype, options.rows)
    asked = list(rows)
    losses = check_agreement(model, rows, size, autocast, AGREEMENT[options.precision])
    if "graphs" in rows:  # the check's are of eval mode, and would count in their pool
        _drop(rows, "graphs")
        rows |= build_rows(model, batch, dtype, ["graphs"])
    results = measure(rows, autocast, options.repeats, options.device)
    ours = results.get("packed")
    for row in results.values():
        row["median"] = round(statistics.median(row["seconds"]), 4)
        if ours is None:
            continue
        ratios = [b / a for a, b in zip(ours["seconds"], row["seconds"], strict=True)]
        row["time_ratio"] = round(statistics.median(ratios), 3)
        known = row["gflop"] is not None and ours["gflop"] is not None
        row["flop_ratio"] = round(row["gflop"] / ours["gflop"], 3) if known else None
    results |= {name: {"error": "out of memory"} for name in asked if name not in results}
    if options.device == "cpu":
        return {"losses": losses, "rows": results, "floor": None}
    text_rows = int(batch[2].sum())  # of negatives too, on average
    rows.clear()
    del model, batch
    gc.collect()
    torch.cuda.empty_cache()
    sizes = dict(batch=size, tokens=options.tokens, text_rows=text_rows, negative_rows=text_rows)
    setup = Setup("cuda", dtype or torch.float32, repeats=10)
    floor = time_floor(stage1_products(config, **sizes), setup, IN_A_ROW["cuda"])
    timed = {name: row["median"] for name, row in results.items() if "error" not in row}
    for ratio, key in (("ratio", "ms"), ("in_a_row_ratio", "in_a_row_ms")):
        floor[ratio] = {name: round(median * 1e3 / floor[key], 2) for name, median in timed.items()}
    return {"losses": losses, "rows": results, "floor": floor}


def print_batch(size: int, found: dict[str, Any]) -> None:
    columns = "median s", "min s", "forward s", "step s", "peak GiB", "GFLOP", "time/packed", "FLOP/packed"
    print(f"{f'batch {size}':<20}" + "".join(f"{column:>12}" for column in columns))
    for name, row in found["rows"].items():
        if "error" in row:
            print(f"{name:<20} {row['error']}")
            continue
        values = [row["median"], min(row["seconds"])]
        values += [row.get(key) for key in ("forward", "step", "peak_gib", "gflop", "time_ratio", "flop_ratio")]
        print(f"{name:<20}" + "".join(f"{'' if value is None else value:>12}" for value in values))
        for family, (ms, launches) in row.get("breakdown", {}).get("families", {}).items():
            print(f"    {family:<36} {ms:>8.3f} ms {launches:>6} launches")
        if "breakdown" in row:
            print("    busy {busy_ms} of {span_ms} ms a step, idle {idle_share:.1%}".format(**row["breakdown"]))
    original = found["rows"].get("original", {})
    if original.get("flop_ratio"):
        speed, flops = original["time_ratio"], 1 / original["flop_ratio"]
        print(f"the packed path is {speed:.2f}x as fast as the original's code, with {flops:.0%} of its FLOPs")
    if floor := found["floor"]:
        print(f"the matrix products, each alone, take {floor['ms']} ms; times that: {floor['ratio']}")
        print(f"the matrix products, in a row, take {floor['in_a_row_ms']} ms; times that: {floor['in_a_row_ratio']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="pairs")
    parser.add_argument("--tokens", type=int, default=257, help="image tokens")
    parser.add_argument("--lengths", type=int, nargs=2, default=(6, 18), help="shortest and longest caption, in tokens")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", choices=get_args(Checkpointing), default="none", help="of packed and graphs")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS + COMPILED_ROWS,
        default=ROWS,
        help=f"{', '.join(ROWS)} by default; graphs are held to packed where that is among them",
    )
    parser.add_argument("--precision", choices=sorted(AGREEMENT), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file, written anew after every batch size")
    options = parser.parse_args()
    if reason := _original.why_missing():
        parser.exit(1, reason + "\n")
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    result: dict[str, Any] = {"bench": "stage1", "settings": settings, "batches": {}}
    with _original.process_group():
        for size in options.batch:
            found = result["batches"][str(size)] = bench_batch(options, size)
            print_batch(size, found)
            gc.collect()
            torch.cuda.empty_cache()
            if options.output:
                write_result(options.output, result)


if __name__ == "__main__":
    main()
