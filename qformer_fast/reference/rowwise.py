"""Ops that treat each row by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.reference.philox import dropout_keep, threshold_and_scale


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact erf; x (rows, width), bias (width,)."""
    return F.gelu(x + bias)


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias).to(x.dtype)


def bias_gelu_bwd(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """With y = x + bias: dx = dout (Phi(y) + y phi(y)), Phi and phi the normal distribution and its density; dbias is
    the sum of dx over rows.
    """
    y = x + bias
    dx = dout * (torch.special.ndtr(y) + y * (-0.5 * y * y).exp() / math.sqrt(2 * math.pi))
    return dx.to(x.dtype), dx.sum(0).to(bias.dtype)


def bias_gelu_bwd_in_place(
    dout: Tensor,
    x: Tensor,
    bias: Tensor,
    total: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = True,
) -> tuple[Tensor, Tensor]:
    """Overwrites dout with dx; returns dbias, written to ``total`` where it is given, with ``add`` added, and the
    forward's output, in ``out``, which may be x.
    """
    dx, dbias = bias_gelu_bwd(dout, x, bias)
    dout.copy_(dx)
    activation = bias_gelu_fwd(x, bias)
    (dbias,) = put_into(None if total is None else [total], [dbias], add)
    return dbias, activation if out is None else out.copy_(activation)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float = 0.0
) -> Tensor:
    """layer_norm(dropout(x) + residual) * weight + bias; x and residual (rows, hidden)."""
    return F.layer_norm(F.dropout(x, dropout_p) + residual, weight.shape, weight, bias, eps)


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None = None,
    out: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    rest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, and of each row the mean and 1 / sqrt(variance + eps); arguments as the kernels' forward."""
    normed, mean, rstd = _standardise(_add_dropped(x, residual, x_bias, seed, dropout_p), eps)
    result = (normed * _wide(weight) + _wide(bias)).to(x.dtype)
    if statistics is not None:
        mean, rstd = (place.copy_(x) for place, x in zip(statistics, (mean, rstd), strict=True))
    if rest is not None:
        result, last = result.split([out.shape[0], rest.shape[0]])
        rest.copy_(last)
    return result if out is None else out.copy_(result), mean, rstd


def dropout_add_layer_norm_bwd(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    x_bias: Tensor | None = None,
    totals: Sequence[Tensor] | None = None,
    dx: Tensor | None = None,
    add: bool = True,
    drest: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """With n = (z - mean) rstd and dn = dout weight: dz = rstd (dn - mean(dn) - n mean(dn n)), which is dresidual, and
    dx is dz under dropout's mask; over rows dweight sums dout n, dbias dout and, with ``x_bias``, dx_bias dx.
    """
    if drest is not None:
        dout = torch.cat([dout, drest])
    normed = (_add_dropped(x, residual, x_bias, seed, dropout_p) - mean[:, None]) * rstd[:, None]
    dresidual, dweight, dbias = _standardise_bwd(_wide(dout), normed, rstd, weight)
    dropped = _dropout(dresidual, seed, dropout_p)
    dx_bias = () if x_bias is None else (dropped.sum(0).to(x_bias.dtype),)
    dresidual = dresidual.to(x.dtype)
    dx = dropped.to(x.dtype) if dx is None else dx.copy_(dropped)
    return dx, dresidual, *put_into(totals, (dweight, dbias, *dx_bias), add)


def _add_dropped(x: Tensor, residual: Tensor, x_bias: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    """dropout(x + x_bias) + residual"""
    x = _wide(x) if x_bias is None else _wide(x) + _wide(x_bias)
    return _dropout(x, seed, dropout_p) + _wide(residual)


def sum_parts(parts: Tensor, *outputs: Tensor, add: bool = False) -> None:
    """outputs[i] = the sum of parts[:, i] (parts, outputs, width) over the parts, plus outputs[i] with ``add``."""
    for out, part in zip(outputs, parts.unbind(1), strict=True):
        out.copy_(part.sum(0) + out if add else part.sum(0))


def put_into(totals: Sequence[Tensor] | None, gradients: Sequence[Tensor], add: bool = True) -> Sequence[Tensor]:
    """The gradients, or ``totals`` after those with elements were written to them, with ``add`` added."""
    if totals is None:
        return gradients
    pairs = zip(totals, gradients, strict=True)
    return [total if not x.numel() else total.add_(x) if add else total.copy_(x) for total, x in pairs]


def embeddings(
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(layer_norm(word[input_ids] + position[position_ids])): (rows, hidden)."""
    words = F.embedding(input_ids, word_weight, padding_idx=padding_idx)
    rows = words + F.embedding(position_ids, position_weight)
    return F.dropout(F.layer_norm(rows, weight.shape, weight, bias, eps), dropout_p)


def embeddings_fwd(
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """out of ``dtype``, and of each row the mean and 1 / sqrt(variance + eps)."""
    rows = _wide(F.embedding(input_ids, word_weight)) + _wide(F.embedding(position_ids, position_weight))
    normed, mean, rstd = _standardise(rows, eps)
    return _dropout(normed * _wide(weight) + _wide(bias), seed, dropout_p).to(dtype), mean, rstd


def embeddings_bwd(
    dout: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    padding_idx: int | None,
    dropout_p: float,
    totals: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm's gradient as in :func:`dropout_add_layer_norm_bwd`, summed into the row of each id."""
    rows = _wide(F.embedding(input_ids, word_weight)) + _wide(F.embedding(position_ids, position_weight))
    normed = (rows - mean[:, None]) * rstd[:, None]
    drows, dweight, dbias = _standardise_bwd(_dropout(_wide(dout), seed, dropout_p), normed, rstd, weight)
    dword = torch.zeros_like(word_weight, dtype=drows.dtype).index_add(0, input_ids, drows)
    dposition = torch.zeros_like(position_weight, dtype=drows.dtype).index_add(0, position_ids, drows)
    if padding_idx is not None:
        dword[padding_idx] = 0
    gradients = dword.to(word_weight.dtype), dposition.to(position_weight.dtype), dweight, dbias
    return tuple(put_into(totals, gradients))


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if seed is None:
        return x
    return torch.where(dropout_keep(seed, *x.shape, dropout_p), x * threshold_and_scale(dropout_p)[1], 0.0)


def _standardise(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = z.mean(1)
    rstd = (z.var(1, unbiased=False) + eps).rsqrt()
    return (z - mean[:, None]) * rstd[:, None], mean, rstd


def _standardise_bwd(dout: Tensor, normed: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz, and dweight and dbias in weight's dtype."""
    dnormed = dout * _wide(weight)
    along = (dnormed * normed).mean(1, keepdim=True)
    dz = (dnormed - dnormed.mean(1, keepdim=True) - normed * along) * rstd[:, None]
    return dz, (dout * normed).sum(0).to(weight.dtype), dout.sum(0).to(weight.dtype)
