"""What configurations name, made: encoders, feature caches, data sets and models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from qformer_fast.data.batches import PairDataset, read_pixels
from qformer_fast.data.captions import image_folder, read_pairs
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.evaluation.retrieval import CachedTokens, ImageTokens
from qformer_fast.integrations.checkpoints import load_checkpoint
from qformer_fast.models.blip2 import ImageEncoder
from qformer_fast.models.blip2_qformer import Blip2QFormer, init_from_bert
from qformer_fast.training.config import DataConfig, ModelConfig


class ImageSource(Protocol):
    """Where a configuration says that image tokens come from: a feature cache, or an encoder over pictures."""

    feature_cache: str | None
    encoder: str | None
    encoder_pretrained: str | None
    random_encoder: bool


def load_encoder(name: str | None, pretrained: str | None, *, random: bool) -> ImageEncoder:
    """The frozen image encoder of a configuration.

    Raises:
        ValueError: no encoder named, or one without weights although random ones were not asked for.
    """
    if name is None:
        raise ValueError("encoder must name an open_clip model when there is no feature_cache, got None")
    if pretrained is None and not random:
        raise ValueError(f"encoder_pretrained must name weights of {name} (or set random_encoder), got None")
    return ImageEncoder(name, pretrained=pretrained)


def build_dataset(config: DataConfig, encoder: ImageEncoder | None) -> PairDataset:
    """Pairs with cached tokens, or with the pixels that ``encoder`` takes."""
    pairs, tokenizer = read_pairs(config.pairs), load_tokenizer(config.tokenizer)
    if encoder is not None:
        root = config.image_root or image_folder(config.pairs)
        return PairDataset(pairs, tokenizer, transform=encoder.transform, image_root=root, max_length=config.max_length)
    return PairDataset(pairs, tokenizer, cache=open_cache(config), max_length=config.max_length)


def open_cache(source: ImageSource) -> FeatureCache:
    """The feature cache of a configuration, which must be of the encoder that it names, if any."""
    expect = {name: value for name in ("encoder", "encoder_pretrained") if (value := getattr(source, name)) is not None}
    return FeatureCache(source.feature_cache, expect=expect)


def build_model(config: ModelConfig) -> Blip2QFormer:
    """A new model, from BERT's weights or from a checkpoint where the configuration names one; prints what was
    found.
    """
    if config.checkpoint is not None and os.path.isdir(config.checkpoint):
        return Blip2QFormer.from_pretrained(config.checkpoint)
    model = Blip2QFormer(config.qformer, embed_dim=config.embed_dim, local_gradients=config.local_gradients)
    if config.bert is not None:
        print(f"BERT weights: {init_from_bert(model, load_checkpoint(config.bert))}")
    if config.checkpoint is not None:
        print(f"checkpoint: {model.load_lavis_state_dict(load_checkpoint(config.checkpoint), strict=False)}")
    return model


def encode_pictures(encoder: ImageEncoder, root: Path, names: Sequence[str], batch_size: int) -> Iterator[Tensor]:
    """Tokens of the pictures ``names`` in ``root``, (batch, tokens, width) on the encoder's device."""
    device = next(encoder.parameters()).device
    for start in tqdm(range(0, len(names), batch_size), unit="batch", disable=None):
        pixels = [read_pixels(root / name, encoder.transform) for name in names[start : start + batch_size]]
        yield encoder(torch.stack(pixels).to(device))


def image_tokens(
    source: ImageSource,
    names: Sequence[str],
    root: Path,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> ImageTokens:
    """Tokens of the images ``names``: of the cache, or of the pictures in ``root``, encoded once and kept on the CPU.

    Args:
        source (ImageSource): says where they come from.
        names (Sequence): keys of the cache, or paths in ``root``.
        root (Path): the folder that the pictures are in.
        batch_size (int): pictures that are encoded at once.
        device, dtype: where and in what the encoder runs.

    Raises:
        ValueError: images that the cache lacks, a picture that can't be read; the message names them.
    """
    if source.feature_cache is not None:
        cache = open_cache(source)
        if missing := [name for name in names if name not in cache]:
            raise ValueError(f"annotations name {len(missing)} images that the feature cache lacks: {missing[:5]}")
        return CachedTokens(cache, names)
    encoder = load_encoder(source.encoder, source.encoder_pretrained, random=source.random_encoder).to(device, dtype)
    out = None
    for number, tokens in enumerate(encode_pictures(encoder, root, names, batch_size)):
        if out is None:
            out = tokens.new_empty(len(names), *tokens.shape[1:], device="cpu")
        first = number * batch_size
        out[first : first + len(tokens)] = tokens
    return out
