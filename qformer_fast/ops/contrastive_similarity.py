"""Image-text similarity of ITC."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_shape

IMPLEMENTATIONS = {"reference": reference.contrastive_similarity}


def contrastive_similarity(image_features: Tensor, text_features: Tensor, *, backend: str | None = None) -> Tensor:
    """Of each image and text the largest dot product over the image's queries.

    Replaces LAVIS's matmul and max (blip2_qformer.py:138-150 of LAVIS 506965b).

    Args:
        image_features (Tensor): (images, queries, dim).
        text_features (Tensor): (texts, dim).
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (images, texts).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer input. RuntimeError: the backend asked for
            can't run, with the reason.
    """
    check_shape("image_features", image_features, "images", "queries", "dim")
    check_shape("text_features", text_features, "texts", image_features.shape[2])
    check_floating(image_features=image_features, text_features=text_features)
    check_device(image_features, text_features=text_features)
    return backends.resolve("contrastive_similarity", IMPLEMENTATIONS, backend, image_features)(
        image_features, text_features
    )
