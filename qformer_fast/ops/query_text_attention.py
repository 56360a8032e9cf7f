"""Self-attention of the packed sequences [queries | text]."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.layout import SequenceLayout
from qformer_fast.ops._checks import check_floating, check_probability, check_rows, check_shape

IMPLEMENTATIONS = {"reference": reference.query_text_attention}


def query_text_attention(
    qkv: Tensor,
    layout: SequenceLayout,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T * softmax_scale) v inside each sequence of ``layout``, under its mask.

    Replaces LAVIS ``BertSelfAttention`` between its projections (Qformer.py:187-270), for all sequences at once and
    without padding. A row that may look at nothing gives zeros.

    Args:
        qkv (Tensor): (rows, 3, nheads, headdim); fp32, fp16 or bf16; the packed rows' queries, keys and values.
        layout (SequenceLayout): which rows form which sequence.
        softmax_scale (float, Optional): Default: `None`, 1/sqrt(headdim).
        dropout_p (float): probability of dropping a softmax weight, in [0, 1). Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, nheads, headdim), qkv.dtype.

    Raises:
        ValueError: shapes, rows or probability that do not fit. TypeError: integer input. RuntimeError: the backend
            asked for can't run, with the reason.
    """
    check_shape("qkv", qkv, "rows", 3, "nheads", "headdim")
    check_floating(qkv=qkv)
    check_rows("qkv", qkv, layout.num_rows, layout)
    check_probability("dropout_p", dropout_p)
    run = backends.resolve("query_text_attention", IMPLEMENTATIONS, backend, qkv)
    return run(qkv, layout, softmax_scale=softmax_scale, dropout_p=dropout_p)
