"""The image cross-attention sub-layer on query rows."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.layout import SequenceLayout
from qformer_fast.ops._checks import check_device, check_floating, check_probability, check_rows, check_shape
from qformer_fast.ops.image_cross_attention import check_image_mask

IMPLEMENTATIONS = {"reference": reference.cross_attention_block}


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
    backend: str | None = None,
) -> Tensor:
    """layer_norm(query_rows + dropout(out(attention(q(query_rows), k, v))))

    Replaces LAVIS ``BertAttention`` with an image (Qformer.py:295-350), its key and value projections aside.

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
    check_device(query_rows, k=k, v=v, image_mask=image_mask)
    if image_mask is not None:
        check_image_mask(image_mask, k, layout)
    check_probability("attention_dropout_p", attention_dropout_p)
    check_probability("hidden_dropout_p", hidden_dropout_p)
    return backends.resolve("cross_attention_block", IMPLEMENTATIONS, backend, query_rows)(
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
    )
