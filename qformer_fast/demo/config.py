"""What a run of the demo is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from qformer_fast.demo.language import PretrainConfig

Task = Literal["stage1", "stage2", "vqa"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class Stage2Config:
    """Captions of drawings with a frozen language model, from the demo's stage 1; a GPU's lengths.

    The language model sees its few thousand names ten times; more does not lower its loss on names left out.

    Args:
        steps (int): of training.
        batch_size (int): names a step.
        lr (float): peak of the learning rate.
        language (PretrainConfig): of the language model.
    """

    steps: int = 400
    batch_size: int = 64
    lr: float = 2e-4
    language: PretrainConfig = field(default_factory=lambda: PretrainConfig(steps=100, batch_size=8))


@dataclass(frozen=True)
class VQAConfig:
    """Answers to easy-vqa's questions with a frozen language model; a GPU's lengths, which take a CPU hours.

    Args:
        steps (int): of training.
        batch_size (int): questions a step.
        lr (float): peak of the learning rate.
        answer_batch_size (int): questions that are answered at once.
        num_workers (int): threads that read a cache, processes that read pictures.
        language (PretrainConfig): of the language model.
    """

    steps: int = 2000
    batch_size: int = 256
    lr: float = 5e-4
    answer_batch_size: int = 512
    num_workers: int = 0
    language: PretrainConfig = field(default_factory=lambda: PretrainConfig(steps=500))


@dataclass(frozen=True)
class DemoConfig:
    """One run of the demo.

    Args:
        output_dir (str): report, results, logs and models; what an earlier demo trained there is replaced.
        cache_dir (str, Optional): image tokens, kept for the next run. Default: `None`, the user's cache folder.
        synthetic (bool): made-up pictures, which need no data package.
        tasks (list, Optional): "stage1" on drawings; "stage2", captions from stage 1's model; "vqa", easy-vqa. Default:
            `None`, all on a GPU, "stage1" on a CPU.
        steps (int, Optional): of stage 1's training. Default: `None`, 1800 on a GPU, and on a CPU what fits
            ``minutes``.
        minutes (float): of stage 1's training on a CPU, when ``steps`` is not given.
        batch_size (int): pairs a step of stage 1.
        stage2 (Stage2Config): of the task "stage2".
        vqa (VQAConfig): of the task "vqa".
        precision (str): "auto" is bf16 autocast where that is faster here, else fp32.
        device (str): "auto" takes a GPU where there is one.
        seed (int): of weights, order, dropout and negatives.
    """

    output_dir: str = "runs/demo"
    cache_dir: str | None = None
    synthetic: bool = False
    tasks: list[Task] | None = None
    steps: int | None = None
    minutes: float = 2.5
    batch_size: int = 64
    stage2: Stage2Config = field(default_factory=Stage2Config)
    vqa: VQAConfig = field(default_factory=VQAConfig)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tasks is not None:
            if not self.tasks or not set(self.tasks) <= set(TASKS):
                raise ValueError(f"tasks must be some of {TASKS}, got {self.tasks}")
            if "stage2" in self.tasks and "stage1" not in self.tasks:
                raise ValueError(f"tasks must have stage1, from which stage2 starts, got {self.tasks}")
