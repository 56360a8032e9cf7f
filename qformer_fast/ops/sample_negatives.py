"""Hard negatives of ITM."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_shape

IMPLEMENTATIONS = {"reference": reference.sample_negatives}


def sample_negatives(logits: Tensor, excluded: Tensor, *, backend: str | None = None) -> Tensor:
    """One column a row, drawn from softmax(logits) over the columns that are not excluded; stays on the device.

    Replaces LAVIS's softmax and multinomial with a host round trip a row (blip2_qformer.py:181-209 of LAVIS 506965b).
    A row that excludes everything draws uniformly.

    Args:
        logits (Tensor): (rows, candidates), divided by the temperature.
        excluded (Tensor): (rows, candidates) bool.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows,) int64 in [0, candidates).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: ``excluded`` is not bool. RuntimeError: the backend
            asked for can't run, with the reason.
    """
    check_shape("logits", logits, "rows", "candidates")
    check_shape("excluded", excluded, *logits.shape)
    check_floating(logits=logits)
    check_device(logits, excluded=excluded)
    if excluded.dtype != torch.bool:
        raise TypeError(f"excluded must be bool, got {excluded.dtype}")
    return backends.resolve("sample_negatives", IMPLEMENTATIONS, backend, logits)(logits, excluded)
