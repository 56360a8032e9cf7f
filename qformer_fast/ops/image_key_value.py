"""Keys and values of all cross-attention layers, once per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._autograd import register_autograd
from qformer_fast.ops._checks import autocast_dtype, check_device, check_floating, check_shape


@torch.library.custom_op("qformer_fast::fold_norm_fwd", mutates_args=())
def fold_norm_fwd(
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    run = backends.kernel_or_formula("fold_norm_fwd", weight)
    return run(weight, bias, norm_weight, norm_bias, width, dtype)


@fold_norm_fwd.register_fake
def _(weight, bias, norm_weight, norm_bias, width: int, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape[0], width, dtype=dtype)


@torch.library.custom_op("qformer_fast::fold_norm_bwd", mutates_args=())
def fold_norm_bwd(dout: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> list[Tensor]:
    """Gradients of the four parameters."""
    run = backends.kernel_or_formula("fold_norm_bwd", weight)
    return list(run(dout, weight, bias, norm_weight, norm_bias))


@fold_norm_bwd.register_fake
def _(dout: Tensor, *parameters) -> list[Tensor]:
    return [torch.empty_like(x) for x in parameters]


def _setup_context(ctx, inputs, output) -> None:
    *parameters, _, _ = inputs
    ctx.save_for_backward(*parameters)


def _backward(ctx, dout: Tensor) -> tuple[Any, ...]:
    return *fold_norm_bwd(dout.contiguous(), *ctx.saved_tensors), None, None


register_autograd(fold_norm_fwd, _backward, _setup_context)


def _kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    standardized: bool,
) -> Tensor:
    if norm_weight is None or not standardized:
        return reference.image_key_value(x, weight, bias, norm_weight, norm_bias, eps=eps, standardized=standardized)
    dtype = autocast_dtype(x)
    parameters = (p.contiguous() for p in (weight, bias, norm_weight, norm_bias))
    return F.linear(x.to(dtype), fold_norm_fwd(*parameters, x.shape[-1], dtype))


IMPLEMENTATIONS = {"reference": reference.image_key_value, "triton": _kernels}


def image_key_value(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    standardized: bool = False,
    backend: str | None = None,
) -> Tensor:
    """linear(layer_norm(x) * norm_weight + norm_bias, weight, bias), the LayerNorm folded into the weights.

    Replaces ``ln_vision`` and every layer's key and value projections (Qformer.py:200-202); no product for the gradient
    of x runs unless x requires grad.

    Args:
        x (Tensor): (images, tokens, encoder_hidden), the image encoder's tokens.
        weight (Tensor): (out, encoder_hidden), the layers' key and value weights one below the other.
        bias (Tensor): (out,).
        norm_weight, norm_bias (Tensor, Optional): (encoder_hidden,). Default: `None`, x is already normalised.
        eps (float): of the LayerNorm. Default: 1e-5, ``nn.LayerNorm``'s as in LAVIS (blip2.py:81).
        standardized (bool): x is :meth:`Blip2QFormer.standardize`'s: (images, tokens, encoder_hidden and a column of
            ones, filled up to a multiple of 8). Default: False.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (images, tokens, out).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer input. RuntimeError: the backend asked for
            can't run, with the reason.
    """
    check_shape("weight", weight, "out", "encoder_hidden")
    width = weight.shape[1]
    check_shape("x", x, "images", "tokens", reference.standardized_width(width) if standardized else width)
    check_shape("bias", bias, weight.shape[0])
    check_floating(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check_device(weight, x=x, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must be given together, got one of them")
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            check_shape(name, value, width)
    return backends.resolve("image_key_value", IMPLEMENTATIONS, backend, x)(
        x, weight, bias, norm_weight, norm_bias, eps=eps, standardized=standardized
    )


@torch.no_grad()
def image_key_value_bwd(
    dout: Tensor, x: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, add: bool, add_norm: bool
) -> None:
    """Backward of :func:`image_key_value` of standardized rows where autograd did not follow it; also of some of its
    columns alone.

    Args:
        dout (Tensor): (images, tokens, out) of the dtype that forward ran in.
        x (Tensor): (images, tokens, standardized width), as it was given to forward.
        parameters (Sequence): weight (out, encoder_hidden), bias (out,), norm_weight and norm_bias (encoder_hidden,).
        gradients (Sequence): four tensors like these, to which their gradients are written.
        add, add_norm (bool): to weight's and bias's, and to the norm's, they are added instead.
    """
    chosen = backends.chooses_kernels(parameters[0])
    run = backends.kernel_or_formula("fold_norm_bwd", parameters[0]) if chosen else reference.fold_norm_bwd
    product = dout.flatten(0, 1).T @ x.flatten(0, 1).to(dout.dtype)
    run(product, *parameters, gradients, add, add_norm)
