"""Stage 1 trained on real pictures: loss curves beside the reference's, long runs, a run that is killed and resumed.

Pictures are the demo's drawings, their tokens (257 of 1408) those of a frozen ViT of EVA-CLIP-g's size with random
weights, extracted once. Every part says what it holds the figures to and fails where they do not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _machine import write_result
from torch import Tensor

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.backend import use_backend
from qformer_fast.data.batches import Batch, PairDataset, ShuffledBatches
from qformer_fast.data.captions import Pair
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.demo import emoji_pairs
from qformer_fast.models.blip2 import ImageEncoder
from qformer_fast.reference.stage1 import original_order_stage1
from qformer_fast.training.config import OptimizerConfig, RunConfig
from qformer_fast.training.graphs import GraphedStage1
from qformer_fast.training.loop import train

PARTS = ("curves", "long", "large_logits_bf16", "large_logits_fp16", "killed")
LOSSES = ("loss_itc", "loss_itm", "loss_itg")
# of a loss, at every step, beside the reference in the same precision: four times what bf16 itself changes of the
# reference at most, at least this
BAND, LEAST_BAND = 4.0, 0.02


def extract(folder: Path, pictures: int, device: str) -> PairDataset:
    """The first ``pictures`` drawings with their names; tokens are cached in ``folder``."""
    chosen = emoji_pairs.load_pictures()[:pictures]
    if not folder.exists():
        torch.manual_seed(0)
        encoder = ImageEncoder("EVA01-g-14").to(device, torch.bfloat16)

        def batches() -> Iterator[Tensor]:
            for start in range(0, len(chosen), 64):
                drawings = [encoder.transform(emoji_pairs.render(p)) for p in chosen[start : start + 64]]
                yield encoder(torch.stack(drawings).to(device, torch.bfloat16)).float().cpu()

        FeatureCache.create(folder, [p.key for p in chosen], batches(), metadata={"encoder": "EVA01-g-14, random"})
    pairs = [Pair(p.key, p.caption, p.key) for p in chosen]
    return PairDataset(pairs, load_tokenizer(), cache=FeatureCache(folder, verify=False))


class Trainer:
    """Steps of AdamW on ``dataset`` from one seed; ``forward`` gives the losses of a batch with given negatives."""

    def __init__(self, config: QFormerConfig, dataset: PairDataset, batch_size: int, seed: int, device: str):
        torch.manual_seed(seed)
        self.model = Blip2QFormer(config).to(device).train()
        self.dataset, self.device = dataset, device
        self.order = iter(ShuffledBatches(len(dataset), batch_size, seed=0))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        self.generator = torch.Generator().manual_seed(0)

    def next_batch(self) -> tuple[Batch, tuple[Tensor, Tensor]]:
        """A batch, and negatives that depend on its number alone."""
        batch = self.dataset[next(self.order)]
        size = len(batch.image_ids)
        shifts = [torch.randint(1, size, (size,), generator=self.generator) for _ in range(2)]
        image_index, text_index = ((torch.arange(size) + shift) % size for shift in shifts)
        return batch, (image_index.to(self.device), text_index.to(self.device))

    def run(self, steps: int, forward: Callable, precision: str) -> list[list[float]]:
        """The three losses of every step."""
        dtype = {"bf16": torch.bfloat16, "fp32": None}[precision]
        found = []
        for _ in range(steps):
            batch, negatives = self.next_batch()
            images, *captions = (x.to(self.device) for x in (batch.images, batch.input_ids, batch.attention_mask))
            with torch.autocast(self.device, dtype, enabled=dtype is not None):
                out = forward(self.model, images.float(), *captions, negatives=negatives)
            out.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            found.append(torch.stack([getattr(out, name).detach() for name in LOSSES]))
        return torch.stack(found).tolist()


def ours(model: Blip2QFormer, *args: Tensor, **options: Any) -> Any:
    return model(*args, **options)


def the_reference(model: Blip2QFormer, *args: Tensor, **options: Any) -> Any:
    with use_backend("reference"):
        return original_order_stage1(model, *args, **options)


def compare_curves(
    config: Callable[[float], QFormerConfig], dataset: PairDataset, *, batch_size: int, steps: int, device: str
) -> dict[str, Any]:
    """Losses of each step, ours and the reference's in bf16; the reference in fp32 says what bf16 itself changes.

    Without dropout every loss stays within the band at every step. With dropout of 0.1 the mean of the last ten steps
    stays within three standard deviations of that of three seeds of the reference.

    Raises:
        AssertionError: a loss outside.
    """

    def curve(forward: Callable, precision: str, dropout: float = 0.0, seed: int = 0) -> list[list[float]]:
        return Trainer(config(dropout), dataset, batch_size, seed, device).run(steps, forward, precision)

    exact, reference, fused = (curve(the_reference, "fp32"), curve(the_reference, "bf16"), curve(ours, "bf16"))
    rounding, difference = (torch.tensor(x).sub(torch.tensor(reference)).abs().amax(0) for x in (exact, fused))
    band = (BAND * rounding).clamp(min=LEAST_BAND)
    last = [torch.tensor(curve(the_reference, "bf16", dropout=0.1, seed=seed)[-10:]).mean(0) for seed in range(3)]
    seeds = torch.stack(last)
    spread = (3 * seeds.std(0)).clamp(min=LEAST_BAND)
    dropped = torch.tensor(curve(ours, "bf16", dropout=0.1)[-10:]).mean(0)
    result = {
        "losses": list(LOSSES),
        "fp32_reference": exact,
        "reference": reference,
        "ours": fused,
        "largest_difference": difference.tolist(),
        "band": band.tolist(),
        "dropout_reference_seeds": seeds.tolist(),
        "dropout_spread": spread.tolist(),
        "dropout_ours": dropped.tolist(),
    }
    assert bool((difference <= band).all()), f"losses differ by {difference.tolist()}, allowed {band.tolist()}"
    inside = (dropped - seeds.mean(0)).abs() <= spread
    assert bool(inside.all()), f"with dropout the last losses are {dropped.tolist()}, those of seeds {seeds.tolist()}"
    return result


def train_long(
    config: QFormerConfig,
    dataset: PairDataset,
    *,
    batch_size: int,
    steps: int,
    precision: str,
    device: str,
    logits_scale: float = 1.0,
) -> dict[str, Any]:
    """``steps`` steps of the loop, as CUDA graphs on a GPU, with attention's logits ``logits_scale`` times as large.

    Raises:
        AssertionError: after a fifth of the steps memory still grows or graphs are captured, or more than one host sync
            a step. FloatingPointError: a loss that is NaN or Inf.
    """
    torch.manual_seed(0)
    model = Blip2QFormer(config)
    with torch.no_grad():
        for layer in model.qformer.encoder.layer:
            layer.attention.attention.query.weight *= logits_scale
            if hasattr(layer, "crossattention"):
                layer.crossattention.attention.query.weight *= logits_scale
    captures, peaks, syncs = [], [], []
    with tempfile.TemporaryDirectory() as folder, _counted_captures(captures), _counted_syncs(syncs, device):

        def watch(entry: dict[str, Any]) -> None:
            if device == "cuda":
                peaks.append((entry["step"], torch.cuda.max_memory_reserved(), len(captures), len(syncs)))

        run = RunConfig(
            output_dir=folder,
            steps=steps,
            batch_size=batch_size,
            precision=precision,
            device=device,
            cuda_graphs=device == "cuda",
            save_every=10 * steps,
            log_every=max(1, steps // 20),
        )
        begin = time.perf_counter()
        entries = train(model, dataset, run, OptimizerConfig(lr=1e-4, warmup_steps=steps // 10), on_log=watch)
        seconds = time.perf_counter() - begin
    if peaks:
        warm = next(peak for peak in peaks if peak[0] >= steps // 5)
        assert peaks[-1][1:3] == warm[1:3], f"memory and captures (step, bytes, captures, syncs) grow: {peaks}"
        assert peaks[-2][3] - warm[3] <= peaks[-2][0] - warm[0], f"more than one host sync a step: {peaks}"
    return {
        "precision": precision,
        "logits_scale": logits_scale,
        "steps": steps,
        "seconds": round(seconds, 2),
        "step_bytes_captures_syncs": peaks,
        "entries": entries,
    }


@contextlib.contextmanager
def _counted_captures(found: list[int]) -> Iterator[None]:
    capture = GraphedStage1._capture

    def counted(self, *args):
        found.append(1)
        return capture(self, *args)

    GraphedStage1._capture = counted
    try:
        yield
    finally:
        GraphedStage1._capture = capture


@contextlib.contextmanager
def _counted_syncs(found: list[int], device: str) -> Iterator[None]:
    """Host syncs that PyTorch knows of; waiting for one event, as the graphs do each step, is not among them."""
    if device != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: found.append(1) if "synchronizing" in str(message) else None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def kill_and_resume(command: list[str], folder: Path, *, steps: int, kill_at: int) -> dict[str, Any]:
    """Runs ``command OUTPUT STEPS`` whole, and again killed by SIGKILL after step ``kill_at`` and resumed.

    Raises:
        AssertionError: a step's losses that differ, or a run that ended before it was killed.
    """
    whole, parts = folder / "whole", folder / "parts"
    subprocess.run([*command, str(whole), str(steps)], check=True)
    process = subprocess.Popen([*command, str(parts), str(steps)])
    log = parts / "log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < kill_at):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    survived = len(log.read_text().splitlines())
    subprocess.run([*command, str(parts), str(steps)], check=True)
    entries = [[json.loads(line) for line in (x / "log.jsonl").read_text().splitlines()] for x in (whole, parts)]
    curves = [[[entry[name] for name in LOSSES] for entry in run] for run in entries]
    difference = max(abs(a - b) for x, y in zip(*curves, strict=True) for a, b in zip(x, y, strict=True))
    assert difference == 0.0, f"losses of the resumed run differ by {difference}"
    return {"steps": steps, "killed_after": survived, "largest_difference": difference}


def blip2(dropout: float = 0.1) -> QFormerConfig:
    return QFormerConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def train_to(dataset: PairDataset, output: str, steps: int, device: str) -> None:
    """The run that is killed: without graphs, whose shapes depend on what was captured before."""
    torch.manual_seed(0)
    run = RunConfig(
        output_dir=output, steps=steps, batch_size=32, device=device, save_every=5, log_every=1, resume=True
    )
    train(Blip2QFormer(blip2()), dataset, run, OptimizerConfig(lr=1e-4, warmup_steps=5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, default=Path(".cache/eva_g_features"), help="made where it is missing")
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000, help="of the long runs")
    parser.add_argument("--curve-steps", type=int, default=50)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument("--train-to", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dataset = extract(options.features, options.pictures, options.device)
    if options.train_to:
        train_to(dataset, options.train_to[0], int(options.train_to[1]), options.device)
        return
    common = dict(dataset=dataset, batch_size=options.batch, device=options.device)
    long = dict(config=blip2(), steps=options.steps, **common)
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("output", "train_to")}
    result: dict[str, Any] = {"bench": "train_stage1", "settings": settings, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        same = ["--features", str(options.features), "--pictures", str(options.pictures), "--device", options.device]
        command = [sys.executable, os.path.abspath(__file__), *same, "--train-to"]
        parts: dict[str, Callable[[], Any]] = {
            "curves": lambda: compare_curves(blip2, steps=options.curve_steps, **common),
            "long": lambda: train_long(precision="bf16", **long),
            "large_logits_bf16": lambda: train_long(precision="bf16", logits_scale=30.0, **long),
            "large_logits_fp16": lambda: train_long(precision="fp16", logits_scale=30.0, **long),
            "killed": lambda: kill_and_resume(command, Path(folder), steps=20, kill_at=13),
        }
        for name in options.parts:
            begin = time.perf_counter()
            result["parts"][name] = parts[name]()
            print(f"{name}: held, {time.perf_counter() - begin:.0f} s", flush=True)
            if options.output:
                write_result(options.output, result)


if __name__ == "__main__":
    main()
