"""Stage 1's step with its gradients in tensors of the step's own, in the parts that CUDA graphs are captured of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qformer_fast import overlap
from qformer_fast.layout import PackedText, SequenceLayout
from qformer_fast.models.blip2_qformer import Blip2QFormer, Contrast, FirstSweep, Stage1Output, pairs_of
from qformer_fast.models.image_kv import ImageKV
from qformer_fast.models.packing import EncoderWeights, GradientBuffers, Group
from qformer_fast.ops._seeds import seeds_ahead


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


@dataclasses.dataclass(frozen=True, eq=False)
class SweepInputs:
    """What sweep 1 reads over ranks, and backward; the gradients of ITC's features, of ITG's mean and of ITM's sum come
    from outside. ``images`` as of :class:`StepInputs`.
    """

    images: Tensor
    text: PackedText
    label_rows: Tensor
    labels: Tensor
    feature_gradients: tuple[Tensor, Tensor]
    itg_gradient: Tensor
    itm_gradient: Tensor


def written_groups(model: Blip2QFormer) -> list[Group]:
    """Of whose gradients :func:`step_in_parts` writes, without ``add``, each once before it adds to it."""
    return [*model.qformer.groups, tuple(model.ln_vision.parameters())]


def seeds_of_sweep(model: Blip2QFormer) -> int:
    """Two of each sub-layer, and the embeddings'."""
    return 6 * model.config.num_hidden_layers + 1


def sweep(
    model: Blip2QFormer, inputs: StepInputs | SweepInputs, gradients: GradientBuffers, *, add: bool
) -> tuple[list[Tensor], FirstSweep]:
    """Sweep 1 on a leaf of the images' keys and values: the weights that made these, and what sweep 1 leaves."""

    @torch.no_grad()
    def keys_and_values() -> tuple[list[Tensor], Tensor]:
        weights = model.qformer.kv_weights(model.ln_vision)
        return weights, model.image_kv(inputs.images, weights, standardized=True).buffer

    (kv_weights, made), weights = overlap.side_by_side(
        keys_and_values, lambda: model.qformer.encoder_weights(model.query_tokens, gradients, add_gradients=add)
    )
    image_kv = ImageKV(made.requires_grad_(), gradient=torch.empty_like(made))
    with seeds_ahead(seeds_of_sweep(model)):
        return kv_weights, model.first_sweep(image_kv, inputs.text, inputs.label_rows, weights)


class Totals:
    """Where a step's gradients go that autograd has, which kernels do not put there themselves.

    Args:
        gradients (GradientBuffers): of the model's parameters.
        image_kv (ImageKV): with its gradient.
        weights (EncoderWeights): of which kernels write gradients too.
        add (bool): False: what kernels write, and these are given, is new in the step.
    """

    def __init__(self, gradients: GradientBuffers, image_kv: ImageKV, weights: EncoderWeights, *, add: bool):
        own = [(parameter, total) for parameter, total in gradients.of_parameters() if parameter.requires_grad]
        self._totals = dict([(image_kv.buffer, image_kv.gradient), *own, *weights.leaves()])
        self._new = [image_kv.gradient, *([] if add else [total for _, total in weights.leaves()])]

    def backward(
        self,
        outputs: list[Tensor],
        grad_outputs: list[Tensor] | None = None,
        *,
        first: bool = False,
        also: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Gradients of the outputs are added to the totals, or by a step's ``first`` backward written to those that are
        new in it. Those of ``also`` are returned, and where there are no others, what was left aside is not waited for.
        """
        inputs = [*also, *self._totals]
        found = torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)
        returned, found = found[: len(also)], found[len(also) :]
        pairs = [(total, x) for total, x in zip(self._totals.values(), found, strict=True) if x is not None]
        # of a part of the layers the next part's kernels may go on beside what was left aside
        if pairs or not also:
            overlap.join()
        is_new = {id(total) for total in self._new} if first else set()
        for put, chosen in (
            (torch._foreach_copy_, [pair for pair in pairs if id(pair[0]) in is_new]),
            (torch._foreach_add_, [pair for pair in pairs if id(pair[0]) not in is_new]),
        ):
            if chosen:
                put(*map(list, zip(*chosen, strict=True)))
        return returned


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
    kv_weights, first = sweep(model, inputs, gradients, add=add)
    image_kv, weights, seeds = first.image_kv, first.weights, seeds_of_sweep(model)

    def contrast_and_pairs() -> tuple[Contrast, tuple[Tensor, Tensor], PackedText, SequenceLayout]:
        contrast = model.contrast(model.features(first), inputs.same_image)
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

    totals = Totals(gradients, image_kv, weights, add=add)
    totals.backward([(contrast.loss_itc + loss_itg) * inputs.scale], first=True)
    yield None

    with seeds_ahead(seeds):
        loss_itm, logits = model.second_sweep(first.again(), pairs, layout)
    totals.backward([loss_itm * inputs.scale])
    parts = model.qformer.image_kv_backward(
        inputs.images, image_kv.gradient, norm=model.ln_vision, weights=kv_weights, gradients=gradients, add=add
    )
    for _ in parts:
        pass
    yield Stage1Output(
        loss=(contrast.loss_itc + loss_itm + loss_itg).detach(),
        loss_itc=contrast.loss_itc.detach(),
        loss_itm=loss_itm.detach(),
        loss_itg=loss_itg.detach(),
        sim_i2t=contrast.sim_i2t,
        sim_t2i=contrast.sim_t2i,
        itm_logits=logits.detach(),
        itm_labels=model.match_labels(len(inputs.same_image)),
        negatives=taken,
    )
