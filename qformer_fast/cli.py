"""``qformer-fast``: train, extract-features, demo, explain, doctor, evaluate."""

from __future__ import annotations

import functools
import json
import sys
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from qformer_fast import doctor
from qformer_fast.assemble import (
    ENCODER_FIELDS,
    build_dataset,
    build_model,
    encode_pictures,
    source_encoder,
)
from qformer_fast.config import QFormerConfig
from qformer_fast.data.bad import BadData, OnBad
from qformer_fast.data.captions import clean_caption
from qformer_fast.data.examples import read_any
from qformer_fast.data.extraction import extract
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.files import write_bytes, write_text
from qformer_fast.data.pictures import PictureBatches, read_pixels
from qformer_fast.data.sources import keep_present, read_mixture
from qformer_fast.data.tokenizer import load_tokenizer, tokenize
from qformer_fast.demo.config import TASKS, DemoConfig
from qformer_fast.demo.run import main as run_demo
from qformer_fast.evaluation import explain
from qformer_fast.evaluation.commands import EVALUATIONS
from qformer_fast.presets import find_preset, preset_names
from qformer_fast.ranks import RankError, Ranks, process_group
from qformer_fast.training.config import ModelConfig, TrainConfig
from qformer_fast.training.loop import check_output_dir, resolve_device, train


@dataclass(frozen=True)
class ExtractConfig:
    """Image tokens of all pictures of a data set into a feature cache.

    An extraction that was interrupted goes on with the same options; under torchrun each process does its share.

    Args:
        pairs (list or str): a JSON list, a folder of pictures or tar shards, see
            :func:`qformer_fast.data.examples.read_examples`; or several, see
            :func:`qformer_fast.data.sources.read_mixture`.
        output (str): the cache's folder, made new, or that of an extraction to go on with.
        encoder (str): an open_clip model.
        encoder_pretrained (str, Optional): its open_clip tag or a file.
        image_root (str, Optional): the folder that the pairs' images are in, but for those in tars. Default: `None`,
            that of ``pairs``.
        random_encoder (bool): accept an encoder with random weights.
        image_size (int, Optional): pictures' rows and columns. Default: `None`, the encoder's own.
        batch_size (int): pictures at once.
        shard_images (int): pictures a shard; what is done is kept in whole shards.
        num_workers (int): processes that read pictures, for each that encodes them.
        on_bad (str): "refuse" ends at bad data, before the first picture where they can be seen then; "skip" goes on
            without them, counts them and says so. See :class:`qformer_fast.training.config.DataConfig`.
        dtype (str): "float16", "bfloat16" or "float32" as stored, or "int8" with a scale a token.
        device (str): "auto" takes a GPU where there is one; under torchrun each process its own.
    """

    pairs: list[str] | str
    output: str
    encoder: str
    encoder_pretrained: str | None = None
    random_encoder: bool = False
    image_size: int | None = None
    image_root: str | None = None
    batch_size: int = 32
    shard_images: int = 4096
    num_workers: int = 0
    on_bad: OnBad = "refuse"
    dtype: str = "float16"
    device: str = "auto"


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
        image_size (int, Optional): the picture's rows and columns. Default: `None`, the encoder's own.
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
    image_size: int | None = None
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
        elif command.startswith("evaluate "):
            EVALUATIONS[command.removeprefix("evaluate ")][1](config)
        elif command == "explain":
            _explain(config)
        else:
            run_demo(config)
    except (ValueError, OSError, ImportError, FloatingPointError, RankError) as error:
        print(f"qformer-fast {command}: {error}", file=sys.stderr)
        return 1
    return 0


JOIN_SECONDS = 600.0

CONFIGS = {
    "train": (TrainConfig, "train stage 1, stage 2 or both, or fine-tune"),
    "extract-features": (ExtractConfig, "write the image tokens of a data set to a cache"),
    "demo": (DemoConfig, "train and evaluate on real pictures from packages, and write a report"),
    "explain": (ExplainConfig, "draw what of a picture speaks for a caption"),
    **{f"evaluate {name}": (config, about) for name, (config, _, about) in EVALUATIONS.items()},
}

POSITIONAL = {"explain": {"image": "a picture", "caption": "a caption"}}


def _config_help(command: str) -> str:
    kind = command.split(" ")[0]
    names = [name for name in preset_names() if name.startswith("evaluate_") == (kind == "evaluate")]
    about = "a YAML file with the options below"
    return f"{about}, or a preset: {', '.join(names)}" if kind in ("train", "evaluate") else about


class _ConfigOrPreset(ActionConfigFile):
    """``--config``: a YAML file, or the name of a preset.

    Options that the command lacks are refused here: jsonargparse's message is lost below a second subcommand.
    """

    def __call__(self, parser: ArgumentParser, cfg: Namespace, values: str, option_string: str | None = None) -> None:
        try:
            path = find_preset(values)
        except ValueError as error:
            raise ArgumentError(self, str(error)) from error
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ArgumentError(self, f"{path} is no YAML: {error}") from error
        if unknown := _unknown_options(content, parser.get_defaults()):
            raise ArgumentError(self, f"{path} has options that this command lacks: {unknown}")
        super().__call__(parser, cfg, str(path), option_string)


def _unknown_options(content: object, known: object) -> list[str]:
    """Keys of nested mappings that ``known`` lacks, with dots between."""
    if not isinstance(content, dict) or not isinstance(known, Namespace):
        return []
    unknown = [key for key in content if key not in known]
    for key in content.keys() - unknown:
        unknown += [f"{key}.{name}" for name in _unknown_options(content[key], known[key])]
    return unknown


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The program's parser and each command's."""
    parser = ArgumentParser(prog="qformer-fast", description="BLIP-2's Q-Former: training, features, demo.")
    subcommands = parser.add_subcommands()
    commands = {}
    for name, (config, about) in CONFIGS.items():
        commands[name] = ArgumentParser(description=about)
        commands[name].add_argument("--config", action=_ConfigOrPreset, help=_config_help(name))
        commands[name].add_class_arguments(config, skip={"synthetic", "tasks", *POSITIONAL.get(name, {})})
        for argument, meaning in POSITIONAL.get(name, {}).items():
            commands[name].add_argument(argument, type=str, help=meaning)
        if not name.startswith("evaluate "):
            subcommands.add_subcommand(name, commands[name], help=about)
    about = "what to run; all by default on a GPU, stage1 on a CPU"
    commands["demo"].add_argument("--tasks", nargs="+", choices=TASKS, help=about)
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
    with process_group(config.run.timeout) as ranks:
        _train_on(ranks, config, used)


def _train_on(ranks: Ranks, config: TrainConfig, used: str) -> None:
    check_output_dir(config.run)
    encoder = source_encoder(config.data) if config.data.feature_cache is None else None
    dataset = build_dataset(config.data, encoder, config.language)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, config.language)
    output_dir = Path(config.run.output_dir)
    if ranks.first:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(output_dir / "config.yaml", used)
    entries = train(model, dataset, config.run, config.optimizer, encoder=encoder, num_workers=config.data.num_workers)
    if entries:
        print(json.dumps(entries[-1]))


def extract_features(config: ExtractConfig) -> FeatureCache | None:
    """Runs the encoder over every picture once, in the order in which the pairs first name them, and prints what was
    skipped and whether the cache is whole; `None` where other processes have not done their share yet.
    """
    bad = BadData(config.on_bad)
    paths = [config.pairs] if isinstance(config.pairs, str) else config.pairs
    read = functools.partial(read_any, bad=bad, num_workers=config.num_workers)
    mixture = keep_present(read_mixture(paths, read, image_root=config.image_root, bad=bad), bad)
    keys = list(mixture.members)
    metadata = {name: getattr(config, name) for name in ENCODER_FIELDS}
    with process_group(JOIN_SECONDS) as ranks:
        encoder = source_encoder(config).to(resolve_device(config.device))
        pictures = PictureBatches(mixture.root, encoder.transform, mixture.members)
        cache = extract(
            config.output,
            keys,
            lambda lists: encode_pictures(encoder, pictures, lists, num_workers=config.num_workers, bad=bad),
            metadata=metadata,
            dtype=config.dtype,
            shard_images=config.shard_images,
            batch_size=config.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            bad=bad,
        )
    if bad.counts:
        print(bad.summary())
    if cache is not None:
        print(f"{config.output}: {len(cache)} of {len(keys)} pictures in {len(cache.shards)} shards")
    return cache


def _explain(config: ExplainConfig) -> None:
    """Prints ITM's and ITC's answers, and writes the overlay and the tensors."""
    device = resolve_device(config.device)
    encoder = source_encoder(config).to(device)
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
