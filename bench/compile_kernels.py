"""Compiles every Triton kernel without a GPU: registers, shared memory and spills on each architecture.

The ops run forward and backward on a CPU, at the sizes of _cases.py and a few more, while Triton is told of another
architecture and compiles where it would launch: argument types, block sizes and flags are those of real calls, the
results are rubbish. An op that _cases.py knows needs nothing here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from _cases import CASES, Sizes
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from qformer_fast import backend, kernels, ops, reference
from qformer_fast.kernels import launch

# bytes that one block may have
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
# fewer than the heads of two images, but more than those of "few_heads"
MULTIPROCESSORS = 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = [f"{arch}-{dtype}" for arch in SHARED_LIMITS for dtype in DTYPES]
# captions of one length: numbers of rows are multiples of 16, which Triton makes kernels of their own for
SIZES = {
    "blip2": Sizes(2, "cpu", shortest=16, longest=16),
    "long_text": Sizes(2, "cpu", shortest=96, longest=96),
    "headdim_32": Sizes(2, "cpu", shortest=16, longest=16, hidden=384, intermediate=1536),
    "few_heads": Sizes(2, "cpu", shortest=16, longest=16, hidden=384, nheads=6, intermediate=1536),
    "headdim_128": Sizes(2, "cpu", shortest=16, longest=16, hidden=1536, intermediate=6144),
}


def kernel_names() -> set[str]:
    """Every kernel of qformer_fast.kernels; helpers that kernels call do not end in _kernel."""
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    found = itertools.chain.from_iterable(vars(module).items() for module in modules)
    return {name for name, value in found if isinstance(value, JITFunction) and name.endswith("_kernel")}


class _Driver:
    """What Triton asks of a driver before it compiles; each architecture is a device of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_instead_of_launching(arch: int) -> Iterator[dict[tuple, Any]]:
    """Collects (kernel's name, its constants) -> compiled kernel."""
    compiled, run = {}, JITFunction.run

    def compile_only(self: JITFunction, *args, grid, warmup, **constants) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **constants)
        compiled[self.__name__, kernel.hash] = (constants, kernel)

    driver.set_active(_Driver(arch))
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(launch, "architecture", lambda device: f"sm_{arch}"),
        patch.object(launch, "num_multiprocessors", lambda device: MULTIPROCESSORS),
        patch.object(backend, "_probe_triton", lambda: None),
        patch.object(backend, "_why_not_triton_on", lambda x, unsupported: unsupported),
    ):
        yield compiled


def run_ops(sizes: Sizes, dtype: torch.dtype, quick: bool) -> None:
    """Forward and backward of every op that has kernels; ``quick`` only at the largest dropout probability."""

    def new(*shape: int, std: float = 1.0) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    for op, make in CASES.items():
        if "triton" not in importlib.import_module(f"qformer_fast.ops.{op}").IMPLEMENTATIONS:
            continue
        for case in make(sizes):
            for dropout_p in case.dropouts[-1:] if quick else case.dropouts:
                inputs = case.make(new)
                out = case.call(getattr(ops, op), inputs, dropout_p, backend="triton")
                if out.requires_grad:
                    torch.autograd.grad(out, [x for x in inputs.values() if x.requires_grad], torch.empty_like(out))


def run_launchers(dtype: torch.dtype) -> None:
    """What no op of _cases.py launches."""
    x = torch.empty(2, 1408, dtype=dtype)
    width = reference.standardized_width(1408)
    kernels.standardize_into(x.new_empty(2, width), x, 1e-5)
    weight, bias, norm = torch.empty(16, 1408), torch.empty(16), torch.empty(1408)
    folded = kernels.fold_norm_fwd(weight, bias, norm, norm, width, dtype)
    kernels.fold_norm_bwd(folded, weight, bias, norm, norm)
    kernels.fold_norm_bwd(folded, weight, bias, norm, norm, [weight, bias, norm, norm])
    for rows in (16, 32, 128):
        x, weight, bias = (torch.empty(shape, dtype=dtype) for shape in ((rows, 768), (3072, 768), (3072,)))
        kernels.linear_few_rows(x, weight, bias)
        kernels.linear_few_rows(x, weight, bias, gelu=True)
        kernels.linear_few_rows(x, weight, in_parts=True)


def compile_for(target: str, sizes: list[str], quick: bool) -> list[dict[str, Any]]:
    """One row a kernel and set of constants; ``target`` is one of TARGETS."""
    arch, dtype = int(target.split("-")[0]), target.split("-")[1]
    with compile_instead_of_launching(arch) as compiled:
        for name in sizes:
            run_ops(SIZES[name], DTYPES[dtype], quick)
        run_launchers(DTYPES[dtype])
    rows = []
    for (name, _), (constants, kernel) in compiled.items():
        registers, stack = _resources(kernel.asm["cubin"])
        rows.append(
            {
                "kernel": name,
                "constants": constants,
                "arch": f"sm_{arch}",
                "dtype": dtype,
                "shared_bytes": kernel.metadata.shared,
                "shared_limit": SHARED_LIMITS[arch],
                "registers": registers,
                "spills": stack,
                "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
            }
        )
    return rows


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack: what did not fit into registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS, metavar="ARCH-DTYPE", help="90-bf16")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="dropout on, where there is dropout")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if backend.interpreting():
        parser.exit(1, "TRITON_INTERPRET=1 is set: the interpreter compiles nothing\n")
    missing = kernel_names()
    torch.set_num_threads(1)
    with ProcessPoolExecutor(options.processes) as pool:
        work = functools.partial(compile_for, sizes=options.sizes, quick=options.quick)
        for rows in pool.map(work, options.target):
            for row in rows:
                print(json.dumps(row), flush=True)
                missing.discard(row["kernel"])
    if missing:
        parser.exit(1, f"nothing launches {sorted(missing)} at the sizes {options.sizes}\n")


if __name__ == "__main__":
    main()
