"""The tail of every sub-layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._autograd import register_autograd
from qformer_fast.ops._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_probability,
    check_shape,
)
from qformer_fast.ops._seeds import draw_seed

MAX_HIDDEN = 4096


@torch.library.custom_op("qformer_fast::dropout_add_layer_norm_fwd", mutates_args=())
def dropout_add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.kernel_or_formula("dropout_add_layer_norm_fwd", x)
    return run(x, residual, weight, bias, seed, eps, dropout_p)


@dropout_add_layer_norm_fwd.register_fake
def _(x: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], dtype=statistics_dtype(x)) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, rstd


@torch.library.custom_op("qformer_fast::dropout_add_layer_norm_bwd", mutates_args=())
def dropout_add_layer_norm_bwd(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight, dbias. Without ``seed`` dresidual is dx: then it is written once, and (0, hidden) stands
    for it, since the outputs of an op may not alias each other.
    """
    run = backends.kernel_or_formula("dropout_add_layer_norm_bwd", x)
    dx, dresidual, dweight, dbias = run(dout, x, residual, weight, mean, rstd, seed, dropout_p)
    return dx, dx.new_empty(0, dx.shape[1]) if seed is None else dresidual, dweight, dbias


@dropout_add_layer_norm_bwd.register_fake
def _(
    dout: Tensor, x: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor | None, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dresidual = x.new_empty(0, x.shape[1]) if seed is None else torch.empty_like(dx)
    return dx, dresidual, torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, _, seed, _, ctx.dropout_p = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, residual, weight, mean, rstd, seed)


def _backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: gradient checkpointing lets them be read a single time
    seed = saved[-1]
    dx, dresidual, *parameters = dropout_add_layer_norm_bwd(dout.contiguous(), *saved, ctx.dropout_p)
    return dx, dx if seed is None else dresidual, *parameters, None, None, None


register_autograd(dropout_add_layer_norm_fwd, _backward, _setup_context)


def _kernels(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float) -> Tensor:
    x, residual = (rows.to(autocast_dtype(x)).contiguous() for rows in (x, residual))
    seed = draw_seed(x, dropout_p)
    out, _, _ = dropout_add_layer_norm_fwd(x, residual, weight.contiguous(), bias.contiguous(), seed, eps, dropout_p)
    return out


IMPLEMENTATIONS = {"reference": reference.dropout_add_layer_norm, "triton": _kernels}


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unsupported(hidden: int) -> str | None:
    """Why the kernels can't take rows this wide, or None."""
    return None if 1 <= hidden <= MAX_HIDDEN else f"its kernels take hidden sizes of 1 to {MAX_HIDDEN}, got {hidden}"


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm of a residual sum: ``layer_norm(dropout(x) + residual) * weight + bias``.

    Replaces the tail of LAVIS ``BertSelfOutput`` and ``BertOutput`` (Qformer.py:288-292, 374-378) / HF
    ``Blip2QFormerOutput``. The kernels take residual in x's dtype, and both in the autocast dtype under autocast.

    Args:
        x, residual (Tensor): (rows, hidden); fp32, fp16 or bf16.
        weight, bias (Tensor): (hidden,), fp32 or x.dtype.
        eps (float): added to the variance, so in units of x squared. Default: 1e-12.
        dropout_p (float): probability of dropping an element of x, in [0, 1). Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, hidden), x.dtype; statistics in fp32.

    Raises:
        ValueError: shapes, devices or probability that do not fit. TypeError: integer input. RuntimeError: the backend
            asked for can't run, with the reason.

    Source: Ba et al. 2016 (arXiv:1607.06450) sec. 3; backward as in reference/rowwise.py.
    """
    check_shape("x", x, "rows", "hidden")
    check_shape("residual", residual, *x.shape)
    check_shape("weight", weight, x.shape[1])
    check_shape("bias", bias, x.shape[1])
    check_floating(x=x, residual=residual, weight=weight, bias=bias)
    check_device(x, residual=residual, weight=weight, bias=bias)
    check_probability("dropout_p", dropout_p)
    run = backends.resolve("dropout_add_layer_norm", IMPLEMENTATIONS, backend, x, unsupported(x.shape[1]))
    return run(x, residual, weight, bias, eps=eps, dropout_p=dropout_p)
