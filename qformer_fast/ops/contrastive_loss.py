"""The image-text contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._autograd import register_autograd
from qformer_fast.ops._checks import check_device, check_floating, check_shape


@torch.library.custom_op("qformer_fast::contrastive_loss_fwd", mutates_args=())
def contrastive_loss_fwd(
    sim_i2t: Tensor, sim_t2i: Tensor, temp: Tensor, same_image: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """losses (2, rows), logits (2, rows, candidates), and for backward lse_parts (2, 2, rows) and counts (rows,)."""
    run = backends.kernel_or_formula("contrastive_loss_fwd", sim_i2t)
    return run(sim_i2t, sim_t2i, temp, same_image, label_smoothing)


@contrastive_loss_fwd.register_fake
def _(
    sim_i2t: Tensor, sim_t2i: Tensor, temp: Tensor, same_image: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = sim_i2t.shape[0], torch.promote_types(sim_i2t.dtype, torch.float32)
    losses, lse_parts, counts = (sim_i2t.new_empty(size, dtype=dtype) for size in ((2, rows), (2, 2, rows), (rows,)))
    return losses, sim_i2t.new_empty(2, *sim_i2t.shape), lse_parts, counts


@torch.library.custom_op("qformer_fast::contrastive_loss_bwd", mutates_args=())
def contrastive_loss_bwd(
    dlosses: Tensor,
    lse_parts: Tensor,
    counts: Tensor,
    sim_i2t: Tensor,
    sim_t2i: Tensor,
    temp: Tensor,
    same_image: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the similarities (2, rows, candidates), and of temp (2, rows), to be added up."""
    run = backends.kernel_or_formula("contrastive_loss_bwd", sim_i2t)
    return run(dlosses, lse_parts, counts, sim_i2t, sim_t2i, temp, same_image, label_smoothing)


@contrastive_loss_bwd.register_fake
def _(
    dlosses: Tensor,
    lse_parts: Tensor,
    counts: Tensor,
    sim_i2t: Tensor,
    sim_t2i: Tensor,
    temp: Tensor,
    same_image: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    return sim_i2t.new_empty(2, *sim_i2t.shape), torch.empty_like(dlosses)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.label_smoothing = inputs
    ctx.save_for_backward(*output[2:], *tensors)


def _backward(ctx, dlosses: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    *_, temp, _ = kept = ctx.saved_tensors
    dsims, dtemps = contrastive_loss_bwd(dlosses.contiguous(), *kept, ctx.label_smoothing)
    return *dsims, dtemps.sum().to(temp.dtype), None, None


register_autograd(contrastive_loss_fwd, _backward, _setup_context)


def _kernels(
    sim_i2t: Tensor, sim_t2i: Tensor, temp: Tensor, same_image: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    sims = sim_i2t.contiguous(), sim_t2i.contiguous()
    losses, logits, *_ = contrastive_loss_fwd(*sims, temp, same_image.contiguous(), label_smoothing)
    return losses.mean().to(sim_i2t.dtype), *logits


IMPLEMENTATIONS = {"reference": reference.contrastive_loss, "triton": _kernels}


def contrastive_loss(
    sim_i2t: Tensor,
    sim_t2i: Tensor,
    temp: Tensor,
    same_image: Tensor,
    *,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each image's texts and of each text's images, the mean of both.

    The target of a row is spread over the columns that show its image, and smoothed over all (blip2_qformer.py:152-178
    of LAVIS 506965b). Sums are in fp32.

    Args:
        sim_i2t, sim_t2i (Tensor): (rows, candidates), cosines of images with texts and of texts with images.
        temp (Tensor): 0-dim, the temperature that they are divided by; of any floating dtype, also its gradient.
        same_image (Tensor): (rows, candidates) bool, at least one True a row.
        label_smoothing (float): in [0, 1]. Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        tuple: the loss, 0-dim, in nats; and without gradients the similarities over the temperature.

    Raises:
        ValueError: shapes or devices that do not fit, no candidates, label_smoothing outside [0, 1]. TypeError: dtypes
            that differ, ``same_image`` is not bool. RuntimeError: the backend asked for can't run, with the reason.
    """
    check_shape("sim_i2t", sim_i2t, "rows", "candidates")
    check_shape("sim_t2i", sim_t2i, *sim_i2t.shape)
    check_shape("same_image", same_image, *sim_i2t.shape)
    check_shape("temp", temp)
    if not sim_i2t.numel():
        raise ValueError(f"sim_i2t must have rows and candidates, got {tuple(sim_i2t.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    check_floating(sim_i2t=sim_i2t, temp=temp)
    if sim_t2i.dtype != sim_i2t.dtype:
        raise TypeError(f"sim_t2i must be {sim_i2t.dtype}, got {sim_t2i.dtype}")
    check_device(sim_i2t, sim_t2i=sim_t2i, temp=temp, same_image=same_image)
    if same_image.dtype != torch.bool:
        raise TypeError(f"same_image must be bool, got {same_image.dtype}")
    run = backends.resolve("contrastive_loss", IMPLEMENTATIONS, backend, sim_i2t)
    return run(sim_i2t, sim_t2i, temp, same_image, label_smoothing)
