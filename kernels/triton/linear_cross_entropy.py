"""LM head and cross-entropy: logits of some rows at a time, overwritten by their gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.kernels import launch
from qformer_fast.products import product_into
from qformer_fast.reference.losses import weight_gradient_dtype

# below every logit, and finite: the difference of two stays a number
LOWEST = tl.constexpr(-1e38)
# a vocabulary whose rows of logits 16 bytes do not divide is padded to a multiple: cuBLAS is slowest there
COLUMNS = 64
# rows of all chunks but the last are a multiple: their pointers are alike, and no kernel compiles twice
ROWS = 16
# fp16 gradients of logits are made this much larger: those of rare words, 1e-5 and less, would lose their digits
FP16_SCALE = 256.0


@triton.jit
def linear_cross_entropy_fwd_kernel(
    logits_ptr,  # (M, stride), becomes its gradient WITH_GRADIENTS; columns from V on are finite and do not count
    bias_ptr,  # (stride,) or None
    labels_ptr,  # (M,) int64
    dout_ptr,  # (M,) or None, which is all ones
    losses_ptr,  # (M,) fp32 or None
    V,
    stride,
    label_smoothing,
    gradient_scale,
    ignore_index,
    WITH_GRADIENTS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program = one row, swept over for its log-sum-exp and again for its gradient.

    A thread keeps the maximum and the sum of its own groups of GROUP columns; threads meet after the sweep.
    """
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    logits_ptr += row.to(tl.int64) * stride
    offs = tl.arange(0, BLOCK_N // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if label == ignore_index:
        if losses_ptr is not None:
            tl.store(losses_ptr + row, 0.0)
        if WITH_GRADIENTS:
            zeros = tl.zeros((BLOCK_N // GROUP, GROUP), logits_ptr.dtype.element_ty)
            for start in range(0, stride, BLOCK_N):
                tl.store(logits_ptr + start + offs, zeros, mask=start + offs < stride)
    else:
        inside = (label >= 0) & (label < V)
        # 32 bits, for the comparison with columns
        target = tl.where(inside, label, 0).to(tl.int32)
        own = tl.load(logits_ptr + target).to(tl.float32)
        if bias_ptr is not None:
            own += tl.load(bias_ptr + target).to(tl.float32)
        own = tl.where(inside, own, float("nan"))

        largest = tl.full((BLOCK_N // GROUP,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_N // GROUP,), tl.float32)
        sums = tl.zeros((BLOCK_N // GROUP,), tl.float32)
        for start in range(0, stride, BLOCK_N):
            offs_n = start + offs
            x = tl.load(logits_ptr + offs_n, mask=offs_n < stride, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                x += tl.load(bias_ptr + offs_n, mask=offs_n < stride, other=0.0).to(tl.float32)
            if SMOOTHED:
                sums += tl.sum(tl.where(offs_n < V, x, 0.0), axis=1)
            x = tl.where(offs_n < V, x, float("-inf"))
            larger = tl.maximum(largest, tl.max(x, axis=1))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger[:, None]), axis=1)
            largest = larger
        top = tl.max(largest, axis=0)
        lse = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))

        if losses_ptr is not None:
            loss = lse - own
            if SMOOTHED:
                loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - tl.sum(sums, axis=0) / V)
            tl.store(losses_ptr + row, loss)

        if WITH_GRADIENTS:
            scale = tl.where(inside, gradient_scale, float("nan"))
            if dout_ptr is not None:
                scale *= tl.load(dout_ptr + row).to(tl.float32)
            for start in range(0, stride, BLOCK_N):
                offs_n = start + offs
                x = tl.load(logits_ptr + offs_n, mask=offs_n < stride, other=0.0).to(tl.float32)
                if bias_ptr is not None:
                    x += tl.load(bias_ptr + offs_n, mask=offs_n < stride, other=0.0).to(tl.float32)
                dlogits = tl.exp(x - lse)
                if SMOOTHED:
                    dlogits -= label_smoothing / V
                dlogits = tl.where(offs_n == target, dlogits - (1.0 - label_smoothing), dlogits)
                tl.store(logits_ptr + offs_n, dlogits * scale, mask=offs_n < stride)


@triton.jit(do_not_specialize=["M"])
def reduce_losses_kernel(
    losses_ptr,  # (M,) fp32
    labels_ptr,  # (M,) int64
    loss_ptr,  # () fp32
    divisor_ptr,  # () fp32: gradients of the sum are to be divided by it
    M,
    ignore_index,
    gradient_scale,
    MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: sum of all losses, over the number of counted rows for a MEAN."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    counted = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, M, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = offs_m < M
        total += tl.load(losses_ptr + offs_m, mask=mask, other=0.0)
        counted += tl.load(labels_ptr + offs_m, mask=mask, other=ignore_index) != ignore_index
    loss = tl.sum(total, axis=0)
    count = tl.sum(counted, axis=0).to(tl.float32)
    if MEAN:
        tl.store(loss_ptr, loss / count)
        tl.store(divisor_ptr, gradient_scale * tl.maximum(count, 1.0))
    else:
        tl.store(loss_ptr, loss)
        tl.store(divisor_ptr, gradient_scale)


@triton.jit(do_not_specialize=["M"])
def column_sums_kernel(
    x_ptr,  # (M, stride)
    sums_ptr,  # (N,) fp32
    M,
    N,
    stride,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program = BLOCK_N columns; ADDs to what is there."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, M, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m[:, None] < M) & (offs_n[None, :] < stride)
        total += tl.load(x_ptr + offs_m[:, None].to(tl.int64) * stride + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    column = tl.sum(total, axis=0)
    if ADD:
        column += tl.load(sums_ptr + offs_n, mask=offs_n < N)
    tl.store(sums_ptr + offs_n, column, mask=offs_n < N)


@triton.jit
def linear_cross_entropy_bwd_kernel(
    x_ptr,  # (N,)
    dout_ptr,  # () fp32
    divisor_ptr,  # () fp32
    out_ptr,  # (N,)
    N,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = x dout / divisor, plus out with ADD; one program = BLOCK_N elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(dout_ptr).to(tl.float32) / tl.load(divisor_ptr)
    x = tl.load(x_ptr + offs, mask=offs < N).to(tl.float32) * scale
    if ADD:
        x += tl.load(out_ptr + offs, mask=offs < N).to(tl.float32)
    tl.store(out_ptr + offs, x, mask=offs < N)


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    with_gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, divisor, and for a loss that is reduced dx, dweight and dbias of the sum, to be divided by ``divisor``.

    Args:
        x (Tensor): (rows, hidden) contiguous; weight and bias are cast to its dtype.
        with_gradients (list): which of x's, weight's and bias's gradients to make; the others have no elements.

    Returns:
        tuple: loss () or (rows,) fp32; divisor () fp32; dx (rows, hidden), x.dtype; dweight; dbias fp32.
    """
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    inputs = x, weight, bias, labels
    if reduction == "none":
        none = _chunk_by_chunk(*inputs, label_smoothing, ignore_index, [False] * 3, losses=losses)
        return losses, losses.new_empty(0), *none
    scale = FP16_SCALE if x.dtype == torch.float16 else 1.0
    gradients = _chunk_by_chunk(*inputs, label_smoothing, ignore_index, with_gradients, scale, losses=losses)
    loss, divisor = losses.new_empty(()), losses.new_empty(())
    settings = launch.settings("reduce_losses", x.device)
    reduce_losses_kernel[(1,)](
        losses, labels, loss, divisor, x.shape[0], ignore_index, scale, MEAN=reduction == "mean", **settings
    )
    return loss, divisor, *gradients


def linear_cross_entropy_bwd(
    dout: Tensor,
    divisor: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    totals: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`linear_cross_entropy_fwd` times dout () / divisor, in x's, weight's and bias's dtype.

    Those of weight and bias are added to ``totals`` where they are given.
    """
    settings = launch.settings("linear_cross_entropy_bwd", dx.device)

    def scaled(gradient: Tensor, dtype: torch.dtype, total: Tensor | None = None) -> Tensor:
        out = torch.empty_like(gradient, dtype=dtype) if total is None else total
        if N := gradient.numel():
            grid = (triton.cdiv(N, settings["BLOCK_N"]),)
            linear_cross_entropy_bwd_kernel[grid](gradient, dout, divisor, out, N, ADD=total is not None, **settings)
        return out

    weight_total, bias_total = totals or (None, None)
    return scaled(dx, dx.dtype), scaled(dweight, weight_dtype, weight_total), scaled(dbias, bias_dtype, bias_total)


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
    """dx, dweight and dbias for dout (rows,) contiguous; the logits are made again."""
    dx, dweight, dbias = _chunk_by_chunk(
        x, weight, bias, labels, label_smoothing, ignore_index, with_gradients, dout=dout
    )
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _chunk_by_chunk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    with_gradients: list[bool],
    gradient_scale: float = 1.0,
    *,
    losses: Tensor | None = None,
    dout: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills ``losses`` and returns gradient_scale times dx in x.dtype, dweight, and dbias in fp32."""
    rows, vocab = x.shape[0], weight.shape[0]
    group = 16 // x.element_size()
    width = vocab if vocab % group == 0 else triton.cdiv(vocab, COLUMNS) * COLUMNS
    settings = dict(launch.settings("linear_cross_entropy_fwd", x.device))
    chunk = chunk_rows(rows, settings.pop("CHUNK_ROWS"))
    settings |= {"GROUP": group, "SMOOTHED": label_smoothing > 0}

    dx = torch.empty_like(x) if with_gradients[0] else x.new_empty(0)
    dtype = weight_gradient_dtype(x, weight, with_gradients)
    dweight = x.new_empty((width, x.shape[1]) if with_gradients[1] else 0, dtype=dtype)
    dbias = x.new_empty(vocab if with_gradients[2] else 0, dtype=torch.float32)
    if not rows:
        return dx, dweight.zero_()[:vocab], dbias.zero_()

    if width == vocab:
        weight_rows = weight.to(x.dtype)
    else:
        weight_rows = x.new_empty(width, x.shape[1])
        weight_rows[:vocab] = weight
        weight_rows[vocab:] = 0.0
    bias_row = None if bias is None else F.pad(bias.to(x.dtype), (0, width - vocab))
    buffer = x.new_empty(min(chunk, rows), width)
    for start in range(0, rows, chunk):
        part = x[start : start + chunk]
        logits = buffer[: len(part)]
        torch.mm(part, weight_rows.t(), out=logits)
        linear_cross_entropy_fwd_kernel[(len(part),)](
            logits,
            bias_row,
            labels[start:],
            None if dout is None else dout[start:],
            None if losses is None else losses[start:],
            vocab,
            width,
            label_smoothing,
            gradient_scale,
            ignore_index,
            WITH_GRADIENTS=any(with_gradients),
            **settings,
        )
        if with_gradients[0]:
            torch.mm(logits, weight_rows, out=dx[start : start + chunk])
        if with_gradients[1]:
            product_into(dweight, logits.t(), part, add=start > 0)
        if with_gradients[2]:
            _add_column_sums(dbias, logits, add=start > 0)
    return dx, dweight[:vocab], dbias


def chunk_rows(rows: int, limit: int) -> int:
    """Rows of each chunk but the last: chunks of one size, as few as ``limit`` allows."""
    chunks = max(1, triton.cdiv(rows, limit))
    return max(1, triton.cdiv(rows, chunks * ROWS)) * ROWS


def _add_column_sums(total: Tensor, x: Tensor, *, add: bool) -> None:
    settings = launch.settings("column_sums", x.device)
    grid = (triton.cdiv(total.shape[0], settings["BLOCK_N"]),)
    column_sums_kernel[grid](x, total, x.shape[0], total.shape[0], x.shape[1], ADD=add, **settings)
