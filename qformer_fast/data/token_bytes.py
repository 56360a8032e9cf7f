"""Image tokens as the bytes that a cache stores: plain floats, or int8 with one scale a token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = (*FLOATS, "int8")
LEVELS = 127
SCALE_BYTES = 4


def read_dtype(dtype: str) -> torch.dtype:
    """What :func:`unpack` gives: ``dtype`` itself, of "int8" float16."""
    return FLOATS.get(dtype, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    """Of a cache that stores floats."""
    return next(name for name, value in FLOATS.items() if value == dtype)


def token_bytes(dtype: str, width: int) -> int:
    """Bytes of one token: of "int8" one a value, and behind them the token's fp32 scale."""
    return width + SCALE_BYTES if dtype == "int8" else width * FLOATS[dtype].itemsize


def pack(tokens: Tensor, dtype: str) -> np.ndarray:
    """Bytes of image tokens.

    int8 values are ``round(x / scale)`` with the token's ``scale = max(abs(x)) / 127``, so that no value is off by more
    than half a scale.

    Args:
        tokens (Tensor): (images, tokens, width) of any floating dtype, on any device.
        dtype (str): one of ``DTYPES``.

    Returns:
        ndarray: (images, tokens * token_bytes) uint8. What is not finite in ``read_dtype(dtype)`` is not found here.
    """
    if dtype != "int8":
        return tokens.detach().to("cpu", FLOATS[dtype]).contiguous().flatten(1).view(torch.uint8).numpy()
    x = tokens.detach().float()
    # a token of zeros has scale 0 and is divided by something else
    scale = x.abs().amax(-1, keepdim=True) / LEVELS
    levels = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return torch.cat([levels.view(torch.uint8), scale.view(torch.uint8)], dim=-1).flatten(1).cpu().numpy()


def unpack(raw: Tensor, dtype: str, tokens: int, width: int) -> Tensor:
    """Image tokens (images, tokens, width) in ``read_dtype(dtype)``, of (images, bytes) uint8 as :func:`pack` gives, on
    their device.
    """
    if dtype != "int8":
        return raw.view(FLOATS[dtype]).view(len(raw), tokens, width)
    raw = raw.view(len(raw), tokens, width + SCALE_BYTES)
    scales = raw[..., width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    levels = raw[..., :width].view(torch.int8)
    out = torch.empty(len(raw), tokens, width, dtype=read_dtype(dtype), device=raw.device)
    if raw.device.type != "cpu":
        return torch.mul(levels, scales, out=out)
    # image by image, whose fp32 values stay in the processor's cache: a third of the time
    values = torch.empty(tokens, width)
    for image, of_image, scale in zip(out, levels, scales, strict=True):
        image.copy_(values.copy_(of_image).mul_(scale))
    return out
