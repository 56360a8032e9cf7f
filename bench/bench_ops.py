"""Every op at BLIP-2's sizes: eager, compiled, Triton, SDPA and Liger in one run, on the same inputs."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _cases import CASES, Sizes
from _harness import Setup, measure, measure_ceilings
from _machine import write_result
from _providers import PROVIDERS, providers, reference_provider

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=["all", *CASES], default=["all"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 128], help="pairs, at least 2")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=100, help="samples of each time")
    parser.add_argument("--quick", action="store_true", help="10 samples of each time")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file, written anew after every case")
    options = parser.parse_args()

    torch.manual_seed(0)
    setup = Setup(options.device, DTYPES[options.dtype], 10 if options.quick else options.repeats)
    ceilings = measure_ceilings(setup)
    print(f"copy {ceilings['gb_s']} GB/s, matrix product {ceilings['tflop_s']} TFLOP/s")
    rows = []
    for batch in options.batch:
        sizes = (Sizes.tiny if options.tiny else Sizes)(batch, options.device)
        for op in CASES if "all" in options.op else options.op:
            for case in CASES[op](sizes):
                found = measure(case, reference_provider(case), providers(case, options.providers), setup, ceilings)
                _print(found)
                rows += found
                if options.out:
                    settings = {name: value for name, value in vars(options).items() if name != "out"}
                    result = {"bench": "ops", "settings": settings, "ceilings": ceilings, "rows": rows}
                    write_result(options.out, result)


def _print(rows: list[dict]) -> None:
    for row in rows:
        head = f"{row['op']:<26} {row['shape']:<14} {row['provider']:<15}"
        if "error" in row:
            print(f"{head} {row['error']}", flush=True)
            continue
        ratio = f"{row['floor_ratio']:8.2f}x floor" if "floor_ratio" in row else ""
        print(f"{head} p={row['dropout_p']:<4} {row['mode']:<8} {row['p50_us']:>11.2f} us {ratio}", flush=True)


if __name__ == "__main__":
    main()
