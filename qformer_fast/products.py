"""Matrix products: of few rows, and those that are added to a tensor of another dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import extension, overlap

# up to how many rows a kernel that reads the weights with many programs is faster than cuBLAS
FEW_ROWS = 128


def reads_weights(rows: Tensor) -> bool:
    """Whether a product with these rows takes the time of reading its weights, and a kernel is there for it."""
    return rows.shape[0] <= FEW_ROWS and backends.has_kernels(rows)


def linear(rows: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False, backend: str | None = None) -> Tensor:
    """rows @ weight^T + bias, with ``gelu`` GELU of it; for inference. Backend "triton" leaves the extension out."""
    if reads_weights(rows):
        from qformer_fast import kernels

        return kernels.linear_few_rows(rows, weight, bias, gelu=gelu)
    if (backend or backends.asked_for()) in (None, "cuda") and extension.linear_is_faster(rows, weight):
        return extension.linear(rows, weight, bias.to(rows.dtype), gelu=gelu)
    if gelu:
        return backends.kernel_or_formula("bias_gelu_fwd", rows)(rows @ weight.t(), bias)
    return torch.addmm(bias.to(rows.dtype), rows, weight.t())


def linear_in_parts(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight^T, or (parts, rows, outputs), whose sum it is; for inference."""
    if not reads_weights(rows):
        return rows @ weight.t()
    from qformer_fast import kernels

    return kernels.linear_few_rows(rows, weight, in_parts=True)


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
