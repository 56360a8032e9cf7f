"""What stage 1's step would take and move on more GPUs than were measured, and what becomes the limit.

Measured: the step on one and on two GPUs and ITC by its candidates (bench_ranks.py --candidates ...), encoder and step
from pictures (bench_pixels.py). Everything else is assumed, and said so in what is written.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = 8  # GPUs
NVLINK, NIC = 450e9, 50e9  # bytes a second and GPU, one way: NVLink 4, and 400 Gb/s between hosts
USED = 0.8  # part of a link's bandwidth that is reached
SWEEP_2 = 0.45  # of the step: forward and backward of the pairs
BESIDE = 0.23  # of the step, from the first gradients that are done to the last: what a reduction may hide behind
DISK = 10e9  # bytes a second and host
PICTURE, DECODE = 100e3, 6e-3  # bytes of a JPEG, seconds of a core to decode and resize it


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a GPU's batch; BLIP-2's."""

    batch: int
    parameters: int
    tokens: int = 257
    width: int = 1408
    features: int = 256


def gather_seconds(size: float, gpus: int) -> float:
    """An all-gather of ``size`` bytes of each GPU: between hosts a host's links carry each once, NVLink carries all."""
    within = (gpus - 1) * size / NVLINK
    between = max(gpus - HOST, 0) * size / (HOST * NIC)
    return max(within, between) / USED


def swap_seconds(size: float, gpus: int) -> float:
    """An all-to-all of ``size`` bytes for each GPU: those of other hosts pass the GPU's own link."""
    within = (min(gpus, HOST) - 1) * size / NVLINK
    between = max(gpus - HOST, 0) * size / NIC
    return max(within, between) / USED


def reduce_seconds(size: float, gpus: int) -> float:
    """An all-reduce of ``size`` bytes: within a host, between hosts an eighth by each GPU, and within again."""
    local, hosts = min(gpus, HOST), math.ceil(gpus / HOST)
    within = 2 * (local - 1) / local * size / NVLINK
    between = 2 * (hosts - 1) / hosts * size / HOST / NIC
    return (within + between) / USED


def most_pairs(batch: int, gpus: int) -> float:
    """How many pairs more than its share the rank with the most has, where texts choose images at random."""
    return math.sqrt(batch * (1 - 1 / gpus)) * math.sqrt(2 * math.log(gpus))


def itc_seconds(measured: dict[str, float], candidates: int) -> float:
    """Between the two measured counts around it, or beyond the last by the slope of the last two."""
    counts = sorted(map(int, measured))
    above = next((i for i, count in enumerate(counts) if count >= candidates), len(counts) - 1)
    a, b = counts[max(above, 1) - 1], counts[max(above, 1)]
    low, high = measured[str(a)], measured[str(b)]
    return (low + (high - low) * (candidates - a) / (b - a)) / 1e3


def step_of(
    sizes: Sizes, gpus: int, one: float, two: float, itc: dict[str, float], number_bytes: int
) -> dict[str, float]:
    """Seconds of a step from the features cached, and bytes that a GPU receives."""
    # of texts: features, and gradients in fp32; and of each pair of an image and a text the same in fp32
    texts, similarities = sizes.batch * sizes.features, 4 * sizes.batch**2
    gradients = 4 * sizes.parameters

    def exchange(gpus: int) -> float:
        there_and_back = gather_seconds(texts * number_bytes, gpus) + gather_seconds(4 * texts, gpus)
        return there_and_back + 2 * swap_seconds(similarities, gpus)

    found = {
        "exchange_bytes": (gpus - 1) * (texts * (number_bytes + 4) + 2 * similarities),
        "gradient_bytes": 2 * (gpus - 1) / gpus * gradients,
        "original_bytes": 2 * (gpus - 1) * sizes.batch * sizes.tokens * sizes.width * 2,
        "exchange": exchange(gpus) - exchange(2),
        "itc": max(itc_seconds(itc, gpus * sizes.batch) - itc_seconds(itc, 2 * sizes.batch), 0.0),
        "gradients": max(reduce_seconds(gradients, gpus) - max(reduce_seconds(gradients, 2), BESIDE * one), 0.0),
        "imbalance": SWEEP_2 * one * (most_pairs(sizes.batch, gpus) - most_pairs(sizes.batch, 2)) / (3 * sizes.batch),
    }
    found["step"] = two + sum(found[name] for name in ("exchange", "itc", "gradients", "imbalance"))
    return found


def write(ranks: dict[str, Any], pixels: dict[str, Any], number_bytes: int) -> str:
    """bench/scaling.md's text."""
    one, two = (ranks["ranks"][count] for count in ("1", "2"))
    parameters = two["gradient_all_reduce_bytes"] // 4  # of two ranks each receives as many as there are
    sizes = Sizes(ranks["settings"]["batch"], parameters)
    t1, t2 = one["median_ms"] / 1e3, two["median_ms"] / 1e3
    encoder = pixels["encoders"]["ViT-L-14"]["rows"]["encoder"]["median_ms"] / 1e3 * sizes.batch / 128
    rows, data = [], []
    for gpus in (2, 8, 64, 512):
        found = step_of(sizes, gpus, t1, t2, one["itc_ms"], number_bytes)
        added = {name: found[name] for name in ("exchange", "itc", "gradients", "imbalance")}
        ms = [f"{1e3 * x:.1f}" for x in (found["step"], *added.values())]
        mb = [found[name] / 1e6 for name in ("exchange_bytes", "gradient_bytes", "original_bytes")]
        mb = [f"{x:,.1f}" if x < 10 else f"{x:,.0f}" for x in mb]
        limit = max(added, key=added.get) if sum(added.values()) > 0.02 * t1 else "the step itself"
        cells = [*mb, *ms, f"{100 * t1 / found['step']:.1f}%", f"{gpus * sizes.batch / found['step']:,.0f}", limit]
        rows.append(f"| {gpus} | {' | '.join(cells)} |")
        images = HOST * sizes.batch / found["step"]
        bf16, int8 = (images * x / 1e9 for x in (2 * sizes.tokens * sizes.width, sizes.tokens * (sizes.width + 4)))
        slower = found["step"] + encoder
        pictures = HOST * sizes.batch / slower
        cells = [f"{bf16:.1f}", f"{int8:.1f}", f"{1e3 * slower:.1f}", f"{pictures * PICTURE / 1e9:.2f}"]
        data.append(f"| {gpus} | {' | '.join(cells)} | {pictures * DECODE:.0f} |")
    itc = ", ".join(f"{int(count):,} candidates {ms:.1f} ms" for count, ms in one["itc_ms"].items())
    gpu, encoders_gpu = ranks["machine"]["gpu"], pixels["machine"]["gpu"]
    shares = {name: f"{100 * x:.0f}%" for name, x in (("used", USED), ("beside", BESIDE), ("sweep", SWEEP_2))}
    speeds = {name: f"{x / 1e9:.0f} GB/s" for name, x in (("nvlink", NVLINK), ("nic", NIC), ("disk", DISK))}
    head = [
        "GPUs",
        "texts and similarities",
        "gradients",
        "the original's image tokens and gradients",
        "step",
        "ITC's exchange",
        "ITC",
    ]
    head += ["gradients", "imbalance", "of one GPU's speed", "pairs/s", "most is added by"]
    return f"""# Stage 1 on more GPUs than were measured

Written by `bench/scaling.py`. Measured on {gpu}: a step of {sizes.batch} pairs a GPU
takes {1e3 * t1:.1f} ms on one and {1e3 * t2:.1f} ms on two, ITC with {itc};
on {encoders_gpu}: ViT-L/14 {1e3 * encoder:.1f} ms a batch.

Assumed: hosts of {HOST} GPUs, {speeds["nvlink"]} a GPU within and {speeds["nic"]} between them, of which
{shares["used"]} is reached; a reduction hides behind {shares["beside"]} of the step; sweep 2 is {shares["sweep"]} of it
and all wait for the rank with the most pairs; {speeds["disk"]} from a host's disks; pictures of {PICTURE / 1e3:.0f} KB
that take a core {1e3 * DECODE:.0f} ms.

## From cached features

MB that a GPU receives a step, for ITC of texts' features, of similarities and of the gradients of both; ms of the
step, and what ITC's exchange, ITC itself, gradients and imbalance add to two GPUs'.

| {" | ".join(head)} |
|{"---|" * len(head)}
{chr(10).join(rows)}

## Data of a host

GB/s read from caches in bf16 and int8; with pictures and the encoder in front ms of a step, GB/s, and cores.

| GPUs | bf16 | int8 | step | pictures | cores |
|---|---|---|---|---|---|
{chr(10).join(data)}

From caches the disks are the limit where more than {speeds["disk"]} are read, from pictures the encoder.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=Path, required=True, help="of bench_ranks.py with --candidates")
    parser.add_argument("--pixels", type=Path, required=True, help="of bench_pixels.py")
    parser.add_argument("--number-bytes", type=int, default=4, help="of a text feature on its way: 4, or 2 for bf16")
    parser.add_argument("--output", type=Path, help="a Markdown file. Default: printed")
    options = parser.parse_args()
    text = write(*(json.loads(path.read_text()) for path in (options.ranks, options.pixels)), options.number_bytes)
    options.output.write_text(text) if options.output else print(text)


if __name__ == "__main__":
    main()
