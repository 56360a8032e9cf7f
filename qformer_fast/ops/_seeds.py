"""Seeds of dropout, drawn on the device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

# how many seeds the first op inside seeds_ahead is to draw, and those that no op has taken yet
_wanted = 0
_drawn: list[Tensor] = []


class _Again(threading.local):
    """Of a thread, since autograd runs backward in threads of its own."""

    keeping: tuple[list[Tensor | None], ...] = ()
    given: Iterator[Tensor | None] | None = None


_again = _Again()


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """(1,) int64 from the default generator of x's device, or None where nothing is dropped.

    It stays on the device, so that a captured CUDA graph draws anew at each replay.
    """
    return draw_seeds(x, dropout_p)[0]


def draw_seeds(x: Tensor, *dropout_ps: float) -> list[Tensor | None]:
    """A seed as :func:`draw_seed` for each probability, drawn together."""
    if not any(dropout_ps):
        return [None] * len(dropout_ps)
    seeds = _draw(x, dropout_ps) if _again.given is None else [next(_again.given) for _ in dropout_ps]
    for kept in _again.keeping:
        kept.extend(seeds)
    return seeds


def _draw(x: Tensor, dropout_ps: tuple[float, ...]) -> list[Tensor | None]:
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
    """Ops inside, all on one device, take their first ``count`` seeds from one draw, one launch for all."""
    global _wanted
    _wanted = count
    try:
        yield
    finally:
        _wanted = 0
        _drawn.clear()


def same_seeds() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a part and of its computation in backward, which takes the seeds that were drawn in the first; the
    ``context_fn`` of ``torch.utils.checkpoint``.
    """
    kept: list[Tensor | None] = []
    return _keeping(kept), _giving(kept)


@contextlib.contextmanager
def _keeping(kept: list[Tensor | None]) -> Iterator[None]:
    before, _again.keeping = _again.keeping, (*_again.keeping, kept)
    try:
        yield
    finally:
        _again.keeping = before


@contextlib.contextmanager
def _giving(kept: list[Tensor | None]) -> Iterator[None]:
    before, _again.given = _again.given, iter(kept)
    try:
        yield
    finally:
        _again.given = before


def check_drawn_again(dropout_p: float) -> None:
    """Raises RuntimeError where dropout without seeds is captured and computed again in backward: it would differ."""
    if dropout_p > 0 and _again.keeping and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "gradient checkpointing in a CUDA graph needs the kernels' dropout, and this op runs on the reference"
        )


def new_seeds(count: int, device: torch.device) -> Tensor:
    """(count, 1) int64 from the device's default generator."""
    if torch.compiler.is_compiling():  # Dynamo does not know random_, which is faster
        return torch.randint(2**62, (count, 1), device=device)
    return torch.empty(count, 1, dtype=torch.int64, device=device).random_()
