"""What of a picture speaks for a caption: maps over image tokens as heat maps over the picture."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.evaluation.retrieval import similarity

if TYPE_CHECKING:
    from qformer_fast.models.blip2 import ImageEncoder
    from qformer_fast.models.blip2_qformer import Blip2QFormer

Method = Literal["grad_cam", "attention"]
Query = int | Literal["mean", "max"]

# dark to bright in equal steps, 8 bits of red, green and blue
COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
OPACITY = 0.8


@dataclass(frozen=True, eq=False)
class Explanation:
    """What :func:`explain` returns, on the CPU.

    Args:
        match_probability (float): of ITM, in [0, 1].
        cosine (float): of ITC, the largest over the queries.
        maps (dict): {layer: (queries, tokens)} of :meth:`Blip2QFormer.grad_cam`, or {layer: (nheads, queries, tokens)}
            of :meth:`Blip2QFormer.cross_attention_maps`.
        layer (int): the one that is drawn.
        heat (Tensor): (height, width) in [0, 1], see :func:`heat_map`.
        overlay (Image): of ``heat`` on the picture that the encoder saw.
    """

    match_probability: float
    cosine: float
    maps: dict[int, Tensor]
    layer: int
    heat: Tensor
    overlay: Image.Image


@torch.no_grad()
def explain(
    model: Blip2QFormer,
    encoder: ImageEncoder,
    pixels: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    method: Method = "grad_cam",
    layer: int | None = None,
    query: Query = "mean",
) -> Explanation:
    """Whether a caption fits a picture, and what of the picture says so.

    Args:
        model (Blip2QFormer): in eval mode.
        encoder (ImageEncoder): the one that the model was trained with, on the model's device.
        pixels (Tensor): (3, height, width), of ``encoder.transform``.
        input_ids, attention_mask (Tensor): (1, length).
        method (str): "grad_cam", see :meth:`Blip2QFormer.grad_cam`, or "attention", drawn as the mean over the heads.
            Default: "grad_cam".
        layer (int, Optional): one with cross-attention, the only one in ``maps`` then. Default: `None`, all are in
            ``maps`` and the last is drawn.
        query (int or str): the query to draw, or "mean" or "max" over all. Default: "mean".

    Raises:
        ValueError: a model in training mode, another method, a layer without cross-attention, a query out of range.
    """
    if model.training:
        raise ValueError("model must be in eval mode, call model.eval() first")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    tokens = encoder(pixels[None].to(model.temp.device)).to(model.temp.dtype)
    image_kv, text = model.image_kv(tokens), (input_ids, attention_mask)
    layers = None if layer is None else [layer]
    if method == "grad_cam":
        maps = model.grad_cam(image_kv, *text, layers=layers)
    else:
        maps = model.cross_attention_maps(image_kv, *text, layers=layers)
    maps = {layer: x[0].cpu() for layer, x in maps.items()}
    layer, drawn = list(maps.items())[-1]
    drawn = of_query(drawn if method == "grad_cam" else drawn.mean(0), query)
    grid = to_grid(drawn, encoder.grid, tokens.shape[1] - math.prod(encoder.grid))
    heat = heat_map(grid, pixels.shape[-2:])
    return Explanation(
        match_probability=float(model.match(image_kv, *text).softmax(-1)[0, 1]),
        cosine=float(similarity(model.image_features(image_kv), model.text_features(*text))),
        maps=maps,
        layer=layer,
        heat=heat,
        overlay=overlay(encoder.picture(pixels.cpu()), heat),
    )


def of_query(maps: Tensor, query: Query) -> Tensor:
    """One query's map, or the mean or maximum over the queries: (queries, tokens) -> (tokens,).

    Raises:
        ValueError: a query out of range, another word.
    """
    if query == "mean":
        return maps.mean(0)
    if query == "max":
        return maps.amax(0)
    if not isinstance(query, int) or not 0 <= query < len(maps):
        raise ValueError(f'query must be "mean", "max" or lie in [0, {len(maps)}), got {query!r}')
    return maps[query]


def to_grid(maps: Tensor, grid: tuple[int, int], prefix_tokens: int = 1) -> Tensor:
    """A map over tokens as one over patches.

    Args:
        maps (Tensor): (..., tokens).
        grid (tuple): rows and columns of patches, whose tokens are the last, row by row; (16, 16) of ViT-L/14 at 224.
        prefix_tokens (int): tokens before the patches, which are left out: the class token, registers. Default: 1.

    Returns:
        Tensor: (..., rows, columns).

    Raises:
        ValueError: another number of tokens.
    """
    expected = prefix_tokens + grid[0] * grid[1]
    if maps.shape[-1] != expected:
        raise ValueError(
            f"maps must have {expected} tokens, {prefix_tokens} and {grid[0]} x {grid[1]} patches, got {maps.shape[-1]}"
        )
    return maps[..., prefix_tokens:].unflatten(-1, grid)


def heat_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps over patches, each stretched to [0, 1] and enlarged to a picture by bicubic interpolation.

    Args:
        maps (Tensor): (..., rows, columns).
        size (tuple): height and width of the picture.

    Returns:
        Tensor: (..., height, width) fp32; zeros where a map is the same everywhere.
    """
    least, greatest = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    stretched = (maps - least).float() / (greatest - least).float().clamp_min(torch.finfo(torch.float32).tiny)
    large = F.interpolate(stretched.reshape(-1, 1, *maps.shape[-2:]), size, mode="bicubic")
    # bicubic goes below what lies around a peak, and above it
    return large.reshape(*maps.shape[:-2], *size).clamp(0, 1)


def colour(heat: Tensor) -> Tensor:
    """``COLOURS`` and what lies between them: (...) in [0, 1] -> (..., 3) in [0, 1]."""
    colours = torch.tensor(COLOURS, device=heat.device) / 255
    place = heat * (len(COLOURS) - 1)
    below = place.long().clamp_max(len(COLOURS) - 2)
    return torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])


def overlay(picture: Tensor, heat: Tensor) -> Image.Image:
    """Heat as colours on a picture, the more opaque the hotter.

    Args:
        picture (Tensor): (3, height, width) in [0, 1]; of an encoder's pixels :meth:`ImageEncoder.picture`.
        heat (Tensor): (height, width) in [0, 1].

    Raises:
        ValueError: sizes that differ.
    """
    if picture.shape != (3, *heat.shape):
        raise ValueError(
            f"picture must be (3, height, width) with the size of heat, {tuple(heat.shape)}, got {tuple(picture.shape)}"
        )
    out = torch.lerp(picture.permute(1, 2, 0).float(), colour(heat), OPACITY * heat[..., None])
    return Image.fromarray((out * 255).round().byte().cpu().numpy())


def png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
