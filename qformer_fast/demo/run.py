"""``qformer-fast demo``: features, training, evaluation on unseen concepts, speed and report, in one go."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qformer_fast.data.batches import Batch, PairDataset, ShuffledBatches
from qformer_fast.data.captions import Pair
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.files import write_text
from qformer_fast.data.tokenizer import tokenize
from qformer_fast.demo import baseline
from qformer_fast.demo.features import cached_tokens
from qformer_fast.demo.pictures import Picture, mirrored, split_by_base
from qformer_fast.demo.sources import Source, emoji_source, synthetic_source
from qformer_fast.evaluation.retrieval import chance_at_k, embed, recall_at_k, rerank, similarity
from qformer_fast.models.blip2_qformer import Blip2QFormer
from qformer_fast.reference.stage1 import original_order_stage1
from qformer_fast.training.config import OptimizerConfig, RunConfig
from qformer_fast.training.loop import AUTOCAST, resolve_device, train

GPU_STEPS = 1800
LEARNING_RATE = 3e-4
FEWEST_CPU_STEPS = 60
ORIGINAL_TEXT_LENGTH = 32
RERANKED = 16
EXAMPLES = 12


@dataclass(frozen=True)
class DemoConfig:
    """One run of the demo.

    Args:
        output_dir (str): report, results, log and model; what an earlier demo trained there is replaced.
        cache_dir (str, Optional): image tokens, kept for the next run. Default: `None`, the user's cache folder.
        synthetic (bool): made-up pictures, which need no data package.
        steps (int, Optional): of training. Default: `None`, 1800 on a GPU, and on a CPU what fits ``minutes``.
        minutes (float): of training on a CPU, when ``steps`` is not given.
        batch_size (int): pairs a step.
        precision (str): "auto" is bf16 autocast where that is faster here, else fp32.
        device (str): "auto" takes a GPU where there is one.
        seed (int): of weights, order, dropout and negatives.
    """

    output_dir: str = "runs/demo"
    cache_dir: str | None = None
    synthetic: bool = False
    steps: int | None = None
    minutes: float = 2.5
    batch_size: int = 64
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class TestSet:
    """Pictures of unseen concepts and the names to find."""

    pictures: list[Picture]
    cache: FeatureCache
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def captions(self) -> list[str]:
        return sorted({picture.caption for picture in self.pictures})

    @cached_property
    def tokens(self) -> Tensor:
        """(pictures, 49, width)"""
        return self.cache.rows([picture.key for picture in self.pictures])

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        return tokenize(self.tokenizer, self.captions)

    @cached_property
    def relevant(self) -> Tensor:
        """(pictures, captions) bool"""
        column = {caption: i for i, caption in enumerate(self.captions)}
        columns = torch.tensor([column[picture.caption] for picture in self.pictures])
        return columns[:, None] == torch.arange(len(self.captions))


def main(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo, prints the table and the report's path, and returns the results as written to ``results.json``.

    Raises:
        ModuleNotFoundError: a data package is missing; the message names it and ``--synthetic``. ValueError: a damaged
            cache of image tokens.
    """
    from qformer_fast.demo.report import write_report

    begin = time.perf_counter()
    device = resolve_device(config.device)
    source = synthetic_source() if config.synthetic else emoji_source()
    precision = _faster_precision(device) if config.precision == "auto" else config.precision
    train_pictures, test_pictures = split_by_base(source.pictures)
    output_dir = Path(config.output_dir)
    shutil.rmtree(output_dir / "training", ignore_errors=True)
    # a GPU trains long enough for mirrored pictures to pay, a CPU would spend its minutes on their image tokens
    mirror_images = mirrored(train_pictures) if device.type == "cuda" else []
    seconds: dict[str, float] = {}

    def phase(name: str) -> None:
        seconds[name] = time.perf_counter() - begin - sum(seconds.values())
        print(f"{name}: {seconds[name]:.0f} s", flush=True)

    encoder = source.make_encoder(device)
    cache, cached = cached_tokens([*source.pictures, *mirror_images], source.render, encoder, _cache_dir(config))
    phase("image tokens, read from the cache" if cached else "image tokens, extracted")

    test = TestSet(test_pictures, cache, source.tokenizer)
    rows = {"chance": _chance(test)}
    rows["linear heads"] = _evaluate_baseline(source, train_pictures, test, cache, device, config.seed)
    phase("linear heads")

    torch.manual_seed(config.seed)
    model = source.build_model(source.tokenizer, encoder.width).to(device)
    dataset = _dataset([*train_pictures, *mirror_images], source.tokenizer, cache)
    steps = config.steps or _steps_that_fit(model, dataset, config, device, precision)
    run = RunConfig(
        output_dir=str(output_dir / "training"),
        steps=steps,
        batch_size=config.batch_size,
        precision=precision,
        device=str(device),
        seed=config.seed,
        save_every=steps,
        log_every=max(1, steps // 100),
    )
    optimizer = OptimizerConfig(lr=LEARNING_RATE, warmup_steps=max(1, steps // 10))
    history = train(model, dataset, run, optimizer)
    phase(f"training, {steps} steps")

    model.eval()
    found = _evaluate(model, test, device, precision)
    rows["Q-Former, contrast (ITC)"], rows["Q-Former, re-ranked (ITM)"] = found["itc"], found["itm"]
    phase("evaluation")
    speed = _measure_speed(model, dataset, config, device, precision)
    phase("speed")

    examples = _examples(model, test, source, found["similarities"], device)
    results = {
        "config": vars(config),
        "retrieval": rows,
        "speed": speed,
        "seconds": dict(seconds),
        "steps": steps,
        "precision": precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "pictures": {"train": len(train_pictures), "test": len(test_pictures), "test captions": len(test.captions)},
        "features": source.features,
        "text_features": source.text_features,
    }
    verdict = _verdict(rows, steps, device)
    print(f"\n{as_table(rows, len(test.pictures), len(test.captions))}\n\n{verdict}\n{_speed_line(speed)}")
    write_text(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    path = output_dir / "report.html"
    write_report(path, results, history, examples, source.credits, table_note=verdict)
    phase("report")
    print(f"report: {path.resolve()}")
    return results


def _cache_dir(config: DemoConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qformer_fast"


def _faster_precision(device: torch.device) -> str:
    """bf16 on a GPU, and on a CPU whose bf16 products are faster than its fp32 ones; measured, 0.1 s."""
    if device.type != "cpu":
        return "bf16"

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begin)
        return min(times)

    return "bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"


def _dataset(pictures: list[Picture], tokenizer: PreTrainedTokenizerBase, cache: FeatureCache) -> PairDataset:
    """Each picture with its name and with its other names; what shows one concept is never a negative of it."""
    pairs = [
        Pair(picture.key, name, picture.concept) for picture in pictures for name in (picture.caption, *picture.aliases)
    ]
    return PairDataset(pairs, tokenizer, cache=cache)


def _first_batch(dataset: PairDataset, config: DemoConfig) -> Batch:
    return dataset[next(iter(ShuffledBatches(len(dataset), config.batch_size, seed=config.seed)))]


def _steps_that_fit(
    model: Blip2QFormer, dataset: PairDataset, config: DemoConfig, device: torch.device, precision: str
) -> int:
    """1800 on a GPU; on a CPU as many as fit ``config.minutes`` at the speed of two trial steps."""
    if device.type != "cpu":
        return GPU_STEPS
    batch = _first_batch(dataset, config)
    step = _stepper(model, model, batch, device, precision)
    step()
    begin = time.perf_counter()
    step()
    taken = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)
    return max(FEWEST_CPU_STEPS, min(GPU_STEPS, int(60 * config.minutes / taken)))


def _stepper(
    model: Blip2QFormer, forward: Callable, batch: Batch, device: torch.device, precision: str
) -> Callable[[], None]:
    """Forward and backward of one batch, waiting for the device."""
    images = batch.images.to(device).float()
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            loss = forward(images, ids, mask, image_ids=batch.image_ids).loss
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _measure_speed(
    model: Blip2QFormer, dataset: PairDataset, config: DemoConfig, device: torch.device, precision: str
) -> dict[str, float]:
    """Seconds of forward and backward in training mode, the two orders taken in turn, text padded to 32 as the
    original.
    """
    model.train()
    packed = _first_batch(dataset, config)
    missing = max(0, ORIGINAL_TEXT_LENGTH - packed.input_ids.shape[1])
    ids, mask = (torch.nn.functional.pad(x, (0, missing)) for x in (packed.input_ids, packed.attention_mask))
    padded = Batch(packed.images, ids, mask, packed.image_ids)
    steps = {
        "packed": _stepper(model, model, packed, device, precision),
        "original order": _stepper(
            model, lambda *a, **k: original_order_stage1(model, *a, **k), padded, device, precision
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(4):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - begin)
    model.zero_grad(set_to_none=True)
    model.eval()
    ratio = statistics.median(b / a for a, b in zip(times["packed"], times["original order"], strict=True))
    return {name: statistics.median(taken) for name, taken in times.items()} | {"ratio": ratio}


def _percentages(i2t: dict[int, float], t2i: dict[int, float]) -> dict[str, float]:
    found = {f"i2t R@{k}": value for k, value in i2t.items()} | {f"t2i R@{k}": value for k, value in t2i.items()}
    return {name: round(value, 2) for name, value in found.items()}


def _chance(test: TestSet) -> dict[str, float]:
    return _percentages(chance_at_k(test.relevant), chance_at_k(test.relevant.T))


def _evaluate_baseline(
    source: Source, pictures: list[Picture], test: TestSet, cache: FeatureCache, device: torch.device, seed: int
) -> dict[str, float]:
    names = list(dict.fromkeys([*(picture.caption for picture in pictures), *test.captions]))
    vectors = dict(zip(names, source.embed_captions(names, source.tokenizer, device), strict=True))
    pooled = cache.rows([picture.key for picture in pictures]).mean(1, dtype=torch.float32).to(device)
    texts = torch.stack([vectors[picture.caption] for picture in pictures])
    numbers = {concept: i for i, concept in enumerate(dict.fromkeys(picture.concept for picture in pictures))}
    concepts = torch.tensor([numbers[picture.concept] for picture in pictures], device=device)
    image_head, text_head = baseline.train_linear_heads(pooled, texts, concepts, seed=seed)
    with torch.no_grad():
        unseen = test.tokens.mean(1, dtype=torch.float32).to(device)
        scores = baseline.cosine(image_head(unseen), text_head(torch.stack([vectors[c] for c in test.captions]))).cpu()
    return _percentages(recall_at_k(scores, test.relevant), recall_at_k(scores.T.contiguous(), test.relevant.T))


@torch.no_grad()
def _evaluate(model: Blip2QFormer, test: TestSet, device: torch.device, precision: str) -> dict[str, Any]:
    with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
        cosine = similarity(*embed(model, test.tokens, *test.text)).float().cpu()
        texts, images = rerank(model, test.tokens, *test.text, cosine, k=RERANKED)
    relevant = test.relevant
    return {
        "similarities": cosine,
        "itc": _percentages(recall_at_k(cosine, relevant), recall_at_k(cosine.T.contiguous(), relevant.T)),
        "itm": _percentages(recall_at_k(texts.cpu(), relevant), recall_at_k(images.cpu(), relevant.T)),
    }


@torch.no_grad()
def _examples(
    model: Blip2QFormer, test: TestSet, source: Source, similarities: Tensor, device: torch.device
) -> list[dict[str, Any]]:
    """A spread of test pictures with their three nearest captions, a generated caption and where the queries look."""
    rows = torch.linspace(0, len(test.pictures) - 1, EXAMPLES).long()
    tokens = test.tokens[rows].to(device).float()
    generated = model.generate(tokens, num_beams=3, max_new_tokens=12)
    words = source.tokenizer.batch_decode(generated, skip_special_tokens=True)
    (maps,) = model.cross_attention_maps(tokens, layers=model.config.cross_attention_layers[-1:]).values()
    maps = maps.mean(1).cpu()
    nearest = similarities[rows].topk(3, dim=1).indices
    return [
        {
            "picture": source.render(test.pictures[row]),
            "name": test.pictures[row].caption,
            "vendor": test.pictures[row].vendor,
            "nearest": [test.captions[column] for column in nearest[i].tolist()],
            "generated": words[i].strip(),
            "attention": maps[i].unflatten(-1, (7, 7)),
        }
        for i, row in enumerate(rows.tolist())
    ]


def as_table(rows: dict[str, dict[str, float]], images: int, captions: int) -> str:
    """Recall in percent as text."""
    columns = list(next(iter(rows.values())))
    lines = [f"unseen concepts: {images} pictures, {captions} captions; recall in percent"]
    lines.append(f"{'':<28}" + "".join(f"{name:>10}" for name in columns))
    lines += [f"{name:<28}" + "".join(f"{row[c]:>10.1f}" for c in columns) for name, row in rows.items()]
    return "\n".join(lines)


def _verdict(rows: dict[str, dict[str, float]], steps: int, device: torch.device) -> str:
    """Whether the Q-Former beats the linear heads at R@1, said either way."""
    ours, linear = rows["Q-Former, contrast (ITC)"], rows["linear heads"]
    above = {name: ours[name] > linear[name] for name in ("i2t R@1", "t2i R@1")}
    parts = [
        f"{'above' if better else 'NOT above'} at {name} ({ours[name]:.1f} v. {linear[name]:.1f})"
        for name, better in above.items()
    ]
    said = f"The Q-Former against the linear heads on the same features: {parts[0]}, {parts[1]}."
    if not all(above.values()) and device.type == "cpu":
        said += (
            f" A CPU's time budget ends its training after {steps} steps, where a GPU takes {GPU_STEPS}; "
            "the linear heads see the data 60 times. --steps and --minutes give it more."
        )
    return said


def _speed_line(speed: dict[str, float]) -> str:
    return (
        f"forward + backward: packed {speed['packed']:.2f} s, original order {speed['original order']:.2f} s, "
        f"{speed['ratio']:.2f} times as fast (names of a few tokens, which the original order pads to 32)"
    )
