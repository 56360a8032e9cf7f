"""Image-text similarity of ITC."""

from __future__ import annotations

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._autograd import register_autograd
from qformer_fast.ops._checks import autocast_dtype, check_device, check_floating, check_shape

MAX_QUERIES = 2**15


@torch.library.custom_op("qformer_fast::contrastive_similarity_fwd", mutates_args=())
def contrastive_similarity_fwd(
    image_features: Tensor, text_features: Tensor, apart: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (images, texts), if ``apart`` a copy (texts, images), otherwise nothing, and argmax (images, texts)."""
    out, argmax = backends.kernel_or_formula("contrastive_similarity_fwd", image_features)(
        image_features, text_features
    )
    return out, out.T.clone(memory_format=torch.contiguous_format) if apart else out.new_empty(0), argmax


@contrastive_similarity_fwd.register_fake
def _(image_features: Tensor, text_features: Tensor, apart: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = image_features.new_empty(image_features.shape[0], text_features.shape[0])
    copy = out.new_empty(out.shape[::-1] if apart else 0)
    return out, copy, torch.empty_like(out, dtype=torch.int16)


@torch.library.custom_op("qformer_fast::contrastive_similarity_bwd_image", mutates_args=())
def contrastive_similarity_bwd_image(dout: Tensor, argmax: Tensor, text_features: Tensor, queries: int) -> Tensor:
    run = backends.kernel_or_formula("contrastive_similarity_bwd_image", text_features)
    return run(dout, argmax, text_features, queries)


@contrastive_similarity_bwd_image.register_fake
def _(dout: Tensor, argmax: Tensor, text_features: Tensor, queries: int) -> Tensor:
    return text_features.new_empty(dout.shape[0], queries, text_features.shape[1])


@torch.library.custom_op("qformer_fast::contrastive_similarity_bwd_text", mutates_args=())
def contrastive_similarity_bwd_text(dout: Tensor, argmax: Tensor, image_features: Tensor) -> Tensor:
    return backends.kernel_or_formula("contrastive_similarity_bwd_text", image_features)(dout, argmax, image_features)


@contrastive_similarity_bwd_text.register_fake
def _(dout: Tensor, argmax: Tensor, image_features: Tensor) -> Tensor:
    return image_features.new_empty(dout.shape[1], image_features.shape[2])


def _setup_context(ctx, inputs, output) -> None:
    *features, ctx.apart = inputs
    ctx.save_for_backward(*features, output[-1])


def _backward(ctx, dout: Tensor | None, dcopy: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    image_features, text_features, argmax = ctx.saved_tensors
    of_texts = dout if not ctx.apart else None if dcopy is None else dcopy.T
    dimage, dtext = None, None
    if ctx.needs_input_grad[0] and dout is not None:
        dimage = contrastive_similarity_bwd_image(dout.contiguous(), argmax, text_features, image_features.shape[1])
    if ctx.needs_input_grad[1] and of_texts is not None:
        dtext = contrastive_similarity_bwd_text(of_texts.contiguous(), argmax, image_features)
    return dimage, dtext, None


register_autograd(contrastive_similarity_fwd, _backward, _setup_context, results=2)


def _kernels(image_features: Tensor, text_features: Tensor, apart: bool) -> Tensor | tuple[Tensor, Tensor]:
    dtype = autocast_dtype(image_features)
    features = (x.to(dtype).contiguous() for x in (image_features, text_features))
    out, copy, _ = contrastive_similarity_fwd(*features, apart)
    return (out, copy) if apart else out


IMPLEMENTATIONS = {"reference": reference.contrastive_similarity, "triton": _kernels}


def contrastive_similarity(
    image_features: Tensor, text_features: Tensor, *, apart: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Of each image and text the largest dot product over the image's queries.

    Replaces LAVIS's matmul and max (blip2_qformer.py:138-150 of LAVIS 506965b). The gradient goes to the query with the
    largest product; the kernels take the first of equal ones. They never hold the products of all queries. fp32 is
    multiplied to fp32 precision; under autocast both inputs take the autocast dtype.

    Args:
        image_features (Tensor): (images, queries, dim); fp32, fp16 or bf16.
        text_features (Tensor): (texts, dim), of the same dtype.
        apart (bool): once more with texts first, as ITC's local gradients have it (blip2_qformer.py:132-150): what is
            (images, texts) gives images alone a gradient, what is (texts, images) texts alone. Default: False.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (images, texts), the dtype of the features; NaN where a product is NaN. With ``apart`` a tuple of it and
        the same as (texts, images).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer input, dtypes that differ. RuntimeError: the
            backend asked for can't run, with the reason.
    """
    check_shape("image_features", image_features, "images", "queries", "dim")
    images, queries, dim = image_features.shape
    if not queries or not dim:
        raise ValueError(f"image_features must have queries and columns, got {tuple(image_features.shape)}")
    check_shape("text_features", text_features, "texts", dim)
    check_floating(image_features=image_features, text_features=text_features)
    if autocast_dtype(image_features) != autocast_dtype(text_features):
        raise TypeError(f"text_features must be {image_features.dtype}, got {text_features.dtype}")
    check_device(image_features, text_features=text_features)
    unsupported = None if queries <= MAX_QUERIES else f"its kernels take {MAX_QUERIES} queries, got {queries}"
    run = backends.resolve("contrastive_similarity", IMPLEMENTATIONS, backend, image_features, unsupported)
    return run(image_features, text_features, apart)
