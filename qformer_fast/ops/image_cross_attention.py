"""Attention of query rows to the image that their sequence looks at."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.layout import SequenceLayout
from qformer_fast.ops._autograd import register_autograd
from qformer_fast.ops._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_probability,
    check_rows,
    check_scale,
    check_shape,
    check_totals,
)
from qformer_fast.ops._seeds import draw_seed

MAX_HEADDIM = 128


@torch.library.custom_op("qformer_fast::image_cross_attention_fwd", mutates_args=())
def image_cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    seed: Tensor | None,
    num_queries: int,
    softmax_scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    run = backends.kernel_or_formula("image_cross_attention_fwd", q)
    return run(q, k, v, image_order, image_offsets, image_mask, seed, num_queries, softmax_scale, dropout_p)


@image_cross_attention_fwd.register_fake
def _(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("qformer_fast::image_cross_attention_bwd", mutates_args=())
def image_cross_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    image_order: Tensor,
    image_offsets: Tensor,
    image_mask: Tensor | None,
    seed: Tensor | None,
    num_queries: int,
    softmax_scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = image_order, image_offsets, image_mask, seed, num_queries
    run = backends.kernel_or_formula("image_cross_attention_bwd", q)
    return run(dout, q, k, v, out, lse, *layout, softmax_scale, dropout_p)


@image_cross_attention_bwd.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.sizes = inputs[7:]


def _backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    gradients = image_cross_attention_bwd(dout.contiguous(), *ctx.saved_tensors, *ctx.sizes)
    return *gradients, *[None] * (4 + len(ctx.sizes))


register_autograd(image_cross_attention_fwd, _backward, _setup_context)


def _kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    image_mask: Tensor | None,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    dtype = autocast_dtype(q)
    out, _ = image_cross_attention_fwd(
        q.to(dtype).contiguous(),
        *kernel_keys_values(k.to(dtype), v.to(dtype)),
        *layout.sequences_by_image(k.shape[0]),
        None if image_mask is None else image_mask.contiguous(),
        draw_seed(q, dropout_p),
        layout.num_queries,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        dropout_p,
    )
    return out


def kernel_keys_values(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v as the kernels read them: heads contiguous and equal strides, as slices of one buffer have; else
    copies.
    """
    return (k, v) if _readable(k, v) else (k.contiguous(), v.contiguous())


def _readable(k: Tensor, v: Tensor) -> bool:
    nheads, headdim = k.shape[2:]
    return k.stride() == v.stride() and (k.stride(3) == 1 or headdim == 1) and (k.stride(2) == headdim or nheads == 1)


def check_kv_gradients(kv_gradients: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
    """Raises ValueError or TypeError unless the kernels can write the gradients of k and v there."""
    check_totals(kv_gradients, k, v, name="kv_gradients", contiguous=False)
    if not _readable(*kv_gradients):
        strides = [gradient.stride() for gradient in kv_gradients]
        raise ValueError(f"kv_gradients must have heads contiguous and equal strides, got {strides}")


IMPLEMENTATIONS = {"reference": reference.image_cross_attention, "triton": _kernels}


def unsupported(headdim: int, image_mask: Tensor | None) -> str | None:
    """Why the kernels can't take this call, or None."""
    if image_mask is not None and image_mask.dtype != torch.bool:
        return f"its kernels take a bool image_mask, got {image_mask.dtype}"
    return None if headdim <= MAX_HEADDIM else f"its kernels take head dimensions up to {MAX_HEADDIM}, got {headdim}"


def image_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    image_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T * softmax_scale) v, where sequence s reads the keys and values of image ``layout.image_index[s]``.

    Replaces LAVIS's cross-attention between its projections (Qformer.py:187-270); an image that several sequences
    look at is stored once.

    Args:
        q (Tensor): (query rows, nheads, headdim); fp32, fp16 or bf16.
        k, v (Tensor): (images, tokens, nheads, headdim), q.dtype; may be strided slices of the all-layers buffer.
        layout (SequenceLayout): its ``image_index`` says who looks where.
        image_mask (Tensor, Optional): (images, 1 or num_queries, tokens); bool (True = may look) or float (added to the
            scores). A row that may look at nothing gives zeros. Default: `None`, all tokens.
        softmax_scale (float, Optional): positive. Default: `None`, 1/sqrt(headdim).
        dropout_p (float): probability of dropping a softmax weight, in [0, 1). Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (query rows, nheads, headdim), q.dtype.

    Raises:
        ValueError: shapes, rows, devices or probability that do not fit. TypeError: integer input. RuntimeError: the
            backend asked for can't run, with the reason.
    """
    check_shape("q", q, "query rows", "nheads", "headdim")
    check_shape("k", k, "images", "tokens", q.shape[1], q.shape[2])
    check_shape("v", v, *k.shape)
    check_floating(q=q, k=k, v=v)
    check_device(q, k=k, v=v, image_mask=image_mask)
    check_rows("q", q, layout.num_query_rows, layout)
    check_probability("dropout_p", dropout_p)
    check_scale("softmax_scale", softmax_scale)
    if image_mask is not None:
        check_image_mask(image_mask, k, layout)
    run = backends.resolve("image_cross_attention", IMPLEMENTATIONS, backend, q, unsupported(q.shape[2], image_mask))
    return run(q, k, v, layout, image_mask=image_mask, softmax_scale=softmax_scale, dropout_p=dropout_p)


def check_image_mask(image_mask: Tensor, k: Tensor, layout: SequenceLayout) -> None:
    """Raises ValueError unless ``image_mask`` is (images, 1 or num_queries, tokens)."""
    readers = "1 or num_queries" if image_mask.ndim != 3 or image_mask.shape[1] not in (1, layout.num_queries) else None
    check_shape("image_mask", image_mask, k.shape[0], readers or image_mask.shape[1], k.shape[1])
    if readers:
        raise ValueError(f"image_mask must have 1 or {layout.num_queries} readers, got {image_mask.shape[1]}")
