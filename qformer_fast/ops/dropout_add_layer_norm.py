"""The tail of every sub-layer."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_probability, check_shape

IMPLEMENTATIONS = {"reference": reference.dropout_add_layer_norm}


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
    ``Blip2QFormerOutput``.

    Args:
        x, residual (Tensor): (rows, hidden); fp32, fp16 or bf16.
        weight, bias (Tensor): (hidden,), fp32 or x.dtype.
        eps (float): added to the variance, so in units of x squared. Default: 1e-12.
        dropout_p (float): probability of dropping an element of x, in [0, 1). Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, hidden), statistics in fp32.

    Raises:
        ValueError: shapes, devices or probability that do not fit. TypeError: integer input. RuntimeError: the backend
            asked for can't run, with the reason.

    Source: Ba et al. 2016 (arXiv:1607.06450) sec. 3.
    """
    check_shape("x", x, "rows", "hidden")
    check_shape("residual", residual, *x.shape)
    check_shape("weight", weight, x.shape[1])
    check_shape("bias", bias, x.shape[1])
    check_floating(x=x, residual=residual, weight=weight, bias=bias)
    check_device(x, residual=residual, weight=weight, bias=bias)
    check_probability("dropout_p", dropout_p)
    run = backends.resolve("dropout_add_layer_norm", IMPLEMENTATIONS, backend, x)
    return run(x, residual, weight, bias, eps=eps, dropout_p=dropout_p)
