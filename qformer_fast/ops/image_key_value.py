"""Keys and values of all cross-attention layers, once per image."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_shape

# a matrix product, the same on every backend
IMPLEMENTATIONS = dict.fromkeys(("reference", "triton"), reference.image_key_value)


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
