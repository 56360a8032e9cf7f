"""What the demo's tasks share: data, device, places, and how each trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from qformer_fast.data.batches import ImageTextDataset
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.demo import language
from qformer_fast.demo.config import DemoConfig
from qformer_fast.demo.features import TokenEncoder, cached_tokens
from qformer_fast.demo.language import PretrainConfig
from qformer_fast.demo.pictures import Picture
from qformer_fast.demo.sources import Source
from qformer_fast.models.blip2_qformer import Blip2QFormer
from qformer_fast.models.language import load_language_model
from qformer_fast.training.config import OptimizerConfig, RunConfig
from qformer_fast.training.loop import Entry, train


class Laps:
    """Seconds of each part of a run, printed as each ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    def end(self, name: str) -> None:
        """The part that began where the one before ended."""
        self.seconds[name] = time.perf_counter() - self._begin - sum(self.seconds.values())
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)


@dataclass(frozen=True)
class Outcome:
    """What a task found.

    Args:
        results (dict): entries of ``results.json``.
        summary (str): what is printed at the end.
        sections (list): of the report, HTML.
    """

    results: dict[str, Any]
    summary: str
    sections: list[str]


@dataclass(frozen=True)
class LanguageModel:
    """The demo's frozen language model.

    Args:
        model (PreTrainedModel): frozen.
        tokenizer (LanguageTokenizer): its own.
        about (str): what it is, a sentence.
        losses (list): of its pre-training's steps, nats a token.
    """

    model: PreTrainedModel
    tokenizer: LanguageTokenizer
    about: str
    losses: list[float]


@dataclass(frozen=True)
class Setting:
    """One run's data, device and places."""

    config: DemoConfig
    source: Source
    encoder: TokenEncoder
    device: torch.device
    precision: str
    output_dir: Path
    cache_dir: Path
    laps: Laps

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"

    def tokens(
        self, pictures: Sequence[Picture], render: Callable[[Picture], Image.Image], task: str = ""
    ) -> FeatureCache:
        """The pictures' image tokens, extracted or read; what ``laps`` calls it begins with ``task``."""
        # a CPU's batches fit its cache
        batch_size = 256 if self.device.type == "cuda" else 32
        cache, cached = cached_tokens(pictures, render, self.encoder, self.cache_dir, batch_size=batch_size)
        self.laps.end(task + ("image tokens, read from the cache" if cached else "image tokens, extracted"))
        return cache

    def train(
        self,
        model: nn.Module,
        dataset: ImageTextDataset,
        folder: Path,
        *,
        steps: int,
        batch_size: int,
        lr: float,
        num_workers: int = 0,
    ) -> list[Entry]:
        """Trains in place and returns the log; a tenth of the steps warms up."""
        run = RunConfig(
            output_dir=str(folder),
            steps=steps,
            batch_size=batch_size,
            precision=self.precision,
            device=str(self.device),
            seed=self.config.seed,
            cuda_graphs=self.device.type == "cuda" and isinstance(model, Blip2QFormer),
            save_every=steps,
            log_every=max(1, steps // 100),
        )
        optimizer = OptimizerConfig(lr=lr, warmup_steps=max(1, steps // 10))
        return train(model, dataset, run, optimizer, num_workers=num_workers)

    def language_model(
        self, documents: Sequence[Sequence[str]], config: PretrainConfig, folder: Path, *, of: str
    ) -> LanguageModel:
        """A new language model, trained on text alone, kept in ``folder`` and read from there.

        Args:
            documents, config: see :func:`qformer_fast.demo.language.pretrain`.
            folder (Path): where it is kept.
            of (str): what the documents are, for ``about``.
        """
        tokenizer = language.build_tokenizer(self.source.tokenizer)
        torch.manual_seed(self.config.seed)
        model = self.source.build_language_model(tokenizer)
        losses = language.pretrain(model, tokenizer, documents, config, device=self.device, seed=self.config.seed)
        language.save(model, tokenizer, folder)
        sizes = model.config
        trained = f"trained for {config.steps} steps on nothing but {of}" if losses else "not trained at all"
        about = (
            f"an OPT of {sizes.num_hidden_layers} layers {sizes.hidden_size} wide, {model.num_parameters() / 1e6:.1f} "
            f"million parameters, {self.source.word_embeddings}, made by this run, {trained}, and frozen"
        )
        return LanguageModel(
            load_language_model(str(folder)).to(self.device),
            LanguageTokenizer.from_pretrained(str(folder)),
            about,
            losses,
        )
