"""Training state on disk: a folder a checkpoint, whole or not there at all."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from qformer_fast.data.files import find_damage, new_folder

_NAME = re.compile(r"checkpoint-(\d{8})")


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Checkpoint folders in ``output_dir``, oldest first."""
    return sorted(path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name))


def save_checkpoint(
    output_dir: str | os.PathLike, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], *, keep: int
) -> Path:
    """Writes ``checkpoint-<step>`` and removes all but the last ``keep``, and what a killed run left half-written.

    Args:
        output_dir (path): where; one run's alone.
        model (nn.Module): anything with ``save_pretrained``; its folder is also the checkpoint's.
        optimizer (Optimizer): its state tensors, saved under the names of the model's parameters.
        state (Mapping): JSON values: "step", "identity" (what a resumed run must have the same) and more; random states
            are added.
        keep (int): at least 1.

    Returns:
        Path: the checkpoint.
    """
    output_dir = Path(output_dir)
    for abandoned in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(abandoned)
    final = output_dir / f"checkpoint-{state['step']:08d}"
    with new_folder(final) as scratch:
        model.save_pretrained(scratch)
        save_file(_optimizer_tensors(model, optimizer) | _random_tensors(), scratch / "training.safetensors")
        text = json.dumps({**state, "python_random": random.getstate()})
        (scratch / "state.json").write_text(text, encoding="utf-8")
    for old in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint_state(
    folder: str | os.PathLike, model: nn.Module, optimizer: Optimizer, *, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Puts a checkpoint's weights, optimizer state and random states back.

    Args:
        folder (path): the checkpoint.
        model, optimizer: as they were built for the run that saved it.
        identity (Mapping): must equal the saved state's "identity".

    Returns:
        dict: the ``state`` that was saved.

    Raises:
        ValueError: a file that is missing, truncated or corrupted, a checkpoint of another run or model; the message
            names what differs. Nothing is changed then.
    """
    folder = Path(folder)
    damage = find_damage(folder, ["model.safetensors", "training.safetensors", "state.json"])
    if damage is not None:
        raise ValueError(f"checkpoint: {damage}; remove {folder} to go on from the one before it")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            saved = state["identity"].get(name)
            raise ValueError(f"run.resume: {name} must be {saved} as in {folder}, got {value}")
    weights, tensors = load_file(folder / "model.safetensors"), load_file(folder / "training.safetensors")
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    differing = sorted({*own.items()} ^ {(name, tensor.shape) for name, tensor in weights.items()})
    if differing:
        raise ValueError(f"checkpoint: {folder} must hold the weights of this model, but these differ: {differing[:5]}")
    model.load_state_dict(weights)
    _load_optimizer_tensors(model, optimizer, tensors)
    _load_random_tensors(tensors)
    version, internal, gauss = state.pop("python_random")
    random.setstate((version, tuple(internal), gauss))
    return state


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names in the order of the optimizer's numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model, optimizer)
    return {
        f"optimizer.{entry}.{names[number]}": value.contiguous()
        for number, entries in optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
    }


def _load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    numbers = {name: number for number, name in enumerate(_parameter_names(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, entry, name = key.split(".", 2)
            state.setdefault(numbers[name], {})[entry] = value
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
