"""Stage 1 over ranks with both sweeps as CUDA graphs.

What ranks exchange runs as it comes, between graphs: no collective is captured, so each rank captures what its own
captions and pairs need. Events in sweep 2's graph tell when its backward is done with some layers: their gradients are
averaged over the ranks while the next ones' are made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from qformer_fast import overlap
from qformer_fast.layout import PackedText, room_for, round_up
from qformer_fast.models.blip2_qformer import Blip2QFormer
from qformer_fast.models.distributed import (
    DistributedStage1,
    MatchInputs,
    MatchRoom,
    Pairs,
    RanksOutput,
    match,
)
from qformer_fast.models.graphed import no_garbage_collection
from qformer_fast.models.packing import GradientBuffers
from qformer_fast.ops._seeds import seeds_ahead
from qformer_fast.training.averaging import averaging_over
from qformer_fast.training.captures import Capture, GraphedSteps, Shape, Where, expandable_segments
from qformer_fast.training.sweeps import SweepInputs, Totals, seeds_of_sweep, sweep

# called with each number of :func:`segments` when its gradients are done for the current stream
Done = Callable[[int], None]


class Sweeps(Protocol):
    """A rank's sweeps, in this order.

    Args:
        matched (tuple): what :func:`match` gave in sweep 2, until another step.
    """

    matched: tuple[Tensor, Tensor]

    def first(self) -> tuple[Tensor, Tensor]:
        """Sweep 1, and ITC's features of the rank's pairs."""

    def captions(self) -> Tensor:
        """ITG's mean over the rank's tokens."""

    def first_backward(self) -> None:
        """From the gradients in its :class:`SweepInputs`."""

    def room(self, pairs: int, text_rows: int, max_length: int) -> MatchRoom | None:
        """Which the pairs are to be filled up to."""

    def second(self, given: MatchInputs, done: Done) -> None:
        """Sweep 2, its backward, and that of the product that made the images' keys and values."""


def cut_layers(layers: int) -> list[int]:
    """Before which layers sweep 2's backward is cut, the first cut first: the less is left to do, the less is averaged
    behind it.
    """
    return list(dict.fromkeys(layers >> i for i in (1, 2, 3) if layers >> i > 0))


def segments(model: Blip2QFormer) -> list[int]:
    """Behind which segment of sweep 2's backward the gradients of each of the model's groups are done: one of some
    layers, or that of the embeddings, or behind that one of the images' keys and values (:attr:`QFormer.kv_parts`).
    """
    qformer, cuts = model.qformer, cut_layers(model.config.num_hidden_layers)
    found = {
        id(group[0]): sum(number < cut for cut in cuts)
        for number, layer in enumerate(qformer.encoder.layer)
        for groups in layer.groups.values()
        for group in groups
    }
    norm = [(p,) for p in model.ln_vision.parameters()]  # done with the last part
    for number, part in enumerate(qformer.kv_parts, len(cuts) + 1):
        found |= {id(group[0]): number for group in (*qformer.kv_groups(part), *norm)}
    return [found.get(id(group[0]), len(cuts)) for group in model.groups]


class SweepsAsTheyCome:
    """:class:`Sweeps` without graphs; gradients are added to ``gradients``, or without ``add`` written as
    :func:`qformer_fast.training.sweeps.step_in_parts` writes them. What :mod:`qformer_fast.overlap` has left aside may
    not be done when ``done`` is called, which :func:`overlap.mark` knows of.
    """

    def __init__(self, model: Blip2QFormer, inputs: SweepInputs, gradients: GradientBuffers, *, add: bool = True):
        self.model, self.inputs, self.gradients, self.add = model, inputs, gradients, add

    def first(self) -> tuple[Tensor, Tensor]:
        self._kv_weights, swept = sweep(self.model, self.inputs, self.gradients, add=self.add)
        self._swept, self._features = swept, self.model.features(swept)
        self._totals = Totals(self.gradients, swept.image_kv, swept.weights, add=self.add)
        return tuple(x.detach() for x in self._features)

    def captions(self) -> Tensor:
        self._loss_itg = self.model.caption_loss(self._swept.itg_rows, self.inputs.labels, self.gradients)
        return self._loss_itg.detach()

    def first_backward(self) -> None:
        self._totals.backward(
            [*self._features, self._loss_itg],
            [*self.inputs.feature_gradients, self.inputs.itg_gradient],
            first=True,
        )

    def room(self, pairs: int, text_rows: int, max_length: int) -> None:
        return None

    def second(self, given: MatchInputs, done: Done) -> None:
        layers = cut_layers(self.model.config.num_hidden_layers)
        cuts: list[tuple[Tensor, Tensor]] = []

        def at_layer(layer: int, rows: Tensor) -> Tensor:
            if layer not in layers:
                return rows
            cuts.append((rows, rows.detach().requires_grad_()))
            return cuts[-1][1]

        again = self._swept.again()
        with seeds_ahead(seeds_of_sweep(self.model)):
            output, logits = match(self.model, again.image_kv, again.weights, given, at_layer)
        self.matched, gradient = (output.detach(), logits.detach()), self.inputs.itm_gradient
        for segment, (rows, leaf) in enumerate(reversed(cuts)):
            (gradient,) = self._totals.backward([output], [gradient], also=[leaf])
            output = rows
            done(segment)
        self._totals.backward([output], [gradient])
        done(len(cuts))
        parts = self.model.qformer.image_kv_backward(
            self.inputs.images,
            self._swept.image_kv.gradient,
            norm=self.model.ln_vision,
            weights=self._kv_weights,
            gradients=self.gradients,
            add=self.add,
        )
        for segment, _ in enumerate(parts, len(cuts) + 1):
            done(segment)


def step_over_ranks(
    ranks: DistributedStage1,
    sweeps: Sweeps,
    inputs: SweepInputs,
    gradients: GradientBuffers,
    pairs: Pairs,
    scale: Tensor | float,
    negatives: tuple[Tensor, Tensor] | None = None,
    done: Done = lambda segment: None,
    branch: overlap.Branch | None = None,
) -> RanksOutput:
    """The rank's share of a step's losses, detached. Its gradients, ``scale`` times, go where those of ``sweeps`` go.

    Args:
        ranks (DistributedStage1): of a model with the parameters that ``sweeps`` run with.
        inputs (SweepInputs): that ``sweeps`` read.
        gradients (GradientBuffers): of the parameters of the model of ``ranks``.
        negatives (tuple, Optional): as of :meth:`DistributedStage1.forward`.
        done (Callable, Optional): see :data:`Done`. Default: nothing is called.
        branch (Branch, Optional): on which what ranks exchange runs, beside the sweeps. Default: `None`, beside none.
    """
    temp, branch = ranks.model.temp, branch or overlap.Branch()
    features = tuple(x.detach().requires_grad_() for x in sweeps.first())
    # many small kernels, and waiting for other ranks, beside few large ones
    branch.begin()
    with branch.here():
        contrast = ranks.contrast(features, pairs)
        wanted = [*features, temp] if temp.requires_grad else features
        found = torch.autograd.grad(contrast.loss_itc * scale, wanted)
        torch._foreach_copy_(list(inputs.feature_gradients), list(found[:2]))
        for x in found[2:]:
            gradients[(temp,)].add_(x)
        inputs.itg_gradient.fill_(pairs.itg_share * scale)
        inputs.itm_gradient.fill_(pairs.itm_share * scale)
    loss_itg = sweeps.captions()
    branch.join()
    sweeps.first_backward()
    with branch.here():
        matching = ranks.matching(contrast, pairs, negatives)
        count, *rows = sizes = _to_host(matching.sizes)
        number = 2 * len(pairs.same_image) + count
        room = sweeps.room(number, pairs.own_rows + sum(rows), pairs.captions.max_length)
        given = ranks.pair_up(matching, sizes, pairs, room)
    branch.join()
    sweeps.second(given, done)
    matched = sweeps.matched[0].clone(), sweeps.matched[1][:number].clone()
    out = ranks.output(contrast, matched, loss_itg, matching.negatives, given, pairs)
    losses = {name: getattr(out, name).detach() for name in ("loss", "loss_itc", "loss_itm", "loss_itg")}
    return dataclasses.replace(out, **losses)


def _to_host(x: Tensor) -> list[int]:
    """What the current stream has in ``x``; other streams' work goes on."""
    if not x.is_cuda:
        return x.tolist()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    return host.tolist()


class GraphedRanks(GraphedSteps):
    """:class:`qformer_fast.training.graphs.GraphedStage1` over the ranks of a process group, each with captures of its
    own; no wrapper such as DDP. The parameters become those of the group's first rank.

    How many pairs a rank matches, and how many rows their captions have, differs from step to step: sweep 2 has graphs
    for every 32nd of a batch of pairs more, and for the rows that steps needed. While a rank records some, others
    wait. A shape of captions keeps its images' keys and values and their gradient (at BLIP-2's sizes 9.5 MB an image).

    Args:
        ranks (DistributedStage1): of a model on a CUDA device.
        dtype, bucket: as of :class:`qformer_fast.training.graphs.GraphedStage1`.
        timeout (float): as of :func:`averaging_over`, which says how gradients are averaged. Default: 600.0, as NCCL's.

    ``waiting`` is entered while the device waits for gradients of other ranks.
    """

    waiting: Callable[[], contextlib.AbstractContextManager] = staticmethod(contextlib.nullcontext)

    def __init__(
        self,
        ranks: DistributedStage1,
        *,
        dtype: torch.dtype | None = None,
        bucket: int | None = None,
        timeout: float = 600.0,
    ):
        model = ranks.model
        self._averaging = averaging_over(ranks.group, model.temp.device, timeout)
        gradients, self._wholes = GradientBuffers.flat(model.groups, segments(model), self._averaging.zeros)
        super().__init__(model, gradients, dtype=dtype, bucket=bucket)
        self.ranks = ranks
        self._branch = overlap.Branch(model.temp.device, priority=-2)  # before the graphs' kernels
        self._behind_events = torch.cuda.Stream(model.temp.device)
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                dist.broadcast(x, group_src=0, group=ranks.group)

    def __call__(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Sequence[str | int] | Tensor | None = None,
        *,
        scale: Tensor | float = 1.0,
        average: bool = True,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> RanksOutput:
        """As :meth:`qformer_fast.training.graphs.GraphedStage1.__call__`, of the rank's share of the losses.

        Args:
            average (bool): the gradients, with those that were there, become their mean over the ranks. Default: True.
            negatives (tuple, Optional): as of :meth:`DistributedStage1.forward`.
        """
        if image_embeds.requires_grad:
            raise ValueError("image_embeds must not require grad: the graphs make the parameters' gradients alone")
        model, ranks = self.model, self.ranks
        text, text_rows, bucket = self._fit(image_embeds, input_ids, attention_mask)
        pairs = ranks.gather_pairs(text, image_ids, text.next_tokens()[1], model.temp.device)
        adds, zeros = self._prepare_gradients()
        sizes = image_embeds.shape, text_rows, 2 * bucket, 0, text.max_length
        shape = Shape(*sizes, model.training, adds, model.qformer.gradient_checkpointing)
        capture = self._loaded(shape, (image_embeds, text))
        if zeros:
            torch._foreach_zero_(zeros)

        def done(segment: int) -> None:
            if average:
                for whole in self._wholes[segment]:
                    self._averaging.begin(whole)

        with capture.autocast():
            out = step_over_ranks(
                ranks, capture, capture.inputs, self._gradients, pairs, scale, negatives, done, self._branch
            )
        with self.waiting():
            self._averaging.join()
        self._attach()
        return out

    def _new_capture(self, *arguments) -> _RanksCapture:
        return _RanksCapture(*arguments, owner=weakref.ref(self))


class _RanksCapture(Capture):
    """Graphs of :class:`SweepsAsTheyCome`, sweep 2's recorded when they are needed; they are :class:`Sweeps`.

    Args:
        owner (ref): whose other captures are given up where memory lacks, and on whose stream events are waited for.
        others: as of :class:`Capture`.
    """

    def __init__(self, *arguments, owner: weakref.ref[GraphedRanks]):
        super().__init__(*arguments)
        self._owner = owner
        self._second: dict[MatchRoom, _Second] = {}

    def _new_inputs(self, images: Tensor, text: PackedText) -> SweepInputs:
        batch, width = len(images), self.model.vision_proj.out_features

        def zeros(*size: int) -> Tensor:
            return images.new_zeros(size, dtype=torch.float32)

        return SweepInputs(
            images=images,
            **self._captions(text),
            feature_gradients=(zeros(batch, self.model.query_tokens.shape[1], width), zeros(batch, width)),
            itg_gradient=zeros(),
            itm_gradient=zeros(),
        )

    def load(self, images: Tensor, text: PackedText) -> None:
        self._load_pairs(images, text)

    def record(self, where: Where) -> None:
        self._where = where
        self._sweeps = self._sweeps_to(self.gradients)

        def parts(sweeps: SweepsAsTheyCome) -> Iterator[tuple[Tensor, Tensor] | Tensor | None]:
            yield sweeps.first()
            yield sweeps.captions()
            yield sweeps.first_backward()

        self.graphs, (self._features, self._loss_itg, _) = self._record(
            where, lambda scratch: parts(self._sweeps_to(scratch)), parts(self._sweeps)
        )

    def _sweeps_to(self, gradients: GradientBuffers) -> SweepsAsTheyCome:
        return SweepsAsTheyCome(self.model, self.inputs, gradients, add=self.shape.adds)

    def first(self) -> tuple[Tensor, Tensor]:
        self.graphs[0].replay()
        return self._features

    def captions(self) -> Tensor:
        self.graphs[1].replay()
        return self._loss_itg

    def first_backward(self) -> None:
        self.graphs[2].replay()

    def room(self, pairs: int, text_rows: int, max_length: int) -> MatchRoom:
        pairs = round_up(pairs, max(4, self.shape.image_shape[0] // 32))
        bucket = 2 * self.shape.filler_rows
        known = {room.text_rows for room in self._second if (room.pairs, room.max_length) == (pairs, max_length)}
        return MatchRoom(pairs, room_for(text_rows, bucket, known), 2 * bucket, max_length)

    def second(self, given: MatchInputs, done: Done) -> None:
        if given.room not in self._second:
            self._second[given.room] = self._record_second(given)
        graph, inputs, events, self.matched = self._second[given.room]
        torch._foreach_copy_(_tensors(inputs), _tensors(given))
        graph.replay()
        behind = self._owner()._behind_events
        for segment, event in enumerate(events):
            behind.wait_event(event)
            with torch.cuda.stream(behind):
                done(segment)

    def _record_second(self, given: MatchInputs) -> _Second:
        captures = self._owner()._captures
        try:
            return self._try_to_record_second(given)
        except torch.OutOfMemoryError:
            others = [shape for shape, capture in captures.items() if capture is not self]
            if not others and not self._second:
                raise
        for shape in others:
            del captures[shape]
        self._second.clear()
        gc.collect()
        torch.cuda.empty_cache()
        return self._try_to_record_second(given)

    def _try_to_record_second(self, given: MatchInputs) -> _Second:
        device = self.model.temp.device
        ids, positions, offsets, *others = (x.clone() for x in _tensors(given))
        inputs = MatchInputs(PackedText(ids, positions, offsets, given.text.max_length), *others, given.room)
        state = torch.cuda.get_rng_state(device)
        events: list[torch.cuda.Event] = []

        def mark(_segment: int) -> None:
            events.append(torch.cuda.Event(external=True))
            overlap.mark(events[-1])

        def once(scratch: GradientBuffers) -> Iterator[None]:
            sweeps = self._sweeps_to(scratch)
            sweeps.first()
            sweeps.captions()
            sweeps.first_backward()
            yield sweeps.second(inputs, lambda segment: None)

        def part() -> Iterator[None]:
            yield self._sweeps.second(inputs, mark)

        try:
            with no_garbage_collection(), expandable_segments():
                (graph,), _ = self._record(self._where, once, part())
        finally:
            torch.cuda.set_rng_state(state, device)
        return _Second(graph, inputs, events, self._sweeps.matched)


class _Second(NamedTuple):
    """A graph of sweep 2, what it reads, an event in it behind each of :func:`segments`, and what it gives."""

    graph: torch.cuda.CUDAGraph
    inputs: MatchInputs
    events: list[torch.cuda.Event]
    matched: tuple[Tensor, Tensor]


def _tensors(given: MatchInputs) -> list[Tensor]:
    return [*given.text.tensors, given.image_index, given.labels, given.counts]
