"""The self-attention sub-layer on packed rows."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.layout import SequenceLayout
from qformer_fast.ops._checks import check_floating, check_probability, check_rows, check_shape

IMPLEMENTATIONS = {"reference": reference.self_attention_block}


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
    backend: str | None = None,
) -> Tensor:
    """layer_norm(rows + dropout(out(attention(qkv(rows)))))

    Replaces LAVIS ``BertAttention`` without an image (Qformer.py:295-350).

    Args:
        rows (Tensor): (rows, hidden), packed as ``layout`` says.
        layout (SequenceLayout): which rows form which sequence.
        qkv_weight, qkv_bias (Tensor): (3*hidden, hidden) and (3*hidden,): query, key, value one below the other.
        out_weight, out_bias (Tensor): (hidden, hidden) and (hidden,).
        norm_weight, norm_bias (Tensor): (hidden,).
        nheads (int): divides hidden.
        eps (float): of the LayerNorm. Default: 1e-12.
        attention_dropout_p, hidden_dropout_p (float): probabilities in [0, 1). Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, hidden).

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
    if hidden % nheads:
        raise ValueError(f"nheads must divide the hidden size {hidden}, got {nheads}")
    check_probability("attention_dropout_p", attention_dropout_p)
    check_probability("hidden_dropout_p", hidden_dropout_p)
    return backends.resolve("self_attention_block", IMPLEMENTATIONS, backend, rows)(
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
    )
