"""Launch settings: measured once an architecture, looked up at run time.

``python bench/tune.py`` measures them on the GPU at hand and rewrites ``launch_table.json``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from qformer_fast.backend import interpreting

TABLE = json.loads(Path(__file__).with_name("launch_table.json").read_text())
DEFAULT_ARCHITECTURE = "sm_90"


def settings(kernel: str, device: torch.device) -> dict[str, Any]:
    """Block sizes, num_warps and num_stages of ``kernel`` on ``device``, as keyword arguments of its launch."""
    return settings_of(kernel, architecture(device))


@functools.cache
def settings_of(kernel: str, name: str) -> dict[str, Any]:
    return TABLE[DEFAULT_ARCHITECTURE][kernel] | TABLE.get(name, {}).get(kernel, {})


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and its like; the default's on a CPU."""
    if device.type != "cuda":
        return DEFAULT_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """What fills the device with one program each; 2 under the interpreter, so that programs loop there too."""
    return 2 if interpreting() else torch.cuda.get_device_properties(device).multi_processor_count


def row_programs(rows: int, settings: dict[str, Any], device: torch.device, columns: int = 1) -> int:
    """How many programs of a backward kernel share the rows of each of ``columns`` blocks of columns; takes the table's
    number a multiprocessor out of ``settings``.
    """
    programs = settings.pop("programs") * num_multiprocessors(device)
    return min(-(-rows // settings["BLOCK_M"]), max(1, programs // columns))
