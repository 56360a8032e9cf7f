"""Which implementation runs an op, and why."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from qformer_fast import extension

BACKENDS = ("reference", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# what CUDA tensors take unasked, the first that has the op and can run it
PREFERRED = ("cuda", "triton")

_active: str | None = None


def available() -> dict[str, str | None]:
    """Each backend and the reason why it can't run here, or None when it can."""
    return {"reference": None, "triton": _why_no_triton(), "cuda": extension.why_not()}


@torch.compiler.assume_constant_result
def _why_no_triton() -> str | None:
    return _probe_triton()


@functools.cache
def _probe_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton can't be imported ({error})"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1, set before the start, runs the kernels on a CPU, slowly)"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, this device has {capability}"


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, one program after the other."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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


def asked_for() -> str | None:
    """The backend of the :func:`use_backend` around the call, or None."""
    return _active


def resolve(
    op: str,
    implementations: Mapping[str, Callable],
    backend: str | None,
    x: Tensor,
    unsupported: str | None = None,
    extension_unsupported: str | None = None,
) -> Callable:
    """The implementation that runs ``op``: the backend asked for, else :func:`use_backend`'s, else the fastest for x.

    Args:
        op (str): for messages.
        implementations (Mapping): of ``op``, by backend.
        backend (str, Optional): asked for by name; never falls back.
        x (Tensor): the input whose device and dtype count.
        unsupported (str, Optional): why the kernels can't take this call's other arguments. Default: `None`, they can.
        extension_unsupported (str, Optional): why the extension's can't. Default: `None`, they can.

    Raises:
        ValueError: an unknown backend. RuntimeError: the backend asked for has no such op or can't run here.
    """

    def why_not(name: str) -> str | None:
        reason = _why_not_triton_on(x, unsupported)
        if name == "cuda":
            reason = extension.why_not() or reason or extension_unsupported
        return reason

    name = backend or _active
    if name is None:
        chosen = (name for name in PREFERRED if name in implementations and why_not(name) is None)
        return implementations[next(chosen, "reference") if x.is_cuda else "reference"]
    _check(name)
    if name not in implementations:
        raise RuntimeError(f"backend {name!r} has no {op}; it runs on {sorted(implementations)}")
    reason = None if name == "reference" else why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} can't run this {op}: {reason}")
    return implementations[name]


def _why_not_triton_on(x: Tensor, unsupported: str | None) -> str | None:
    reason = _why_no_triton()
    if reason is not None:
        return reason
    if x.dtype not in KERNEL_DTYPES:
        return f"its kernels take fp32, fp16 and bf16, got {x.dtype}"
    if not (x.is_cuda or interpreting()):
        return f"its kernels take CUDA tensors, got one on {x.device}"
    return unsupported


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton launchers can run on ``x``."""
    return _why_not_triton_on(x, None) is None


def chooses_kernels(x: Tensor) -> bool:
    """Whether ops take the kernels for ``x``: unasked on a CUDA device, elsewhere where they are asked for."""
    return has_kernels(x) and (_active in PREFERRED or (_active is None and x.is_cuda))


def kernel_or_formula(op: str, x: Tensor) -> Callable:
    """What a custom op runs on ``x``: the Triton launcher ``op``, or on a CPU and in fp64 the formula in reference/."""
    if has_kernels(x):
        from qformer_fast import kernels

        return getattr(kernels, op)
    from qformer_fast import reference

    return getattr(reference, op)


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    reason = available()[name]
    if reason is not None:
        raise RuntimeError(f"backend {name!r} can't run here: {reason}")
