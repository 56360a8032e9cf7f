"""What every public op checks before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qformer_fast.layout import SequenceLayout


def check_shape(name: str, x: Tensor, *expected: int | str) -> None:
    """Raises ValueError unless ``x`` has these sizes; a word instead of a number accepts any size."""
    sizes_agree = all(isinstance(want, str) or want == have for want, have in zip(expected, x.shape, strict=False))
    if x.ndim != len(expected) or not sizes_agree:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name} must be ({shape}), got {tuple(x.shape)}")


def check_floating(**tensors: Tensor | None) -> None:
    """Raises TypeError unless every tensor is floating-point."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {x.dtype}")


def check_device(expected: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError unless every tensor lies where ``expected`` does."""
    for name, x in tensors.items():
        if x is not None and x.device != expected.device:
            raise ValueError(f"{name} must be on {expected.device}, got {x.device}")


def check_probability(name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {p}")


def check_scale(name: str, scale: float | None) -> None:
    if scale is not None and not scale > 0:
        raise ValueError(f"{name} must be positive, got {scale}")


def check_rows(name: str, x: Tensor, rows: int, layout: SequenceLayout) -> None:
    """Raises ValueError unless ``x`` has the ``rows`` that ``layout`` speaks of and lies on its device."""
    if x.shape[0] != rows:
        raise ValueError(f"{name} must have the {rows} rows of the layout, got {x.shape[0]}")
    if x.device != layout.masks.device:
        raise ValueError(f"{name} must be on the layout's device {layout.masks.device}, got {x.device}")


def check_totals(
    totals: Sequence[Tensor] | None, *parameters: Tensor, name: str = "gradients", contiguous: bool = True
) -> None:
    """Raises ValueError unless there is a contiguous tensor of every parameter's shape and device, and TypeError unless
    it is of the parameter's dtype or fp32.
    """
    if totals is None:
        return
    if len(totals) != len(parameters):
        raise ValueError(f"{name} must be {len(parameters)} tensors, got {len(totals)}")
    for i, (total, parameter) in enumerate(zip(totals, parameters, strict=True)):
        check_shape(f"{name}[{i}]", total, *parameter.shape)
        check_device(parameter, **{f"{name}[{i}]": total})
        if total.dtype not in (parameter.dtype, torch.float32):
            raise TypeError(f"{name}[{i}] must be {parameter.dtype} or fp32, got {total.dtype}")
        if contiguous and not total.is_contiguous():
            raise ValueError(f"{name}[{i}] must be contiguous, got strides {total.stride()}")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives the kernels for ``x``: its own outside autocast, and in fp64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
