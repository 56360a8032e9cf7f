"""Stage 1 on drawings: training, retrieval of unseen concepts, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qformer_fast.data.batches import Batch, PairDataset, ShuffledBatches
from qformer_fast.data.captions import Pair
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import tokenize
from qformer_fast.demo import baseline, report
from qformer_fast.demo.config import DemoConfig
from qformer_fast.demo.pictures import Picture, mirrored, split_by_base
from qformer_fast.demo.setting import Outcome, Setting
from qformer_fast.demo.sources import Source
from qformer_fast.evaluation.retrieval import chance_at_k, embed, recall_at_k, rerank, similarity
from qformer_fast.models.blip2_qformer import Blip2QFormer
from qformer_fast.reference.stage1 import original_order_stage1
from qformer_fast.training.loop import AUTOCAST

GPU_STEPS = 1800
LEARNING_RATE = 3e-4
FEWEST_CPU_STEPS = 60
ORIGINAL_TEXT_LENGTH = 32
RERANKED = 16
EXAMPLES = 12


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


@dataclass(frozen=True)
class Stage1:
    """The trained model and what it was trained and tested on.

    Args:
        model (Blip2QFormer): in eval mode.
        pictures (list): of training, not mirrored.
        dataset (PairDataset): of training, mirrored pictures included.
        test (TestSet): unseen concepts.
        outcome (Outcome): what was found.
    """

    model: Blip2QFormer
    pictures: list[Picture]
    dataset: PairDataset
    test: TestSet
    outcome: Outcome


def run_stage1(setting: Setting) -> Stage1:
    """Trains, and evaluates on pictures of concepts that training had none of."""
    config, source, device, precision = setting.config, setting.source, setting.device, setting.precision
    lap = setting.laps.end
    train_pictures, test_pictures = split_by_base(source.pictures)
    # a GPU trains long enough for mirrored pictures to pay, a CPU would spend its minutes on their image tokens
    mirror_images = mirrored(train_pictures) if device.type == "cuda" else []
    cache = setting.tokens([*source.pictures, *mirror_images], source.render)

    test = TestSet(test_pictures, cache, source.tokenizer)
    rows = {"chance": _chance(test)}
    rows["linear heads"] = _evaluate_baseline(source, train_pictures, test, cache, device, config.seed)
    lap("linear heads")

    torch.manual_seed(config.seed)
    model = source.build_model(source.tokenizer, setting.encoder.width).to(device)
    dataset = _dataset([*train_pictures, *mirror_images], source.tokenizer, cache)
    steps = config.steps or _steps_that_fit(model, dataset, config, device, precision)
    folder = setting.output_dir / "training"
    history = setting.train(model, dataset, folder, steps=steps, batch_size=config.batch_size, lr=LEARNING_RATE)
    lap(f"training, {steps} steps")

    model.eval()
    found = _evaluate(model, test, device, precision)
    rows["Q-Former, contrast (ITC)"], rows["Q-Former, re-ranked (ITM)"] = found["itc"], found["itm"]
    lap("evaluation")
    speed = _measure_speed(model, dataset, config, device, precision)
    lap("speed")

    counts = {"train": len(train_pictures), "test": len(test_pictures), "test captions": len(test.captions)}
    results = {"retrieval": rows, "speed": speed, "steps": steps, "pictures": counts}
    verdict = _verdict(rows, steps, device)
    title = f"unseen concepts: {counts['test']} pictures, {counts['test captions']} captions; recall in percent"
    summary = f"{report.as_text(title, rows)}\n\n{verdict}\n{_speed_line(speed)}"
    examples = _examples(model, test, source, found["similarities"], device)
    about = report.Stage1About(
        verdict=verdict,
        machine=f"{setting.device_name}, {precision}",
        features=source.features,
        text_features=source.text_features,
        batch_size=config.batch_size,
    )
    sections = report.stage1_sections(results, history, examples, about)
    return Stage1(model, train_pictures, dataset, test, Outcome(results, summary, sections))


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
