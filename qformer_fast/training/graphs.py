"""Stage 1's forward and backward as CUDA graphs, for hosts that launch more slowly than the GPU runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qformer_fast.layout import PackedText
from qformer_fast.models.blip2_qformer import Blip2QFormer, Stage1Output, pairs_of

MAX_LENGTH_STEP = 16


class _Shape(NamedTuple):
    """What a set of graphs is captured for."""

    image_shape: torch.Size
    image_dtype: torch.dtype
    text_rows: int  # room for the captions
    negative_rows: int  # room for the negative captions
    max_length: int
    training: bool


class GraphedStage1:
    """Runs ``model`` forward and backward by replaying CUDA graphs; losses and gradients are those of the model.

    Graphs want fixed shapes, so text rows are filled up to multiples of ``bucket`` with captions that no loss reads.
    How many rows the negative captions have is known only when they are drawn: the step waits for that number while
    the captions' loss runs. Each new shape costs a capture; the graphs share one memory pool. Where
    a batch draws longer negatives than there is room for, the step is captured and run again with more room, from the
    same random state.

    A replay draws its own dropout and negatives from the device's default generator, as the model would.

    Args:
        model (Blip2QFormer): on a CUDA device. Its parameters stay where they are; moving or replacing them afterwards
            is not seen. Not a wrapper such as DDP, and without gradient checkpointing, which reads random states that
            a capture can't.
        dtype (torch.dtype, Optional): to autocast to. Default: `None`, no autocast.
        bucket (int): text rows that shapes are rounded up to. Default: 256.

    Raises:
        ValueError: the model is not on a CUDA device, gradient checkpointing is on, or a bucket below 1.
    """

    def __init__(self, model: Blip2QFormer, *, dtype: torch.dtype | None = None, bucket: int = 256):
        if model.temp.device.type != "cuda":
            raise ValueError(f"model must be on a CUDA device, got {model.temp.device}")
        if model.qformer.gradient_checkpointing:
            raise ValueError("model must have gradient checkpointing off: a capture can't read its random states")
        if bucket < 1:
            raise ValueError(f"bucket must be at least 1, got {bucket}")
        self.model = model
        self.dtype = dtype
        self.bucket = bucket
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._captures: dict[_Shape, _Capture] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # one stream for all captures: the pool hands a stream only memory that was freed on it
        self._stream = torch.cuda.Stream(model.temp.device)
        self._negative_rows: dict[int, int] = {}  # by text_rows

    def __call__(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Sequence[str | int] | Tensor | None = None,
        *,
        scale: Tensor | float = 1.0,
    ) -> Stage1Output:
        """Adds the gradients of ``scale`` times the loss to the parameters' ``grad``.

        Args:
            image_embeds (Tensor): (batch, tokens, encoder_hidden), without gradient.
            input_ids, attention_mask, image_ids: as :meth:`Blip2QFormer.forward` takes them; captions on the CPU cost
                no host sync.
            scale (Tensor or float): 0-dim, a loss scale or one over the accumulated passes. Default: 1.0.

        Returns:
            Stage1Output: detached.

        Raises:
            ValueError: as :meth:`Blip2QFormer.forward`, and for image tokens that require grad.
        """
        if image_embeds.requires_grad:
            raise ValueError("image_embeds must not require grad: the graphs make the parameters' gradients alone")
        model, device = self.model, self.model.temp.device
        batch = image_embeds.shape[0]
        text = model.pack_captions(input_ids, attention_mask, batch)
        same_image = model.same_image(image_ids, batch, device)
        max_length = -(-text.max_length // MAX_LENGTH_STEP) * MAX_LENGTH_STEP
        text = dataclasses.replace(text, max_length=max_length)
        text_rows = self._round_up(text.num_rows)
        inputs = (image_embeds, text, same_image, scale)
        self._attach_gradients()
        while True:
            room = self._negative_rows.setdefault(text_rows, text_rows + self.bucket)
            shape = _Shape(image_embeds.shape, image_embeds.dtype, text_rows, room, max_length, model.training)
            state = torch.cuda.get_rng_state(device)
            if shape not in self._captures:
                self._captures[shape] = self._capture(shape, inputs)
            capture = self._captures[shape]
            capture.load(*inputs)
            negative_rows = capture.draw()
            if negative_rows <= room:
                return capture.finish()
            self._negative_rows[text_rows] = self._round_up(negative_rows)
            torch.cuda.set_rng_state(state, device)

    def _round_up(self, rows: int) -> int:
        return -(-rows // self.bucket) * self.bucket

    def _attach_gradients(self) -> None:
        """Has every ``grad`` be the tensor that the graphs add to, whatever zero_grad or a user put in its place."""
        fresh = []
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is None:
                fresh.append(gradient)
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if fresh:
            torch._foreach_zero_(fresh)

    def _capture(self, shape: _Shape, inputs: tuple) -> _Capture:
        state = torch.cuda.get_rng_state(self.model.temp.device)
        capture = _Capture(_with_own_leaves(self.model), self.dtype, shape, inputs[1], self._gradients)
        capture.load(*inputs)
        with _no_garbage_collection():
            capture.record(self._pool, self._stream)
        torch.cuda.set_rng_state(state, self.model.temp.device)
        return capture


def _with_own_leaves(model: nn.Module) -> nn.Module:
    """The model once more, its parameters other leaves of autograd on the same memory.

    A loss of the model that is still alive keeps its leaves on the stream where it was computed. Backward then waits
    for that stream, which a capture on another one must not.
    """
    memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What is collected may free device memory or destroy graphs, which would end the capture at hand."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Capture:
    """Graphs of one shape, the tensors that they read, and the tensors that they write."""

    def __init__(self, model, dtype, shape: _Shape, text: PackedText, gradients):
        self.model, self.dtype, self.shape = model, dtype, shape
        self.parameters, self.gradients = [p for p in model.parameters() if p.requires_grad], gradients
        device, batch = model.temp.device, shape.image_shape[0]

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.images = torch.empty(shape.image_shape, dtype=shape.image_dtype, device=device)
        rows = shape.text_rows
        offsets = zeros(batch + text.fillers(rows) + 1)
        self.text = PackedText(zeros(rows), zeros(rows), offsets, shape.max_length)
        self.label_rows, self.labels = zeros(rows - batch), zeros(rows - batch)
        self.same_image = torch.empty(batch, batch, dtype=torch.bool, device=device)
        self.scale = torch.empty((), device=device)
        self.host_rows = torch.empty((), dtype=torch.int64, pin_memory=True)
        self.drawn = torch.cuda.Event()

    def load(self, images: Tensor, text: PackedText, same_image: Tensor, scale: Tensor | float) -> None:
        filled = text.select(torch.arange(len(text), device=text.offsets.device), self.shape.text_rows, fill=True)
        rows, labels = text.next_tokens()
        missing = len(self.labels) - len(labels)
        loads = (
            (self.images, images),
            (self.text.input_ids, filled.input_ids),
            (self.text.position_ids, filled.position_ids),
            (self.text.offsets, filled.offsets),
            (self.label_rows, torch.nn.functional.pad(rows, (0, missing))),
            (self.labels, torch.nn.functional.pad(labels, (0, missing), value=-100)),
            (self.same_image, same_image),
        )
        for place, given in loads:
            place.copy_(given.pin_memory() if given.device.type == "cpu" else given, non_blocking=True)
        self.scale.copy_(scale) if isinstance(scale, Tensor) else self.scale.fill_(scale)

    def record(self, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._autocast():
            # once without recording, sweep 2 with negatives that fit: Triton compiles, kernels are loaded, cuBLAS takes
            # its workspace
            first = self._first()
            self._draw(first)
            own = torch.arange(len(self.same_image), device=self.images.device)
            loss = first.loss_itc + self._caption_loss(first) + self._second(first, own, own)[0]
            found = torch.autograd.grad(loss * self.scale, self.parameters, allow_unused=True)
            self._add([torch.zeros_like(total) for total in self.gradients], found)
            del first, loss, found
        torch.cuda.current_stream().wait_stream(stream)
        self.graphs = [torch.cuda.CUDAGraph() for _ in range(3)]

        def recording(graph: torch.cuda.CUDAGraph) -> contextlib.ExitStack:
            stack = contextlib.ExitStack()
            stack.enter_context(torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"))
            stack.enter_context(self._autocast())
            return stack

        with recording(self.graphs[0]):
            first = self._first()
            self.negatives = self._draw(first)
        with recording(self.graphs[1]):
            loss_itg = self._caption_loss(first)
        with recording(self.graphs[2]):
            loss_itm, logits = self._second(first, *self.negatives)
            loss = first.loss_itc + loss_itm + loss_itg
            self._add(self.gradients, torch.autograd.grad(loss * self.scale, self.parameters, allow_unused=True))
        self.out = Stage1Output(
            loss=loss.detach(),
            loss_itc=first.loss_itc.detach(),
            loss_itm=loss_itm.detach(),
            loss_itg=loss_itg.detach(),
            sim_i2t=first.sim_i2t.detach(),
            sim_t2i=first.sim_t2i.detach(),
            itm_logits=logits.detach(),
            itm_labels=self.model.match_labels(len(self.same_image)),
            negatives=self.negatives,
        )

    def draw(self) -> int:
        """Runs up to the captions' loss; returns how many rows the negative captions have."""
        self.graphs[0].replay()
        self.drawn.record()
        self.graphs[1].replay()
        self.drawn.synchronize()
        return int(self.host_rows)

    def finish(self) -> Stage1Output:
        self.graphs[2].replay()
        out = dict(vars(self.out))
        negatives = tuple(index.clone() for index in out.pop("negatives"))
        return Stage1Output(**{name: x.clone() for name, x in out.items()}, negatives=negatives)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cuda", self.dtype, enabled=self.dtype is not None, cache_enabled=False)

    def _first(self):
        return self.model.first_sweep(self.images, self.text, self.same_image)

    def _draw(self, first) -> tuple[Tensor, Tensor]:
        negatives = self.model.draw_negatives(first, self.same_image)
        self.host_rows.copy_(self.text.lengths[negatives[1]].sum(), non_blocking=True)
        return negatives

    @staticmethod
    def _add(totals: list[Tensor], found: Sequence[Tensor | None]) -> None:
        pairs = [(total, g) for total, g in zip(totals, found, strict=True) if g is not None]
        torch._foreach_add_([total for total, _ in pairs], [g for _, g in pairs])

    def _caption_loss(self, first) -> Tensor:
        return self.model.caption_loss(first.itg_rows, self.label_rows, self.labels)

    def _second(self, first, image_index: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor]:
        num_rows = 2 * self.shape.text_rows + self.shape.negative_rows
        pairs = self.text.select(pairs_of(text_index), num_rows, fill=True)
        return self.model.second_sweep(first, pairs, image_index)
