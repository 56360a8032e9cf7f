"""The feed-forward sub-layer, with weights of their own for query and text rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import extension, overlap, reference
from qformer_fast.ops._autograd import frees_saved, norm_totals, register_autograd, without_totals
from qformer_fast.ops._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_probability,
    check_shape,
    check_totals,
)
from qformer_fast.ops._seeds import draw_seeds
from qformer_fast.ops.dropout_add_layer_norm import statistics_dtype
from qformer_fast.products import linear, linear_in_parts, product


@torch.library.custom_op("qformer_fast::split_feed_forward_block_fwd", mutates_args=())
def split_feed_forward_block_fwd(
    query_rows: Tensor,
    text_rows: Tensor,
    parameters: list[Tensor],
    seeds: list[Tensor],
    totals: list[Tensor],
    add: bool,
    eps: float,
    dropout_p: float,
    backend: str,
    overwrite: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output of all rows, and for backward: up (before bias and GELU), x (down without its bias), mean and rstd.

    ``parameters`` are six of the query rows, if there are any, then six of the text rows, if there are any; ``seeds``
    likewise, none without dropout; ``totals`` and ``add`` are for backward, see :func:`_bwd`. ``backend`` "cuda" has
    GELU made in the extension's products, where that is faster. With ``overwrite``, where the caller reads the output
    alone, backward writes to up and x if autograd frees them. Without ``keep`` there is no backward, and up and x have
    no rows.
    """
    gelu = backends.kernel_or_formula("bias_gelu_fwd", query_rows)
    add_norm = backends.kernel_or_formula("dropout_add_layer_norm_fwd", query_rows)
    count, (hidden, intermediate) = query_rows.shape[0] + text_rows.shape[0], parameters[2].shape
    out = query_rows.new_empty(count, hidden)
    x, up = (query_rows.new_empty(count if keep else 0, width) for width in (hidden, intermediate))
    mean, rstd = (query_rows.new_empty(count, dtype=statistics_dtype(query_rows)) for _ in range(2))

    def run(rows: Tensor, part: slice, parameters: list[Tensor], seed: Tensor | None) -> None:
        up_weight, up_bias, down_weight, down_bias, *norm = parameters
        if not keep:
            activation = linear(rows, up_weight, up_bias, gelu=True, backend=backend)
        elif _fuses(backend, rows, extension.FWD_ROWS):
            activation = extension.linear_gelu_fwd(rows, up_weight, up_bias, up[part])
        else:
            activation = gelu(torch.mm(rows, up_weight.t(), out=up[part]), up_bias)
        down = torch.mm(activation, down_weight.t(), out=x[part]) if keep else linear_in_parts(activation, down_weight)
        add_norm(down, rows, *norm, seed, eps, dropout_p, down_bias, out[part], (mean[part], rstd[part]))

    parts = _parts(query_rows, text_rows, parameters, seeds)
    with overlap.overlapping_in_captures():
        overlap.side_by_side(*(functools.partial(run, *part) for part in parts))
    return out, up, x, mean, rstd


def _fuses(backend: str, rows: Tensor, least: int) -> bool:
    """Whether the extension makes a product with GELU: with few rows cuBLAS's and a pass of GELU are faster."""
    return backend == "cuda" and rows.shape[0] >= least


def _parts(query_rows: Tensor, text_rows: Tensor, parameters: list[Tensor], seeds: list[Tensor]) -> list:
    """(rows, their place among all rows, six parameters, seed) of the query and the text rows, where there are any."""
    count = query_rows.shape[0]
    places = (query_rows, slice(0, count)), (text_rows, slice(count, count + text_rows.shape[0]))
    present = [place for place in places if place[0].shape[0]]
    return [(*place, parameters[6 * i : 6 * i + 6], seeds[i] if seeds else None) for i, place in enumerate(present)]


@split_feed_forward_block_fwd.register_fake
def _(query_rows, text_rows, parameters, *others) -> tuple[Tensor, ...]:
    count, (hidden, intermediate) = query_rows.shape[0] + text_rows.shape[0], parameters[2].shape
    kept = count if others[-1] else 0
    sizes = (count, hidden), (kept, intermediate), (kept, hidden)
    out, up, x = (query_rows.new_empty(size) for size in sizes)
    mean, rstd = (query_rows.new_empty(count, dtype=statistics_dtype(query_rows)) for _ in range(2))
    return out, up, x, mean, rstd


def _bwd(
    dout: Tensor,
    query_rows: Tensor,
    text_rows: Tensor,
    up: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    parameters: list[Tensor],
    seeds: list[Tensor],
    totals: list[Tensor],
    add: bool,
    dropout_p: float,
    backend: str,
    overwrite: bool,
) -> list[Tensor]:
    """dquery_rows, dtext_rows, then the gradients of ``parameters``, or these are written to ``totals`` if it is not
    empty, with ``add`` added. With ``overwrite`` up and x are written to, which saves memory of their size.
    """
    gelu_bwd_in_place = backends.kernel_or_formula("bias_gelu_bwd_in_place", query_rows)
    add_norm_bwd = backends.kernel_or_formula("dropout_add_layer_norm_bwd", query_rows)

    def run(
        rows: Tensor, part: slice, parameters: list[Tensor], seed: Tensor | None, totals: list[Tensor]
    ) -> list[Tensor]:
        up_weight, up_bias, down_weight, down_bias, norm_weight, _ = parameters
        up_weight_total, up_bias_total, down_weight_total, *others = totals or [None] * 6
        dx, dresidual, dnorm_weight, dnorm_bias, ddown_bias = add_norm_bwd(
            dout[part], x[part], rows, norm_weight, mean[part], rstd[part], seed, dropout_p, down_bias,
            norm_totals(others), x[part] if overwrite else None, add,
        )  # fmt: skip
        up_rows, activation = up[part], up[part] if overwrite else None
        if _fuses(backend, rows, extension.BWD_ROWS):
            dup, dup_bias, activation = extension.linear_gelu_bwd(
                dx, down_weight, up_rows, up_bias, up_bias_total, activation, add
            )
        else:
            dup = dx @ down_weight
            dup_bias, activation = gelu_bwd_in_place(dup, up_rows, up_bias, up_bias_total, activation, add)
        ddown_weight = product(dx.t(), activation, down_weight_total, add=add)
        del activation
        dup_weight = product(dup.t(), rows, up_weight_total, add=add)
        if dresidual is dx:  # without dropout, and what reads these rows may have been left aside
            overlap.join()
        dresidual.addmm_(dup, up_weight)
        return [dresidual, dup_weight, dup_bias, ddown_weight, ddown_bias, dnorm_weight, dnorm_bias]

    parts = _parts(query_rows, text_rows, parameters, seeds)
    of_parts = [totals[6 * i : 6 * i + 6] for i in range(len(parts))]
    tasks = [functools.partial(run, *part, t) for part, t in zip(parts, of_parts, strict=True)]
    with overlap.overlapping_in_captures():
        found = overlap.side_by_side(*tasks)
    given = iter(found)
    drows = [next(given)[0] if rows.shape[0] else torch.empty_like(rows) for rows in (query_rows, text_rows)]
    return drows if totals else [*drows, *(gradient for _, *gradients in found for gradient in gradients)]


# where it writes to its inputs backward calls the function itself: an op may not and return others
split_feed_forward_block_bwd = torch.library.custom_op("qformer_fast::split_feed_forward_block_bwd", mutates_args=())(
    _bwd
)


@split_feed_forward_block_bwd.register_fake
def _(dout, query_rows, text_rows, up, x, mean, rstd, parameters, *_) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (query_rows, text_rows, *parameters)]


def _setup_context(ctx, inputs, output) -> None:
    query_rows, text_rows, parameters, seeds, ctx.totals, ctx.add, _, *ctx.options, ctx.overwrite, _ = inputs
    _, *saved = output
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(query_rows, text_rows, *saved, *parameters, *seeds)


def _backward(ctx, dout: Tensor):
    saved = ctx.saved_tensors  # once: gradient checkpointing lets them be read a single time
    rows_and_saved, others = saved[:6], saved[6:]
    parameters, seeds = list(others[: ctx.num_parameters]), list(others[ctx.num_parameters :])
    overwrite = ctx.overwrite and frees_saved(dout)
    run = _bwd if overwrite or ctx.totals else split_feed_forward_block_bwd
    dquery_rows, dtext_rows, *gradients = run(
        dout.contiguous(), *rows_and_saved, parameters, seeds, ctx.totals, ctx.add, *ctx.options, overwrite
    )
    gradients = gradients or [None] * len(parameters)
    return dquery_rows, dtext_rows, gradients, [None] * len(seeds), [None] * len(ctx.totals), *[None] * 6


register_autograd(split_feed_forward_block_fwd, _backward, _setup_context)


def _kernels(
    query_rows: Tensor,
    text_rows: Tensor,
    query_parameters: tuple[Tensor, ...] | None,
    text_parameters: tuple[Tensor, ...] | None,
    *,
    eps: float,
    dropout_p: float,
    gradients: Sequence[Sequence[Tensor] | None] | None = None,
    add_gradients: bool = True,
    backend: str = "triton",
) -> Tensor:
    dtype = autocast_dtype(query_rows)
    given = [i for i, rows in enumerate((query_rows, text_rows)) if rows.shape[0]]
    parameters, totals = [], []
    for i in given:
        up_weight, up_bias, down_weight, *others = (query_parameters, text_parameters)[i]
        parameters += [up_weight.to(dtype), up_bias, down_weight.to(dtype), *others]
        totals += [] if gradients is None else gradients[i]
    seeds = [seed for seed in draw_seeds(query_rows, *[dropout_p] * len(given)) if seed is not None]
    rows = query_rows.to(dtype).contiguous(), text_rows.to(dtype).contiguous()
    options = add_gradients, eps, dropout_p, backend, True, torch.is_grad_enabled()
    out, *_ = split_feed_forward_block_fwd(*rows, parameters, seeds, totals, *options)
    return out


def _extension_unsupported(rows: Tensor, *parameters: tuple[Tensor, ...] | None) -> str | None:
    dtype = autocast_dtype(rows)
    if dtype not in extension.DTYPES:
        return f"its products take fp16 and bf16, got {dtype}"
    widths = {size for given in parameters if given is not None for size in given[0].shape}
    odd = sorted(width for width in widths if width % 8)
    return f"its products take widths that are multiples of 8, got {odd}" if odd else None


IMPLEMENTATIONS = {
    "reference": without_totals(reference.split_feed_forward_block),
    "triton": _kernels,
    "cuda": functools.partial(_kernels, backend="cuda"),
}


def split_feed_forward_block(
    query_rows: Tensor,
    text_rows: Tensor,
    query_parameters: tuple[Tensor, ...] | None,
    text_parameters: tuple[Tensor, ...] | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    gradients: Sequence[Sequence[Tensor] | None] | None = None,
    add_gradients: bool = True,
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
        gradients (Sequence, Optional): for the queries' and for the text's parameters six tensors like them, fp32 or of
            their dtype, contiguous. The kernels add the parameters' gradients to them in backward and give autograd
            none; those of no rows stay as they are. Default: `None`.
        add_gradients (bool): False: write to ``gradients`` instead. Default: True.
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
    for place, (name, parameters, count) in enumerate(parts):
        if count and parameters is None:
            raise ValueError(f"{name} must be given for {count} rows, got None")
        if parameters is not None:
            check_shape(f"{name}[0]", parameters[0], "intermediate", hidden)
            check_shape(f"{name}[2]", parameters[2], hidden, parameters[0].shape[0])
            totals = None if gradients is None else gradients[place]
            check_totals(totals, *parameters, name=f"gradients[{place}]")
    reason = _extension_unsupported(query_rows, query_parameters, text_parameters)
    run = backends.resolve(
        "split_feed_forward_block", IMPLEMENTATIONS, backend, query_rows, extension_unsupported=reason
    )
    return run(
        query_rows,
        text_rows,
        query_parameters,
        text_parameters,
        eps=eps,
        dropout_p=dropout_p,
        gradients=gradients,
        add_gradients=add_gradients,
    )
