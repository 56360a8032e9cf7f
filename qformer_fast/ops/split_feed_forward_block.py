"""The feed-forward sub-layer, with weights of their own for query and text rows."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_probability, check_shape

IMPLEMENTATIONS = {"reference": reference.split_feed_forward_block}


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
    them.

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
