"""Attention of query rows to the image that their sequence looks at."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.layout import SequenceLayout
from qformer_fast.ops._checks import check_device, check_floating, check_probability, check_rows, check_shape

IMPLEMENTATIONS = {"reference": reference.image_cross_attention}


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
        softmax_scale (float, Optional): Default: `None`, 1/sqrt(headdim).
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
    if image_mask is not None:
        check_image_mask(image_mask, k, layout)
    run = backends.resolve("image_cross_attention", IMPLEMENTATIONS, backend, q)
    return run(q, k, v, layout, image_mask=image_mask, softmax_scale=softmax_scale, dropout_p=dropout_p)


def check_image_mask(image_mask: Tensor, k: Tensor, layout: SequenceLayout) -> None:
    """Raises ValueError unless ``image_mask`` is (images, 1 or num_queries, tokens)."""
    readers = "1 or num_queries" if image_mask.ndim != 3 or image_mask.shape[1] not in (1, layout.num_queries) else None
    check_shape("image_mask", image_mask, k.shape[0], readers or image_mask.shape[1], k.shape[1])
    if readers:
        raise ValueError(f"image_mask must have 1 or {layout.num_queries} readers, got {image_mask.shape[1]}")
