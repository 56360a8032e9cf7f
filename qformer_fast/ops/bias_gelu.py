"""The activation of the feed-forward layers."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._autograd import register_autograd
from qformer_fast.ops._checks import autocast_dtype, check_device, check_floating, check_shape


@torch.library.custom_op("qformer_fast::bias_gelu_fwd", mutates_args=())
def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    return backends.kernel_or_formula("bias_gelu_fwd", x)(x, bias)


@bias_gelu_fwd.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("qformer_fast::bias_gelu_bwd", mutates_args=())
def bias_gelu_bwd(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return backends.kernel_or_formula("bias_gelu_bwd", x)(dout, x, bias)


@bias_gelu_bwd.register_fake
def _(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor]:
    return bias_gelu_bwd(dout.contiguous(), *ctx.saved_tensors)


register_autograd(bias_gelu_fwd, _backward, _setup_context)


def _kernels(x: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu_fwd(x.to(autocast_dtype(x)).contiguous(), bias)


IMPLEMENTATIONS = {"reference": reference.bias_gelu, "triton": _kernels}


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """gelu(x + bias) = y/2 (1 + erf(y / sqrt 2)) with y = x + bias; the exact form, not the tanh one.

    Under autocast the kernel takes x in the autocast dtype.

    Args:
        x (Tensor): (rows, width); fp32, fp16 or bf16.
        bias (Tensor): (width,), fp32 or x.dtype.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, width), x.dtype.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer input. RuntimeError: the backend asked for
            can't run, with the reason.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415) sec. 2; backward as in reference/rowwise.py.
    """
    check_shape("x", x, "rows", "width")
    check_shape("bias", bias, x.shape[1])
    check_floating(x=x, bias=bias)
    check_device(x, bias=bias)
    return backends.resolve("bias_gelu", IMPLEMENTATIONS, backend, x)(x, bias)
