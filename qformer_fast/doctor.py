"""What this machine can run: versions, devices, and which backend each op uses."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

import torch

from qformer_fast import ops
from qformer_fast.backend import BACKENDS, PREFERRED, available
from qformer_fast.config import QFormerConfig
from qformer_fast.models import one_launch

PACKAGES = ("qformer_fast", "torch", "triton", "transformers", "open_clip_torch", "safetensors", "numpy")


def report() -> dict[str, Any]:
    """Versions, devices and backends, ready for JSON.

    Returns:
        dict: "versions" {package: version or None}, "devices" [{"name", ...}], "backends" {backend: None or the reason
            why it can't run}, "one_launch" None or the reason why BLIP-2's Q-Former in bf16 does not encode few images
            in one, "ops" {op: {"uses": what tensors on the GPU take, where there
            is one, "unavailable": {backend: reason}}}.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "devices": _devices(),
        "backends": available(),
        "one_launch": _one_launch(),
        "ops": {name: _op(name) for name in ops.__all__},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"name": f"cpu ({platform.machine()})", "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index} ({properties.name})",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def _one_launch() -> str | None:
    config, device = QFormerConfig(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return one_launch.why_not(config, config.num_query_tokens, torch.bfloat16, device)


def _op(name: str) -> dict[str, Any]:
    implementations = importlib.import_module(f"qformer_fast.ops.{name}").IMPLEMENTATIONS
    reasons = available()
    unavailable = {}
    for backend in BACKENDS:
        reason = reasons[backend] if backend in implementations else f"has no {name}"
        if reason:
            unavailable[backend] = reason
    can_run = (backend for backend in PREFERRED if backend not in unavailable)
    uses = next(can_run, "reference") if torch.cuda.is_available() else "reference"
    return {"uses": uses, "unavailable": unavailable}


def as_text(found: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = ["versions"]
    lines += [f"  {name:<16} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += ["devices"]
    for device in found["devices"]:
        details = ", ".join(f"{key} {value}" for key, value in device.items() if key != "name")
        lines.append(f"  {device['name']}: {details}")
    lines += ["backends"]
    lines += [f"  {name:<16} {reason or 'can run'}" for name, reason in found["backends"].items()]
    lines.append(f"  {'one launch':<16} {found['one_launch'] or 'can run'}")
    lines += ["ops"]
    for name, op in found["ops"].items():
        reasons = "; ".join(f"not {backend}: {reason}" for backend, reason in op["unavailable"].items())
        lines.append(f"  {name:<26} {op['uses']:<10} {reasons}")
    return "\n".join(lines)
