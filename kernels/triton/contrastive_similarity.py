"""Image-text similarity: the largest product over an image's queries, without the (images, texts, queries) tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch

# from here on tiles of several images fill a GPU at batch 128
MANY_TEXTS = 1024


@triton.jit
def contrastive_similarity_fwd_kernel(
    image_ptr,  # (images, Q, D)
    text_ptr,  # (T, D)
    out_ptr,  # (images, T)
    argmax_ptr,  # (images, T) int16
    images,
    T,
    Q,
    D,
    IMAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = IMAGES images and BLOCK_T texts; a product's columns are BLOCK_Q queries of each image."""
    COLUMNS: tl.constexpr = IMAGES * BLOCK_Q
    tiles = tl.cdiv(T, BLOCK_T)
    offs_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    first_image = tl.program_id(0) // tiles * IMAGES
    image = (first_image + tl.arange(0, COLUMNS) // BLOCK_Q).to(tl.int64)
    query = tl.arange(0, COLUMNS) % BLOCK_Q
    text_ptr += offs_t[:, None].to(tl.int64) * D
    best = tl.full((BLOCK_T, IMAGES), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_T, IMAGES), tl.int32)
    broken = tl.zeros((BLOCK_T, IMAGES), tl.int32)
    for first in range(0, Q, BLOCK_Q):
        mask_q = (first + query < Q) & (image < images)
        row_ptr = image_ptr + (image * Q + first + query) * D
        products = tl.zeros((BLOCK_T, COLUMNS), tl.float32)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            text = tl.load(text_ptr + offs_d[None, :], mask=mask_t[:, None] & mask_d[None, :], other=0.0)
            rows = tl.load(row_ptr[None, :] + offs_d[:, None], mask=mask_q[None, :] & mask_d[:, None], other=0.0)
            products = tl.dot(text, rows, products, input_precision=PRECISION)
        products = tl.where((first + query < Q)[None, :], products, float("-inf"))
        products = tl.reshape(products, (BLOCK_T, IMAGES, BLOCK_Q))
        broken = tl.maximum(broken, tl.max((products != products).to(tl.int32), axis=2))
        largest, index = tl.max(products, axis=2, return_indices=True, return_indices_tie_break_left=True)
        argmax = tl.where(largest > best, first + index, argmax)
        best = tl.maximum(best, largest)
    best = tl.where(broken > 0, float("nan"), best)
    # with NaN among them the index may be a masked one
    argmax = tl.minimum(argmax, Q - 1)
    own = (first_image + tl.arange(0, IMAGES)).to(tl.int64)
    offs = own[None, :] * T + offs_t[:, None]
    mask = mask_t[:, None] & (own < images)[None, :]
    tl.store(out_ptr + offs, best, mask=mask)
    tl.store(argmax_ptr + offs, argmax.to(tl.int16), mask=mask)


@triton.jit
def contrastive_similarity_bwd_image_kernel(
    dout_ptr,  # (images, T)
    argmax_ptr,  # (images, T) int16
    text_ptr,  # (T, D)
    dimage_ptr,  # (images, Q, D)
    T,
    Q,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = BLOCK_Q queries of an image and BLOCK_D columns: dout where the query was largest, times texts."""
    image = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_q = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_d = offs_d < D
    dimage = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        argmax = tl.load(argmax_ptr + image * T + offs_t, mask=mask_t, other=-1).to(tl.int32)
        dout = tl.load(dout_ptr + image * T + offs_t, mask=mask_t, other=0.0)
        offs = offs_t[:, None].to(tl.int64) * D + offs_d[None, :]
        text = tl.load(text_ptr + offs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
        chosen = tl.where(argmax[None, :] == offs_q[:, None], dout[None, :], 0.0).to(text.dtype)
        dimage = tl.dot(chosen, text, dimage, input_precision=PRECISION)
    offs = (image * Q + offs_q)[:, None] * D + offs_d[None, :]
    tl.store(dimage_ptr + offs, dimage, mask=(offs_q < Q)[:, None] & mask_d[None, :])


@triton.jit
def contrastive_similarity_bwd_text_kernel(
    dout_ptr,  # (images, T)
    argmax_ptr,  # (images, T) int16
    image_ptr,  # (images, Q, D)
    dtext_ptr,  # (T, D)
    images,
    T,
    Q,
    D,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program = BLOCK_D columns of one text: the sum over images of dout times the largest query."""
    text = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dtext = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    for start in range(0, images, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I)
        mask_i = offs_i < images
        place = offs_i.to(tl.int64) * T + text
        argmax = tl.load(argmax_ptr + place, mask=mask_i, other=0)
        dout = tl.load(dout_ptr + place, mask=mask_i, other=0.0).to(tl.float32)
        offs = (offs_i.to(tl.int64) * Q + argmax)[:, None] * D + offs_d[None, :]
        query = tl.load(image_ptr + offs, mask=mask_i[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        dtext += dout[:, None] * query
    tl.store(dtext_ptr + text * D + offs_d, tl.sum(dtext, axis=0), mask=mask_d)


def contrastive_similarity_fwd(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """image_features (images, queries, dim), text_features (texts, dim), contiguous -> out and argmax (images, texts),
    argmax in int16; of equal queries the first.
    """
    images, Q, D = image_features.shape
    T = text_features.shape[0]
    out = image_features.new_empty(images, T)
    argmax = image_features.new_empty(images, T, dtype=torch.int16)
    settings = _settings("contrastive_similarity_fwd", Q, T, out.device)
    if out.numel():
        grid = (triton.cdiv(T, settings["BLOCK_T"]) * triton.cdiv(images, settings["IMAGES"]),)
        contrastive_similarity_fwd_kernel[grid](image_features, text_features, out, argmax, images, T, Q, D, **settings)
    return out, argmax


def contrastive_similarity_bwd_image(dout: Tensor, argmax: Tensor, text_features: Tensor, queries: int) -> Tensor:
    """dout and argmax (images, texts), text_features (texts, dim), contiguous -> (images, queries, dim)."""
    images, (T, D) = dout.shape[0], text_features.shape
    dimage = text_features.new_empty(images, queries, D)
    settings = _settings("contrastive_similarity_bwd_image", queries, T, dout.device)
    if images:
        grid = (images, triton.cdiv(D, settings["BLOCK_D"]), triton.cdiv(queries, settings["BLOCK_Q"]))
        contrastive_similarity_bwd_image_kernel[grid](dout, argmax, text_features, dimage, T, queries, D, **settings)
    return dimage


def contrastive_similarity_bwd_text(dout: Tensor, argmax: Tensor, image_features: Tensor) -> Tensor:
    """dout and argmax (images, texts), image_features (images, queries, dim), contiguous -> (texts, dim)."""
    images, Q, D = image_features.shape
    T = dout.shape[1]
    dtext = image_features.new_empty(T, D)
    settings = launch.settings("contrastive_similarity_bwd_text", dout.device)
    if T:
        grid = (T, triton.cdiv(D, settings["BLOCK_D"]))
        contrastive_similarity_bwd_text_kernel[grid](dout, argmax, image_features, dtext, images, T, Q, D, **settings)
    return dtext


def _settings(kernel: str, queries: int, texts: int, device: torch.device) -> dict:
    """The table's for few texts or for many, as all ranks have, with BLOCK_Q no larger than the queries need and no
    smaller than a matrix product takes.
    """
    settings = launch.settings(kernel if texts < MANY_TEXTS else f"{kernel}_many", device)
    return settings | {"BLOCK_Q": min(settings["BLOCK_Q"], max(16, triton.next_power_of_2(queries)))}
