"""The feed-forward sub-layer, with weights of their own for query and text rows."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_floating, check_probability, check_shape

IMPLEMENTATIONS = {"reference": reference.split_feed_forward_block}


def split_feed_forward_block(
    rows: Tensor,
    num_query_rows: int,
    query_parameters: tuple[Tensor, ...] | None,
    text_parameters: tuple[Tensor, ...] | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """layer_norm(rows + dropout(down(gelu(up(rows))))), rows before ``num_query_rows`` with the query parameters.

    Replaces LAVIS ``feed_forward_chunk_query`` and ``feed_forward_chunk`` (Qformer.py:449-474) and the cat between them.

    Args:
        rows (Tensor): (rows, hidden), query rows first.
        num_query_rows (int): 0 to rows.
        query_parameters, text_parameters (tuple): up_weight (intermediate, hidden), up_bias (intermediate,), down_weight
            (hidden, intermediate), down_bias (hidden,), norm_weight (hidden,), norm_bias (hidden,). None where no such rows
            come.
        eps (float): of the LayerNorm. Default: 1e-12.
        dropout_p (float): probability in [0, 1). Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, hidden).

    Raises:
        ValueError: shapes or probability that do not fit, rows without parameters. TypeError: integer input. RuntimeError:
            the backend asked for can't run, with the reason.
    """
    check_shape("rows", rows, "rows", "hidden")
    check_floating(rows=rows)
    check_probability("dropout_p", dropout_p)
    if not 0 <= num_query_rows <= rows.shape[0]:
        raise ValueError(f"num_query_rows must lie in [0, {rows.shape[0]}], got {num_query_rows}")
    parts = (
        ("query_parameters", query_parameters, num_query_rows),
        ("text_parameters", text_parameters, rows.shape[0] - num_query_rows),
    )
    for name, parameters, count in parts:
        if count and parameters is None:
            raise ValueError(f"{name} must be given for {count} rows, got None")
        if parameters is not None:
            check_shape(f"{name}[0]", parameters[0], "intermediate", rows.shape[1])
            check_shape(f"{name}[2]", parameters[2], rows.shape[1], parameters[0].shape[0])
    run = backends.resolve("split_feed_forward_block", IMPLEMENTATIONS, backend)
    return run(rows, num_query_rows, query_parameters, text_parameters, eps=eps, dropout_p=dropout_p)
