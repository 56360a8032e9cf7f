"""Training state on disk: a folder a checkpoint, whole or not there at all."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

_NAME = re.compile(r"checkpoint-(\d{8})")


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Checkpoint folders in ``output_dir``, oldest first."""
    return sorted(path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name))


def save_checkpoint(
    output_dir: str | os.PathLike, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], *, keep: int
) -> Path:
    """Writes ``checkpoint-<step>`` and removes all but the last ``keep``.

    Args:
        output_dir (path): where.
        model (nn.Module): anything with ``save_pretrained``; its folder is also the checkpoint's.
        optimizer (Optimizer): its state tensors.
        state (dict): JSON values, with "step"; random states are added.
        keep (int): at least 1.

    Returns:
        Path: the checkpoint.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{state['step']:08d}"
    scratch = Path(tempfile.mkdtemp(dir=output_dir, prefix=".checkpoint-"))
    try:
        model.save_pretrained(scratch)
        save_file(_optimizer_tensors(optimizer) | _random_tensors(), scratch / "training.safetensors")
        (scratch / "state.json").write_text(json.dumps(state | {"python_random": random.getstate()}), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.replace(scratch, final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    for old in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint_state(folder: str | os.PathLike, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Puts a checkpoint's weights, optimizer state and random states back.

    Returns:
        dict: the ``state`` that was saved.

    Raises:
        ValueError: a file that is missing, truncated or of another model; the message names it. Nothing is changed
            then.
    """
    folder = Path(folder)
    try:
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "training.safetensors")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version, internal, gauss = state.pop("python_random")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"checkpoint: {folder} is truncated or incomplete: {error}") from error
    own = model.state_dict()
    differing = sorted(n for n in own.keys() | weights.keys() if n not in own or n not in weights
                       or own[n].shape != weights[n].shape)  # fmt: skip
    if differing:
        raise ValueError(f"checkpoint: {folder} must hold the weights of this model, but these differ: {differing[:5]}")
    model.load_state_dict(weights)
    _load_optimizer_tensors(optimizer, tensors)
    _load_random_tensors(tensors)
    random.setstate((version, tuple(internal), gauss))
    return state


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{index}.{name}": value.contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def _load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_tensors() -> dict[str, Tensor]:
    _kind, keys, *rest = np.random.get_state()
    tensors = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(keys.astype(np.int64))}
    tensors["random.numpy_rest"] = torch.tensor(rest, dtype=torch.float64)
    for index in range(torch.cuda.device_count()):
        tensors[f"random.cuda.{index}"] = torch.cuda.get_rng_state(index)
    return tensors


def _load_random_tensors(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.torch"])
    position, has_gauss, cached = tensors["random.numpy_rest"].tolist()
    keys = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    for index in range(torch.cuda.device_count()):
        if f"random.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"], index)
