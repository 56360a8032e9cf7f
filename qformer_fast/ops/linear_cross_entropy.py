"""The LM head and its loss."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_shape

IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy}


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(x weight^T + bias, labels) with label smoothing.

    Replaces LAVIS's decoder and loss (Qformer.py:688, 1073-1083), whose label smoothing is 0.1.

    Args:
        x (Tensor): (rows, hidden).
        weight (Tensor): (vocab, hidden); may be tied to the word embeddings.
        bias (Tensor, Optional): (vocab,).
        labels (Tensor): (rows,) int64 in [0, vocab) or ``ignore_index``.
        label_smoothing (float): probability spread evenly over the vocabulary, in [0, 1]. Default: 0.0.
        ignore_index (int): rows with this label do not count. Default: -100.
        reduction (str): "mean" over counted rows, "sum" or "none". Default: "mean".
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: 0-dim, or (rows,) with "none"; nats.

    Raises:
        ValueError: shapes, devices or options that do not fit. TypeError: integer x. RuntimeError: the backend asked
            for can't run, with the reason.
    """
    check_shape("x", x, "rows", "hidden")
    check_shape("weight", weight, "vocab", x.shape[1])
    check_shape("labels", labels, x.shape[0])
    if bias is not None:
        check_shape("bias", bias, weight.shape[0])
    check_floating(x=x, weight=weight, bias=bias)
    check_device(x, weight=weight, bias=bias, labels=labels)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    run = backends.resolve("linear_cross_entropy", IMPLEMENTATIONS, backend, x)
    return run(x, weight, bias, labels, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction)
