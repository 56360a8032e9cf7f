"""Seeds of dropout, drawn on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# how many seeds the first op inside seeds_ahead is to draw, and those that no op has taken yet
_wanted = 0
_drawn: list[Tensor] = []


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """(1,) int64 from the default generator of x's device, or None where nothing is dropped.

    It stays on the device, so that a captured CUDA graph draws anew at each replay.
    """
    return draw_seeds(x, dropout_p)[0]


def draw_seeds(x: Tensor, *dropout_ps: float) -> list[Tensor | None]:
    """A seed as :func:`draw_seed` for each probability, drawn together."""
    if not any(dropout_ps):
        return [None] * len(dropout_ps)
    global _wanted
    count = len(dropout_ps)
    if count <= _wanted:
        _drawn.extend(new_seeds(_wanted, x.device).unbind())
        _wanted = 0
    ahead = count <= len(_drawn)
    seeds = [_drawn.pop() for _ in range(count)] if ahead else new_seeds(count, x.device).unbind()
    return [seed if p > 0 else None for seed, p in zip(seeds, dropout_ps, strict=True)]


@contextlib.contextmanager
def seeds_ahead(count: int) -> Iterator[None]:
    """Ops inside, all on one device, take their first ``count`` seeds from one draw: one launch instead of one an op.

    Not around a part that is computed again in backward: there it would find other seeds.
    """
    global _wanted
    _wanted = count
    try:
        yield
    finally:
        _wanted = 0
        _drawn.clear()


def new_seeds(count: int, device: torch.device) -> Tensor:
    """(count, 1) int64 from the device's default generator."""
    if torch.compiler.is_compiling():  # Dynamo does not know random_, which is faster
        return torch.randint(2**62, (count, 1), device=device)
    return torch.empty(count, 1, dtype=torch.int64, device=device).random_()
