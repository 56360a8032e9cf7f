"""Encoding without gradients: weights packed once per set of parameters, queries without text in one launch or as CUDA
graphs."""

from __future__ import annotations

import functools
import logging
import operator
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.layout import Mask, SequenceLayout
from qformer_fast.models.graphed import no_garbage_collection
from qformer_fast.models.image_kv import ImageKV
from qformer_fast.models.one_launch import MAX_IMAGES, OneLaunch, why_not
from qformer_fast.models.padded import padded_layout
from qformer_fast.ops._checks import autocast_dtype

if TYPE_CHECKING:
    from qformer_fast.models.qformer import QFormer

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32
"""Graphs of one stream; where there would be more, all are given up and captured again as they are asked for."""


_version = Tensor._version.__get__


class Kept:
    """The last result of a computation from tensors, made again when one of them or ``key`` has changed.

    A change is another tensor, another memory or another version. The memory is held, so that nothing else can come to
    lie there. Tensors made in inference mode count no versions: nothing is kept of them. Nor is what a CUDA graph is
    being captured with, which is there once the graph is replayed.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._key: Any = None
        self._value: Any = None

    def last(self, key: Any) -> Any:
        """The result for ``key``, of tensors that may have changed, or None."""
        return self._value if key == self._key else None

    def get(self, tensors: list[Tensor], key: Any, make: Callable[[], Any]) -> Any:
        if self._value is None or key != self._key or not self._same(tensors):
            capturing = any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing()
            if capturing or any(x.is_inference() for x in tensors):
                return make()
            # the old value first, so that both are never held
            self._value = None
            with torch.inference_mode(False), torch.no_grad():
                self._value = make()
            self._tensors, self._key = tensors, key
            self._memory = [x.detach() for x in tensors]
            self._versions, self._pointers = sum(map(_version, tensors)), list(map(Tensor.data_ptr, tensors))
        return self._value

    def _same(self, tensors: list[Tensor]) -> bool:
        return (
            len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            # of the same tensors: none of them can have counted back
            and sum(map(_version, tensors)) == self._versions
            and list(map(Tensor.data_ptr, tensors)) == self._pointers
        )

    def __reduce__(self) -> tuple:
        """A copy begins empty."""
        return Kept, ()


class QueryEncoder:
    """Encodes queries beside images, in eval mode without gradients.

    Until the first cross-attention nothing depends on the image, so that much is computed for one image where all have
    the same queries, and where these are a parameter once per set of parameters, as packed weights are. On a CUDA
    device the rest is one launch for few images, where the extension can run it (:func:`one_launch.why_not`), and
    otherwise a CUDA graph for each bucket of images and number of tokens.

    Args:
        graphs (bool): capture CUDA graphs. Default: True.
    """

    def __init__(self, graphs: bool = True):
        self.graphs = graphs
        self._kept = Kept()
        self._captured: list[_Runner] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return QueryEncoder, (self.graphs,)

    def forget(self) -> None:
        self._kept = Kept()

    def _hold(self, runner: _Runner | None) -> None:
        """A caller's CUDA graph that has captured an encoding reads the runner's memory as long as it is replayed."""
        if runner is not None and runner not in self._captured:
            self._captured.append(runner)

    def encode(
        self, qformer: QFormer, query_embeds: Tensor, image_embeds: Tensor, norm: nn.LayerNorm | None = None
    ) -> Tensor | None:
        """Queries (1 or images, queries, hidden), images (images, tokens, encoder_hidden) -> (images, queries, hidden).

        Args:
            qformer (QFormer): in eval mode.
            norm (nn.LayerNorm, Optional): applied to the tokens first, folded into the weights.

        Returns:
            Tensor or None: None where changes of the weights would not be noticed (:meth:`QFormer.parameters_read`).
        """
        dtype = autocast_dtype(query_embeds)
        place = None
        base = query_embeds if query_embeds._base is None else query_embeds._base
        if len(query_embeds) == 1 and isinstance(base, nn.Parameter):
            place = query_embeds.data_ptr(), query_embeds.stride()
        shape = query_embeds.shape[1], len(query_embeds) == 1
        key = query_embeds.device, dtype, norm and norm.eps, backends.asked_for(), place, shape
        with self._lock, torch.autocast(query_embeds.device.type, enabled=False):
            # the device works while the host looks whether what it runs with is what the parameters are
            runner = self._kept.last(key)
            out = None if runner is None else runner.run(query_embeds, image_embeds, True, self.graphs)
            capturing = query_embeds.is_cuda and torch.cuda.is_current_stream_capturing()
            if capturing:
                self._hold(runner)
            tensors = qformer.parameters_read()
            if tensors is None:
                return None
            tensors += [] if norm is None else [norm.weight, norm.bias]
            tensors += [] if place is None else [base]
            found = self._kept.get(
                tensors, key, lambda: _Runner(qformer, None if place is None else query_embeds, dtype, norm)
            )
            if capturing:
                self._hold(found)
            if found is runner:
                return out
            kept = found is self._kept.last(key)
            return found.run(query_embeds, image_embeds, kept, self.graphs and kept)


class _Runner:
    """Encodings with one set of parameters.

    Args:
        qformer (QFormer): which has them.
        queries (Tensor, Optional): (1, queries, hidden) where all encodings have these. Default: `None`.
        dtype (torch.dtype): of the rows.
        norm (nn.LayerNorm, Optional): of the image tokens.
    """

    def __init__(self, qformer: QFormer, queries: Tensor | None, dtype: torch.dtype, norm: nn.LayerNorm | None):
        self.qformer, self.dtype, self.norm = qformer, dtype, norm
        self.weights = qformer.encoder_weights_in(dtype)
        parameters = qformer.kv_weights(norm)
        if norm is None:
            self.kv_weight, self.kv_bias = (x.to(dtype) for x in parameters)
        else:
            width = reference.standardized_width(qformer.config.encoder_hidden_size)
            self.kv_weight, self.kv_bias = reference.fold_norm_fwd(*parameters, width, dtype), None
        self.first = None if queries is None else self.before_images(queries)
        self._graphs: dict[int, _Graphs] = {}

    @functools.cached_property
    def one_launch(self) -> OneLaunch | None:
        if self.first is None:
            return None
        if reason := why_not(self.qformer.config, len(self.first[0]), self.dtype, self.first[0].device):
            logger.info("few images are not encoded in one launch: %s", reason)
            return None
        with torch.inference_mode(False), torch.no_grad():
            return OneLaunch(self.qformer.config, self.weights, *self.first)

    def before_images(self, query_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Of (n, queries, hidden) the rows after the first self-attention, (n * queries, hidden), and what the first
        cross-attention asks, (n * queries, nheads, headdim).
        """
        layer, weights = self.qformer.encoder.layer[0], self.weights.layers[0]
        rows = self.qformer.embed_queries(query_embeds, len(query_embeds), self.dtype)
        rows, _ = layer.attention(rows, self.layout(*query_embeds.shape[:2]), weights.self_attention)
        weight, bias, *_ = weights.cross_attention.parameters
        return rows, F.linear(rows, weight, bias.to(self.dtype)).unflatten(-1, (-1, self.qformer.config.headdim))

    def layout(self, images: int, queries: int) -> SequenceLayout:
        return padded_layout(Mask.UNIMODAL, None, None, images, queries, self.kv_weight.device)

    def run(self, query_embeds: Tensor, image_embeds: Tensor, kept: bool, graphs: bool) -> Tensor:
        """``kept``: there will be other calls, so that it pays to make what they need; ``graphs`` too."""
        rows = self._tokens(image_embeds)
        images, tokens = image_embeds.shape[:2]
        capturing = rows.is_cuda and torch.cuda.is_current_stream_capturing()
        # what is made during a capture belongs to the graph
        made = "one_launch" in self.__dict__ or kept and not capturing
        if images <= MAX_IMAGES and made and self.one_launch is not None:
            return self.one_launch.run(self.project(rows), images)
        if graphs and rows.is_cuda and not capturing:
            stream = torch.cuda.current_stream().cuda_stream
            if stream not in self._graphs:
                self._graphs[stream] = _Graphs(self)
            return self._graphs[stream].run(query_embeds, rows, images, tokens)
        first = self.first or self.before_images(query_embeds)
        keys_values = self.project(rows).view(images, tokens, -1)
        layout = self.layout(images, query_embeds.shape[1])
        return self.encode(repeated(first, layout.num_query_rows), keys_values, layout)

    def _tokens(self, image_embeds: Tensor) -> Tensor:
        """(images * tokens, width) as the product takes them."""
        rows = image_embeds.flatten(0, 1)
        if self.norm is None:
            return rows.to(self.dtype)
        rows = rows.contiguous()
        out = rows.new_empty(rows.shape[0], self.kv_weight.shape[1], dtype=self.dtype)
        return backends.kernel_or_formula("standardize_into", rows)(out, rows, self.norm.eps)

    def project(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """All layers' keys and values: (images * tokens, width) -> (images * tokens, layers * 2 * hidden)."""
        weight = self.kv_weight.t()
        return (
            torch.mm(rows, weight, out=out)
            if self.kv_bias is None
            else torch.addmm(self.kv_bias, rows, weight, out=out)
        )

    def encode(self, first: tuple[Tensor, Tensor], keys_values: Tensor, layout: SequenceLayout) -> Tensor:
        """:meth:`before_images` of each image, and keys and values (images, tokens, layers * 2 * hidden) -> (images,
        queries, hidden).
        """
        config, (rows, q) = self.qformer.config, first
        sizes = (len(config.cross_attention_layers), 2, config.num_attention_heads, config.headdim)
        layers = self.qformer.layers_with(ImageKV(keys_values.unflatten(-1, sizes)), self.weights)
        for index, (layer, layer_kv, weights) in enumerate(layers):
            if index == 0:
                rows = layer.crossattention.attend(rows, q, layer_kv, layout, weights.cross_attention)
                rows = layer.feed_forward(rows, rows[:0], weights)
            else:
                rows = layer(rows, layout, layer_kv, weights)
        return rows.unflatten(0, (len(keys_values), -1))


def repeated(first: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Both with ``count`` rows."""
    rows, q = first
    times = count // len(rows)
    return first if times == 1 else (rows.repeat(times, 1), q.repeat(times, 1, 1))


class _Graphs:
    """CUDA graphs of one stream, which share their memory and the keys and values that they read."""

    def __init__(self, runner: _Runner):
        self.runner = runner
        self._clear()

    def _clear(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._keys_values: Tensor | None = None
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._calls: dict[tuple[int, int], tuple[Tensor, _Graph, Tensor]] = {}

    def run(self, query_embeds: Tensor, rows: Tensor, images: int, tokens: int) -> Tensor:
        if (images, tokens) not in self._calls:
            with torch.inference_mode(False), torch.no_grad():
                self._calls[images, tokens] = self._prepare(query_embeds, rows, images, tokens)
        keys_values, graph, out = self._calls[images, tokens]
        self.runner.project(rows, out=keys_values)
        graph.replay(query_embeds)
        return out.clone()

    def _prepare(self, query_embeds: Tensor, rows: Tensor, images: int, tokens: int) -> tuple[Tensor, _Graph, Tensor]:
        """Where these images' keys and values go, the graph that reads them, and where their output comes."""
        bucket, width = bucket_of(images), len(self.runner.kv_weight)
        if self._keys_values is None or self._keys_values.numel() < bucket * tokens * width:
            self._clear()
            # zeros: what a first batch smaller than its bucket leaves must be numbers
            self._keys_values = torch.zeros(bucket * tokens * width, dtype=rows.dtype, device=rows.device)
        keys_values = self._keys_values[: bucket * tokens * width].view(bucket * tokens, width)
        if (bucket, tokens) not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.clear()
                self._calls.clear()
            by_image = keys_values.view(bucket, tokens, width)
            self._graphs[bucket, tokens] = _Graph(self.runner, query_embeds, by_image, self._pool)
        graph = self._graphs[bucket, tokens]
        return keys_values[: images * tokens], graph, graph.out[:images]


class _Graph:
    """The capture of one encoding: of queries like ``query_embeds``, with ``keys_values`` of the bucket's images."""

    def __init__(self, runner: _Runner, query_embeds: Tensor, keys_values: Tensor, pool: tuple[int, int]):
        images, queries = len(keys_values), query_embeds.shape[1]
        layout = self._layout = runner.layout(images, queries)
        self._queries = self._first = None
        if runner.first is None:
            shape = (1 if len(query_embeds) == 1 else images, *query_embeds.shape[1:])
            self._queries = query_embeds.new_zeros(shape)
        else:
            self._first = repeated(runner.first, images * queries)

        def encode() -> Tensor:
            first = self._first or repeated(runner.before_images(self._queries), images * queries)
            return runner.encode(first, keys_values, layout)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            encode()  # compiles kernels, which a capture can't
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with (
            no_garbage_collection(),
            torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
        ):
            self.out = encode()

    def replay(self, query_embeds: Tensor) -> None:
        if self._queries is not None:
            self._queries[: len(query_embeds)].copy_(query_embeds)
        self._graph.replay()


def bucket_of(images: int) -> int:
    """The number of images that a graph is captured for: up to 16 every one, then eight to an octave."""
    step = 1 << max((images - 1).bit_length() - 4, 0)
    return -(-images // step) * step
