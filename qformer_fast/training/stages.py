"""What differs between the models that the loop trains: inputs, losses and metrics."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qformer_fast.data.batches import Batch, ImageTextDataset, LanguageBatch, LanguageDataset, PairDataset
from qformer_fast.data.language import LanguageText
from qformer_fast.integrations.checkpoints import checksum
from qformer_fast.models.blip2_joint import Blip2Joint
from qformer_fast.models.blip2_opt import Blip2OPT, Stage2Output
from qformer_fast.models.blip2_qformer import Blip2QFormer, Stage1Output
from qformer_fast.models.distributed import DistributedStage1, RanksOutput
from qformer_fast.ranks import Ranks
from qformer_fast.training.config import RunConfig
from qformer_fast.training.graphs import GraphedStage1
from qformer_fast.training.graphs_over_ranks import GraphedRanks
from qformer_fast.training.profile import Profile

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
RETRIEVAL = ("r1_i2t", "r1_t2i", "itm_accuracy")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


class Stage(ABC):
    """How the loop trains one kind of model.

    Args:
        model (nn.Module): on its device. Where several ranks train, it is wrapped in ``DistributedDataParallel``, or
            their CUDA graphs average its gradients.
        dataset (ImageTextDataset): what its batches come from.
        run (RunConfig): precision and graphs.

    ``scales_loss`` says whether gradients pass through fp16, where small ones would be lost.

    Raises:
        ValueError: a data set for another kind of model, CUDA graphs where there are none, a kind of model that one
            process alone trains.
    """

    dataset_class: ClassVar[type[ImageTextDataset]]
    losses: ClassVar[tuple[str, ...]]
    """What the loss is the sum of, or the loss itself: named where it is not finite, and shown beside the progress."""
    metrics: ClassVar[tuple[str, ...]]
    """What :meth:`step` measures."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """0-dim parameters that the log shows."""
    has_graphs: ClassVar[bool] = False
    has_ranks: ClassVar[bool] = True

    def __init__(self, model: nn.Module, dataset: ImageTextDataset, run: RunConfig):
        name = type(model).__name__
        if not isinstance(dataset, self.dataset_class):
            expected, got = self.dataset_class.__name__, type(dataset).__name__
            raise ValueError(f"dataset must be a {expected} for a {name}, got a {got}")
        if run.cuda_graphs and not self.has_graphs:
            raise ValueError(f"run.cuda_graphs must be False for a {name}, since they are stage 1's; got True")
        self.model, self.run = model, run
        self.device = next(model.parameters()).device
        self.ranks = Ranks.current()
        self.trained: nn.Module = model
        if not self.ranks.alone:
            if not self.has_ranks:
                raise ValueError(f"a {name} needs a run of one process, got {self.ranks.world_size} of them")
            if not run.cuda_graphs:
                self.trained = DistributedDataParallel(self.over_ranks(model))
        self.scales_loss = run.precision == "fp16"

    def over_ranks(self, model: nn.Module) -> nn.Module:
        """What the ranks run of ``model``, whose loss has the mean over them that is wanted."""
        return model

    def watch(self, profile: Profile) -> None:
        """Has the ranks' communication counted."""
        profile.watch(self.trained)

    def step(self, images: Tensor, batch: Any, scale: Tensor, *, last: bool = True) -> Tensor:
        """Forward, and backward of ``scale`` times the loss; the ranks' gradients are averaged in the ``last`` one.

        Returns:
            Tensor: (len(metrics),) fp32.
        """
        with contextlib.nullcontext() if last or self.ranks.alone else self.trained.no_sync():
            with autocast(self.device, self.run.precision):
                out = self.forward(images, batch)
            (out.loss * scale).backward()
        return self.measure(out, batch)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have the same, beside what all runs must."""
        return {}

    @abstractmethod
    def forward(self, images: Tensor, batch: Any) -> Any:
        """The model's output, with a ``loss``."""

    @abstractmethod
    def measure(self, out: Any, batch: Any) -> Tensor:
        """The values of ``metrics``."""


class Stage1(Stage):
    """Contrast, matching and captions on pairs."""

    dataset_class = PairDataset
    losses = ("loss_itc", "loss_itm", "loss_itg")
    metrics = ("loss", *losses, *RETRIEVAL)
    scalars = ("temp",)
    has_graphs = True

    def __init__(self, model: Blip2QFormer, dataset: ImageTextDataset, run: RunConfig):
        super().__init__(model, dataset, run)
        self.graphed: GraphedStage1 | GraphedRanks | None = None
        if run.cuda_graphs:
            dtype = AUTOCAST.get(run.precision)
            if self.ranks.alone:
                self.graphed = GraphedStage1(model, dtype=dtype)
            else:
                self.graphed = GraphedRanks(self.over_ranks(model), dtype=dtype, timeout=run.timeout)

    def over_ranks(self, model: nn.Module) -> nn.Module:
        return DistributedStage1(model)

    def watch(self, profile: Profile) -> None:
        if self.graphed is None:
            super().watch(profile)
        else:
            self.graphed.waiting = functools.partial(profile.part, "communication")

    def step(self, images: Tensor, batch: Batch, scale: Tensor, *, last: bool = True) -> Tensor:
        if self.graphed is None:
            return super().step(images, batch, scale, last=last)
        inputs = images, batch.input_ids, batch.attention_mask, batch.image_ids
        if isinstance(self.graphed, GraphedRanks):
            out = self.graphed(*inputs, scale=scale, average=last)
        else:
            out = self.graphed(*inputs, scale=scale)
        return self.measure(out, batch)

    def forward(self, images: Tensor, batch: Batch) -> Stage1Output:
        return self.trained(images, batch.input_ids, batch.attention_mask, batch.image_ids)

    def measure(self, out: Stage1Output, batch: Batch) -> Tensor:
        """A retrieval counts when it shows the same image."""
        image_ids = batch.image_ids.to(self.device, non_blocking=True)

        def recall(similarity: Tensor) -> Tensor:
            nearest = similarity.argmax(1)
            if isinstance(out, RanksOutput):
                return out.same_image.gather(1, nearest[:, None]).float().mean()
            return (image_ids[nearest] == image_ids).float().mean()

        # a rank may match more or fewer pairs than three an image; all of them have as many
        accuracy = (out.itm_logits.argmax(1) == out.itm_labels).float().sum() / (3 * len(image_ids))
        losses = [getattr(out, name).detach().float() for name in ("loss", *self.losses)]
        return torch.stack([*losses, recall(out.sim_i2t), recall(out.sim_t2i), accuracy])


class LanguageStage(Stage):
    """With a frozen language model, on examples."""

    dataset_class = LanguageDataset

    def __init__(self, model: Blip2OPT | Blip2Joint, dataset: LanguageDataset, run: RunConfig):
        super().__init__(model, dataset, run)
        self.dataset, self.language_model = dataset, model.language_projection.language_model
        self.scales_loss |= self.language_model.dtype == torch.float16

    def identity(self) -> dict[str, Any]:
        weights = checksum(self.language_model.state_dict())
        return {"language_weights": weights, "examples": checksum(self.dataset.content)}


class Stage2(LanguageStage):
    """A frozen language model's loss on examples."""

    losses = metrics = ("loss",)

    def __init__(self, model: Blip2OPT, dataset: LanguageDataset, run: RunConfig):
        super().__init__(model, dataset, run)
        if dataset.has_prompts and not model.config.use_qformer_text_input:
            raise ValueError("dataset must have no prompts for the Q-Former of a model without a text branch")
        model.qformer_prompts, model.text_end = dataset.has_prompts, dataset.language.end

    def forward(self, images: Tensor, batch: LanguageBatch) -> Stage2Output:
        text = batch.input_ids, batch.attention_mask, batch.labels
        return self.trained(images, *text, batch.qformer_input_ids, batch.qformer_attention_mask)

    def measure(self, out: Stage2Output, batch: LanguageBatch) -> Tensor:
        return out.loss.detach().float()[None]


class Joint(LanguageStage, Stage1):
    """Both stages on examples, whose texts also come as stage 1's captions."""

    losses = (*Stage1.losses, "loss_lm")
    metrics = ("loss", *losses, *RETRIEVAL)
    has_graphs = False
    has_ranks = False

    def __init__(self, model: Blip2Joint, dataset: LanguageDataset, run: RunConfig):
        super().__init__(model, dataset, run)
        if not dataset.has_captions:
            raise ValueError("dataset must be given a captions_tokenizer for a Blip2Joint, got None")

    def forward(self, images: Tensor, batch: LanguageBatch) -> Stage1Output:
        text = LanguageText(batch.input_ids, batch.attention_mask, batch.labels)
        return self.model(images, batch.caption_input_ids, batch.caption_attention_mask, text, batch.image_ids)


def build_stage(model: nn.Module, dataset: ImageTextDataset, run: RunConfig) -> Stage:
    """The stage of a model's kind.

    Raises:
        ValueError: a model that the loop does not train, and what :class:`Stage` refuses.
    """
    for kind, stage in ((Blip2Joint, Joint), (Blip2OPT, Stage2), (Blip2QFormer, Stage1)):
        if isinstance(model, kind):
            return stage(model, dataset, run)
    raise ValueError(f"model must be a Blip2QFormer, Blip2OPT or Blip2Joint, got a {type(model).__name__}")
