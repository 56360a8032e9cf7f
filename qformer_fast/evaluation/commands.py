"""``qformer-fast evaluate``: captions, answers and retrieval of a trained model on public benchmarks."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qformer_fast.assemble import (
    build_generator,
    build_model,
    image_tokens,
    saved_class,
    token_reader,
)
from qformer_fast.config import QFormerConfig
from qformer_fast.data.captions import clean_question
from qformer_fast.data.files import CHECKSUMS, crc32, write_text
from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.data.tokenizer import load_tokenizer, tokenize
from qformer_fast.evaluation import captioning, vqa
from qformer_fast.evaluation._json import Id
from qformer_fast.evaluation.generated import (
    Generate,
    ReadTokens,
    Request,
    generate_after_prompts,
    generate_all,
    generate_captions,
)
from qformer_fast.evaluation.journal import Journal
from qformer_fast.evaluation.karpathy import read_karpathy
from qformer_fast.evaluation.retrieval import IMAGE_BATCH_SIZE, PAIR_BATCH_SIZE, Score
from qformer_fast.evaluation.retrieval import evaluate as measure_retrieval
from qformer_fast.integrations.checkpoints import checksum
from qformer_fast.models.blip2_joint import Blip2Joint
from qformer_fast.models.blip2_opt import Blip2OPT
from qformer_fast.models.blip2_qformer import Blip2QFormer
from qformer_fast.training.config import ModelConfig
from qformer_fast.training.loop import AUTOCAST, resolve_device

TEXTS = "texts.jsonl"
LOGITS = "logits.jsonl"
CAPTION_PROMPT = "a photo of"
# where the pictures of questions with a number are, and of those with a name
IMAGE_PATTERNS = {int: "COCO_val2014_{:012d}.jpg", str: "{}.jpg"}
# fields that only say where something is, and such whose part in the texts enters in another form
NO_SETTINGS = {
    *("checkpoint", "output", "language_model", "qformer", "feature_cache", "tokenizer", "device"),
    *("end", "qformer_prompts"),
    *("annotations", "split", "questions", "format", "image_pattern"),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """A model that writes text about images, and how.

    Args:
        checkpoint (str): a folder of ``save_pretrained``, a folder or a hub id of Hugging Face's BLIP-2 or
            InstructBLIP, or a LAVIS file.
        output (str): a folder for texts, metrics and the values of each text. A run that was interrupted goes on in it.
        language_model (str, Optional): a folder or a hub id, with its tokenizer. Default: `None`, the one that the
            checkpoint names or holds; a LAVIS file does neither.
        end (str, Optional): what a causal language model's texts end with, "" for its own end. Default: `None`, what
            the checkpoint says: a new line, InstructBLIP's language model's own end, or what it was trained with here.
        qformer (QFormerConfig): sizes of a LAVIS file's model; others say their own.
        feature_cache (str, Optional): a folder of :class:`FeatureCache` with the images. Default: `None`, pictures are
            encoded as they come.
        encoder (str, Optional): an open_clip model; needed without a feature cache, and with one what the cache must be
            of.
        encoder_pretrained (str, Optional): its open_clip tag or a file, likewise.
        random_encoder (bool): accept an encoder with random weights.
        image_size (int, Optional): pictures' rows and columns. Default: `None`, the encoder's own.
        image_root (str, Optional): the folder that the images are in. Default: `None`, that of the annotations or
            questions.
        qformer_prompts (bool, Optional): the Q-Former reads the prompts too. Default: `None`, what the checkpoint says:
            InstructBLIP's does, and one that was trained so here.
        qformer_max_length (int): of prompts for the Q-Former in BERT's tokens; longer ones lose their beginning.
        tokenizer (str, Optional): of the Q-Former's text, see :func:`qformer_fast.data.tokenizer.load_tokenizer`.
        num_beams (int): of beam search; 1 takes the best token each time.
        length_penalty (float): beams are ranked by log-likelihood / length ** length_penalty.
        max_new_tokens, min_new_tokens (int): of a text, without the prompt.
        do_sample (bool): nucleus sampling instead of beam search.
        top_p (float): probability in (0, 1] of the tokens that are sampled from.
        seed (int): of sampling and of random weights.
        batch_size (int): texts at once.
        precision (str): "fp32", or autocast to "bf16" or "fp16" with a language model of this dtype.
        device (str): "auto" takes a GPU where there is one.
    """

    checkpoint: str
    output: str
    language_model: str | None = None
    end: str | None = None
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    feature_cache: str | None = None
    encoder: str | None = None
    encoder_pretrained: str | None = None
    random_encoder: bool = False
    image_size: int | None = None
    image_root: str | None = None
    qformer_prompts: bool | None = None
    qformer_max_length: int = 128
    tokenizer: str | None = None
    num_beams: int = 5
    length_penalty: float = 1.0
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    do_sample: bool = False
    top_p: float = 0.9
    seed: int = 0
    batch_size: int = 16
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in {"num_beams": 1, "max_new_tokens": 1, "min_new_tokens": 0, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens must be at most {self.max_new_tokens}, got {self.min_new_tokens}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        _check_folder(self.output)

    def decoding(self) -> dict[str, Any]:
        """Options of transformers' ``generate``."""
        options = {"max_new_tokens": self.max_new_tokens, "min_new_tokens": self.min_new_tokens}
        if self.do_sample:
            return options | {"do_sample": True, "num_beams": 1, "top_p": self.top_p}
        options |= {"do_sample": False, "num_beams": self.num_beams}
        return options | ({"length_penalty": self.length_penalty} if self.num_beams > 1 else {})


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig(GenerationConfig):
    """Captions of COCO, Flickr30K or NoCaps, and their metrics; stage 1's models caption too.

    Args:
        annotations (str): see :func:`qformer_fast.evaluation.captioning.read_references`.
        split (str): "train", "restval", "val" or "test", of annotations that hold several.
        prompt (str, Optional): what captions begin with. Default: `None`, "a photo of"; stage 1's models take none.
    """

    annotations: str
    split: str = "test"
    prompt: str | None = None
    min_new_tokens: int = 8


@dataclass(frozen=True, kw_only=True)
class VQAConfig(GenerationConfig):
    """Answers to the questions of VQAv2, OK-VQA or GQA, and their accuracy.

    Args:
        questions (str): the official questions.
        annotations (str, Optional): the official answers of VQAv2 or OK-VQA; GQA's are with its questions. Default:
            `None`, answers are written and not measured.
        format (str): of the questions, "vqa" of VQAv2 and OK-VQA, or "gqa".
        image_pattern (str, Optional): an image's file name, or its key in the cache, with one format field for its id.
            Default: `None`, "COCO_val2014_{:012d}.jpg" of a number and "{}.jpg" of a name.
        prompt (str): with "{}" where the question goes.
    """

    questions: str
    annotations: str | None = None
    format: Literal["vqa", "gqa"] = "vqa"
    image_pattern: str | None = None
    prompt: str = "Question: {} Short answer:"
    length_penalty: float = -1.0
    max_new_tokens: int = 10
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.prompt:
            raise ValueError(f'prompt must have "{{}}" where the question goes, got {self.prompt!r}')
        if self.format == "gqa" and self.annotations is not None:
            raise ValueError(f"annotations must be left out with GQA's format, got {self.annotations!r}")


@dataclass(frozen=True)
class RetrievalConfig:
    """Recall of image-text retrieval on COCO or Flickr30K.

    Args:
        checkpoint (str): a folder of ``save_pretrained``, a folder or a hub id of Hugging Face's
            ``Blip2ForImageTextRetrieval``, or a LAVIS file.
        annotations (str): see :func:`qformer_fast.evaluation.karpathy.read_karpathy`.
        split (str): "train", "restval", "val" or "test", of annotations that hold several.
        output (str, Optional): a folder for the result and that of each image and caption. A run that was interrupted
            goes on in it. Default: `None`, the result is printed and nothing kept.
        qformer (QFormerConfig): sizes of a LAVIS file's model; a folder says its own.
        feature_cache (str, Optional): a folder of :class:`FeatureCache` with the annotations' images. Default: `None`,
            pictures are encoded once and their tokens kept in memory.
        encoder (str, Optional): an open_clip model; needed without a feature cache, and with one what the cache must be
            of.
        encoder_pretrained (str, Optional): its open_clip tag or a file, likewise.
        random_encoder (bool): accept an encoder with random weights.
        image_size (int, Optional): pictures' rows and columns. Default: `None`, the encoder's own.
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
    image_size: int | None = None
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
        _check_folder(self.output)


def _check_folder(output: str | None) -> None:
    if output is not None and Path(output).is_file():
        raise ValueError(f"output must be a folder, got {output}, a file")


def evaluate_captioning(config: CaptioningConfig) -> dict[str, Any]:
    """Writes ``captions.json`` (COCO's format of results), ``per_image.jsonl`` and ``metrics.json``; prints a table.

    Returns:
        dict: the content of ``metrics.json``: "metrics", fractions {"overall" (and NoCaps's domains): {name: value}},
        "notices", "settings" and others.
    """
    split = captioning.read_references(config.annotations, split=config.split)
    if unnamed := [image_id for image_id in split.references if image_id not in split.file_names]:
        raise ValueError(f'annotations: {config.annotations} must have each image\'s "file_name", not of {unnamed[:5]}')
    read_tokens = _token_reader(config, split.file_names.values(), config.annotations)
    model = build_generator(config.checkpoint, language_model=config.language_model, qformer=config.qformer)
    prompt = config.prompt
    if isinstance(model, Blip2OPT):
        prompt = CAPTION_PROMPT if prompt is None else prompt
    elif prompt is not None:
        raise ValueError(f"prompt must be left out for {config.checkpoint}, which is of stage 1, got {prompt!r}")
    requests = [Request(image_id, split.file_names[image_id], prompt or "") for image_id in split.references]
    captions, settings = _generate(config, model, read_tokens, requests, task="captioning", prompt=prompt)
    folder = Path(config.output)
    captioning.write_captions(folder / "captions.json", captions)
    if split.domains:
        found = captioning.by_domain(captions, split.references, split.domains)
    else:
        found = {captioning.OVERALL: captioning.caption_metrics(captions, split.references)}
    overall = found[captioning.OVERALL]
    lines = []
    for image_id, caption in captions.items():
        line = {"image_id": image_id, "image": split.file_names[image_id], "caption": caption}
        line |= {"domain": split.domains[image_id]} if split.domains else {}
        lines.append(line | overall.per_image[image_id])
    result = {
        "metrics": {name: group.scores for name, group in found.items()},
        "images": len(captions),
        "tokenizer": overall.tokenizer,
        "notices": overall.notices,
        "settings": {"annotations": config.annotations, **settings},
    }
    _write_results(folder, {"per_image.jsonl": lines}, result)
    print(_caption_table(result))
    return result


def evaluate_vqa(config: VQAConfig) -> dict[str, Any]:
    """Writes ``answers.json`` (the data set's official format of results), ``per_question.jsonl`` and
    ``metrics.json``; prints a table.

    Returns:
        dict: the content of ``metrics.json``: "metrics", percent {"overall", ...} or None without answers, "notices",
        "settings" and others.
    """
    questions, measure = _read_questions(config)
    images = [_image_name(config, question.image_id) for question in questions]
    read_tokens = _token_reader(config, images, config.questions)
    model = build_generator(config.checkpoint, language_model=config.language_model, qformer=config.qformer)
    if not isinstance(model, Blip2OPT):
        raise ValueError(f"checkpoint must be of a model with a language model, {config.checkpoint} is of stage 1")
    requests = [
        Request(question.question_id, image, config.prompt.replace("{}", clean_question(question.question)))
        for question, image in zip(questions, images, strict=True)
    ]
    answers, settings = _generate(config, model, read_tokens, requests, task="vqa")
    folder = Path(config.output)
    write = vqa.write_answers if config.format == "vqa" else vqa.write_gqa
    write(folder / "answers.json", answers)
    found = measure(answers) if measure else None
    lines = []
    for question in questions:
        line = {"question_id": question.question_id, "image_id": question.image_id, "question": question.question}
        line |= {"answer": answers[question.question_id]}
        lines.append(line | ({"accuracy": found.per_question[question.question_id]} if found else {}))
    result = {
        "metrics": {name: x for name, x in vars(found).items() if name != "per_question"} if found else None,
        "questions": len(questions),
        "notices": [] if found else ["there are no answers to compare with, nothing was measured"],
        "settings": {"questions": config.questions, "annotations": config.annotations, **settings},
    }
    _write_results(folder, {"per_question.jsonl": lines}, result)
    print(_accuracy_table(result))
    return result


def evaluate_retrieval(config: RetrievalConfig) -> dict[str, Any]:
    """Prints recall both ways; writes ``metrics.json``, ``per_image.jsonl`` and ``per_caption.jsonl``.

    Returns:
        dict: the content of ``metrics.json``.
    """
    data = read_karpathy(config.annotations, split=config.split)
    text = tokenize(load_tokenizer(config.tokenizer), data.captions, max_length=config.max_length)
    device = resolve_device(config.device)
    model = build_model(ModelConfig(qformer=config.qformer, checkpoint=config.checkpoint)).to(device).eval()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    decisive = ("k", "precision", "image_batch_size", "pair_batch_size", "encoder", "encoder_pretrained", "image_size")
    identity = {name: getattr(config, name) for name in decisive} | {"weights": checksum(model.state_dict())}
    identity |= {"captions": checksum({"input_ids": text[0]}), "images": zlib.crc32("\n".join(data.images).encode())}

    def open_journal(candidates: Tensor) -> Journal:
        found = {"feature_cache": _cache_checksum(config), "candidates": checksum({"candidates": candidates})}
        return Journal(Path(config.output) / LOGITS, identity | found, ("logits",))

    with torch.autocast(device.type, AUTOCAST.get(config.precision), enabled=config.precision in AUTOCAST):
        found = measure_retrieval(
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
            open_journal=None if config.output is None else open_journal,
        )
    names = ("checkpoint", "annotations", "split", "k", "score", "precision", "max_length")
    result: dict[str, Any] = {name: getattr(config, name) for name in names}
    result |= {"images": len(data.images), "captions": len(data.captions)}
    result |= {name: value for name, value in vars(found).items() if name not in ("per_image", "per_text")}
    result["device"] = "cpu"
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(device)
        result["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    print(_recall_table(result))
    if config.output is not None:
        folder = Path(config.output)
        per_image = [
            {"image": image, "rank": entry["rank"], "best": [data.captions[i] for i in entry["best"]]}
            for image, entry in zip(data.images, found.per_image, strict=True)
        ]
        per_caption = [
            {"caption": caption, "image": data.images[image], "rank": entry["rank"]}
            | {"best": [data.images[i] for i in entry["best"]]}
            for caption, image, entry in zip(data.captions, data.image_index, found.per_text, strict=True)
        ]
        _write_results(folder, {"per_image.jsonl": per_image, "per_caption.jsonl": per_caption}, result)
    return result


EVALUATIONS = {
    "captioning": (CaptioningConfig, evaluate_captioning, "captions of COCO, Flickr30K or NoCaps and their metrics"),
    "vqa": (VQAConfig, evaluate_vqa, "answers to VQAv2, OK-VQA or GQA and their accuracy"),
    "retrieval": (
        RetrievalConfig,
        evaluate_retrieval,
        "recall at 1, 5 and 10 on a Karpathy split, by ITC and re-ranked by ITM",
    ),
}
"""Of each name: options, the function that takes them, and what it gives."""


def _token_reader(config: GenerationConfig, images: Iterable[str], beside: str) -> ReadTokens:
    root = Path(config.image_root or Path(beside).parent)
    if config.random_encoder:
        # the same weights after an interruption
        torch.manual_seed(config.seed)
    device, dtype = resolve_device(config.device), AUTOCAST.get(config.precision)
    return token_reader(config, list(dict.fromkeys(images)), root, device=device, dtype=dtype)


def _generate(
    config: GenerationConfig,
    model: Blip2OPT | Blip2QFormer,
    read_tokens: ReadTokens,
    requests: Sequence[Request],
    **settings: Any,
) -> tuple[dict[Id, str], dict[str, Any]]:
    """The text of each request, and all that decides about the texts, with the names of the models."""
    device, dtype = resolve_device(config.device), AUTOCAST.get(config.precision)
    names: dict[str, Any] = {"checkpoint": config.checkpoint}
    weights = {"weights": checksum(model.state_dict())}
    if isinstance(model, Blip2OPT):
        if dtype == torch.float16 and model.language_model.config.model_type in ("t5", "mt5", "umt5"):
            raise ValueError('precision must be "bf16" or "fp32" for a T5, which fp16 is too narrow for, got "fp16"')
        names["language_model"] = _language_model_name(config, model)
        generate, told = _language_writer(config, model, names["language_model"])
        weights["language_weights"] = checksum(model.language_model.state_dict())
        model.language_model.to(dtype or torch.float32)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
        generate, told = functools.partial(_caption, model, tokenizer, config.decoding()), _vocabulary(tokenizer)
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in NO_SETTINGS}
    wanted = json.dumps([(request.id, request.image, request.prompt) for request in requests])
    data = {"requests": zlib.crc32(wanted.encode())}
    data["feature_cache"] = _cache_checksum(config)
    identity = options | settings | told | data | weights | {"qformer": model.config.to_dict()}
    model.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        texts = generate_all(
            generate,
            read_tokens,
            requests,
            batch_size=config.batch_size,
            path=Path(config.output) / TEXTS,
            identity=identity,
            seed=config.seed if config.do_sample else None,
        )
    return texts, names | identity


def _cache_checksum(config: GenerationConfig | RetrievalConfig) -> int | None:
    return None if config.feature_cache is None else crc32(Path(config.feature_cache) / CHECKSUMS)


def _language_model_name(config: GenerationConfig, model: Blip2OPT) -> str:
    """Where the language model's tokenizer is: a Hugging Face checkpoint has its own."""
    if config.language_model is None and saved_class(config.checkpoint) not in (Blip2OPT.__name__, Blip2Joint.__name__):
        return config.checkpoint
    return config.language_model or model.language_model.name_or_path


def _language_writer(config: GenerationConfig, model: Blip2OPT, language_model: str) -> tuple[Generate, dict[str, Any]]:
    """What writes, and what decides about its texts."""
    end = model.text_end if config.end is None else config.end
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    language = LanguageTokenizer(tokenizer, encoder_decoder=model.language_projection.encoder_decoder, end=end)
    reads_prompts = model.qformer_prompts if config.qformer_prompts is None else config.qformer_prompts
    if reads_prompts and not model.config.use_qformer_text_input:
        raise ValueError(f"qformer_prompts must be False, {config.checkpoint} has no text branch; got True")
    bert = load_tokenizer(config.tokenizer) if reads_prompts else None
    options = {"qformer_tokenizer": bert, "qformer_max_length": config.qformer_max_length, **config.decoding()}
    generate = functools.partial(generate_after_prompts, model, language, **options)
    return generate, {"end": language.end, "qformer_prompts": reads_prompts} | _vocabulary(tokenizer, bert)


def _caption(
    model: Blip2QFormer, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], tokens: Tensor, _: Sequence[str]
) -> list[str]:
    return generate_captions(model, tokenizer, tokens, **options)


def _vocabulary(*tokenizers: PreTrainedTokenizerBase | None) -> dict[str, int]:
    """A checksum of the words."""
    words = [sorted(tokenizer.get_vocab().items()) for tokenizer in tokenizers if tokenizer is not None]
    return {"vocabulary": zlib.crc32(json.dumps(words).encode())}


def _read_questions(config: VQAConfig) -> tuple[list[vqa.Question], Callable[[dict[Id, str]], Any] | None]:
    """The questions, and what measures their answers where there are any to compare with."""
    if config.format == "vqa":
        questions = vqa.read_questions(config.questions)
        if config.annotations is None:
            return questions, None
        annotations = vqa.read_annotations(config.annotations, questions=questions)
        return questions, functools.partial(vqa.vqa_accuracy, annotations=annotations)
    questions = vqa.read_gqa(config.questions)
    answers = {question.question_id: question.answer for question in questions if question.answer is not None}
    if 0 < len(answers) < len(questions):
        without = len(questions) - len(answers)
        raise ValueError(f"questions: {config.questions} must have answers to all or to none, not to {without}")
    return questions, functools.partial(vqa.gqa_accuracy, answers=answers) if answers else None


def _image_name(config: VQAConfig, image_id: Id) -> str:
    pattern = config.image_pattern or IMAGE_PATTERNS[type(image_id)]
    try:
        name = pattern.format(image_id)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"image_pattern must fit image ids, got {pattern!r} for {image_id!r}: {error}") from error
    if name == pattern:
        raise ValueError(f"image_pattern must have a format field for image ids, got {pattern!r}")
    return name


def _write_results(folder: Path, samples: Mapping[str, Iterable[dict[str, Any]]], result: dict[str, Any]) -> None:
    """``metrics.json``, and of each name of ``samples`` a JSON Lines file."""
    for name, lines in samples.items():
        write_text(folder / name, "".join(json.dumps(line) + "\n" for line in lines))
    write_text(folder / "metrics.json", json.dumps(result, indent=2) + "\n")


def _caption_table(result: dict[str, Any]) -> str:
    lines = [f"{result['images']} images; 100 times each metric, as papers print them"]
    lines.append(f"{'':<12}" + "".join(f"{name:>9}" for name in result["metrics"][captioning.OVERALL]))
    for name, scores in result["metrics"].items():
        lines.append(f"{name:<12}" + "".join(f"{100 * value:>9.2f}" for value in scores.values()))
    return "\n".join(lines + result["notices"])


def _accuracy_table(result: dict[str, Any]) -> str:
    lines = [f"{result['questions']} questions; accuracy in percent"]
    if result["metrics"] is not None:
        rows = {"overall": result["metrics"]["overall"], **result["metrics"].get("per_answer_type", {})}
        lines += [f"{name:<12}{value:>9.2f}" for name, value in rows.items()]
    return "\n".join(lines + result["notices"])


def _recall_table(result: dict[str, Any]) -> str:
    lines = [f"{result['images']} images, {result['captions']} captions; recall in percent"]
    lines.append(f"{'':<10}" + "".join(f"{name:>8}" for name in result["itc"]))
    for row in ("itc", "reranked"):
        lines.append(f"{row:<10}" + "".join(f"{value:>8.2f}" for value in result[row].values()))
    memory = f", peak {result['peak_gib']} GiB" if "peak_gib" in result else ""
    rate = "" if result["pairs_per_second"] is None else f", {result['pairs_per_second']:.0f} a second"
    lines.append(f"re-ranked {result['pairs']} pairs{rate}{memory}")
    return "\n".join(lines)
