"""Weights of linear layers that adapters were put around."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

PLAIN = (nn.Linear, nn.LayerNorm)


def weight_of(layer: nn.Module) -> Tensor:
    """What a linear layer multiplies with: its weight, and the active LoRA adapters' (peft) products added to it.

    Raises:
        ValueError: what it computes is no product with one weight; the message says why.
    """
    if type(layer) in PLAIN:
        return layer.weight
    reason = why_no_weight(layer)
    if reason is not None:
        raise ValueError(f"a Q-Former's layers must have a weight that multiplies their input: {reason}")
    if not hasattr(layer, "base_layer"):
        return layer.weight
    weight = layer.base_layer.weight
    if not (layer.merged or layer.disable_adapters):
        with torch.autocast(weight.device.type, enabled=False):
            for adapter in _active(layer):
                weight = weight + layer.get_delta_weight(adapter)
    return weight


def why_no_weight(layer: nn.Module) -> str | None:
    """Why :func:`weight_of` has none, or None."""
    if type(layer) in PLAIN or (isinstance(layer, PLAIN) and parametrize.is_parametrized(layer)):
        return None
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    if not (hasattr(layer, "lora_A") and type(getattr(layer, "base_layer", None)) is nn.Linear):
        return f"{name} is neither nn.Linear nor LoRA around one"
    if layer.disable_adapters:
        return f"{name} is merged while its adapters are off" if layer.merged else None
    for adapter in () if layer.merged else _active(layer):
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            return f"{name} has a variant of LoRA, or a bias, in adapter {adapter!r}"
        if layer.training and getattr(layer.lora_dropout[adapter], "p", 0.0) > 0:
            return f"{name} drops inputs of adapter {adapter!r} in training (lora_dropout)"
    return None


def state_of(layer: nn.Module) -> tuple | None:
    """What the weight of a layer with adapters depends on besides its parameters."""
    if type(layer) in PLAIN or not hasattr(layer, "base_layer"):
        return None
    return layer.merged, layer.disable_adapters, tuple((name, layer.scaling[name]) for name in _active(layer))


def _active(layer: nn.Module) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
