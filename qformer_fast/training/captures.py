"""What CUDA graphs of stage 1's steps have in common, in one process and over ranks: shapes, inputs, gradients, and how
they are recorded.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qformer_fast import overlap
from qformer_fast.config import Checkpointing
from qformer_fast.layout import PackedText, room_for, round_up
from qformer_fast.models.blip2_qformer import Blip2QFormer
from qformer_fast.models.graphed import no_garbage_collection
from qformer_fast.models.packing import GradientBuffers
from qformer_fast.reference import standardized_width
from qformer_fast.training.sweeps import written_groups

MAX_LENGTH_STEP = 16


class Shape(NamedTuple):
    """What a set of graphs is captured for."""

    image_shape: torch.Size
    text_rows: int  # room for the captions
    filler_rows: int  # of these at most, taken by no caption
    negative_rows: int  # room for the negative captions
    max_length: int
    training: bool
    adds: bool  # to gradients that are there
    checkpointing: Checkpointing


class Where(NamedTuple):
    """How graphs are recorded: from which memory, and on which streams."""

    pool: tuple[int, int]
    stream: torch.cuda.Stream
    beside: overlap.Streams


class GraphedSteps(ABC):
    """Steps of ``model`` by replaying captures, one of each shape.

    Args:
        model, dtype, bucket: as of :class:`qformer_fast.training.graphs.GraphedStage1`.
        gradients (GradientBuffers): of ``model.groups``.

    Raises:
        ValueError: as of :class:`qformer_fast.training.graphs.GraphedStage1`.
    """

    def __init__(
        self, model: Blip2QFormer, gradients: GradientBuffers, *, dtype: torch.dtype | None, bucket: int | None
    ):
        if model.temp.device.type != "cuda":
            raise ValueError(f"model must be on a CUDA device, got {model.temp.device}")
        if bucket is not None and bucket < 1:
            raise ValueError(f"bucket must be at least 1, got {bucket}")
        self.model = model
        self.dtype = dtype
        self.bucket = bucket
        self._gradients = gradients
        written = {id(p) for group in written_groups(model) for p in group}
        attached = [(p, gradient) for p, gradient in gradients.of_parameters() if p.requires_grad]
        self._attached = [(p, gradient, id(p) in written) for p, gradient in attached]
        self._captures: dict[Shape, Capture] = {}
        self._images: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._text_rows: dict[tuple[torch.Size, int], set[int]] = {}  # by image shape and max_length
        self._pool = torch.cuda.graph_pool_handle()
        # the same streams for all captures: the pool hands a stream only memory that was freed on it
        self._stream = torch.cuda.Stream(model.temp.device, priority=-1)
        self._beside = overlap.Streams(model.temp.device)

    @abstractmethod
    def _new_capture(self, *arguments: Any) -> Capture:
        """Of :class:`Capture`'s arguments, one that is not recorded yet."""

    def _fit(
        self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[PackedText, int, int]:
        """The captions, the room that a capture has for their rows, and the bucket."""
        batch = image_embeds.shape[0]
        text = self.model.pack_captions(input_ids, attention_mask, batch)
        text = dataclasses.replace(text, max_length=round_up(text.max_length, MAX_LENGTH_STEP))
        bucket = self.bucket or max(32, batch // 2)
        known = self._text_rows.setdefault((image_embeds.shape, text.max_length), set())
        text_rows = room_for(text.num_rows, bucket, known)
        known.add(text_rows)
        return text, text_rows, bucket

    def _loaded(self, shape: Shape, inputs: tuple) -> Capture:
        if shape not in self._captures:
            self._captures[shape] = self._capture(shape, inputs)
        capture = self._captures[shape]
        capture.load(*inputs)
        return capture

    def _prepare_gradients(self) -> tuple[bool, list[Tensor]]:
        """Copies to the graphs' gradients what a user put in their place.

        Returns:
            tuple: whether there are gradients to add to, and the tensors that must be zero for the graphs.
        """
        adds = any(parameter.grad is not None for parameter, *_ in self._attached)
        zeros = []
        for parameter, gradient, is_written in self._attached:
            if parameter.grad is None:
                zeros += [gradient] if adds or not is_written else []
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
        return adds, zeros

    def _capture(self, shape: Shape, inputs: tuple) -> Capture:
        try:
            return self._try_to_capture(shape, inputs)
        except torch.OutOfMemoryError:
            if not self._captures:
                raise
        self._captures.clear()
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        torch.cuda.empty_cache()
        return self._try_to_capture(shape, inputs)

    def _try_to_capture(self, shape: Shape, inputs: tuple) -> Capture:
        state = torch.cuda.get_rng_state(self.model.temp.device)
        kind = shape.image_shape, self.dtype or inputs[0].dtype
        if kind not in self._images:
            *sizes, width = shape.image_shape
            images = torch.empty(*sizes, standardized_width(width), dtype=kind[1], device=self.model.temp.device)
            self._images[kind] = images
        model = _with_own_leaves(self.model)
        capture = self._new_capture(model, self.dtype, shape, self._images[kind], inputs[1], self._gradients)
        capture.load(*inputs)
        with no_garbage_collection(), expandable_segments():
            capture.record(Where(self._pool, self._stream, self._beside))
        torch.cuda.set_rng_state(state, self.model.temp.device)
        return capture

    def _attach(self) -> None:
        for parameter, gradient, _ in self._attached:
            parameter.grad = gradient


class Capture(ABC):
    """Graphs of one shape, the tensors that they read, and the tensors that they write.

    Args:
        model (Blip2QFormer): with leaves of its own on the parameters' memory.
        dtype (torch.dtype, Optional): to autocast to.
        images (Tensor): for standardized tokens, which captures share.
        text (PackedText): captions like those that are loaded later.
        gradients (GradientBuffers): of the parameters.
    """

    def __init__(
        self,
        model: Blip2QFormer,
        dtype: torch.dtype | None,
        shape: Shape,
        images: Tensor,
        text: PackedText,
        gradients: GradientBuffers,
    ):
        self.model, self.dtype, self.shape = model, dtype, shape
        self.gradients = GradientBuffers(model.groups, gradients.buffers)
        self.inputs = self._new_inputs(images, text)

    @abstractmethod
    def _new_inputs(self, images: Tensor, text: PackedText) -> Any:
        """Tensors that the graphs read, with :meth:`_captions` of ``text``."""

    @abstractmethod
    def load(self, *inputs: Any) -> None:
        """Puts a step's inputs where the graphs read them."""

    @abstractmethod
    def record(self, where: Where) -> None:
        """Captures the graphs."""

    def _captions(self, text: PackedText) -> dict[str, Any]:
        """Room for captions like ``text``."""
        batch, rows = self.shape.image_shape[0], self.shape.text_rows

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=self.model.temp.device)

        offsets = zeros(batch + text.fillers(self.shape.filler_rows) + 1)
        packed = PackedText(zeros(rows), zeros(rows), offsets, self.shape.max_length)
        return {"text": packed, "label_rows": zeros(rows - batch), "labels": zeros(rows - batch)}

    def _load_pairs(self, images: Tensor, text: PackedText) -> None:
        filled = text.filled(self.shape.text_rows, self.shape.filler_rows)
        rows, labels = text.next_tokens()
        inputs = self.inputs
        missing = len(inputs.labels) - len(labels)
        if images.device.type == "cpu":
            images = images.pin_memory()
        self.model.standardize(images.to(inputs.images.device, non_blocking=True), out=inputs.images)
        put(inputs.text.input_ids, filled.input_ids)
        put(inputs.text.position_ids, filled.position_ids)
        put(inputs.text.offsets, filled.offsets)
        put(inputs.label_rows, torch.nn.functional.pad(rows, (0, missing)))
        put(inputs.labels, torch.nn.functional.pad(labels, (0, missing), value=-100))

    def _record(
        self,
        where: Where,
        once: Callable[[GradientBuffers], Iterator[Any]],
        parts: Iterator[Any],
    ) -> tuple[list[torch.cuda.CUDAGraph], list[Any]]:
        """A graph of each part, and what they give; ``once`` gives as many, which run first as they come."""
        pool, stream, beside = where
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.autocast():
            # without recording: Triton compiles, kernels are loaded, cuBLAS takes its workspace
            scratch = GradientBuffers(self.gradients.groups)
            with overlap.overlapping(beside):
                count = sum(1 for _ in once(scratch))
            del scratch
        torch.cuda.current_stream().wait_stream(stream)
        graphs, given = [torch.cuda.CUDAGraph() for _ in range(count)], []
        for graph in graphs:
            with (
                torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
                self.autocast(),
                overlap.overlapping(beside),
            ):
                given.append(next(parts))
        return graphs, given

    def autocast(self) -> torch.autocast:
        return torch.autocast("cuda", self.dtype, enabled=self.dtype is not None, cache_enabled=False)


def put(place: Tensor, given: Tensor) -> None:
    place.copy_(given.pin_memory() if given.device.type == "cpu" else given, non_blocking=True)


def _with_own_leaves(model: nn.Module) -> nn.Module:
    """The model once more, its parameters other leaves of autograd on the same memory.

    A loss of the model that is still alive keeps its leaves on the stream where it was computed. Backward then waits
    for that stream, which a capture on another one must not.
    """
    memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _allocator_settings() -> str:
    """As they were last set, where this PyTorch says it."""
    return getattr(torch._C, "_accelerator_getAllocatorSettings", str)()


@contextlib.contextmanager
def expandable_segments() -> Iterator[None]:
    """The allocator takes memory as ranges that grow; segments of one size each leave a sixth of a pool unused. Whoever
    has chosen in the environment, or has turned it on, keeps the choice.
    """
    environment = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    given = _allocator_settings() or environment
    if "expandable_segments" in environment or "expandable_segments:True" in given:
        yield
        return
    options = [option for option in given.split(",") if option and not option.startswith("expandable_segments")]
    # all options at once, since those that are not named fall back to their defaults
    torch._C._accelerator_setAllocatorSettings(",".join([*options, "expandable_segments:True"]))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(",".join([*options, "expandable_segments:False"]))
