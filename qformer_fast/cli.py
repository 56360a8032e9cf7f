"""``qformer-fast``: train, extract-features, demo, doctor."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

from qformer_fast import doctor
from qformer_fast.data.batches import PairDataset, read_pixels
from qformer_fast.data.captions import image_folder, read_pairs
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.files import write_text
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.demo.run import DemoConfig
from qformer_fast.demo.run import main as run_demo
from qformer_fast.integrations.checkpoints import load_checkpoint
from qformer_fast.models.blip2 import ImageEncoder
from qformer_fast.models.blip2_qformer import Blip2QFormer, init_from_bert
from qformer_fast.training.config import DataConfig, ModelConfig, TrainConfig
from qformer_fast.training.loop import check_output_dir, resolve_device, train


@dataclass(frozen=True)
class ExtractConfig:
    """Image tokens of all pictures of a data set into a feature cache.

    Args:
        pairs (str): a JSON list or a folder of pictures, see :func:`qformer_fast.data.captions.read_pairs`.
        output (str): the cache's folder, made new.
        encoder (str): an open_clip model.
        encoder_pretrained (str, Optional): its open_clip tag or a file.
        image_root (str, Optional): the folder that the pairs' images are in. Default: `None`, that of ``pairs``.
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
    image_root: str | None = None
    batch_size: int = 32
    dtype: str = "float16"
    device: str = "auto"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser, commands = _parsers()
    options = parser.parse_args(arguments)
    command = options.subcommand
    chosen = options[command]
    if command == "doctor":
        found = doctor.report()
        print(json.dumps(found, indent=2) if chosen.json else doctor.as_text(found))
        return 0
    chosen.pop("config")
    try:
        config = CONFIGS[command][0](**vars(commands[command].instantiate(chosen)))
        if command == "train":
            _train(config, commands[command].dump(chosen))
        elif command == "extract-features":
            extract_features(config)
        else:
            run_demo(config)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"qformer-fast {command}: {error}", file=sys.stderr)
        return 1
    return 0


CONFIGS = {
    "train": (TrainConfig, "train stage 1"),
    "extract-features": (ExtractConfig, "write the image tokens of a data set to a cache"),
    "demo": (DemoConfig, "train and evaluate on real pictures from packages, and write a report"),
}


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The program's parser and each command's."""
    parser = ArgumentParser(prog="qformer-fast", description="BLIP-2's Q-Former: training, features, demo.")
    subcommands = parser.add_subcommands()
    commands = {}
    for name, (config, about) in CONFIGS.items():
        commands[name] = ArgumentParser(description=about)
        commands[name].add_argument("--config", action="config", help="a YAML file with the options below")
        commands[name].add_class_arguments(config, skip={"synthetic"})
        subcommands.add_subcommand(name, commands[name], help=about)
    commands["demo"].add_argument("--synthetic", action="store_true", help="made-up pictures, no data package needed")
    commands["doctor"] = ArgumentParser(description="versions, devices, and which backend each op uses")
    commands["doctor"].add_argument("--json", action="store_true", help="print JSON")
    subcommands.add_subcommand("doctor", commands["doctor"], help="say what can run here and why not")
    return parser, commands


def _train(config: TrainConfig, used: str) -> None:
    """Trains, with the options in use kept as ``config.yaml``, which ``train --config`` takes."""
    check_output_dir(config.run)
    encoder = None
    if config.data.feature_cache is None:
        encoder = load_encoder(config.data.encoder, config.data.encoder_pretrained, random=config.data.random_encoder)
    dataset = build_dataset(config.data, encoder)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model)
    output_dir = Path(config.run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "config.yaml", used)
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
        root = config.image_root or image_folder(config.pairs)
        return PairDataset(pairs, tokenizer, transform=encoder.transform, image_root=root, max_length=config.max_length)
    expect = {name: value for name in ("encoder", "encoder_pretrained") if (value := getattr(config, name)) is not None}
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
    keys = list(dict.fromkeys(pair.image for pair in read_pairs(config.pairs)))
    root = Path(config.image_root or image_folder(config.pairs))
    encoder = load_encoder(config.encoder, config.encoder_pretrained, random=config.random_encoder)
    device = resolve_device(config.device)
    encoder.to(device)

    def batches() -> Iterator[Tensor]:
        for start in tqdm(range(0, len(keys), config.batch_size), unit="batch", disable=None):
            names = keys[start : start + config.batch_size]
            yield encoder(torch.stack([read_pixels(root / name, encoder.transform) for name in names]).to(device))

    metadata = {"encoder": config.encoder, "encoder_pretrained": config.encoder_pretrained}
    return FeatureCache.create(config.output, keys, batches(), metadata=metadata, dtype=config.dtype)


if __name__ == "__main__":
    sys.exit(main())
