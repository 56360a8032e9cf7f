"""Stage 1's forward and backward as CUDA graphs, for hosts that launch more slowly than the GPU runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qformer_fast import overlap
from qformer_fast.config import Checkpointing
from qformer_fast.layout import PackedText, SequenceLayout, room_for, round_up
from qformer_fast.models.blip2_qformer import Blip2QFormer, Contrast, Stage1Output, pairs_of
from qformer_fast.models.graphed import no_garbage_collection
from qformer_fast.models.image_kv import ImageKV
from qformer_fast.models.packing import BlockWeights, EncoderWeights, GradientBuffers, Group
from qformer_fast.ops._seeds import seeds_ahead
from qformer_fast.reference import standardized_width

MAX_LENGTH_STEP = 16
SPARE_BUCKETS = 2
"""Room for negative captions beyond what was seen; a batch that needs more is captured again."""


class _Shape(NamedTuple):
    """What a set of graphs is captured for."""

    image_shape: torch.Size
    text_rows: int  # room for the captions
    filler_rows: int  # of these at most, taken by no caption
    negative_rows: int  # room for the negative captions
    max_length: int
    training: bool
    adds: bool  # to gradients that are there
    checkpointing: Checkpointing


class GraphedStage1:
    """Runs ``model`` forward and backward by replaying CUDA graphs; losses and gradients are those of the model.

    Graphs want fixed shapes, so text rows are filled up to multiples of ``bucket`` with captions that no loss reads.
    How many rows the negative captions have is known only when they are drawn: the step waits for that number while
    the captions' loss and, where no gradients are there yet, sweep 1's backward run. Each new shape costs a capture,
    and another one where gradients accumulate; the graphs share one memory pool. Where a batch draws longer negatives
    than there is room for, the step is captured and run again with more room, from the same random state. So that
    captures end soon, a batch also takes a shape one bucket larger than its own, and what is larger than all before
    gets one bucket more. Where memory lacks for another shape, the earlier ones are given up.

    A replay draws its own dropout and negatives from the device's default generator, as the model would. During a
    capture the allocator's ``expandable_segments`` is on for the whole process, unless the environment says otherwise.

    Args:
        model (Blip2QFormer): on a CUDA device. Its parameters stay where they are; moving or replacing them afterwards
            is not seen. Not a wrapper such as DDP. Gradient checkpointing works with the kernels' dropout.
        dtype (torch.dtype, Optional): to autocast to. Default: `None`, no autocast.
        bucket (int, Optional): text rows that shapes are rounded up to. Default: `None`, half a row a caption and at
            least 32.

    Raises:
        ValueError: the model is not on a CUDA device, or a bucket below 1.
    """

    def __init__(self, model: Blip2QFormer, *, dtype: torch.dtype | None = None, bucket: int | None = None):
        if model.temp.device.type != "cuda":
            raise ValueError(f"model must be on a CUDA device, got {model.temp.device}")
        if bucket is not None and bucket < 1:
            raise ValueError(f"bucket must be at least 1, got {bucket}")
        self.model = model
        self.dtype = dtype
        self.bucket = bucket
        self._gradients = GradientBuffers(model.groups)
        written = {id(p) for group in written_groups(model) for p in group}
        attached = [(p, gradient) for p, gradient in self._gradients.of_parameters() if p.requires_grad]
        self._attached = [(p, gradient, id(p) in written) for p, gradient in attached]
        self._captures: dict[_Shape, _Capture] = {}
        self._images: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._text_rows: dict[tuple[torch.Size, int], set[int]] = {}  # by image shape and max_length
        self._pool = torch.cuda.graph_pool_handle()
        # the same streams for all captures: the pool hands a stream only memory that was freed on it
        self._stream = torch.cuda.Stream(model.temp.device, priority=-1)
        self._beside = overlap.Streams(model.temp.device)
        self._zeroing = torch.cuda.Stream(model.temp.device)
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
        # compared where the names are: moving them here would wait for the device
        same_image = model.same_image(image_ids, batch, image_ids.device if isinstance(image_ids, Tensor) else "cpu")
        max_length = -(-text.max_length // MAX_LENGTH_STEP) * MAX_LENGTH_STEP
        text = dataclasses.replace(text, max_length=max_length)
        bucket = self.bucket or max(32, batch // 2)
        known = self._text_rows.setdefault((image_embeds.shape, max_length), set())
        text_rows = room_for(text.num_rows, bucket, known)
        known.add(text_rows)
        inputs = (image_embeds, text, same_image, scale)
        adds, zeros = self._prepare_gradients()
        while True:
            room = self._negative_rows.setdefault(text_rows, text_rows + SPARE_BUCKETS * bucket)
            sizes = image_embeds.shape, text_rows, 2 * bucket, room, max_length
            shape = _Shape(*sizes, model.training, adds, model.qformer.gradient_checkpointing)
            state = torch.cuda.get_rng_state(device)
            if shape not in self._captures:
                self._captures[shape] = self._capture(shape, inputs)
            capture = self._captures[shape]
            capture.load(*inputs)
            self._zeroing.wait_stream(torch.cuda.current_stream())
            if zeros:
                with torch.cuda.stream(self._zeroing):
                    torch._foreach_zero_(zeros)
            negative_rows = capture.draw(self._zeroing)
            if negative_rows <= room:
                for parameter, gradient, _ in self._attached:
                    parameter.grad = gradient
                return capture.finish()
            self._negative_rows[text_rows] = round_up(negative_rows, bucket) + SPARE_BUCKETS * bucket
            torch.cuda.set_rng_state(state, device)

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

    def _capture(self, shape: _Shape, inputs: tuple) -> _Capture:
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

    def _try_to_capture(self, shape: _Shape, inputs: tuple) -> _Capture:
        state = torch.cuda.get_rng_state(self.model.temp.device)
        kind = shape.image_shape, self.dtype or inputs[0].dtype
        if kind not in self._images:
            *sizes, width = shape.image_shape
            images = torch.empty(*sizes, standardized_width(width), dtype=kind[1], device=self.model.temp.device)
            self._images[kind] = images
        model = _with_own_leaves(self.model)
        capture = _Capture(model, self.dtype, shape, self._images[kind], inputs[1], self._gradients)
        capture.load(*inputs)
        with no_garbage_collection(), _expandable_segments():
            capture.record(self._pool, self._stream, self._beside)
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


def _allocator_settings() -> str:
    """As they were last set, where this PyTorch says it."""
    return getattr(torch._C, "_accelerator_getAllocatorSettings", str)()


@contextlib.contextmanager
def _expandable_segments() -> Iterator[None]:
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


@dataclasses.dataclass(frozen=True, eq=False)
class StepInputs:
    """What a step reads; ``host_rows`` () int64 on the CPU is written: rows of the negative captions. Then ``drawn`` is
    recorded.

    ``images`` went through :meth:`Blip2QFormer.standardize`.
    """

    images: Tensor
    text: PackedText
    label_rows: Tensor
    labels: Tensor
    same_image: Tensor
    scale: Tensor
    host_rows: Tensor
    drawn: torch.cuda.Event | None = None


def written_groups(model: Blip2QFormer) -> list[Group]:
    """Of whose gradients :func:`step_in_parts` writes, without ``add``, each once before it adds to it."""
    return [*model.qformer.groups, tuple(model.ln_vision.parameters())]


def step_in_parts(
    model: Blip2QFormer,
    inputs: StepInputs,
    negative_rows: int,
    gradients: GradientBuffers,
    negatives: tuple[Tensor, Tensor] | None = None,
    *,
    add: bool = True,
) -> Iterator[Stage1Output | None]:
    """Sweep 1 and its losses, the draw of negatives included; sweep 1's backward; sweep 2 and its backward.

    Yields after each part, at last the output. ``gradients``, of ``model``'s parameters, are added to; without ``add``
    those of :func:`written_groups` are written. ``negatives`` may take the place of those drawn, for which there are
    ``negative_rows``.
    """
    kv_weights = model.qformer.kv_weights(model.ln_vision, gradients=gradients, add_gradients=add)
    made, weights = overlap.side_by_side(
        lambda: model.image_kv(inputs.images, kv_weights, standardized=True).buffer,
        lambda: model.qformer.encoder_weights(model.query_tokens, gradients, add_gradients=add),
    )
    image_kv = ImageKV(made.detach().requires_grad_(), gradient=torch.empty_like(made))
    seeds = 6 * model.config.num_hidden_layers + 1  # of a sweep: two of each sub-layer, and the embeddings'
    with seeds_ahead(seeds):
        first = model.first_sweep(image_kv, inputs.text, inputs.label_rows, weights)

    def contrast_and_pairs() -> tuple[Contrast, tuple[Tensor, Tensor], PackedText, SequenceLayout]:
        contrast = model.contrast(first, inputs.same_image)
        drawn = model.draw_negatives(contrast, inputs.same_image)
        inputs.host_rows.copy_(inputs.text.lengths[drawn[1]].sum(), non_blocking=True)
        if inputs.drawn is not None:
            inputs.drawn.record()
        image_index, text_index = negatives or drawn
        fillers = len(inputs.text) - len(text_index)
        fill = 2 * fillers * inputs.text.max_length + negative_rows
        pairs = inputs.text.select(pairs_of(text_index), 2 * inputs.text.num_rows + negative_rows, fill=fill)
        layout = model.pair_layout(pairs, image_index)
        layout.sequences_by_image(image_kv.num_images)
        return contrast, (image_index, text_index), pairs, layout

    # many small kernels beside few large ones
    loss_itg, (contrast, taken, pairs, layout) = overlap.side_by_side(
        lambda: model.caption_loss(first.itg_rows, inputs.labels, gradients), contrast_and_pairs
    )
    yield None

    own = [(parameter, total) for parameter, total in gradients.of_parameters() if parameter.requires_grad]
    totals = dict([(image_kv.buffer, image_kv.gradient), *own, *weights.leaves(), *kv_weights.leaves()])

    def backward(loss: Tensor, new: list[Tensor], grad_outputs: Tensor | None = None) -> None:
        """Gradients that autograd has, which kernels did not put there: written to the totals in ``new``, added to
        others.
        """
        found = torch.autograd.grad(loss, list(totals), grad_outputs, allow_unused=True)
        overlap.join()
        pairs = [(total, x) for total, x in zip(totals.values(), found, strict=True) if x is not None]
        is_new = {id(total) for total in new}
        for put, chosen in (
            (torch._foreach_copy_, [pair for pair in pairs if id(pair[0]) in is_new]),
            (torch._foreach_add_, [pair for pair in pairs if id(pair[0]) not in is_new]),
        ):
            if chosen:
                put(*map(list, zip(*chosen, strict=True)))

    def written(made_weights: BlockWeights | EncoderWeights) -> list[Tensor]:
        return [] if add else [total for _, total in made_weights.leaves()]

    backward((contrast.loss_itc + loss_itg) * inputs.scale, [image_kv.gradient, *written(weights)])
    yield None

    accumulating = dataclasses.replace(image_kv, accumulate=True)
    again = dataclasses.replace(first, image_kv=accumulating, weights=weights.adding())
    with seeds_ahead(seeds):
        loss_itm, logits = model.second_sweep(again, pairs, layout)
    backward(loss_itm * inputs.scale, [])
    backward(made, written(kv_weights), image_kv.gradient)
    yield Stage1Output(
        loss=(contrast.loss_itc + loss_itm + loss_itg).detach(),
        loss_itc=contrast.loss_itc.detach(),
        loss_itm=loss_itm.detach(),
        loss_itg=loss_itg.detach(),
        sim_i2t=contrast.sim_i2t.detach(),
        sim_t2i=contrast.sim_t2i.detach(),
        itm_logits=logits.detach(),
        itm_labels=model.match_labels(len(inputs.same_image)),
        negatives=taken,
    )


class _Capture:
    """Graphs of one shape, the tensors that they read, and the tensors that they write."""

    def __init__(self, model, dtype, shape: _Shape, images: Tensor, text: PackedText, gradients: GradientBuffers):
        self.model, self.dtype, self.shape = model, dtype, shape
        self.gradients = GradientBuffers(model.groups, gradients.buffers)
        device, batch, rows = model.temp.device, shape.image_shape[0], shape.text_rows

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.inputs = StepInputs(
            images=images,
            text=PackedText(
                zeros(rows), zeros(rows), zeros(batch + text.fillers(shape.filler_rows) + 1), shape.max_length
            ),
            label_rows=zeros(rows - batch),
            labels=zeros(rows - batch),
            same_image=torch.empty(batch, batch, dtype=torch.bool, device=device),
            scale=torch.empty((), device=device),
            host_rows=torch.empty((), dtype=torch.int64, pin_memory=True),
            drawn=torch.cuda.Event(external=True),
        )

    def load(self, images: Tensor, text: PackedText, same_image: Tensor, scale: Tensor | float) -> None:
        filled = text.filled(self.shape.text_rows, self.shape.filler_rows)
        rows, labels = text.next_tokens()
        inputs = self.inputs
        missing = len(inputs.labels) - len(labels)
        if images.device.type == "cpu":
            images = images.pin_memory()
        self.model.standardize(images.to(inputs.images.device, non_blocking=True), out=inputs.images)
        loads = (
            (inputs.text.input_ids, filled.input_ids),
            (inputs.text.position_ids, filled.position_ids),
            (inputs.text.offsets, filled.offsets),
            (inputs.label_rows, torch.nn.functional.pad(rows, (0, missing))),
            (inputs.labels, torch.nn.functional.pad(labels, (0, missing), value=-100)),
            (inputs.same_image, same_image),
        )
        for place, given in loads:
            place.copy_(given.pin_memory() if given.device.type == "cpu" else given, non_blocking=True)
        inputs.scale.copy_(scale) if isinstance(scale, Tensor) else inputs.scale.fill_(scale)

    def record(self, pool: tuple[int, int], stream: torch.cuda.Stream, beside: overlap.Streams) -> None:
        negative_rows = self.shape.negative_rows
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._autocast():
            # once without recording: Triton compiles, kernels are loaded, cuBLAS takes its workspace
            own = torch.arange(self.shape.image_shape[0], device=self.inputs.images.device)
            scratch = GradientBuffers(self.gradients.groups)
            with overlap.overlapping(beside):
                steps = step_in_parts(
                    self.model, self.inputs, negative_rows, scratch, negatives=(own, own), add=self.shape.adds
                )
                for _ in steps:
                    pass
            del scratch
        torch.cuda.current_stream().wait_stream(stream)
        self.graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
        parts = step_in_parts(self.model, self.inputs, negative_rows, self.gradients, add=self.shape.adds)
        for graph in self.graphs:
            with (
                torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
                self._autocast(),
                overlap.overlapping(beside),
            ):
                self.out = next(parts)

    def draw(self, zeroing: torch.cuda.Stream) -> int:
        """Runs what may be run again, ``zeroing`` having filled gradients; returns how many rows the negative captions
        have, before it is done.
        """
        self.inputs.host_rows.fill_(-1)
        self.graphs[0].replay()
        torch.cuda.current_stream().wait_stream(zeroing)
        if not self.shape.adds:
            self.graphs[1].replay()
        # the event may still be an earlier replay's
        while (negative_rows := int(self.inputs.host_rows)) < 0:
            self.inputs.drawn.synchronize()
        return negative_rows

    def finish(self) -> Stage1Output:
        """Runs the rest."""
        if self.shape.adds:
            self.graphs[1].replay()
        self.graphs[2].replay()
        out = {name: x for name, x in vars(self.out).items() if x is not None}
        negatives = tuple(index.clone() for index in out.pop("negatives"))
        return Stage1Output(**{name: x.clone() for name, x in out.items()}, negatives=negatives)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cuda", self.dtype, enabled=self.dtype is not None, cache_enabled=False)
