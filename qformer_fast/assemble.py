"""What configurations name, made: encoders, feature caches, data sets and models."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import cached_file

from qformer_fast.config import QFormerConfig
from qformer_fast.data.bad import BadData
from qformer_fast.data.batches import LanguageDataset, PairDataset
from qformer_fast.data.captions import read_pairs
from qformer_fast.data.examples import read_examples
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.files import check_folder_or_id, read_json
from qformer_fast.data.joined import JoinedCaches
from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.data.pictures import PictureBatches, read_pixels
from qformer_fast.data.sources import keep_known, keep_present, keep_readable, read_mixture
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.evaluation.retrieval import CachedTokens, ImageTokens
from qformer_fast.integrations.checkpoints import load_checkpoint, load_into
from qformer_fast.models.blip2 import ImageEncoder
from qformer_fast.models.blip2_joint import Blip2Joint
from qformer_fast.models.blip2_opt import Blip2OPT
from qformer_fast.models.blip2_qformer import Blip2QFormer, init_from_bert
from qformer_fast.models.language import load_language_model
from qformer_fast.ranks import Ranks
from qformer_fast.training.config import DataConfig, LanguageConfig, ModelConfig

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
LANGUAGE_PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")
HF_GENERATORS = ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration")
ENCODER_FIELDS = ("encoder", "encoder_pretrained", "image_size")


class EncoderSource(Protocol):
    """The image encoder that a configuration names."""

    encoder: str | None
    encoder_pretrained: str | None
    random_encoder: bool
    image_size: int | None


class ImageSource(EncoderSource, Protocol):
    """Where a configuration says that image tokens come from: a feature cache, or the encoder over pictures."""

    feature_cache: str | None


def load_encoder(
    name: str | None, pretrained: str | None, *, random: bool, image_size: int | None = None
) -> ImageEncoder:
    """The frozen image encoder of a configuration.

    Raises:
        ValueError: no encoder named, or one without weights although random ones were not asked for.
    """
    if name is None:
        raise ValueError("encoder must name an open_clip model when there is no feature_cache, got None")
    if pretrained is None and not random:
        raise ValueError(f"encoder_pretrained must name weights of {name} (or set random_encoder), got None")
    return ImageEncoder(name, pretrained=pretrained, image_size=image_size)


def source_encoder(source: EncoderSource) -> ImageEncoder:
    """:func:`load_encoder` of a configuration."""
    return load_encoder(
        source.encoder, source.encoder_pretrained, random=source.random_encoder, image_size=source.image_size
    )


def build_dataset(
    config: DataConfig, encoder: ImageEncoder | None, language: LanguageConfig | None = None
) -> PairDataset | LanguageDataset:
    """Pairs, or with ``language`` examples, with cached tokens or with the pixels that ``encoder`` takes; prints which
    bad data were skipped. Ranks of a process group all call this, and share the search for damage.
    """
    bad, ranks = BadData(config.on_bad), Ranks.current()
    read = read_pairs if language is None else functools.partial(read_examples, prompt=language.prompt)
    paths = [config.pairs] if isinstance(config.pairs, str) else config.pairs
    read = functools.partial(read, bad=bad, num_workers=config.num_workers)
    mixture = read_mixture(paths, read, image_root=config.image_root, bad=bad)
    if encoder is None:
        cache = _open_caches(config, mixture.prefixes, bad, ranks)
        mixture = keep_known(mixture, cache, bad)
        images = {"cache": cache}
    else:
        mixture = keep_present(mixture, bad, ranks)
        if bad.skips:
            mixture = keep_readable(mixture, bad, config.num_workers, ranks)
        images = {"transform": encoder.transform, "image_root": mixture.root}
    if language is None:
        dataset = PairDataset(mixture.rows, load_tokenizer(config.tokenizer), **images, max_length=config.max_length)
    else:
        tokenizer = load_tokenizer(config.tokenizer) if language.qformer_prompts or language.joint else None
        dataset = LanguageDataset(
            mixture.rows,
            LanguageTokenizer.from_pretrained(language.model, max_length=language.max_length),
            **images,
            qformer_tokenizer=tokenizer if language.qformer_prompts else None,
            qformer_max_length=config.max_length,
            captions_tokenizer=tokenizer if language.joint else None,
        )
    dataset.skipped = dict(bad.counts)
    if bad.counts and ranks.first:
        print(bad.summary())
    return dataset


def open_cache(source: ImageSource) -> FeatureCache:
    """The feature cache of a configuration, which must be of the encoder that it names, if any."""
    return FeatureCache(source.feature_cache, expect=_expected(source))


def _expected(source: EncoderSource) -> dict[str, Any]:
    return {name: value for name in ENCODER_FIELDS if (value := getattr(source, name)) is not None}


def _open_caches(
    config: DataConfig, prefixes: Sequence[str], bad: BadData, ranks: Ranks
) -> FeatureCache | JoinedCaches:
    """One cache for all sources, or one each."""
    folders, options = config.feature_cache, {"expect": _expected(config), "bad": bad, "ranks": ranks}
    if isinstance(folders, str):
        return FeatureCache(folders, **options)
    if len(folders) != len(prefixes):
        raise ValueError(f"data.feature_cache must be one or {len(prefixes)}, one for each pairs, got {len(folders)}")
    return JoinedCaches([FeatureCache(folder, **options) for folder in folders], prefixes)


def build_model(config: ModelConfig, language: LanguageConfig | None = None) -> Blip2QFormer | Blip2OPT | Blip2Joint:
    """A model of stage 1, with ``language`` of stage 2 or of both, from BERT's weights or from a checkpoint where the
    configuration names one; prints what was found.

    Raises:
        ValueError: a checkpoint that does not fit, or lacks what ``language`` asks for.
    """
    if language is None:
        return _build_stage1(config)
    language_model = load_language_model(language.model, language.dtype)
    source = _build_source(config, language_model)
    options = {"language_model": language_model, "language_model_dropout": language.dropout}
    if not language.joint:
        if language.keep_text and not source.config.use_qformer_text_input:
            raise ValueError(f"language.keep_text must be False, {config.checkpoint} has no text branch; got True")
        return Blip2OPT.from_stage1(source, keep_text=language.keep_text, **options)
    if isinstance(source, Blip2OPT):
        raise ValueError(f"language.joint must be False, {config.checkpoint} has no heads of stage 1; got True")
    model = Blip2Joint(source.config, **(source.init_options() | options))
    load_into(model, source.state_dict(), strict=False)
    return model


def _build_source(config: ModelConfig, language_model: PreTrainedModel) -> Blip2QFormer | Blip2OPT | Blip2Joint:
    """What a model with a language model starts from: the checkpoint's own kind, or a new model of stage 1."""
    checkpoint = config.checkpoint
    if checkpoint is None:
        return _build_stage1(config)
    if is_file(checkpoint):
        weights = load_checkpoint(checkpoint)
        if _has_projection(weights):
            return _stage2_of_lavis(checkpoint, weights, language_model, config.qformer)
        return _build_stage1(config, weights)
    saved = saved_class(checkpoint)
    if saved == Blip2Joint.__name__:
        return Blip2Joint.from_pretrained(checkpoint, language_model=language_model)
    if saved == Blip2OPT.__name__ or saved in HF_GENERATORS:
        return build_generator(checkpoint, language_model=language_model)
    return _build_stage1(config)


def _build_stage1(config: ModelConfig, weights: Mapping[str, Tensor] | None = None) -> Blip2QFormer:
    """A model of stage 1; ``weights`` are those of the LAVIS file that it starts from, if they were read already."""
    if config.checkpoint is not None and not is_file(config.checkpoint):
        if (saved := saved_class(config.checkpoint)) in HF_GENERATORS:
            raise ValueError(f"checkpoint must be of stage 1, got {config.checkpoint}, a {saved}")
        return Blip2QFormer.from_pretrained(config.checkpoint)
    model = Blip2QFormer(config.qformer, embed_dim=config.embed_dim, local_gradients=config.local_gradients)
    if config.bert is not None:
        print(f"BERT weights: {init_from_bert(model, load_checkpoint(config.bert))}")
    if config.checkpoint is not None:
        weights = load_checkpoint(config.checkpoint) if weights is None else weights
        print(f"checkpoint: {model.load_lavis_state_dict(weights, strict=False)}")
    return model


def encode_pictures(
    encoder: ImageEncoder,
    pictures: PictureBatches,
    lists: Sequence[Sequence[str]],
    *,
    num_workers: int = 0,
    bad: BadData | None = None,
) -> Iterator[tuple[list[str], Tensor]]:
    """Of each list of names those whose pictures can be read, and their tokens (pictures, tokens, width) on the
    encoder's device.

    Args:
        encoder (ImageEncoder): on its device.
        pictures (PictureBatches): through the encoder's transform.
        lists (Sequence): of names, a batch each.
        num_workers (int): processes that read pictures. Default: 0.
        bad (BadData, Optional): what is done with pictures that can't be read. Default: `None`, they are refused.

    Raises:
        ValueError: a picture that can't be read and is refused; the message names it.
    """
    bad, device = bad or BadData(), next(encoder.parameters()).device
    for names, pixels, problems in tqdm(pictures.loader(lists, num_workers), unit="batch", disable=None):
        for problem in problems:
            bad.found("unreadable_picture", problem)
        yield names, encoder(pixels.to(device)) if names else pixels


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
        return CachedTokens(_cache_of(source, names), names)
    encoder = source_encoder(source).to(device, dtype)
    out = None
    lists = [names[start : start + batch_size] for start in range(0, len(names), batch_size)]
    pictures = PictureBatches(root, encoder.transform)
    for number, (_, tokens) in enumerate(encode_pictures(encoder, pictures, lists)):
        if out is None:
            out = tokens.new_empty(len(names), *tokens.shape[1:], device="cpu")
        first = number * batch_size
        out[first : first + len(tokens)] = tokens
    return out


def token_reader(
    source: ImageSource,
    names: Sequence[str],
    root: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Callable[[Sequence[str]], Tensor]:
    """As :func:`image_tokens`, for data sets whose tokens fill no memory: a function that reads the tokens (images,
    tokens, width) of some of ``names``, or encodes their pictures, each time that it is called.

    Raises:
        ValueError: images that the cache or the folder lacks; the message names them.
    """
    if source.feature_cache is not None:
        return _cache_of(source, names).rows
    if missing := [name for name in names if not (root / name).is_file()]:
        raise ValueError(f"annotations name {len(missing)} images that are not in {root}: {missing[:5]}")
    return functools.partial(_encode, source_encoder(source).to(device, dtype), root)


def build_generator(
    checkpoint: str, *, language_model: PreTrainedModel | str | None = None, qformer: QFormerConfig | None = None
) -> Blip2OPT | Blip2QFormer:
    """A trained model that writes text about images, in eval mode: of stage 2, or of stage 1, whose text branch does.

    Args:
        checkpoint (str): a folder of ``save_pretrained`` (of :class:`Blip2Joint` the language model writes), a folder
            or a hub id of Hugging Face's BLIP-2 or InstructBLIP, or a LAVIS file.
        language_model (PreTrainedModel or str, Optional): itself, a folder or a hub id. Default: `None`, the one that
            the checkpoint names or holds; a LAVIS file does neither.
        qformer (QFormerConfig, Optional): sizes of a LAVIS file's model; the file says whether it has a text branch.
            Default: `None`, BLIP-2's.

    Raises:
        FileNotFoundError: nothing there. ValueError: a checkpoint that does not fit, no language model where one is
            needed, one where none can be taken.
    """
    if is_file(checkpoint):
        return _generator_of_file(checkpoint, language_model, qformer or QFormerConfig())
    saved = saved_class(checkpoint)
    if saved in HF_GENERATORS:
        return Blip2OPT.from_pretrained(checkpoint, language_model=language_model)
    if saved in (Blip2OPT.__name__, Blip2Joint.__name__):
        named = read_json(Path(checkpoint) / "config.json", "checkpoint")["language_model"]
        if language_model is None and named is None:
            raise ValueError(f"language_model must be given, since {checkpoint} does not name its own, got None")
        kind = Blip2OPT if saved == Blip2OPT.__name__ else Blip2Joint
        model = kind.from_pretrained(checkpoint, language_model=language_model or named)
        return model if kind is Blip2OPT else Blip2OPT.from_stage1(model, model.language_projection.language_model)
    if saved != Blip2QFormer.__name__:
        kinds = (Blip2OPT.__name__, Blip2Joint.__name__, Blip2QFormer.__name__, *HF_GENERATORS)
        raise ValueError(f"checkpoint must be of one of {kinds}, which write text, got {checkpoint}, a {saved}")
    if language_model is not None:
        raise ValueError(f"language_model must be left out for {checkpoint}, a {saved}, got {language_model!r}")
    return Blip2QFormer.from_pretrained(checkpoint)


def is_file(checkpoint: str) -> bool:
    """Whether a checkpoint is meant to be a LAVIS file, and not a folder or a hub id."""
    return checkpoint.endswith(CHECKPOINT_SUFFIXES) or os.path.isfile(checkpoint)


def saved_class(checkpoint: str) -> str:
    """The name of the class that a folder's or a hub id's ``config.json`` tells.

    Raises:
        OSError: nothing there. ValueError: no JSON.
    """
    check_folder_or_id(checkpoint, "checkpoint")
    content = read_json(cached_file(checkpoint, "config.json"), "checkpoint")
    if content.get("model_type") == "qformer_fast":
        return content["class"]
    return (content.get("architectures") or ["model of no known class"])[0]


def _generator_of_file(
    path: str, language_model: PreTrainedModel | str | None, qformer: QFormerConfig
) -> Blip2OPT | Blip2QFormer:
    weights = load_checkpoint(path)
    if _has_projection(weights):
        return _stage2_of_lavis(path, weights, language_model, qformer)
    if language_model is not None:
        raise ValueError(f"checkpoint must hold one of {LANGUAGE_PROJECTIONS} for a language_model, {path} does not")
    return _build_stage1(ModelConfig(qformer=qformer, checkpoint=path), weights).eval()


def _stage2_of_lavis(
    path: str, weights: Mapping[str, Tensor], language_model: PreTrainedModel | str | None, qformer: QFormerConfig
) -> Blip2OPT:
    """The model of a LAVIS file's ``weights``; ``path`` is for errors."""
    if language_model is None:
        raise ValueError(f"language_model must be given, since {path} does not name its own, got None")
    config = dataclasses.replace(
        qformer, use_qformer_text_input="Qformer.bert.embeddings.word_embeddings.weight" in weights
    )
    # InstructBLIP's texts end as its language model's do (LAVIS's blip2_vicuna_instruct.py)
    end = "" if "llm_proj.weight" in weights else "\n"
    model = Blip2OPT(config, language_model, text_end=end).eval()
    report = model.load_lavis_state_dict(weights, strict=False)
    if report.missing:
        raise ValueError(f"checkpoint {path} must hold the whole Q-Former: {report}")
    print(f"checkpoint: {report}")
    return model


def _has_projection(weights: Mapping[str, Tensor]) -> bool:
    """Whether a LAVIS file is of stage 2."""
    return any(name.endswith("_proj.weight") and name.startswith(LANGUAGE_PROJECTIONS) for name in weights)


def _cache_of(source: ImageSource, names: Sequence[str]) -> FeatureCache:
    """The feature cache, which must have the images ``names``."""
    cache = open_cache(source)
    if missing := [name for name in names if name not in cache]:
        raise ValueError(f"annotations name {len(missing)} images that the feature cache lacks: {missing[:5]}")
    return cache


def _encode(encoder: ImageEncoder, root: Path, names: Sequence[str]) -> Tensor:
    pixels = torch.stack([read_pixels(root / name, encoder.transform) for name in names])
    return encoder(pixels.to(next(encoder.parameters()).device))
