"""Training's forward and backward of an encoding as two CUDA graphs, behind one node of autograd."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qformer_fast import backend as backends
from qformer_fast.layout import PackedText, room_for
from qformer_fast.models.adapters import state_of

if TYPE_CHECKING:
    from qformer_fast.models.qformer import QFormer

MAX_GRAPHS = 4
MAX_KINDS_COUNTED = 64
Place = tuple[dict[str, Tensor], str]
Inputs = Sequence[Tensor | None]
Encode = Callable[..., tuple[Tensor, ...]]


class TrainingGraphs:
    """Encodings with gradients of one way to call a model, each kind captured the second time that it comes.

    A kind is what a capture depends on: shapes, dtypes, where the parameters lie and which of them are trained,
    autocast, dropout. The graphs share memory, so one encoding at a time can wait for its backward; others run without.
    Where there are more than ``MAX_GRAPHS`` kinds the one used longest ago makes room, and from then on a kind has to
    come twice as often.
    """

    def __init__(self) -> None:
        self._graphs: collections.OrderedDict[Hashable, _Graph] = collections.OrderedDict()
        self._pool: Any = None
        self._times: collections.Counter = collections.Counter()
        self._wanted_times = 2
        self._rooms: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
        self._pending: Callable[[], object] = lambda: None

    def __reduce__(self) -> tuple:
        return TrainingGraphs, ()

    @property
    def takes_one_more(self) -> bool:
        """Whether no encoding waits for its backward, without which :meth:`run` must not be called."""
        return self._pending() is None

    def fill(self, text: PackedText, width: int) -> PackedText:
        """``text`` of (captions, width) filled up, so that few shapes come again and again."""
        bucket = max(16, len(text) * width // 32)
        rooms = self._rooms[len(text), width]
        room = room_for(text.num_rows, bucket, rooms)
        rooms.add(room)
        return dataclasses.replace(text, max_length=width).filled(room, 2 * bucket)

    def run(
        self, qformer: QFormer, layers: Sequence[nn.Module], encode: Encode, inputs: Inputs, settings: Hashable
    ) -> tuple[Tensor, ...] | None:
        """``encode(*inputs)``, or None where it has to run without graphs.

        Args:
            qformer (QFormer): what ``encode`` runs.
            layers (Sequence): those whose parameters it reads.
            encode (Callable): reads ``inputs``, the layers' parameters and ``settings`` alone.
            inputs (Sequence): tensors on one CUDA device, or None.
            settings (Hashable): what else it depends on.
        """
        places = [(x._parameters, name) for layer in layers for x in layer.modules() for name in x._parameters]
        places = [place for place in places if place[0][place[1]] is not None]
        parameters = [place[name] for place, name in places]
        key = (
            settings,
            *(None if x is None else (x.shape, x.dtype, x.device, x.requires_grad) for x in inputs),
            tuple((x.data_ptr(), x.requires_grad) for x in parameters),
            tuple(map(state_of, layers)),
            torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
            (qformer.training, qformer.gradient_checkpointing, backends.asked_for()),
        )
        if key not in self._graphs and not self._capture(key, encode, inputs, places):
            return None
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        if not graph.has_gradients:
            return None
        waits = _Waits()
        self._pending = weakref.ref(waits)
        return _Replay.apply(graph, waits, *inputs, *parameters)

    def _capture(self, key: Hashable, encode: Encode, inputs: Inputs, places: list[Place]) -> bool:
        """False where it is too early, or memory lacks."""
        if len(self._times) == MAX_KINDS_COUNTED:
            self._times.clear()
        self._times[key] += 1
        if self._times[key] < self._wanted_times:
            return False
        if len(self._graphs) == MAX_GRAPHS:
            self._graphs.popitem(last=False)
            self._wanted_times *= 2
            self._times.clear()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with no_garbage_collection():
                self._graphs[key] = _Graph(encode, inputs, places, self._pool)
        except torch.OutOfMemoryError:
            self._graphs.clear()
            self._pool = None
            self._wanted_times *= 2
            torch.cuda.empty_cache()
            return False
        return True


def can_capture(qformer: QFormer, layers: Sequence[nn.Module], inputs: Inputs) -> bool:
    """Whether :meth:`TrainingGraphs.run` may be asked: something is trained, on a GPU, and nothing else captures."""
    if not (inputs[0].is_cuda and torch.is_grad_enabled()):
        return False
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    # computed again in backward, PyTorch's dropout would differ in a capture
    if qformer.training and qformer.gradient_checkpointing != "none" and not backends.chooses_kernels(inputs[0]):
        return False
    trained = itertools.chain(inputs, (x for layer in layers for x in layer.parameters()))
    return any(x is not None and x.requires_grad for x in trained)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What is collected may free device memory or destroy graphs, which would end the capture at hand."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Waits:
    """Alive as long as an encoding's backward may come."""


class _Graph:
    def __init__(self, encode: Encode, inputs: Inputs, places: list[Place], pool: tuple[int, int]):
        self.inputs = [None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        before = [parameters[name] for parameters, name in places]
        # leaves of its own: autograd would have a parameter's wait for the stream that it was first used on
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in before]
        wanted = [x for x in (*self.inputs, *leaves) if x is not None and x.requires_grad]
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options = dict(dtype=torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"))

        def forward() -> tuple[Tensor, ...]:
            # a weight that was cast before the capture would be that for ever
            with torch.autocast("cuda", cache_enabled=False, **options):
                return encode(*self.inputs)

        def backward(outs: tuple[Tensor, ...], douts: list[Tensor | None]) -> tuple[Tensor | None, ...]:
            trained, grad_outputs = zip(
                *((out, x) for out, x in zip(outs, douts, strict=True) if x is not None), strict=True
            )
            with torch.autocast("cuda", enabled=False):
                return torch.autograd.grad(trained, wanted, grad_outputs, allow_unused=True)

        def zeros(outs: tuple[Tensor, ...]) -> list[Tensor | None]:
            return [torch.zeros_like(x) if x.requires_grad else None for x in outs]

        stream = torch.cuda.Stream()
        try:
            for (parameters, name), leaf in zip(places, leaves, strict=True):
                parameters[name] = leaf
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels, which a capture can't
                outs = forward()
                self.has_gradients = any(x.requires_grad for x in outs)
                if self.has_gradients:
                    backward(outs, zeros(outs))
                del outs
            torch.cuda.current_stream().wait_stream(stream)
            if not self.has_gradients:
                return
            with torch.cuda.graph(self._forward, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outs = forward()
            self._douts = zeros(outs)
            with torch.cuda.graph(self._backward, pool=pool, stream=stream, capture_error_mode="thread_local"):
                gradients = iter(backward(outs, self._douts))
        finally:
            for (parameters, name), parameter in zip(places, before, strict=True):
                parameters[name] = parameter
        self._outs, self._held = [x.detach() for x in outs], before
        self._gradients = [
            next(gradients) if x is not None and x.requires_grad else None for x in (*self.inputs, *leaves)
        ]

    def forward(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        for static, x in zip(self.inputs, inputs, strict=True):
            if x is not None:
                static.detach().copy_(x)
        self._forward.replay()
        return tuple(x.clone() for x in self._outs)

    def without_gradients(self, outs: tuple[Tensor, ...]) -> list[Tensor]:
        """Those of ``outs`` that depend on nothing that is trained."""
        return [out for out, dout in zip(outs, self._douts, strict=True) if dout is None]

    def backward(self, douts: Sequence[Tensor | None]) -> list[Tensor | None]:
        for static, x in zip(self._douts, douts, strict=True):
            if static is not None:
                static.zero_() if x is None else static.copy_(x)
        self._backward.replay()
        # copies: autograd may keep a gradient, which the next replay would write over
        copies = iter(torch._foreach_mul([x for x in self._gradients if x is not None], 1.0))
        return [None if x is None else next(copies) for x in self._gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, waits: _Waits, *inputs_and_parameters: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.graph, ctx.waits = graph, waits
        outs = graph.forward(*inputs_and_parameters[: len(graph.inputs)])
        ctx.mark_non_differentiable(*graph.without_gradients(outs))
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.waits is None:
            raise RuntimeError(
                "backward through a Q-Former's CUDA graph a second time: what it kept is gone, "
                "replace_qformer(model, cuda_graphs=False), or cuda_graphs = False of LAVIS's BertModel, keeps it"
            )
        ctx.waits = None
        unused = all(dout is None for dout in douts)
        gradients = [None] * len(ctx.needs_input_grad[2:]) if unused else ctx.graph.backward(douts)
        return None, None, *gradients
