"""The self-attention sub-layer on packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import overlap, reference
from qformer_fast.layout import SequenceLayout
from qformer_fast.ops._autograd import norm_totals, register_autograd, without_totals
from qformer_fast.ops._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_probability,
    check_rows,
    check_shape,
    check_totals,
)
from qformer_fast.ops._seeds import draw_seeds
from qformer_fast.ops.query_text_attention import unsupported
from qformer_fast.products import linear, linear_in_parts, product


@torch.library.custom_op("qformer_fast::self_attention_block_fwd", mutates_args=())
def self_attention_block_fwd(
    rows: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    text_offsets: Tensor,
    masks: Tensor,
    attention_seed: Tensor | None,
    hidden_seed: Tensor | None,
    totals: list[Tensor],
    add: bool,
    num_query_sequences: int,
    num_queries: int,
    max_text_length: int,
    nheads: int,
    eps: float,
    attention_dropout_p: float,
    hidden_dropout_p: float,
    num_first_rows: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output's ``num_first_rows`` and its other rows, and for backward: qkv, context, lse, x (the output projection
    without its bias), mean and rstd. Without ``keep`` there is no backward, and x has no rows.

    ``totals`` and ``add`` are for backward, see :func:`_bwd`.
    """
    attend = backends.kernel_or_formula("query_text_attention_fwd", rows)
    add_norm = backends.kernel_or_formula("dropout_add_layer_norm_fwd", rows)
    qkv = torch.addmm(qkv_bias.to(rows.dtype), rows, qkv_weight.t()) if keep else linear(rows, qkv_weight, qkv_bias)
    qkv = qkv.view(rows.shape[0], 3, nheads, -1)
    sizes = num_query_sequences, num_queries, max_text_length, qkv.shape[3] ** -0.5, attention_dropout_p
    context, lse = attend(qkv, text_offsets, masks, attention_seed, *sizes)
    context_rows = context.view(rows.shape)
    x = context_rows @ out_weight.t() if keep else linear_in_parts(context_rows, out_weight)
    out, rest = (
        rows.new_empty(num_first_rows, rows.shape[1]),
        rows.new_empty(rows.shape[0] - num_first_rows, rows.shape[1]),
    )
    _, mean, rstd = add_norm(
        x, rows, norm_weight, norm_bias, hidden_seed, eps, hidden_dropout_p, out_bias, out, rest=rest
    )
    return out, rest, qkv, context, lse, x if keep else rows[:0].clone(), mean, rstd


@self_attention_block_fwd.register_fake
def _(rows: Tensor, *others) -> tuple[Tensor, ...]:
    num_queries, max_text_length, nheads = others[13:16]
    num_first_rows, keep = others[19:]
    count, hidden = rows.shape
    streamed = num_queries + max_text_length > reference.MAX_TILE
    qkv, context = (rows.new_empty(count, *heads, nheads, hidden // nheads) for heads in ((3,), ()))
    lse, mean, rstd = (
        rows.new_empty(n, dtype=torch.float32) for n in ((count if streamed else 0, nheads), count, count)
    )
    out, rest = rows.new_empty(num_first_rows, hidden), rows.new_empty(count - num_first_rows, hidden)
    return out, rest, qkv, context, lse, rows.new_empty(count if keep else 0, hidden), mean, rstd


def _bwd(
    dout: Tensor,
    drest: Tensor,
    rows: Tensor,
    qkv: Tensor,
    context: Tensor,
    lse: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    text_offsets: Tensor,
    masks: Tensor,
    attention_seed: Tensor | None,
    hidden_seed: Tensor | None,
    totals: list[Tensor],
    add: bool,
    num_query_sequences: int,
    num_queries: int,
    max_text_length: int,
    attention_dropout_p: float,
    hidden_dropout_p: float,
) -> list[Tensor]:
    """drows, and dqkv_weight, dqkv_bias, dout_weight, dout_bias, dnorm_weight, dnorm_bias, or these six are written to
    ``totals`` if it is not empty, with ``add`` added.
    """
    attend_bwd = backends.kernel_or_formula("query_text_attention_bwd", rows)
    add_norm_bwd = backends.kernel_or_formula("dropout_add_layer_norm_bwd", rows)
    sum_parts = backends.kernel_or_formula("sum_parts", rows)
    qkv_weight_total, qkv_bias_total, out_weight_total, *others = totals or [None] * 6
    dx, drows, dnorm_weight, dnorm_bias, dout_bias = add_norm_bwd(
        dout, x, rows, norm_weight, mean, rstd, hidden_seed, hidden_dropout_p, out_bias, norm_totals(others),
        add=add, drest=drest,
    )  # fmt: skip
    dout_weight = product(dx.t(), context.view(rows.shape), out_weight_total, add=add)
    dcontext = (dx @ out_weight).view(context.shape)
    sizes = num_query_sequences, num_queries, max_text_length, qkv.shape[3] ** -0.5, attention_dropout_p
    dqkv, dbias_parts = attend_bwd(dcontext, qkv, context, lse, text_offsets, masks, attention_seed, *sizes)
    dqkv = dqkv.view(rows.shape[0], -1)
    if drows is dx:  # without dropout, and what reads dx may have been left aside
        overlap.join()
    drows = drows.addmm_(dqkv, qkv_weight)
    dqkv_bias = _new_qkv_bias(qkv_weight, rows) if qkv_bias_total is None else qkv_bias_total
    sum_parts(dbias_parts.flatten(2), *dqkv_bias.view(3, -1), add=qkv_bias_total is not None and add)
    dqkv_weight = product(dqkv.t(), rows, qkv_weight_total, add=add)
    gradients = dqkv_weight, dqkv_bias, dout_weight, dout_bias, dnorm_weight, dnorm_bias
    return [drows] if totals else [drows, *gradients]


# with totals, backward calls the function itself: an op may not add to its inputs and return others
self_attention_block_bwd = torch.library.custom_op("qformer_fast::self_attention_block_bwd", mutates_args=())(_bwd)


def _new_qkv_bias(qkv_weight: Tensor, rows: Tensor) -> Tensor:
    return qkv_weight.new_empty(qkv_weight.shape[0], dtype=torch.promote_types(rows.dtype, torch.float32))


@self_attention_block_bwd.register_fake
def _(dout, drest, rows, qkv, context, lse, x, mean, rstd, qkv_weight, out_weight, out_bias, norm_weight, *_):
    like = qkv_weight, _new_qkv_bias(qkv_weight, rows), out_weight, out_bias, norm_weight, norm_weight
    return [x.new_empty(x.shape) for x in (rows, *like)]


def _setup_context(ctx, inputs, output) -> None:
    rows, qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, _, *layout_and_seeds = inputs[:11]
    _, _, *saved = output
    ctx.save_for_backward(rows, *saved, qkv_weight, out_weight, out_bias, norm_weight, *layout_and_seeds)
    ctx.totals, ctx.add, *sizes, ctx.num_first_rows, _ = inputs[11:]
    ctx.sizes = *sizes[:3], *sizes[5:]
    ctx.bias_dtype = qkv_bias.dtype


def _backward(ctx, dout: Tensor | None, drest: Tensor | None) -> tuple[Any, ...]:
    run = _bwd if ctx.totals else self_attention_block_bwd
    saved = ctx.saved_tensors  # once: gradient checkpointing lets them be read a single time
    count, hidden = saved[0].shape
    counts = ctx.num_first_rows, count - ctx.num_first_rows
    douts = [
        saved[0].new_zeros(n, hidden) if x is None else x.contiguous()
        for n, x in zip(counts, (dout, drest), strict=True)
    ]
    gradients = run(*douts, *saved, ctx.totals, ctx.add, *ctx.sizes)
    drows, dweight, dbias, *others = gradients + [None] * (7 - len(gradients))
    if dbias is not None:
        dbias = dbias.to(ctx.bias_dtype)
    return drows, dweight, dbias, *others, *[None] * 4, [None] * len(ctx.totals), *[None] * 10


register_autograd(self_attention_block_fwd, _backward, _setup_context, results=2)


def _kernels(
    rows: Tensor,
    layout: SequenceLayout,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    nheads: int,
    eps: float,
    attention_dropout_p: float,
    hidden_dropout_p: float,
    gradients: Sequence[Tensor] | None = None,
    add_gradients: bool = True,
    split: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = autocast_dtype(rows)
    out, rest, *_ = self_attention_block_fwd(
        rows.to(dtype).contiguous(),
        qkv_weight.to(dtype),
        qkv_bias,
        out_weight.to(dtype),
        out_bias,
        norm_weight,
        norm_bias,
        layout.text_offsets,
        layout.masks,
        *draw_seeds(rows, attention_dropout_p, hidden_dropout_p),
        list(gradients or ()),
        add_gradients,
        layout.num_query_sequences,
        layout.num_queries,
        layout.max_text_length,
        nheads,
        eps,
        attention_dropout_p,
        hidden_dropout_p,
        layout.num_query_rows if split else layout.num_rows,
        torch.is_grad_enabled(),
    )
    return (out, rest) if split else out


IMPLEMENTATIONS = {"reference": without_totals(reference.self_attention_block), "triton": _kernels}


def self_attention_block(
    rows: Tensor,
    layout: SequenceLayout,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    nheads: int,
    eps: float = 1e-12,
    attention_dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    gradients: Sequence[Tensor] | None = None,
    add_gradients: bool = True,
    split: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """layer_norm(rows + dropout(out(attention(qkv(rows)))))

    Replaces LAVIS ``BertAttention`` without an image (Qformer.py:295-350). On the kernels it is one autograd node,
    which saves the projected rows, the context and the projected context; under autocast it computes and returns the
    autocast dtype.

    Args:
        rows (Tensor): (rows, hidden), packed as ``layout`` says.
        layout (SequenceLayout): which rows form which sequence.
        qkv_weight, qkv_bias (Tensor): (3*hidden, hidden) and (3*hidden,): query, key, value one below the other.
        out_weight, out_bias (Tensor): (hidden, hidden) and (hidden,).
        norm_weight, norm_bias (Tensor): (hidden,).
        nheads (int): divides hidden.
        eps (float): of the LayerNorm. Default: 1e-12.
        attention_dropout_p, hidden_dropout_p (float): probabilities in [0, 1). Default: 0.0.
        gradients (Sequence, Optional): six tensors like the parameters, fp32 or of their dtype, contiguous. The kernels
            add the parameters' gradients to them in backward and give autograd none. Default: `None`.
        add_gradients (bool): False: write to ``gradients`` instead. Default: True.
        split (bool): return query rows and text rows apart. Default: False.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor or tuple: (rows, hidden), or with ``split`` (query rows, hidden) and (text rows, hidden).

    Raises:
        ValueError: shapes, rows or probabilities that do not fit. TypeError: integer input. RuntimeError: the backend
            asked for can't run, with the reason.
    """
    check_shape("rows", rows, "rows", "hidden")
    hidden = rows.shape[1]
    check_rows("rows", rows, layout.num_rows, layout)
    check_shape("qkv_weight", qkv_weight, 3 * hidden, hidden)
    check_shape("qkv_bias", qkv_bias, 3 * hidden)
    check_shape("out_weight", out_weight, hidden, hidden)
    check_floating(rows=rows, qkv_weight=qkv_weight, out_weight=out_weight)
    check_device(
        rows,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        out_weight=out_weight,
        out_bias=out_bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    if hidden % nheads:
        raise ValueError(f"nheads must divide the hidden size {hidden}, got {nheads}")
    check_probability("attention_dropout_p", attention_dropout_p)
    check_probability("hidden_dropout_p", hidden_dropout_p)
    check_totals(gradients, qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, norm_bias)
    reason = unsupported(hidden // nheads, layout)
    return backends.resolve("self_attention_block", IMPLEMENTATIONS, backend, rows, reason)(
        rows,
        layout,
        qkv_weight,
        qkv_bias,
        out_weight,
        out_bias,
        norm_weight,
        norm_bias,
        nheads=nheads,
        eps=eps,
        attention_dropout_p=attention_dropout_p,
        hidden_dropout_p=hidden_dropout_p,
        gradients=gradients,
        add_gradients=add_gradients,
        split=split,
    )
