"""Training's forward and backward of queries beside images as two CUDA graphs, behind one node of autograd."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast.models.adapters import state_of

if TYPE_CHECKING:
    from qformer_fast.models.borrowed import BorrowedQFormer

MAX_GRAPHS = 4
Place = tuple[dict[str, Tensor], str]


class TrainingGraphs:
    """Encodings with gradients, each kind captured the second time in a row that it comes.

    A kind is what a capture depends on: shapes, dtypes, where the parameters lie and which of them are trained,
    autocast, dropout. The graphs share memory, so one encoding at a time can wait for its backward; others run without.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, _Graph] = {}
        self._pool: Any = None
        self._last: Any = None
        self._pending: Callable[[], object] = lambda: None

    def __reduce__(self) -> tuple:
        return TrainingGraphs, ()

    def run(self, qformer: BorrowedQFormer, rows: Tensor, image_embeds: Tensor) -> Tensor | None:
        """Embedded rows (1 or images, queries, hidden), images (images, tokens, encoder_hidden) -> (images, queries,
        hidden), or None where it has to run without graphs.
        """
        if not (rows.is_cuda and torch.is_grad_enabled()) or self._pending() is not None:
            return None
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return None
        inputs = rows, image_embeds
        places = [
            (x._parameters, name) for layer in qformer.layers_read() for x in layer.modules() for name in x._parameters
        ]
        parameters = [place[name] for place, name in places if place[name] is not None]
        if not any(x.requires_grad for x in (*inputs, *parameters)):
            return None
        device = rows.device.type
        key = (
            *((x.shape, x.dtype, x.device, x.requires_grad) for x in inputs),
            tuple((x.data_ptr(), x.requires_grad) for x in parameters),
            tuple(map(state_of, qformer.layers_read())),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            (qformer.training, qformer.gradient_checkpointing, backends.asked_for()),
        )
        if key not in self._graphs:
            if key != self._last:
                self._last = key
                return None
            if len(self._graphs) == MAX_GRAPHS or self._pool is None:
                self._graphs.clear()
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(
                lambda rows, images: qformer.encode_embedded(rows, rows.shape[1], image_embeds=images),
                inputs,
                [place for place in places if place[0][place[1]] is not None],
                self._pool,
            )
        waits = _Waits()
        self._pending = weakref.ref(waits)
        return _Replay.apply(self._graphs[key], waits, *inputs, *parameters)


class _Waits:
    """Alive as long as an encoding's backward may come."""


class _Graph:
    def __init__(
        self, encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], places: list[Place], pool: tuple[int, int]
    ):
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        before = [parameters[name] for parameters, name in places]
        # leaves of its own: autograd would have a parameter's wait for the stream that it was first used on
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in before]
        wanted = [x for x in (*self.inputs, *leaves) if x.requires_grad]
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options = dict(dtype=torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"))

        def forward() -> Tensor:
            # a weight that was cast before the capture would be that for ever
            with torch.autocast("cuda", cache_enabled=False, **options):
                return encode(*self.inputs)

        def backward(dout: Tensor) -> tuple[Tensor | None, ...]:
            with torch.autocast("cuda", enabled=False):
                return torch.autograd.grad(out, wanted, dout, allow_unused=True)

        stream = torch.cuda.Stream()
        try:
            for (parameters, name), leaf in zip(places, leaves, strict=True):
                parameters[name] = leaf
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels, which a capture can't
                out = forward()
                backward(torch.zeros_like(out))
                del out
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._forward, pool=pool, stream=stream, capture_error_mode="thread_local"):
                out = forward()
            self._dout = torch.zeros_like(out)
            with torch.cuda.graph(self._backward, pool=pool, stream=stream, capture_error_mode="thread_local"):
                gradients = iter(backward(self._dout))
        finally:
            for (parameters, name), parameter in zip(places, before, strict=True):
                parameters[name] = parameter
        self._out, self._held = out.detach(), before
        self._gradients = [next(gradients) if x.requires_grad else None for x in (*self.inputs, *leaves)]

    def forward(self, *inputs: Tensor) -> Tensor:
        for static, x in zip(self.inputs, inputs, strict=True):
            static.detach().copy_(x)
        self._forward.replay()
        return self._out.clone()

    def backward(self, dout: Tensor) -> list[Tensor | None]:
        self._dout.copy_(dout)
        self._backward.replay()
        # copies: autograd may keep a gradient, which the next replay would write over
        copies = iter(torch._foreach_mul([x for x in self._gradients if x is not None], 1.0))
        return [None if x is None else next(copies) for x in self._gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, waits: _Waits, *inputs_and_parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.graph, ctx.waits = graph, waits
        return graph.forward(*inputs_and_parameters[: len(graph.inputs)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.waits is None:
            raise RuntimeError(
                "backward through a Q-Former's CUDA graph a second time: what it kept is gone, "
                "replace_qformer(model, cuda_graphs=False), or cuda_graphs = False of LAVIS's BertModel, keeps it"
            )
        ctx.waits = None
        gradients = [None] * len(ctx.needs_input_grad[2:]) if dout is None else ctx.graph.backward(dout)
        return None, None, *gradients
