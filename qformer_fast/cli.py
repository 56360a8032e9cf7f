"""``qformer-fast``: train, extract-features, demo, explain, doctor, evaluate."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from jsonargparse import ArgumentParser

from qformer_fast import doctor
from qformer_fast.assemble import build_dataset, build_model, encode_pictures, image_tokens, load_encoder
from qformer_fast.config import QFormerConfig
from qformer_fast.data.batches import read_pixels
from qformer_fast.data.captions import clean_caption, image_folder, read_pairs
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.files import write_bytes, write_text
from qformer_fast.data.tokenizer import load_tokenizer, tokenize
from qformer_fast.demo.run import DemoConfig
from qformer_fast.demo.run import main as run_demo
from qformer_fast.evaluation import explain
from qformer_fast.evaluation.karpathy import read_karpathy
from qformer_fast.evaluation.retrieval import IMAGE_BATCH_SIZE, PAIR_BATCH_SIZE, Score
from qformer_fast.evaluation.retrieval import evaluate as evaluate_retrieval
from qformer_fast.training.config import ModelConfig, TrainConfig
from qformer_fast.training.loop import AUTOCAST, check_output_dir, resolve_device, train


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


@dataclass(frozen=True)
class RetrievalConfig:
    """Recall of image-text retrieval on COCO or Flickr30K.

    Args:
        checkpoint (str): a folder of ``save_pretrained``, or a LAVIS file.
        annotations (str): see :func:`qformer_fast.evaluation.karpathy.read_karpathy`.
        split (str): "train", "restval", "val" or "test", of annotations that hold several.
        output (str, Optional): a JSON file for the result.
        qformer (QFormerConfig): sizes of a LAVIS file's model; a folder says its own.
        feature_cache (str, Optional): a folder of :class:`FeatureCache` with the annotations' images. Default: `None`,
            pictures are encoded once and their tokens kept in memory.
        encoder (str, Optional): an open_clip model; needed without a feature cache, and with one what the cache must be
            of.
        encoder_pretrained (str, Optional): its open_clip tag or a file, likewise.
        random_encoder (bool): accept an encoder with random weights.
        image_root (str, Optional): the folder that the images are in. Default: `None`, that of ``annotations``.
        tokenizer (str, Optional): see :func:`qformer_fast.data.tokenizer.load_tokenizer`.
        max_length (int): of captions in tokens.
        k (int): candidates of each image and of each text that ITM scores.
        score (str): "itm+itc", logit plus cosine, or "itm".
        image_batch_size, pair_batch_size (int): images whose keys and values are held, and pairs a pass.
        precision (str): "fp32", or autocast to "bf16".
        device (str): "auto" takes a GPU where there is one.
    """

    checkpoint: str
    annotations: str
    split: str = "test"
    output: str | None = None
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    feature_cache: str | None = None
    encoder: str | None = None
    encoder_pretrained: str | None = None
    random_encoder: bool = False
    image_root: str | None = None
    tokenizer: str | None = None
    max_length: int = 35
    k: int = 128
    score: Score = "itm+itc"
    image_batch_size: int = IMAGE_BATCH_SIZE
    pair_batch_size: int = PAIR_BATCH_SIZE
    precision: Literal["fp32", "bf16"] = "bf16"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("k", "image_batch_size", "pair_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ExplainConfig:
    """Whether a caption fits a picture, and what of the picture says so.

    Args:
        image (str): a picture.
        caption (str): a caption.
        checkpoint (str): a folder of ``save_pretrained``, or a LAVIS file.
        encoder (str): an open_clip model, the one that the checkpoint was trained with.
        encoder_pretrained (str, Optional): its open_clip tag or a file.
        random_encoder (bool): accept an encoder with random weights.
        output (str): a PNG file, the heat map on the picture as the encoder sees it.
        tensors (str, Optional): a safetensors file for the maps "layer.N", see
            :class:`qformer_fast.evaluation.explain.Explanation`, and the heat map "heat".
        method (str): "grad_cam" of the ITM score, or "attention".
        layer (int, Optional): one with cross-attention. Default: `None`, the last is drawn and ``tensors`` has all.
        query (int or str): the query to draw, or "mean" or "max" over all.
        qformer (QFormerConfig): sizes of a LAVIS file's model; a folder says its own.
        tokenizer (str, Optional): see :func:`qformer_fast.data.tokenizer.load_tokenizer`.
        device (str): "auto" takes a GPU where there is one.
    """

    image: str
    caption: str
    checkpoint: str
    encoder: str
    encoder_pretrained: str | None = None
    random_encoder: bool = False
    output: str = "explain.png"
    tensors: str | None = None
    method: explain.Method = "grad_cam"
    layer: int | None = None
    query: explain.Query = "mean"
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    tokenizer: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not clean_caption(self.caption):
            raise ValueError(f"caption must have a word in it, got {self.caption!r}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser, commands = _parsers()
    options = parser.parse_args(arguments)
    command = options.subcommand
    chosen = options[command]
    if command == "evaluate":
        command, chosen = f"evaluate {chosen.subcommand}", chosen[chosen.subcommand]
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
        elif command == "evaluate retrieval":
            _evaluate_retrieval(config)
        elif command == "explain":
            _explain(config)
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
    "explain": (ExplainConfig, "draw what of a picture speaks for a caption"),
    "evaluate retrieval": (RetrievalConfig, "recall at 1, 5 and 10 on a Karpathy split, by ITC and re-ranked by ITM"),
}

POSITIONAL = {"explain": {"image": "a picture", "caption": "a caption"}}


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The program's parser and each command's."""
    parser = ArgumentParser(prog="qformer-fast", description="BLIP-2's Q-Former: training, features, demo.")
    subcommands = parser.add_subcommands()
    commands = {}
    for name, (config, about) in CONFIGS.items():
        commands[name] = ArgumentParser(description=about)
        commands[name].add_argument("--config", action="config", help="a YAML file with the options below")
        commands[name].add_class_arguments(config, skip={"synthetic", *POSITIONAL.get(name, {})})
        for argument, meaning in POSITIONAL.get(name, {}).items():
            commands[name].add_argument(argument, type=str, help=meaning)
        if not name.startswith("evaluate "):
            subcommands.add_subcommand(name, commands[name], help=about)
    commands["demo"].add_argument("--synthetic", action="store_true", help="made-up pictures, no data package needed")
    commands["doctor"] = ArgumentParser(description="versions, devices, and which backend each op uses")
    commands["doctor"].add_argument("--json", action="store_true", help="print JSON")
    subcommands.add_subcommand("doctor", commands["doctor"], help="say what can run here and why not")
    evaluate = ArgumentParser(description="measure a trained model")
    subcommands.add_subcommand("evaluate", evaluate, help="measure a trained model on a public benchmark")
    tasks = evaluate.add_subcommands()
    for name in CONFIGS:
        if name.startswith("evaluate "):
            tasks.add_subcommand(name.removeprefix("evaluate "), commands[name], help=CONFIGS[name][1])
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


def extract_features(config: ExtractConfig) -> FeatureCache:
    """Runs the encoder over every picture once, in the order in which the pairs first name them."""
    keys = list(dict.fromkeys(pair.image for pair in read_pairs(config.pairs)))
    root = Path(config.image_root or image_folder(config.pairs))
    encoder = load_encoder(config.encoder, config.encoder_pretrained, random=config.random_encoder)
    encoder.to(resolve_device(config.device))
    metadata = {"encoder": config.encoder, "encoder_pretrained": config.encoder_pretrained}
    batches = encode_pictures(encoder, root, keys, config.batch_size)
    return FeatureCache.create(config.output, keys, batches, metadata=metadata, dtype=config.dtype)


def _evaluate_retrieval(config: RetrievalConfig) -> None:
    """Prints recall both ways, and writes it to ``config.output``."""
    data = read_karpathy(config.annotations, split=config.split)
    text = tokenize(load_tokenizer(config.tokenizer), data.captions, max_length=config.max_length)
    device = resolve_device(config.device)
    model = build_model(ModelConfig(qformer=config.qformer, checkpoint=config.checkpoint)).to(device).eval()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    names = ("split", "k", "score", "precision", "max_length", "checkpoint", "annotations")
    result: dict[str, Any] = {name: getattr(config, name) for name in names}
    result |= {"images": len(data.images), "captions": len(data.captions)}
    with torch.autocast(device.type, AUTOCAST.get(config.precision), enabled=config.precision in AUTOCAST):
        result |= evaluate_retrieval(
            model,
            image_tokens(
                config,
                data.images,
                Path(config.image_root or Path(config.annotations).parent),
                batch_size=config.image_batch_size,
                device=device,
                dtype=AUTOCAST.get(config.precision),
            ),
            *text,
            data.relevant,
            k=config.k,
            score=config.score,
            image_batch_size=config.image_batch_size,
            pair_batch_size=config.pair_batch_size,
        )
    result["device"] = "cpu"
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(device)
        result["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    print(_recall_table(result))
    if config.output is not None:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=2) + "\n")


def _recall_table(result: dict[str, Any]) -> str:
    lines = [f"{result['images']} images, {result['captions']} captions; recall in percent"]
    lines.append(f"{'':<10}" + "".join(f"{name:>8}" for name in result["itc"]))
    for row in ("itc", "reranked"):
        lines.append(f"{row:<10}" + "".join(f"{value:>8.2f}" for value in result[row].values()))
    memory = f", peak {result['peak_gib']} GiB" if "peak_gib" in result else ""
    lines.append(f"re-ranked {result['pairs']} pairs, {result['pairs_per_second']:.0f} a second{memory}")
    return "\n".join(lines)


def _explain(config: ExplainConfig) -> None:
    """Prints ITM's and ITC's answers, and writes the overlay and the tensors."""
    device = resolve_device(config.device)
    encoder = load_encoder(config.encoder, config.encoder_pretrained, random=config.random_encoder).to(device)
    pixels = read_pixels(config.image, encoder.transform)
    model = build_model(ModelConfig(qformer=config.qformer, checkpoint=config.checkpoint)).to(device).eval()
    text = tokenize(load_tokenizer(config.tokenizer), [clean_caption(config.caption)])
    options = {"method": config.method, "layer": config.layer, "query": config.query}
    found = explain.explain(model, encoder, pixels, *text, **options)
    files = {config.output: explain.png(found.overlay)}
    if config.tensors is not None:
        maps = {f"layer.{layer}": x.contiguous() for layer, x in found.maps.items()}
        files[config.tensors] = safetensors.torch.save(maps | {"heat": found.heat})
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(Path(name), content)
    print(f"match {found.match_probability:.4f} (ITM), cosine {found.cosine:.4f} (ITC)")
    print(f"{config.method}, layer {found.layer}, query {config.query}: {config.output}")


if __name__ == "__main__":
    sys.exit(main())
