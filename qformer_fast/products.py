"""Matrix products that are added to a tensor of another dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import overlap


def product(a: Tensor, b: Tensor, total: Tensor | None = None, *, add: bool = True) -> Tensor:
    """a b, or ``total``, to which a b is written, with ``add`` added, aside (:mod:`qformer_fast.overlap`)."""
    if total is None:
        return a @ b
    overlap.aside(lambda: product_into(total, a, b, add=add), a, b)
    return total


def product_into(total: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """total = a b, plus ``total`` with ``add``; 16-bit factors are summed in total's fp32 without rounding between."""
    if a.dtype != total.dtype and not a.is_cuda:
        a, b = a.to(total.dtype), b.to(total.dtype)
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=float(add), out=total)
    elif add:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
