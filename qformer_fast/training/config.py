"""What a training run is told, as dataclasses that the command line and YAML files fill."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from qformer_fast.config import Checkpointing, QFormerConfig
from qformer_fast.data.bad import OnBad


@dataclass(frozen=True)
class ModelConfig:
    """The Q-Former and its heads.

    Args:
        qformer (QFormerConfig): sizes.
        embed_dim (int): width of the ITC features.
        local_gradients (bool): ITC gradients as in the original.
        bert (str, Optional): BERT weights that the model starts from, a file or a folder.
        checkpoint (str, Optional): a checkpoint that it starts from: a folder of ``save_pretrained``, whose sizes are
            taken instead of these, or a LAVIS file; of stage 1, or with a language model also of stage 2, also a folder
            or a hub id of Hugging Face's BLIP-2 or InstructBLIP.
    """

    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    embed_dim: int = 256
    local_gradients: bool = True
    bert: str | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class LanguageConfig:
    """A frozen language model behind the Q-Former: stage 2, or both stages at once.

    Args:
        model (str): a folder, or an id on the Hugging Face hub, of a causal or an encoder-decoder model.
        dtype (str): of its parameters: "float32", "float16", "bfloat16", or "auto", the checkpoint's.
        prompt (str): what it is told before a caption; for questions a template with one "{}" for the question.
        keep_text (bool): keep the Q-Former's text branch, to which the prompts go too where there are any.
        joint (bool): train stage 1's losses with the language model's.
        dropout (bool): its dropout is on, as in the original.
        max_length (int): of a prompt with its text in its tokens, and of an encoder-decoder's each.
    """

    model: str
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    prompt: str = ""
    keep_text: bool = False
    joint: bool = False
    dropout: bool = False
    max_length: int = 32

    @property
    def qformer_prompts(self) -> bool:
        """Whether the Q-Former reads the prompts too."""
        return self.keep_text and self.prompt != ""


@dataclass(frozen=True)
class DataConfig:
    """Pairs and where their image tokens come from.

    Args:
        pairs (list or str): a JSON list, a folder or tar shards, see :func:`qformer_fast.data.captions.read_pairs`, and
            for a language model :func:`qformer_fast.data.examples.read_examples`; or several, see
            :func:`qformer_fast.data.sources.read_mixture`.
        feature_cache (list or str, Optional): a folder of :class:`FeatureCache`, or one for each of ``pairs``.
            Default: `None`, images are encoded as they come.
        encoder (str, Optional): an open_clip model; needed without a feature cache, and with one what the cache must be
            of.
        encoder_pretrained (str, Optional): its open_clip tag or a file, likewise.
        random_encoder (bool): accept an encoder with random weights.
        image_size (int, Optional): pictures' rows and columns; with a feature cache what it must be of. Default:
            `None`, the encoder's own.
        image_root (str, Optional): the folder that the pairs' images are in, but for those in tars. Default: `None`,
            that of ``pairs``.
        on_bad (str): what is done with a damaged shard, a sample that lacks its picture or its text, a picture that
            can't be read, a caption without a word, and an id that comes twice: "refuse" ends the run before it begins,
            or in it at such a picture; "skip" counts them and says so, and reads every picture once before the run
            where there is no feature cache.
        tokenizer (str, Optional): see :func:`qformer_fast.data.tokenizer.load_tokenizer`.
        max_length (int): of captions, and of prompts for the Q-Former, in BERT's tokens; longer captions lose their
            end, longer prompts their beginning.
        num_workers (int): threads that read a feature cache; processes that read pictures, and tars when they are
            indexed.
    """

    pairs: list[str] | str
    feature_cache: list[str] | str | None = None
    encoder: str | None = None
    encoder_pretrained: str | None = None
    random_encoder: bool = False
    image_size: int | None = None
    image_root: str | None = None
    on_bad: OnBad = "refuse"
    tokenizer: str | None = None
    max_length: int = 32
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {self.num_workers}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; defaults are the paper's (arXiv:2301.12597, sec. 3.4).

    Args:
        lr, min_lr, warmup_lr (float): peak, end and start of the learning rate.
        warmup_steps (int): optimizer steps from ``warmup_lr`` to ``lr``.
        weight_decay (float): on all but 1-D parameters and biases.
        betas (tuple): of AdamW.
        max_grad_norm (float, Optional): clip the gradient's norm. Default: `None`, as in the original.
    """

    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 2000
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "warmup_lr", "warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm must be above 0, got {self.max_grad_norm}")


@dataclass(frozen=True)
class RunConfig:
    """One run of the loop.

    Args:
        output_dir (str): log and checkpoints.
        steps (int): optimizer steps in all.
        batch_size (int): pairs a forward pass of a process; those of all processes are stage 1's pool of negatives.
        accumulation (int): forward passes an optimizer step.
        precision (str): "fp32", or autocast to "bf16" or "fp16" (with loss scaling).
        device (str): "auto" takes a GPU where there is one; under torchrun each process its own.
        seed (int): of weights, dropout, negatives and the order of the data; at least 0.
        gradient_checkpointing (str): "none", or what backward computes again to save memory: "feed_forward" or "layer".
        cuda_graphs (bool): replay stage 1's forward and backward as CUDA graphs; needs a GPU. For hosts slower than
            their GPU.
        save_every, log_every (int): optimizer steps.
        keep (int): checkpoints kept.
        resume (bool): go on from the last checkpoint in ``output_dir``.
        tensorboard (bool): write TensorBoard events too.
        profile (bool): log which shares of the time go to waiting for data, to the image encoder, to the Q-Former and
            to communication.
        timeout (float): seconds that a process waits for the others, under torchrun, before it ends with an error.
    """

    output_dir: str
    steps: int
    batch_size: int = 128
    accumulation: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    device: str = "auto"
    seed: int = 0
    gradient_checkpointing: Checkpointing = "none"
    cuda_graphs: bool = False
    save_every: int = 1000
    log_every: int = 10
    keep: int = 2
    resume: bool = False
    tensorboard: bool = False
    profile: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"run.seed must lie in [0, 2**32), got {self.seed}")
        levels = get_args(Checkpointing)
        if self.gradient_checkpointing not in levels:
            raise ValueError(f"run.gradient_checkpointing must be one of {levels}, got {self.gradient_checkpointing!r}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f'run.precision must be "fp32", "bf16" or "fp16", got {self.precision!r}')


@dataclass(frozen=True)
class TrainConfig:
    """Everything of ``qformer-fast train``.

    Args:
        language (LanguageConfig, Optional): Default: `None`, stage 1 is trained.
    """

    data: DataConfig
    run: RunConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    language: LanguageConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.language is not None and self.language.joint and self.language.keep_text:
            raise ValueError("language.keep_text must be False with language.joint, which has it anyway; got True")
