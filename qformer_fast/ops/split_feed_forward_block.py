"""The feed-forward sub-layer, with weights of their own for query and text rows."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._autograd import register_autograd
from qformer_fast.ops._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_probability,
    check_shape,
    draw_seeds,
)


@torch.library.custom_op("qformer_fast::split_feed_forward_block_fwd", mutates_args=())
def split_feed_forward_block_fwd(
    query_rows: Tensor,
    text_rows: Tensor,
    parameters: list[Tensor],
    seeds: list[Tensor],
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output of all rows, and for backward: up (before bias and GELU), x (down without its bias), mean and rstd.

    ``parameters`` are six of the query rows, if there are any, then six of the text rows, if there are any; ``seeds``
    likewise, none without dropout.
    """
    gelu = backends.kernel_or_formula("bias_gelu_fwd", query_rows)
    add_norm = backends.kernel_or_formula("dropout_add_layer_norm_fwd", query_rows)
    count, (hidden, intermediate) = query_rows.shape[0] + text_rows.shape[0], parameters[2].shape
    out, x = (query_rows.new_empty(count, hidden) for _ in range(2))
    up = query_rows.new_empty(count, intermediate)
    statistics = []
    for _, rows, part, (up_weight, up_bias, down_weight, down_bias, *norm), seed in _parts(
        query_rows, text_rows, parameters, seeds
    ):
        torch.mm(rows, up_weight.t(), out=up[part])
        torch.mm(gelu(up[part], up_bias), down_weight.t(), out=x[part])
        _, *mean_rstd = add_norm(x[part], rows, *norm, seed, eps, dropout_p, down_bias, out[part])
        statistics.append(mean_rstd)
    mean, rstd = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*statistics, strict=True))
    return out, up, x, mean, rstd


def _parts(query_rows: Tensor, text_rows: Tensor, parameters: list[Tensor], seeds: list[Tensor]) -> list:
    """(0 for query and 1 for text, rows, their place among all rows, six parameters, seed) of the parts with rows."""
    count = query_rows.shape[0]
    places = (0, query_rows, slice(0, count)), (1, text_rows, slice(count, count + text_rows.shape[0]))
    present = [place for place in places if place[1].shape[0]]
    return [(*place, parameters[6 * i : 6 * i + 6], seeds[i] if seeds else None) for i, place in enumerate(present)]


@split_feed_forward_block_fwd.register_fake
def _(query_rows, text_rows, parameters, *_) -> tuple[Tensor, ...]:
    count, (hidden, intermediate) = query_rows.shape[0] + text_rows.shape[0], parameters[2].shape
    out, up, x = (query_rows.new_empty(count, width) for width in (hidden, intermediate, hidden))
    mean, rstd = (
        query_rows.new_empty(count, dtype=torch.promote_types(query_rows.dtype, torch.float32)) for _ in range(2)
    )
    return out, up, x, mean, rstd


@torch.library.custom_op("qformer_fast::split_feed_forward_block_bwd", mutates_args=())
def split_feed_forward_block_bwd(
    dout: Tensor,
    query_rows: Tensor,
    text_rows: Tensor,
    up: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    parameters: list[Tensor],
    seeds: list[Tensor],
    dropout_p: float,
) -> list[Tensor]:
    """dquery_rows, dtext_rows, then the gradients of ``parameters``."""
    gelu_bwd_in_place = backends.kernel_or_formula("bias_gelu_bwd_in_place", query_rows)
    add_norm_bwd = backends.kernel_or_formula("dropout_add_layer_norm_bwd", query_rows)
    drows = [torch.empty_like(query_rows), torch.empty_like(text_rows)]
    gradients = []
    for kind, rows, part, (up_weight, up_bias, down_weight, down_bias, norm_weight, _), seed in _parts(
        query_rows, text_rows, parameters, seeds
    ):
        dx, dresidual, dnorm_weight, dnorm_bias, ddown_bias = add_norm_bwd(
            dout[part], x[part], rows, norm_weight, mean[part], rstd[part], seed, dropout_p, down_bias
        )
        dup = dx @ down_weight
        dup_bias, activation = gelu_bwd_in_place(dup, up[part], up_bias)
        ddown_weight = dx.t() @ activation
        del activation
        # without dropout dx and dresidual are one tensor, of which dx has been read by now
        drows[kind] = dresidual.addmm_(dup, up_weight)
        gradients += [dup.t() @ rows, dup_bias, ddown_weight, ddown_bias, dnorm_weight, dnorm_bias]
    return [*drows, *gradients]


@split_feed_forward_block_bwd.register_fake
def _(dout, query_rows, text_rows, up, x, mean, rstd, parameters, *_) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (query_rows, text_rows, *parameters)]


def _setup_context(ctx, inputs, output) -> None:
    query_rows, text_rows, parameters, seeds, _, ctx.dropout_p = inputs
    _, *saved = output
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(query_rows, text_rows, *saved, *parameters, *seeds)


def _backward(ctx, dout: Tensor):
    rows_and_saved, others = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    parameters, seeds = list(others[: ctx.num_parameters]), list(others[ctx.num_parameters :])
    dquery_rows, dtext_rows, *gradients = split_feed_forward_block_bwd(
        dout.contiguous(), *rows_and_saved, parameters, seeds, ctx.dropout_p
    )
    return dquery_rows, dtext_rows, gradients, [None] * len(seeds), None, None


register_autograd(split_feed_forward_block_fwd, _backward, _setup_context)


def _kernels(
    query_rows: Tensor,
    text_rows: Tensor,
    query_parameters: tuple[Tensor, ...] | None,
    text_parameters: tuple[Tensor, ...] | None,
    *,
    eps: float,
    dropout_p: float,
) -> Tensor:
    dtype = autocast_dtype(query_rows)
    given = [p for rows, p in ((query_rows, query_parameters), (text_rows, text_parameters)) if rows.shape[0]]
    parameters = []
    for up_weight, up_bias, down_weight, *others in given:
        parameters += [up_weight.to(dtype), up_bias, down_weight.to(dtype), *others]
    seeds = [seed for seed in draw_seeds(query_rows, *[dropout_p] * len(given)) if seed is not None]
    rows = query_rows.to(dtype).contiguous(), text_rows.to(dtype).contiguous()
    return split_feed_forward_block_fwd(*rows, parameters, seeds, eps, dropout_p)[0]


IMPLEMENTATIONS = {"reference": reference.split_feed_forward_block, "triton": _kernels}


def split_feed_forward_block(
    query_rows: Tensor,
    text_rows: Tensor,
    query_parameters: tuple[Tensor, ...] | None,
    text_parameters: tuple[Tensor, ...] | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """layer_norm(rows + dropout(down(gelu(up(rows))))) with parameters of their own, query rows before text rows.

    Replaces LAVIS ``feed_forward_chunk_query`` and ``feed_forward_chunk`` (Qformer.py:449-474) and the cat between
    them. On the kernels it is one autograd node, which saves the rows before GELU and makes GELU again; under autocast
    it computes and returns the autocast dtype.

    Args:
        query_rows, text_rows (Tensor): (query rows, hidden) and (text rows, hidden); one of them may have no row.
        query_parameters, text_parameters (tuple): up_weight (intermediate, hidden), up_bias (intermediate,),
            down_weight (hidden, intermediate), down_bias (hidden,), norm_weight (hidden,), norm_bias (hidden,). None
            where no such rows come.
        eps (float): of the LayerNorm. Default: 1e-12.
        dropout_p (float): probability in [0, 1). Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (query rows + text rows, hidden).

    Raises:
        ValueError: shapes or probability that do not fit, rows without parameters. TypeError: integer input.
            RuntimeError: the backend asked for can't run, with the reason.
    """
    check_shape("query_rows", query_rows, "query rows", "hidden")
    hidden = query_rows.shape[1]
    check_shape("text_rows", text_rows, "text rows", hidden)
    check_floating(query_rows=query_rows, text_rows=text_rows)
    check_device(query_rows, text_rows=text_rows)
    check_probability("dropout_p", dropout_p)
    parts = (
        ("query_parameters", query_parameters, query_rows.shape[0]),
        ("text_parameters", text_parameters, text_rows.shape[0]),
    )
    for name, parameters, count in parts:
        if count and parameters is None:
            raise ValueError(f"{name} must be given for {count} rows, got None")
        if parameters is not None:
            check_shape(f"{name}[0]", parameters[0], "intermediate", hidden)
            check_shape(f"{name}[2]", parameters[2], hidden, parameters[0].shape[0])
    run = backends.resolve("split_feed_forward_block", IMPLEMENTATIONS, backend, query_rows)
    return run(query_rows, text_rows, query_parameters, text_parameters, eps=eps, dropout_p=dropout_p)
