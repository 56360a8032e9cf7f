"""Keys and values of all cross-attention layers in one matrix product, the image LayerNorm folded into its weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def image_key_value(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    standardized: bool = False,
) -> Tensor:
    """linear(layer_norm(x) * norm_weight + norm_bias, weight, bias), without a gradient to x unless x wants one.

    With x̂ = (x - mean) / sqrt(var + eps) this is x̂ W'^T + c', where W' = W diag(norm_weight) and c' = c + W norm_bias.
    x̂ has no parameters, so when x needs no gradient autograd runs only dW' = dKV^T x̂ and dc' = sum(dKV), and from them
    dW = dW' diag(norm_weight) + dc' norm_bias^T, dnorm_weight = column sums of dW' * W, dnorm_bias = W^T dc'.
    With ``standardized`` x is x̂ already. Without ``norm_weight`` x is taken as it is.

    Shapes: x (images, tokens, encoder_hidden), weight (out, encoder_hidden), bias (out,) -> (images, tokens, out).
    """
    if norm_weight is not None:
        if not standardized:
            x = F.layer_norm(x, x.shape[-1:], eps=eps)
        bias = bias + weight @ norm_bias
        weight = weight * norm_weight
    return F.linear(x, weight, bias)
