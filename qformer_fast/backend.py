"""Which implementation runs an op, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

BACKENDS = ("reference", "triton", "cuda")

_active: str | None = None


def available() -> dict[str, str | None]:
    """Each backend and the reason why it can't run here, or None when it can."""
    return {
        "reference": None,
        "triton": "this version ships no Triton kernels",
        "cuda": "this version ships no CUDA extension",
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on one backend.

    Args:
        name (str): "reference", "triton" or "cuda".

    Raises:
        ValueError: an unknown name. RuntimeError: the backend can't run here; the message says why.
    """
    global _active
    _check(name)
    previous, _active = _active, name
    try:
        yield
    finally:
        _active = previous


def resolve(op: str, implementations: Mapping[str, Callable], backend: str | None = None) -> Callable:
    """The implementation that runs ``op``: the backend asked for, else :func:`use_backend`'s, else the reference.

    Raises:
        ValueError: an unknown backend. RuntimeError: the backend asked for has no such op or can't run here.
    """
    name = backend or _active or "reference"
    _check(name)
    if name not in implementations:
        raise RuntimeError(f"backend {name!r} has no {op}; it runs on {sorted(implementations)}")
    return implementations[name]


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    reason = available()[name]
    if reason is not None:
        raise RuntimeError(f"backend {name!r} can't run here: {reason}")
