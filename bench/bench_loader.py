"""Whether data keep up with the step: stage 1 trained from a feature cache in shards on local disk.

Tokens are random, which no time depends on. Figures are of the log's entries after the first two, in which graphs are
captured and workers start: the share of the time in which the device waits for data, and pairs a second. The last three
entries of a GPU are followed by a profiler instead: the share in which it does nothing at all. Before each run the
system is told to forget what it holds of the cache's files; by default a run reads each image once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _breakdown import device_spans, summarize
from _machine import write_result
from torch import Tensor

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.data.batches import PairDataset
from qformer_fast.data.captions import Pair
from qformer_fast.data.extraction import extract
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.training.config import RunConfig
from qformer_fast.training.loop import train

SHARES = ("share_data", "share_encoder", "share_qformer", "share_other")
FOLLOWED = 3  # entries, by a profiler
TINY = dict(hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=96, num_query_tokens=4)
WORDS = ["a", "red", "fox", "beside", "two", "cups", "of", "tea", "in", "the", "harbour", "at", "night", "under"]


def make_cache(folder: Path, options: argparse.Namespace, dtype: str) -> FeatureCache:
    """Of ``options.images`` images, unless it is there."""
    block = torch.randn(options.batch, options.tokens, options.width, generator=torch.Generator().manual_seed(0))

    def encode(lists: Sequence[Sequence[str]]) -> Iterator[tuple[Sequence[str], Tensor]]:
        for keys in lists:
            yield keys, block[: len(keys)]

    keys = [f"image{i}" for i in range(options.images)]
    sizes = dict(shard_images=options.shard_images, batch_size=options.batch)
    metadata = {"tokens": options.tokens, "width": options.width}
    return extract(folder, keys, encode, metadata=metadata, dtype=dtype, **sizes)


def forget(folder: Path) -> None:
    """Takes a cache's files out of the system's memory."""
    for path in folder.rglob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Idle:
    """Follows the device from one of a run's entries to its last; ``share`` of the time between its first and its last
    kernel or copy in which it had none.
    """

    def __init__(self, begin: int, end: int):
        self._begin, self._end = begin, end
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def __call__(self, entry: Mapping[str, Any]) -> None:
        if entry["step"] == self._begin:
            self._profiler.start()
        if entry["step"] == self._end:
            self._profiler.stop()

    @property
    def share(self) -> float:
        found = summarize(device_spans(self._profiler))
        return 1 - found["busy_ms"] / found["span_ms"]


def measure(cache: FeatureCache, options: argparse.Namespace, workers: int) -> dict[str, Any]:
    """One run's medians."""
    captions = [" ".join(WORDS[i % 5 : i % 5 + 3 + i % 8]) for i in range(len(cache))]
    pairs = [Pair(key, caption, key) for key, caption in zip(cache.keys, captions, strict=True)]
    dataset = PairDataset(pairs, load_tokenizer(), cache=cache)
    torch.manual_seed(0)
    model = Blip2QFormer(QFormerConfig(**(TINY if options.tiny else {}), encoder_hidden_size=options.width))
    cuda = options.device == "cuda"
    forget(cache.folder)
    with tempfile.TemporaryDirectory() as output:
        run = RunConfig(
            output_dir=output,
            steps=options.steps,
            batch_size=options.batch,
            precision="bf16" if cuda else "fp32",
            device=options.device,
            cuda_graphs=cuda,
            save_every=options.steps + 1,
            log_every=options.log_every,
            profile=True,
        )
        idle = Idle(run.steps - FOLLOWED * run.log_every, run.steps) if cuda else None
        entries = train(model, dataset, run, num_workers=workers, on_log=idle)
    entries = entries[2 : -FOLLOWED if cuda else None]
    names = (*SHARES, "samples_per_second")
    found = {name: round(statistics.median(entry[name] for entry in entries), 4) for name in names}
    found["most_share_data"] = round(max(entry["share_data"] for entry in entries), 4)
    return found | ({"share_idle": round(idle.share, 4)} if idle else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; caches are kept there")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 8])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--shard-images", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--width", type=int, default=1408)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--log-every", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a model for tests")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    if options.steps % options.log_every or options.steps < (3 + FOLLOWED) * options.log_every:
        parser.error(f"--steps must be a multiple of --log-every, at least {3 + FOLLOWED} times it")
    settings = {key: str(x) if isinstance(x, Path) else x for key, x in vars(options).items() if key != "output"}
    result: dict[str, Any] = {"bench": "loader", "settings": settings, "dtypes": {}}
    for dtype in options.dtypes:
        cache = make_cache(options.folder / dtype, options, dtype)
        rows = result["dtypes"][dtype] = {}
        for workers in options.workers:
            rows[str(workers)] = found = measure(cache, options, workers)
            shares = ", ".join(f"{name.removeprefix('share_')} {100 * found[name]:.1f}%" for name in SHARES)
            if "share_idle" in found:
                shares += f"; idle {100 * found['share_idle']:.1f}%"
            print(f"{dtype:<9} {workers:>2} workers {found['samples_per_second']:>9.1f} pairs/s  {shares}", flush=True)
            if options.output:
                write_result(options.output, result)


if __name__ == "__main__":
    main()
