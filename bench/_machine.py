"""What a measurement was taken on, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qformer_fast import doctor

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """Processor, GPU, versions and commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    found = doctor.report()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": found["versions"],
        "commit": os.environ.get("QFORMER_FAST_COMMIT") or _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a measurement with its machine line and the command that made it; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"command": command, "machine": machine(), **result}, indent=2) + "\n")
    os.replace(scratch, path)
