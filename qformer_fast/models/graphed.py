"""Training's forward and backward of an encoding as two CUDA graphs, behind one node of autograd."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast.layout import PackedText
from qformer_fast.models.adapters import state_of

if TYPE_CHECKING:
    from qformer_fast.models.borrowed import BorrowedQFormer

MAX_GRAPHS = 4
Place = tuple[dict[str, Tensor], str]
Inputs = Sequence[Tensor | None]
Encode = Callable[..., tuple[Tensor, ...]]


class TrainingGraphs:
    """Encodings with gradients of one call in a model, each kind captured the second time that it comes.

    A kind is what a capture depends on: shapes, dtypes, where the parameters lie and which of them are trained,
    autocast, dropout. The graphs share memory, so one encoding at a time can wait for its backward; others run without.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, _Graph] = {}
        self._pool: Any = None
        self._seen: collections.deque = collections.deque(maxlen=4 * MAX_GRAPHS)
        self._rooms: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
        self._pending: Callable[[], object] = lambda: None

    def __reduce__(self) -> tuple:
        return TrainingGraphs, ()

    @property
    def takes_one_more(self) -> bool:
        return self._pending() is None

    def fill(self, text: PackedText, width: int) -> PackedText:
        """``text`` of (captions, width) filled up, so that few shapes come again and again."""
        bucket = max(16, len(text) * width // 32)
        rooms = self._rooms[len(text), width]
        room = room_for(text.num_rows, bucket, rooms)
        rooms.add(room)
        return text.filled(room, 2 * bucket)

    def run(
        self, qformer: BorrowedQFormer, encode: Encode, inputs: Inputs, settings: Hashable
    ) -> tuple[Tensor, ...] | None:
        """``encode(*inputs)``, or None where it has to run without graphs.

        Args:
            qformer (BorrowedQFormer): whose layers ``encode`` runs.
            encode (Callable): reads ``inputs``, the layers' parameters and ``settings`` alone.
            inputs (Sequence): tensors on the device, or None.
            settings (Hashable): what else it depends on.
        """
        places = [
            (x._parameters, name) for layer in qformer.layers_read() for x in layer.modules() for name in x._parameters
        ]
        places = [place for place in places if place[0][place[1]] is not None]
        parameters = [place[name] for place, name in places]
        if not any(x is not None and x.requires_grad for x in (*inputs, *parameters)):
            return None
        device = parameters[0].device.type
        key = (
            settings,
            *(None if x is None else (x.shape, x.dtype, x.device, x.requires_grad) for x in inputs),
            tuple((x.data_ptr(), x.requires_grad) for x in parameters),
            tuple(map(state_of, qformer.layers_read())),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            (qformer.training, qformer.gradient_checkpointing, backends.asked_for()),
        )
        if key not in self._graphs:
            again = key in self._seen if len(self._graphs) < MAX_GRAPHS else key == self._seen[-1]
            self._seen.append(key)
            if not again:
                return None
            if len(self._graphs) == MAX_GRAPHS or self._pool is None:
                self._graphs.clear()
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(encode, inputs, places, self._pool)
        waits = _Waits()
        self._pending = weakref.ref(waits)
        return _Replay.apply(self._graphs[key], waits, *inputs, *parameters)


def round_up(rows: int, bucket: int) -> int:
    return -(-rows // bucket) * bucket


def room_for(rows: int, bucket: int, known: set[int]) -> int:
    """A multiple of ``bucket``, at least ``rows`` and less than two buckets more, if possible of the ``known``."""
    room = round_up(rows, bucket)
    larger = room + bucket
    return larger if room not in known and (larger in known or room > max(known, default=room)) else room


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

        def backward(douts: list[Tensor]) -> tuple[Tensor | None, ...]:
            with torch.autocast("cuda", enabled=False):
                return torch.autograd.grad(outs, wanted, douts, allow_unused=True)

        stream = torch.cuda.Stream()
        try:
            for (parameters, name), leaf in zip(places, leaves, strict=True):
                parameters[name] = leaf
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels, which a capture can't
                outs = forward()
                backward([torch.zeros_like(x) for x in outs])
                del outs
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._forward, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outs = forward()
            self._douts = [torch.zeros_like(x) for x in outs]
            with torch.cuda.graph(self._backward, pool=pool, stream=stream, capture_error_mode="thread_local"):
                gradients = iter(backward(self._douts))
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

    def backward(self, douts: Sequence[Tensor | None]) -> list[Tensor | None]:
        for static, x in zip(self._douts, douts, strict=True):
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
        return graph.forward(*inputs_and_parameters[: len(graph.inputs)])

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
