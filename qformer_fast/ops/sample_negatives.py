"""Hard negatives of ITM."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_shape
from qformer_fast.ops._seeds import new_seeds


@torch.library.custom_op("qformer_fast::sample_negatives_fwd", mutates_args=())
def sample_negatives_fwd(logits: Tensor, excluded: Tensor, seed: Tensor) -> Tensor:
    return backends.kernel_or_formula("sample_negatives_fwd", logits)(logits, excluded, seed)


@sample_negatives_fwd.register_fake
def _(logits: Tensor, excluded: Tensor, seed: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _kernels(logits: Tensor, excluded: Tensor) -> Tensor:
    return sample_negatives_fwd(logits.detach(), excluded, new_seeds(1, logits.device)[0])


IMPLEMENTATIONS = {"reference": reference.sample_negatives, "triton": _kernels}


def sample_negatives(logits: Tensor, excluded: Tensor, *, backend: str | None = None) -> Tensor:
    """One column a row, drawn from softmax(logits) over the columns that are not excluded; stays on the device.

    Replaces LAVIS's softmax and multinomial with a host round trip a row (blip2_qformer.py:181-209 of LAVIS 506965b).
    A row that excludes everything draws uniformly. The kernel takes a NaN for the smallest logit there is; its draw is
    decided by a seed from the default generator of the device, which stays there.

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
    if not logits.shape[1]:
        raise ValueError(f"logits must have candidates, got {tuple(logits.shape)}")
    check_floating(logits=logits)
    check_device(logits, excluded=excluded)
    if excluded.dtype != torch.bool:
        raise TypeError(f"excluded must be bool, got {excluded.dtype}")
    return backends.resolve("sample_negatives", IMPLEMENTATIONS, backend, logits)(logits, excluded)
