"""From pixels to gradients: the frozen image encoder, stage 1 behind it, and both with pictures read by workers.

The encoder has random weights, which its time does not depend on; the pictures are the demo's drawings as PNG files.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import seconds_in_a_row
from _machine import write_result
from torch import Tensor

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.data.batches import PairDataset, ShuffledBatches, batch_loader
from qformer_fast.data.captions import Pair
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.demo import emoji_pairs
from qformer_fast.models.blip2 import ImageEncoder
from qformer_fast.training.graphs import GraphedStage1


def write_pictures(folder: Path, count: int) -> list[Pair]:
    """The first ``count`` drawings as files, with their names."""
    pairs = []
    for number, picture in enumerate(emoji_pairs.load_pictures()[:count]):
        emoji_pairs.render(picture).save(folder / f"{number}.png")
        pairs.append(Pair(f"{number}.png", picture.caption, f"{number}.png"))
    return pairs


def milliseconds(run: Callable[[], Any], repeats: int, device: str) -> dict[str, float]:
    """Median and least time of a call, after two that do not count."""
    times = [seconds_in_a_row(run, 1, device) * 1e3 for _ in range(repeats + 2)]
    return {"median_ms": round(statistics.median(times[2:]), 2), "min_ms": round(min(times[2:]), 2)}


def measure(
    name: str,
    config: Callable[[int], QFormerConfig],
    folder: Path,
    pairs: list[Pair],
    *,
    batch_size: int,
    repeats: int,
    workers: int,
    device: str,
) -> dict[str, Any]:
    """Rows of one encoder: it alone, compiled too; stage 1 on its tokens alone; both, pixels on the device; both, from
    files, per step of a run of steps.
    """
    dtype = torch.bfloat16
    encoder = ImageEncoder(name).to(device, dtype)
    model = Blip2QFormer(config(encoder.width)).to(device).train()
    dataset = PairDataset(pairs, load_tokenizer(), transform=encoder.transform, image_root=folder)
    order = ShuffledBatches(len(dataset), batch_size, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    graphed = GraphedStage1(model, dtype=dtype) if device == "cuda" else None

    def step(tokens: Tensor, captions: tuple[Tensor, Tensor]) -> None:
        if graphed is not None:
            graphed(tokens, *captions)
        else:
            with torch.autocast(device, dtype):
                loss = model(tokens, *captions).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    batch = dataset[next(iter(order))]
    pixels, captions = batch.images.to(device), (batch.input_ids, batch.attention_mask)
    tokens = encoder(pixels)
    rows = {
        "encoder": milliseconds(lambda: encoder(pixels), repeats, device),
        "stage1_step": milliseconds(lambda: step(tokens, captions), repeats, device),
        "from_pixels": milliseconds(lambda: step(encoder(pixels), captions), repeats, device),
    }
    loader = iter(batch_loader(dataset, order, num_workers=workers, pin_memory=device == "cuda"))

    def several_from_files() -> None:
        for found in itertools.islice(loader, repeats):
            step(encoder(found.images.to(device, non_blocking=True)), (found.input_ids, found.attention_mask))

    found = milliseconds(several_from_files, 3, device)
    rows["from_files"] = {key: round(value / repeats, 2) for key, value in found.items()}
    encoder.compile()
    rows["encoder_compiled"] = milliseconds(lambda: encoder(pixels), repeats, device)
    rows["from_pixels_compiled"] = milliseconds(lambda: step(encoder(pixels), captions), repeats, device)
    return {"tokens": list(tokens.shape[1:]), "rows": rows}


def blip2(width: int) -> QFormerConfig:
    return QFormerConfig(encoder_hidden_size=width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="+", default=["ViT-L-14", "EVA01-g-14"], help="open_clip models")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result: dict[str, Any] = {"bench": "pixels", "settings": settings, "encoders": {}}
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pictures(Path(folder), options.pictures)
        sizes = dict(batch_size=options.batch, repeats=options.repeats, workers=options.workers, device=options.device)
        for name in options.encoders:
            torch.manual_seed(0)
            found = result["encoders"][name] = measure(name, blip2, Path(folder), pairs, **sizes)
            for row, times in found["rows"].items():
                print(f"{name:<12} {row:<22} {times['median_ms']:>9} ms, least {times['min_ms']}", flush=True)
            if options.output:
                write_result(options.output, result)


if __name__ == "__main__":
    main()
