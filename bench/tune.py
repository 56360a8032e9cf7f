"""Measures launch settings on the GPU at hand and writes each kernel's fastest to kernels/triton/launch_table.json.

Every candidate is compiled and run once by worker processes, whose results lie in Triton's cache; then they are timed
one by one at BLIP-2's sizes, batch 128.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _cases import CASES, Sizes
from _harness import Case, Setup, make_arm, time_mode
from _providers import kernel_provider

from qformer_fast.kernels import launch

TABLE = Path(__file__).parents[1] / "kernels" / "triton" / "launch_table.json"
BATCH = 128
SETTINGS = dict[str, Any]


def grid(**values: list) -> list[SETTINGS]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


# kernel -> (op, part of the case's shape, mode, candidates)
CANDIDATES: dict[str, tuple[str, str, str, list[SETTINGS]]] = {
    "bias_gelu_fwd": ("bias_gelu", "", "fwd", grid(BLOCK_M=[2, 4, 8], BLOCK_N=[1024], num_warps=[4, 8])),
    "bias_gelu_bwd": (
        "bias_gelu", "", "bwd",
        grid(BLOCK_M=[4, 8], BLOCK_N=[256], num_warps=[4, 8], STAGES=[1, 3], programs=[4, 8, 16]),
    ),
    "dropout_add_layer_norm_fwd": (
        "dropout_add_layer_norm", "", "fwd", grid(BLOCK_M=[1, 2, 4], num_warps=[1, 2, 4]),
    ),
    "dropout_add_layer_norm_bwd": (
        "dropout_add_layer_norm", "", "bwd",
        grid(BLOCK_M=[1, 2], num_warps=[2, 4], STAGES=[1, 3], programs=[2, 4, 8]),
    ),
    "query_text_attention_fwd": (
        "query_text_attention", "sweep2", "fwd", grid(num_warps=[2, 4, 8], num_stages=[1], maxnreg=[96, 255]),
    ),
    "query_text_attention_bwd": (
        "query_text_attention", "sweep2", "bwd", grid(num_warps=[2, 4, 8], num_stages=[1]),
    ),
    "image_cross_attention_fwd_32": (
        "image_cross_attention", "sweep1", "fwd", grid(BLOCK_N=[32, 64, 128], num_warps=[2, 4, 8], num_stages=[2, 3]),
    ),
    "image_cross_attention_bwd_32": (
        "image_cross_attention", "sweep1", "bwd", grid(BLOCK_N=[32, 64, 128], num_warps=[4, 8], num_stages=[1, 2, 3]),
    ),
    "image_cross_attention_fwd_128": (
        "image_cross_attention", "sweep2", "fwd",
        grid(BLOCK_M=[64, 128], BLOCK_N=[32, 64], num_warps=[4, 8], num_stages=[2, 3], maxnreg=[168, 255]),
    ),
    "image_cross_attention_bwd_128": (
        "image_cross_attention", "sweep2", "bwd",
        grid(BLOCK_M=[64, 128], BLOCK_N=[32, 64], num_warps=[4, 8], num_stages=[1, 2]),
    ),
}  # fmt: skip


def case_of(kernel: str) -> tuple[Case, str]:
    op, shape, mode, _ = CANDIDATES[kernel]
    return next(case for case in CASES[op](Sizes(BATCH, "cuda")) if shape in case.shape), mode


def use(kernel: str, settings: SETTINGS, architecture: str) -> None:
    launch.TABLE.setdefault(architecture, {})[kernel] = launch.TABLE[launch.DEFAULT_ARCHITECTURE][kernel] | settings
    launch.settings_of.cache_clear()


def compile_and_run(kernel: str, settings: SETTINGS) -> bool:
    """Whether the device takes these settings; some need more shared memory than it has."""
    setup = Setup("cuda", torch.bfloat16, repeats=1)
    use(kernel, settings, launch.architecture(torch.device("cuda", 0)))
    case, mode = case_of(kernel)
    try:
        for dropout_p in case.dropouts:
            make_arm(case, kernel_provider("triton")(case), mode, dropout_p, setup)()[0]()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{kernel} {settings}: {type(error).__name__} {str(error)[:100]}", flush=True)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    architecture = launch.architecture(torch.device("cuda", 0))
    setup = Setup("cuda", torch.bfloat16, options.repeats)
    everything = [(kernel, settings) for kernel in options.kernel for settings in CANDIDATES[kernel][3]]
    workers = max(1, os.cpu_count() - 2)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(compile_and_run, *zip(*everything, strict=True)))
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    for kernel in options.kernel:
        case, mode = case_of(kernel)
        dropout_p = max(case.dropouts)
        times = []
        for (name, settings), fits in zip(everything, runs, strict=True):
            if name == kernel and fits:
                use(kernel, settings, architecture)
                found = time_mode(case, kernel_provider("triton")(case), mode, dropout_p, setup)
                times.append((found["p50_us"], settings))
        if not times:
            print(f"{kernel:<32} none of the candidates runs, left as it was", flush=True)
            continue
        times.sort(key=lambda row: row[0])
        for microseconds, settings in (*times[:3], times[-1]):
            print(f"{kernel:<32} {microseconds:9.2f} us  {settings}", flush=True)
        use(kernel, times[0][1], architecture)
        table.setdefault(architecture, {})[kernel] = launch.TABLE[architecture][kernel]
        options.out.write_text(as_text(table))


def as_text(table: dict[str, dict[str, SETTINGS]]) -> str:
    """One line a kernel."""
    parts = []
    for architecture, kernels in table.items():
        lines = ",\n".join(f'    "{name}": {json.dumps(settings)}' for name, settings in kernels.items())
        parts.append(f'  "{architecture}": {{\n{lines}\n  }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
