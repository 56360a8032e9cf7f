"""The activation of the feed-forward layers."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_shape

IMPLEMENTATIONS = {"reference": reference.bias_gelu}


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """gelu(x + bias) = y/2 (1 + erf(y / sqrt 2)) with y = x + bias; the exact form, not the tanh one.

    Args:
        x (Tensor): (rows, width); fp32, fp16 or bf16.
        bias (Tensor): (width,), fp32 or x.dtype.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, width).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer input. RuntimeError: the backend asked for
            can't run, with the reason.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415) sec. 2.
    """
    check_shape("x", x, "rows", "width")
    check_shape("bias", bias, x.shape[1])
    check_floating(x=x, bias=bias)
    check_device(x, bias=bias)
    return backends.resolve("bias_gelu", IMPLEMENTATIONS, backend)(x, bias)
