"""The LM head and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._autograd import register_autograd, without_totals
from qformer_fast.ops._checks import autocast_dtype, check_device, check_floating, check_shape, check_totals
from qformer_fast.reference.losses import weight_gradient_dtype


@torch.library.custom_op("qformer_fast::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    with_gradients: list[bool],
    totals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, divisor, dx, dweight, dbias; ``with_gradients`` says which of x, weight and bias require one.

    ``totals`` are for backward, see :func:`_bwd`.
    """
    run = backends.kernel_or_formula("linear_cross_entropy_fwd", x)
    return run(x, weight, bias, labels, label_smoothing, ignore_index, reduction, with_gradients)


@linear_cross_entropy_fwd.register_fake
def _(x, weight, bias, labels, label_smoothing, ignore_index, reduction, with_gradients, _) -> tuple[Tensor, ...]:
    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))

    if reduction == "none":
        return empty(x.shape[0]), empty(0), x.new_empty(0), empty(0), empty(0)
    dx = torch.empty_like(x) if with_gradients[0] else x.new_empty(0)
    dtype = weight_gradient_dtype(x, weight, with_gradients)
    dweight = x.new_empty(weight.shape if with_gradients[1] else 0, dtype=dtype)
    return empty(), empty(), dx, dweight, empty(weight.shape[0] if with_gradients[2] else 0)


def _bwd(
    dout: Tensor,
    divisor: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    totals: list[Tensor],
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> list[Tensor]:
    """What forward made, times dout / divisor; weight's and bias's are added to ``totals`` if it is not empty, and not
    returned.
    """
    run = backends.kernel_or_formula("linear_cross_entropy_bwd", dx)
    found = run(dout, divisor, dx, dweight, dbias, weight_dtype, bias_dtype, totals or None)
    return [found[0]] if totals else list(found)


# with totals, backward calls the function itself: an op may not add to its inputs and return others
linear_cross_entropy_bwd = torch.library.custom_op("qformer_fast::linear_cross_entropy_bwd", mutates_args=())(_bwd)


@linear_cross_entropy_bwd.register_fake
def _(dout, divisor, dx, dweight, dbias, totals, weight_dtype, bias_dtype) -> list[Tensor]:
    others = torch.empty_like(dweight, dtype=weight_dtype), torch.empty_like(dbias, dtype=bias_dtype)
    return [torch.empty_like(dx), *others]


@torch.library.custom_op("qformer_fast::linear_cross_entropy_rows_bwd", mutates_args=())
def linear_cross_entropy_rows_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    with_gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole backward of a loss that is not reduced."""
    run = backends.kernel_or_formula("linear_cross_entropy_rows_bwd", x)
    return run(dout, x, weight, bias, labels, label_smoothing, ignore_index, with_gradients)


@linear_cross_entropy_rows_bwd.register_fake
def _(dout, x, weight, bias, labels, label_smoothing, ignore_index, with_gradients) -> tuple[Tensor, ...]:
    def like(x: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)

    none = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    dbias = none if bias is None else like(bias, with_gradients[2])
    return like(x, with_gradients[0]), like(weight, with_gradients[1]), dbias


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, labels, *ctx.options, ctx.reduction, ctx.with_gradients, ctx.totals = inputs
    ctx.dtypes = weight.dtype, x.dtype if bias is None else bias.dtype
    ctx.save_for_backward(*(inputs[:4] if ctx.reduction == "none" else output[1:]))


def _backward(ctx, dout: Tensor) -> tuple[Any, ...]:
    if ctx.reduction == "none":
        arguments = *ctx.saved_tensors, *ctx.options, ctx.with_gradients
        gradients = linear_cross_entropy_rows_bwd(dout.contiguous(), *arguments)
    else:
        run = _bwd if ctx.totals else linear_cross_entropy_bwd
        gradients = run(dout, *ctx.saved_tensors, ctx.totals, *ctx.dtypes)
        gradients += [None] * (3 - len(gradients))
    wanted = [dx if wants else None for dx, wants in zip(gradients, ctx.with_gradients, strict=True)]
    return *wanted, *[None] * 5, [None] * len(ctx.totals)


register_autograd(linear_cross_entropy_fwd, _backward, _setup_context)


def _kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    gradients: Sequence[Tensor] | None = None,
) -> Tensor:
    inputs = x, weight, bias
    with_gradients = [torch.is_grad_enabled() and y is not None and y.requires_grad for y in inputs]
    x, labels = x.to(autocast_dtype(x)).contiguous(), labels.contiguous()
    loss, *_ = linear_cross_entropy_fwd(
        x, weight, bias, labels, label_smoothing, ignore_index, reduction, with_gradients, list(gradients or ())
    )
    return loss


IMPLEMENTATIONS = {"reference": without_totals(reference.linear_cross_entropy), "triton": _kernels}


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    gradients: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(x weight^T + bias, labels) with label smoothing.

    Replaces LAVIS's decoder and loss (Qformer.py:688, 1073-1083), whose label smoothing is 0.1. The kernels hold the
    logits of some rows at a time, and make the gradients of a reduced loss in forward, for which backward is one
    product. Under autocast they multiply in the autocast dtype.

    Args:
        x (Tensor): (rows, hidden); fp32, fp16 or bf16.
        weight (Tensor): (vocab, hidden), fp32 or x.dtype; may be tied to the word embeddings.
        bias (Tensor, Optional): (vocab,), fp32 or x.dtype.
        labels (Tensor): (rows,) int64 in [0, vocab) or ``ignore_index``. That is checked on a CPU; on a device it would
            cost a host sync, and another label makes its row's loss and gradient NaN.
        label_smoothing (float): probability spread evenly over the vocabulary, in [0, 1]. Default: 0.0.
        ignore_index (int): rows with this label do not count. Default: -100.
        reduction (str): "mean" over counted rows, "sum" or "none". Default: "mean".
        gradients (Sequence, Optional): two tensors like weight and bias, fp32 or of their dtype, contiguous, for a
            reduced loss. The kernels add the gradients to them in backward and give autograd none. Default: `None`.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: 0-dim, or (rows,) with "none"; nats. The kernels return fp32, plain PyTorch outside autocast x.dtype.
            The mean over no counted rows is NaN, its gradient zero.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit. TypeError: integer x, labels that are not int64.
            RuntimeError: the backend asked for can't run, with the reason.
    """
    check_shape("x", x, "rows", "hidden")
    check_shape("weight", weight, "vocab", x.shape[1])
    check_shape("labels", labels, x.shape[0])
    if bias is not None:
        check_shape("bias", bias, weight.shape[0])
    check_floating(x=x, weight=weight, bias=bias)
    check_device(x, weight=weight, bias=bias, labels=labels)
    _check_labels(labels, weight.shape[0], ignore_index)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if gradients is not None:
        if bias is None or reduction == "none":
            raise ValueError("gradients need a bias and a reduced loss")
        check_totals(gradients, weight, bias)
    run = backends.resolve("linear_cross_entropy", IMPLEMENTATIONS, backend, x)
    options = dict(label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction)
    return run(x, weight, bias, labels, **options, gradients=gradients)


def _check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab))]
    if outside.numel():
        raise ValueError(f"labels must lie in [0, {vocab}) or be {ignore_index}, got {int(outside[0])}")
