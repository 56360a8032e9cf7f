"""Keys and values of all cross-attention layers in one matrix product, the image LayerNorm folded into its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.reference.rowwise import put_into


def standardized_width(width: int) -> int:
    """A column of ones after ``width`` columns, and zeros up to a multiple of 8, which products want."""
    return -(-(width + 1) // 8) * 8


def standardize_into(out: Tensor, x: Tensor, eps: float) -> Tensor:
    """out (..., standardized_width) = [(x - mean) / sqrt(var + eps) | 1 | 0] of x (..., width)."""
    width = x.shape[-1]
    out[..., :width] = F.layer_norm(x if x.dtype == torch.float64 else x.float(), (width,), eps=eps)
    out[..., width] = 1
    out[..., width + 1 :] = 0
    return out


def fold_norm_fwd(
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """[weight diag(norm_weight) | bias + weight norm_bias | 0], (out, width) of ``dtype``: what standardised rows and
    their column of ones are multiplied with. Shapes: weight (out, in), bias (out,), norm_weight, norm_bias (in,).
    """
    zeros = weight.new_zeros(weight.shape[0], width - weight.shape[1] - 1)
    folded_bias = bias + weight @ norm_bias
    return torch.cat([weight * norm_weight, folded_bias[:, None], zeros], dim=1).to(dtype)


def fold_norm_bwd(
    dout: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    totals: Sequence[Tensor] = (),
    add: bool = True,
    add_norm: bool = True,
) -> Sequence[Tensor]:
    """Of dout = [dW' | dc' | ...]: dW' diag(norm_weight) + dc' norm_bias^T, dc', the column sums of dW' * weight, and
    weight^T dc'; written to ``totals`` if there are any, with ``add`` the first two are added, with ``add_norm`` the
    others.
    """
    dscaled, dbias = dout[:, : weight.shape[1]].to(weight.dtype), dout[:, weight.shape[1]].to(bias.dtype)
    dweight = dscaled * norm_weight + dbias[:, None] * norm_bias
    gradients = dweight, dbias.clone(), (dscaled * weight).sum(0), dbias @ weight
    if not totals:
        return gradients
    return [*put_into(totals[:2], gradients[:2], add), *put_into(totals[2:], gradients[2:], add_norm)]


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
    With ``standardized`` x is what :func:`standardize_into` made, so that c' is one more column of W' and its gradient
    needs no sum over the rows. Without ``norm_weight`` x is taken as it is.

    Shapes: x (images, tokens, encoder_hidden), weight (out, encoder_hidden), bias (out,) -> (images, tokens, out).
    """
    if standardized:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if norm_weight is None:
            norm_weight, norm_bias = weight.new_ones(weight.shape[1]), weight.new_zeros(weight.shape[1])
        return F.linear(x, fold_norm_fwd(weight, bias, norm_weight, norm_bias, x.shape[-1], dtype))
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
        bias = bias + weight @ norm_bias
        weight = weight * norm_weight
    return F.linear(x, weight, bias)
