"""Self-attention of the packed sequences [queries | text]."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.layout import SequenceLayout
from qformer_fast.ops._autograd import register_autograd
from qformer_fast.ops._checks import (
    autocast_dtype,
    check_floating,
    check_probability,
    check_rows,
    check_scale,
    check_shape,
)
from qformer_fast.ops._seeds import draw_seed

MAX_HEADDIM = 128


@torch.library.custom_op("qformer_fast::query_text_attention_fwd", mutates_args=())
def query_text_attention_fwd(
    qkv: Tensor,
    text_offsets: Tensor,
    masks: Tensor,
    seed: Tensor | None,
    num_query_sequences: int,
    num_queries: int,
    max_text_length: int,
    softmax_scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    sizes = num_query_sequences, num_queries, max_text_length, softmax_scale, dropout_p
    return backends.kernel_or_formula("query_text_attention_fwd", qkv)(qkv, text_offsets, masks, seed, *sizes)


@query_text_attention_fwd.register_fake
def _(qkv, text_offsets, masks, seed, num_query_sequences, num_queries, max_text_length, *_) -> tuple[Tensor, Tensor]:
    rows, _, nheads, headdim = qkv.shape
    streamed = num_queries + max_text_length > reference.MAX_TILE
    return qkv.new_empty(rows, nheads, headdim), qkv.new_empty(rows if streamed else 0, nheads, dtype=torch.float32)


@torch.library.custom_op("qformer_fast::query_text_attention_bwd", mutates_args=())
def query_text_attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    text_offsets: Tensor,
    masks: Tensor,
    seed: Tensor | None,
    num_query_sequences: int,
    num_queries: int,
    max_text_length: int,
    softmax_scale: float,
    dropout_p: float,
) -> Tensor:
    sizes = num_query_sequences, num_queries, max_text_length, softmax_scale, dropout_p
    run = backends.kernel_or_formula("query_text_attention_bwd", qkv)
    return run(dout, qkv, out, lse, text_offsets, masks, seed, *sizes)[0]


@query_text_attention_bwd.register_fake
def _(dout: Tensor, qkv: Tensor, *_) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], *output, *inputs[1:4])
    ctx.sizes = inputs[4:]


def _backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    dqkv = query_text_attention_bwd(dout.contiguous(), *ctx.saved_tensors, *ctx.sizes)
    return dqkv, *[None] * (3 + len(ctx.sizes))


register_autograd(query_text_attention_fwd, _backward, _setup_context)


def _kernels(qkv: Tensor, layout: SequenceLayout, *, softmax_scale: float | None, dropout_p: float) -> Tensor:
    out, _ = query_text_attention_fwd(
        qkv.to(autocast_dtype(qkv)).contiguous(),
        layout.text_offsets,
        layout.masks,
        draw_seed(qkv, dropout_p),
        layout.num_query_sequences,
        layout.num_queries,
        layout.max_text_length,
        qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        dropout_p,
    )
    return out


IMPLEMENTATIONS = {"reference": reference.query_text_attention, "triton": _kernels}


def unsupported(headdim: int, layout: SequenceLayout) -> str | None:
    """Why the kernels can't take this call, or None."""
    if layout.attention_mask is not None:
        return "a layout with an attention_mask runs on the reference"
    return None if headdim <= MAX_HEADDIM else f"its kernels take head dimensions up to {MAX_HEADDIM}, got {headdim}"


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
    without padding. A row that may look at nothing gives zeros. Under autocast the kernels take qkv in the autocast
    dtype.

    Args:
        qkv (Tensor): (rows, 3, nheads, headdim); fp32, fp16 or bf16; the packed rows' queries, keys and values.
        layout (SequenceLayout): which rows form which sequence.
        softmax_scale (float, Optional): positive. Default: `None`, 1/sqrt(headdim).
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
    check_scale("softmax_scale", softmax_scale)
    run = backends.resolve("query_text_attention", IMPLEMENTATIONS, backend, qkv, unsupported(qkv.shape[3], layout))
    return run(qkv, layout, softmax_scale=softmax_scale, dropout_p=dropout_p)
