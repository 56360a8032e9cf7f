"""``qformer-fast``: train, extract-features, demo, doctor."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from qformer_fast import doctor
from qformer_fast.data.batches import PairDataset
from qformer_fast.data.captions import read_pairs
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.demo.run import DemoConfig
from qformer_fast.demo.run import main as run_demo
from qformer_fast.integrations.checkpoints import load_checkpoint
from qformer_fast.models.blip2 import ImageEncoder
from qformer_fast.models.blip2_qformer import Blip2QFormer, init_from_bert
from qformer_fast.training.config import DataConfig, ModelConfig, TrainConfig
from qformer_fast.training.loop import resolve_device, train


@dataclass(frozen=True)
class ExtractConfig:
    """Image tokens of all pictures of a data set into a feature cache.

    Args:
        pairs (str): a JSON list or a folder of pictures, see :func:`qformer_fast.data.captions.read_pairs`.
        output (str): the cache's folder, made new.
        encoder (str): an open_clip model.
        encoder_pretrained (str, Optional): its open_clip tag or a file.
        random_encoder (bool): accept an encoder with random weights.
        batch_size (int): pictures at once.
        dtype (str): "float16", "bfloat16" or "float32", as stored.
        device (str): "auto" takes a GPU where there is one.
    """

    pairs: str
    output: str
    encoder: str
    encoder_pretrained: str | None = None
    random_encoder: bool = False
    batch_size: int = 32
    dtype: str = "float16"
    device: str = "auto"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command = options.subcommand
    if command == "doctor":
        found = doctor.report()
        print(json.dumps(found, indent=2) if options.doctor.json else doctor.as_text(found))
        return 0
    chosen = parser.instantiate_classes(options)[command]
    try:
        if command == "train":
            _train(_dataclass(TrainConfig, chosen), parser, options)
        elif command == "extract-features":
            extract_features(_dataclass(ExtractConfig, chosen))
        else:
            run_demo(_dataclass(DemoConfig, chosen))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"qformer-fast {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="qformer-fast", description="BLIP-2's Q-Former: training, features, demo.")
    commands = parser.add_subcommands()
    for name, config, about in (
        ("train", TrainConfig, "train stage 1"),
        ("extract-features", ExtractConfig, "write the image tokens of a data set to a cache"),
        ("demo", DemoConfig, "train and evaluate on real pictures from packages, and write a report"),
    ):
        command = ArgumentParser(description=about)
        command.add_argument("--config", action="config", help="a YAML file with the options below")
        command.add_class_arguments(config)
        commands.add_subcommand(name, command, help=about)
    command = ArgumentParser(description="versions, devices, and which backend each op uses")
    command.add_argument("--json", action="store_true", help="print JSON")
    commands.add_subcommand("doctor", command, help="say what can run here and why not")
    return parser


def _dataclass(cls: type, options: Namespace):
    return cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__})


def _train(config: TrainConfig, parser: ArgumentParser, options: Namespace) -> None:
    encoder = None
    if config.data.feature_cache is None:
        encoder = load_encoder(config.data.encoder, config.data.encoder_pretrained, random=config.data.random_encoder)
    dataset = build_dataset(config.data, encoder)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model)
    output_dir = Path(config.run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.yaml").write_text(parser.dump(options), encoding="utf-8")
    entries = train(model, dataset, config.run, config.optimizer, encoder=encoder, num_workers=config.data.num_workers)
    if entries:
        print(json.dumps(entries[-1]))


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
        return PairDataset(pairs, tokenizer, transform=encoder.transform, max_length=config.max_length)
    expect = {"encoder": config.encoder} if config.encoder else None
    cache = FeatureCache(config.feature_cache, expect=expect)
    return PairDataset(pairs, tokenizer, cache=cache, max_length=config.max_length)


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


def extract_features(config: ExtractConfig) -> FeatureCache:
    """Runs the encoder over every picture once, in the order in which the pairs first name them."""
    encoder = load_encoder(config.encoder, config.encoder_pretrained, random=config.random_encoder)
    device = resolve_device(config.device)
    encoder.to(device)
    keys = list(dict.fromkeys(pair.image for pair in read_pairs(config.pairs)))

    def batches() -> Iterator[Tensor]:
        for start in tqdm(range(0, len(keys), config.batch_size), unit="batch", disable=None):
            pixels = []
            for path in keys[start : start + config.batch_size]:
                with Image.open(path) as image:
                    pixels.append(encoder.transform(image.convert("RGB")))
            yield encoder(torch.stack(pixels).to(device))

    metadata = {"encoder": config.encoder, "encoder_pretrained": config.encoder_pretrained}
    return FeatureCache.create(config.output, keys, batches(), metadata=metadata, dtype=config.dtype)


if __name__ == "__main__":
    sys.exit(main())
