"""The image cross-attention sub-layer on query rows."""

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
from qformer_fast.ops.image_cross_attention import check_image_mask, check_kv_gradients, kernel_keys_values, unsupported
from qformer_fast.products import linear, linear_in_parts, product


@torch.library.custom_op("qformer_fast::cross_attention_block_fwd", mutates_args=())
def cross_attention_block_fwd(
    query_rows: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    attention_seed: Tensor | None,
    hidden_seed: Tensor | None,
    totals: list[Tensor],
    add: bool,
    kv_totals: list[Tensor],
    num_queries: int,
    eps: float,
    attention_dropout_p: float,
    hidden_dropout_p: float,
    accumulate: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and for backward: q, context, lse, x (the output projection without its bias), mean and rstd. Without
    ``keep`` there is no backward, and x has no rows.

    ``totals``, ``add``, ``kv_totals`` and ``accumulate`` are for backward, see :func:`_bwd`.
    """
    attend = backends.kernel_or_formula("image_cross_attention_fwd", query_rows)
    add_norm = backends.kernel_or_formula("dropout_add_layer_norm_fwd", query_rows)
    if keep:
        q = torch.addmm(q_bias.to(query_rows.dtype), query_rows, q_weight.t())
    else:
        q = linear(query_rows, q_weight, q_bias)
    q = q.view(query_rows.shape[0], *k.shape[2:])
    layout = image_order, image_offsets, image_mask
    context, lse = attend(q, k, v, *layout, attention_seed, num_queries, k.shape[3] ** -0.5, attention_dropout_p)
    x = context.flatten(1) @ out_weight.t() if keep else linear_in_parts(context.flatten(1), out_weight)
    out, mean, rstd = add_norm(x, query_rows, norm_weight, norm_bias, hidden_seed, eps, hidden_dropout_p, out_bias)
    return out, q, context, lse, x if keep else query_rows[:0].clone(), mean, rstd


@cross_attention_block_fwd.register_fake
def _(query_rows: Tensor, k: Tensor, *others) -> tuple[Tensor, ...]:
    count, hidden = query_rows.shape
    out, x = (query_rows.new_empty(n, hidden) for n in (count, count if others[-1] else 0))
    q, context = (query_rows.new_empty(count, *k.shape[2:]) for _ in range(2))
    lse, mean, rstd = (query_rows.new_empty(n, dtype=torch.float32) for n in ((count, k.shape[2]), count, count))
    return out, q, context, lse, x, mean, rstd


def _bwd(
    dout: Tensor,
    query_rows: Tensor,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    context: Tensor,
    lse: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    q_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    attention_seed: Tensor | None,
    hidden_seed: Tensor | None,
    totals: list[Tensor],
    add: bool,
    kv_totals: list[Tensor],
    num_queries: int,
    attention_dropout_p: float,
    hidden_dropout_p: float,
    accumulate: bool,
) -> list[Tensor]:
    """drows; dk, dv, written to ``kv_totals`` if it is not empty, or with ``accumulate`` added to them; dq_weight,
    dq_bias, dout_weight, dout_bias, dnorm_weight, dnorm_bias, written to ``totals`` if it is not empty, or with ``add``
    added to them. What went to the totals is not returned.
    """
    attend_bwd = backends.kernel_or_formula("image_cross_attention_bwd_into", query_rows)
    sum_parts = backends.kernel_or_formula("sum_parts", query_rows)
    add_norm_bwd = backends.kernel_or_formula("dropout_add_layer_norm_bwd", query_rows)
    q_weight_total, q_bias_total, out_weight_total, *others = totals or [None] * 6
    dx, drows, dnorm_weight, dnorm_bias, dout_bias = add_norm_bwd(
        dout, x, query_rows, norm_weight, mean, rstd, hidden_seed, hidden_dropout_p, out_bias, norm_totals(others),
        add=add,
    )  # fmt: skip
    dout_weight = product(dx.t(), context.flatten(1), out_weight_total, add=add)
    dcontext = (dx @ out_weight).view(context.shape)
    layout = image_order, image_offsets, image_mask, attention_seed, num_queries
    dk, dv = kv_totals or (k.new_empty(k.shape) for _ in range(2))
    dq_parts = q.new_empty(k.shape[0], *q.shape[1:], dtype=torch.promote_types(q.dtype, torch.float32))
    inputs = dcontext, q, k, v, context, lse, *layout, k.shape[3] ** -0.5, attention_dropout_p
    dq = attend_bwd(dk, dv, *inputs, accumulate=accumulate, dq_parts=dq_parts).flatten(1)
    if drows is dx:  # without dropout, and what reads dx may have been left aside
        overlap.join()
    drows = drows.addmm_(dq, q_weight)
    dq_bias = dq_parts.new_empty(q_weight.shape[0]) if q_bias_total is None else q_bias_total
    sum_parts(dq_parts.view(k.shape[0], 1, -1), dq_bias, add=q_bias_total is not None and add)
    dq_weight = product(dq.t(), query_rows, q_weight_total, add=add)
    gradients = [] if totals else [dq_weight, dq_bias, dout_weight, dout_bias, dnorm_weight, dnorm_bias]
    return [drows, *([] if kv_totals else [dk, dv]), *gradients]


# with totals, backward calls the function itself: an op may not add to its inputs and return others
cross_attention_block_bwd = torch.library.custom_op("qformer_fast::cross_attention_block_bwd", mutates_args=())(_bwd)


@cross_attention_block_bwd.register_fake
def _(dout, query_rows, k, v, q, context, lse, x, mean, rstd, q_weight, out_weight, out_bias, norm_weight, *_):
    dq_bias = q_weight.new_empty(q_weight.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    like = query_rows, k, v, q_weight, dq_bias, out_weight, out_bias, norm_weight, norm_weight
    return [x.new_empty(x.shape) for x in like]


def _setup_context(ctx, inputs, output) -> None:
    query_rows, k, v, q_weight, q_bias, out_weight, out_bias, norm_weight, _, *layout_and_seeds = inputs[:14]
    _, *saved = output
    ctx.save_for_backward(query_rows, k, v, *saved, q_weight, out_weight, out_bias, norm_weight, *layout_and_seeds)
    ctx.totals, ctx.add, ctx.kv_totals, num_queries, _, *others, _ = inputs[14:]
    ctx.sizes = num_queries, *others
    ctx.bias_dtype = q_bias.dtype


def _backward(ctx, dout: Tensor) -> tuple[Any, ...]:
    run = _bwd if ctx.totals or ctx.kv_totals else cross_attention_block_bwd
    drows, *gradients = run(dout.contiguous(), *ctx.saved_tensors, ctx.totals, ctx.add, ctx.kv_totals, *ctx.sizes)
    kv = [None, None] if ctx.kv_totals else [gradients.pop(0), gradients.pop(0)]
    dweight, dbias, *others = gradients or [None] * 6
    if dbias is not None:
        dbias = dbias.to(ctx.bias_dtype)
    nothing = *[None] * 5, [None] * len(ctx.totals), None, [None] * len(ctx.kv_totals), *[None] * 6
    return drows, *kv, dweight, dbias, *others, *nothing


register_autograd(cross_attention_block_fwd, _backward, _setup_context)


def _kernels(
    query_rows: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    image_mask: Tensor | None,
    eps: float,
    attention_dropout_p: float,
    hidden_dropout_p: float,
    gradients: Sequence[Tensor] | None = None,
    add_gradients: bool = True,
    kv_gradients: tuple[Tensor, Tensor] | None = None,
    accumulate: bool = False,
) -> Tensor:
    dtype = autocast_dtype(query_rows)
    return cross_attention_block_fwd(
        query_rows.to(dtype).contiguous(),
        *kernel_keys_values(k.to(dtype), v.to(dtype)),
        q_weight.to(dtype),
        q_bias,
        out_weight.to(dtype),
        out_bias,
        norm_weight,
        norm_bias,
        *layout.sequences_by_image(k.shape[0]),
        None if image_mask is None else image_mask.contiguous(),
        *draw_seeds(query_rows, attention_dropout_p, hidden_dropout_p),
        list(gradients or ()),
        add_gradients,
        list(kv_gradients or ()),
        layout.num_queries,
        eps,
        attention_dropout_p,
        hidden_dropout_p,
        accumulate,
        torch.is_grad_enabled(),
    )[0]


IMPLEMENTATIONS = {"reference": without_totals(reference.cross_attention_block), "triton": _kernels}


def cross_attention_block(
    query_rows: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    image_mask: Tensor | None = None,
    eps: float = 1e-12,
    attention_dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    gradients: Sequence[Tensor] | None = None,
    add_gradients: bool = True,
    kv_gradients: tuple[Tensor, Tensor] | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """layer_norm(query_rows + dropout(out(attention(q(query_rows), k, v))))

    Replaces LAVIS ``BertAttention`` with an image (Qformer.py:295-350), its key and value projections aside. On
    the kernels it is one autograd node; under autocast it computes and returns the autocast dtype.

    Args:
        query_rows (Tensor): (query rows, hidden).
        k, v (Tensor): (images, tokens, nheads, headdim); may be strided slices of the all-layers buffer.
        layout (SequenceLayout): its ``image_index`` says who looks where.
        q_weight, q_bias (Tensor): (hidden, hidden) and (hidden,).
        out_weight, out_bias (Tensor): (hidden, hidden) and (hidden,).
        norm_weight, norm_bias (Tensor): (hidden,).
        image_mask (Tensor, Optional): (images, 1 or num_queries, tokens), bool or added to the scores.
        eps (float): of the LayerNorm. Default: 1e-12.
        attention_dropout_p, hidden_dropout_p (float): probabilities in [0, 1). Default: 0.0.
        gradients (Sequence, Optional): six tensors like the parameters, fp32 or of their dtype, contiguous. The kernels
            add the parameters' gradients to them in backward and give autograd none. Default: `None`.
        add_gradients (bool): False: write to ``gradients`` instead. Default: True.
        kv_gradients (tuple, Optional): two like k and v, which may be strided as they; the kernels write the gradients
            of k and v to them in backward and give autograd none. Default: `None`.
        accumulate (bool): add to ``kv_gradients`` instead. Default: False.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (query rows, hidden).

    Raises:
        ValueError: shapes, rows, devices or probabilities that do not fit. TypeError: integer input. RuntimeError: the
            backend asked for can't run, with the reason.
    """
    check_shape("query_rows", query_rows, "query rows", "hidden")
    hidden = query_rows.shape[1]
    check_rows("query_rows", query_rows, layout.num_query_rows, layout)
    check_shape("k", k, "images", "tokens", "nheads", "headdim")
    check_shape("v", v, *k.shape)
    check_shape("q_weight", q_weight, k.shape[2] * k.shape[3], hidden)
    check_shape("out_weight", out_weight, hidden, k.shape[2] * k.shape[3])
    check_floating(query_rows=query_rows, k=k, v=v, q_weight=q_weight, out_weight=out_weight)
    check_device(
        query_rows,
        k=k,
        v=v,
        image_mask=image_mask,
        q_weight=q_weight,
        q_bias=q_bias,
        out_weight=out_weight,
        out_bias=out_bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    if image_mask is not None:
        check_image_mask(image_mask, k, layout)
    check_probability("attention_dropout_p", attention_dropout_p)
    check_probability("hidden_dropout_p", hidden_dropout_p)
    check_totals(gradients, q_weight, q_bias, out_weight, out_bias, norm_weight, norm_bias)
    if kv_gradients is not None:
        check_kv_gradients(kv_gradients, k, v)
    reason = unsupported(k.shape[3], image_mask)
    return backends.resolve("cross_attention_block", IMPLEMENTATIONS, backend, query_rows, reason)(
        query_rows,
        k,
        v,
        layout,
        q_weight,
        q_bias,
        out_weight,
        out_bias,
        norm_weight,
        norm_bias,
        image_mask=image_mask,
        eps=eps,
        attention_dropout_p=attention_dropout_p,
        hidden_dropout_p=hidden_dropout_p,
        gradients=gradients,
        add_gradients=add_gradients,
        kv_gradients=kv_gradients,
        accumulate=accumulate,
    )
