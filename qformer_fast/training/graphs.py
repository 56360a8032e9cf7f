"""Stage 1's forward and backward as CUDA graphs, for hosts that launch more slowly than the GPU runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qformer_fast.layout import PackedText, round_up
from qformer_fast.models.blip2_qformer import Blip2QFormer, Stage1Output
from qformer_fast.models.packing import GradientBuffers
from qformer_fast.training.captures import Capture, GraphedSteps, Shape, Where, put
from qformer_fast.training.sweeps import StepInputs, step_in_parts

SPARE_BUCKETS = 2
"""Room for negative captions beyond what was seen; a batch that needs more is captured again."""


class GraphedStage1(GraphedSteps):
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
        super().__init__(model, GradientBuffers(model.groups), dtype=dtype, bucket=bucket)
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
        text, text_rows, bucket = self._fit(image_embeds, input_ids, attention_mask)
        # compared where the names are: moving them here would wait for the device
        same_image = model.same_image(image_ids, batch, image_ids.device if isinstance(image_ids, Tensor) else "cpu")
        inputs = (image_embeds, text, same_image, scale)
        adds, zeros = self._prepare_gradients()
        while True:
            room = self._negative_rows.setdefault(text_rows, text_rows + SPARE_BUCKETS * bucket)
            sizes = image_embeds.shape, text_rows, 2 * bucket, room, text.max_length
            shape = Shape(*sizes, model.training, adds, model.qformer.gradient_checkpointing)
            state = torch.cuda.get_rng_state(device)
            capture = self._loaded(shape, inputs)
            self._zeroing.wait_stream(torch.cuda.current_stream())
            if zeros:
                with torch.cuda.stream(self._zeroing):
                    torch._foreach_zero_(zeros)
            negative_rows = capture.draw(self._zeroing)
            if negative_rows <= room:
                self._attach()
                return capture.finish()
            self._negative_rows[text_rows] = round_up(negative_rows, bucket) + SPARE_BUCKETS * bucket
            torch.cuda.set_rng_state(state, device)

    def _new_capture(self, *arguments) -> _StepCapture:
        return _StepCapture(*arguments)


class _StepCapture(Capture):
    """Graphs of :func:`qformer_fast.training.sweeps.step_in_parts`."""

    def _new_inputs(self, images: Tensor, text: PackedText) -> StepInputs:
        device, batch = images.device, len(images)
        return StepInputs(
            images=images,
            **self._captions(text),
            same_image=torch.empty(batch, batch, dtype=torch.bool, device=device),
            scale=torch.empty((), device=device),
            host_rows=torch.empty((), dtype=torch.int64, pin_memory=True),
            drawn=torch.cuda.Event(external=True),
        )

    def load(self, images: Tensor, text: PackedText, same_image: Tensor, scale: Tensor | float) -> None:
        self._load_pairs(images, text)
        put(self.inputs.same_image, same_image)
        self.inputs.scale.copy_(scale) if isinstance(scale, Tensor) else self.inputs.scale.fill_(scale)

    def record(self, where: Where) -> None:
        negative_rows = self.shape.negative_rows
        # captions of their own negatives have as many rows on any device
        own = torch.arange(self.shape.image_shape[0], device=self.inputs.images.device)

        def parts(gradients: GradientBuffers, negatives: tuple[Tensor, Tensor] | None) -> Iterator[Stage1Output | None]:
            return step_in_parts(self.model, self.inputs, negative_rows, gradients, negatives, add=self.shape.adds)

        self.graphs, (*_, self.out) = self._record(
            where, lambda scratch: parts(scratch, (own, own)), parts(self.gradients, None)
        )

    def draw(self, zeroing: torch.cuda.Stream) -> int:
        """Runs what may be run again, ``zeroing`` having filled gradients; returns how many rows the negative captions
        have, before it is done.
        """
        self.inputs.host_rows.fill_(-1)
        self.graphs[0].replay()
        torch.cuda.current_stream().wait_stream(zeroing)
        if not self.shape.adds:
            self.graphs[1].replay()
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
