"""ITC's loss of both ways' similarities, and its gradients: all of a row in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.linear_cross_entropy import LOWEST


@triton.jit
def contrastive_loss_fwd_kernel(
    i2t_ptr,  # (B, C)
    t2i_ptr,  # (B, C)
    temp_ptr,  # ()
    same_image_ptr,  # (B, C) bool
    losses_ptr,  # (2, B) fp32
    logits_ptr,  # (2, B, C)
    lse_parts_ptr,  # (2, 2, B) fp32: the largest logit, and what is left of log sum exp
    counts_ptr,  # (B,) fp32
    B,
    C,
    label_smoothing,
    BLOCK_C: tl.constexpr,
):
    """One program = one row of one way."""
    row = tl.program_id(0).to(tl.int64)
    own = row % B
    sim_ptr = i2t_ptr
    if row >= B:
        sim_ptr = t2i_ptr
    sim_ptr += own * C
    same_image_ptr += own * C
    logits_ptr += row * C
    temp = tl.load(temp_ptr).to(tl.float32)
    largest = tl.full((BLOCK_C,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    of_all = tl.zeros((BLOCK_C,), tl.float32)
    of_same = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.zeros((BLOCK_C,), tl.int32)
    for start in range(0, C, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        mask = offs < C
        logits = tl.div_rn(tl.load(sim_ptr + offs, mask=mask, other=0.0).to(tl.float32), temp)
        same = tl.load(same_image_ptr + offs, mask=mask, other=0) != 0
        tl.store(logits_ptr + offs, logits, mask=mask)
        of_all += tl.where(mask, logits, 0.0)
        of_same += tl.where(same, logits, 0.0)
        count += same.to(tl.int32)
        logits = tl.where(mask, logits, float("-inf"))
        larger = tl.maximum(largest, logits)
        total = total * tl.exp(largest - larger) + tl.exp(logits - larger)
        largest = larger
    top = tl.max(largest, axis=0)
    rest = tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    n = tl.sum(count, axis=0).to(tl.float32)
    of_target = (1.0 - label_smoothing) * tl.sum(of_same, axis=0) / n + label_smoothing * tl.sum(of_all, axis=0) / C
    tl.store(losses_ptr + row, top - of_target + rest)
    tl.store(lse_parts_ptr + row, top)
    tl.store(lse_parts_ptr + 2 * B + row, rest)
    tl.store(counts_ptr + own, n, mask=row < B)


@triton.jit
def contrastive_loss_bwd_kernel(
    dlosses_ptr,  # (2, B) fp32
    lse_parts_ptr,  # (2, 2, B) fp32: the largest logit, and what is left of log sum exp
    counts_ptr,  # (B,) fp32
    i2t_ptr,  # (B, C)
    t2i_ptr,  # (B, C)
    temp_ptr,  # ()
    same_image_ptr,  # (B, C) bool
    dsims_ptr,  # (2, B, C)
    dtemps_ptr,  # (2, B) fp32
    B,
    C,
    label_smoothing,
    BLOCK_C: tl.constexpr,
):
    """One program = one row of one way; dtemps are to be added up."""
    row = tl.program_id(0).to(tl.int64)
    own = row % B
    sim_ptr = i2t_ptr
    if row >= B:
        sim_ptr = t2i_ptr
    sim_ptr += own * C
    same_image_ptr += own * C
    dsims_ptr += row * C
    temp = tl.load(temp_ptr).to(tl.float32)
    scale = tl.load(dlosses_ptr + row) / temp
    top, rest = tl.load(lse_parts_ptr + row), tl.load(lse_parts_ptr + 2 * B + row)
    of_same = (1.0 - label_smoothing) / tl.load(counts_ptr + own)
    dtemp = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        mask = offs < C
        logits = tl.div_rn(tl.load(sim_ptr + offs, mask=mask, other=0.0).to(tl.float32), temp)
        same = tl.load(same_image_ptr + offs, mask=mask, other=0) != 0
        target = tl.where(same, of_same, 0.0) + label_smoothing / C
        dsim = (tl.exp(logits - top - rest) - target) * scale
        tl.store(dsims_ptr + offs, dsim, mask=mask)
        dtemp -= tl.where(mask, dsim * logits, 0.0)
    tl.store(dtemps_ptr + row, tl.sum(dtemp, axis=0))


def contrastive_loss_fwd(
    sim_i2t: Tensor, sim_t2i: Tensor, temp: Tensor, same_image: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sim_i2t, sim_t2i, same_image (rows, candidates), contiguous, temp () -> losses (2, rows) fp32, logits (2, rows,
    candidates), and for backward lse_parts (2, 2, rows), whose sum is log sum exp, and how many columns show a row's
    image, (rows,).
    """
    B, C = sim_i2t.shape
    logits = sim_i2t.new_empty(2, B, C)
    losses, lse_parts, counts = (sim_i2t.new_empty(size, dtype=torch.float32) for size in ((2, B), (2, 2, B), (B,)))
    contrastive_loss_fwd_kernel[(2 * B,)](
        sim_i2t, sim_t2i, temp, same_image, losses, logits, lse_parts, counts, B, C, label_smoothing,
        **_settings("contrastive_loss_fwd", sim_i2t),
    )  # fmt: skip
    return losses, logits, lse_parts, counts


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
    """dlosses (2, rows) fp32, contiguous, and what forward gave and had -> gradients of the similarities (2, rows,
    candidates), and of temp (2, rows) fp32, to be added up.
    """
    B, C = sim_i2t.shape
    dsims, dtemps = sim_i2t.new_empty(2, B, C), torch.empty_like(dlosses)
    contrastive_loss_bwd_kernel[(2 * B,)](
        dlosses, lse_parts, counts, sim_i2t, sim_t2i, temp, same_image, dsims, dtemps, B, C, label_smoothing,
        **_settings("contrastive_loss_bwd", sim_i2t),
    )  # fmt: skip
    return dsims, dtemps


def _settings(kernel: str, sim: Tensor) -> dict:
    """The table's, with a block no larger than the candidates need."""
    settings = launch.settings(kernel, sim.device)
    return settings | {"BLOCK_C": min(settings["BLOCK_C"], max(16, triton.next_power_of_2(sim.shape[1])))}
