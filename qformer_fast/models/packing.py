"""Weights as the ops want them: stacked, and in the dtype that they are multiplied in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Group = tuple[Tensor, ...]
"""Parameters that are stacked into one tensor, one below the other."""


class GradientBuffers:
    """A gradient tensor for each group of parameters, of their dtype.

    Args:
        groups (list): every parameter in one of them.
        buffers (list, Optional): of other parameters of the same shapes, in the same order. Default: `None`, zeros.
    """

    def __init__(self, groups: list[Group], buffers: list[Tensor] | None = None):
        self.groups = groups
        if buffers is None:
            buffers = [group[0].new_zeros(_stacked_shape(group)) for group in groups]
        self.buffers = buffers
        self._places = {id(group[0]): buffer for group, buffer in zip(groups, buffers, strict=True)}

    @classmethod
    def flat(
        cls, groups: list[Group], parts: list[int], zeros: Callable[[int, torch.dtype], Tensor]
    ) -> tuple[GradientBuffers, list[list[Tensor]]]:
        """Each aligned to 256 bytes, and for each part all its buffers of a dtype as one tensor.

        Args:
            parts (list): the number of the part that each group belongs to.
            zeros (Callable): (size, dtype) -> (size,) zeros.
        """
        buffers: list[Tensor | None] = [None] * len(groups)
        wholes: list[list[Tensor]] = [[] for _ in range(max(parts) + 1)]
        kinds = [(part, group[0].dtype) for part, group in zip(parts, groups, strict=True)]
        for part, dtype in dict.fromkeys(kinds):
            places = [i for i, kind in enumerate(kinds) if kind == (part, dtype)]
            sizes = [sum(p.numel() for p in groups[i]) for i in places]
            room = [-(-size * dtype.itemsize // 256) * 256 // dtype.itemsize for size in sizes]
            whole = zeros(sum(room), dtype)
            for i, size, place in zip(places, sizes, whole.split(room), strict=True):
                buffers[i] = place[:size].view(_stacked_shape(groups[i]))
            wholes[part].append(whole)
        return cls(groups, buffers), wholes

    def __getitem__(self, group: Group) -> Tensor:
        """(sum of rows, ...): the gradients of a whole group."""
        return self._places[id(group[0])]

    def of_parameters(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter with the view that is its gradient."""
        found: list[tuple[Tensor, Tensor]] = []
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            views = buffer.split([len(p) for p in group]) if len(group) > 1 else [buffer]
            found += zip(group, views, strict=True)
        return found


def _stacked_shape(group: Group) -> tuple[int, ...]:
    return (sum(map(len, group)), *group[0].shape[1:]) if group[0].ndim else ()


class BlockWeights(NamedTuple):
    """A sub-layer's parameters in the order of its op's arguments, matrices stacked and cast.

    Args:
        parameters (list): of tensors.
        gradients (list, Optional): tensors like them that the op adds their gradients to. Default: `None`.
        add_gradients (bool): False: it writes them instead. Default: True.
    """

    parameters: list[Tensor]
    gradients: list[Tensor] | None = None
    add_gradients: bool = True

    @classmethod
    def make(
        cls, groups: list[Group], parameters: list[Tensor], gradients: GradientBuffers | None, add_gradients: bool
    ) -> BlockWeights:
        """With ``gradients`` the parameters become leaves of autograd."""
        if gradients is None:
            return cls(parameters)
        leaves = [x if isinstance(x, nn.Parameter) else x.detach().requires_grad_() for x in parameters]
        return cls(leaves, [gradients[group] for group in groups], add_gradients)

    def leaves(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter that requires grad, beside its gradient."""
        return [pair for pair in zip(self.parameters, self.gradients, strict=True) if pair[0].requires_grad]


class LayerWeights(NamedTuple):
    """One layer's weights; a sub-layer that the layer lacks has None."""

    self_attention: BlockWeights
    query_feed_forward: BlockWeights
    cross_attention: BlockWeights | None = None
    text_feed_forward: BlockWeights | None = None


class EncoderWeights(NamedTuple):
    """What all encodings of a step share; see ``QFormer.encoder_weights``.

    Args:
        layers (list): of :class:`LayerWeights`.
        embedding_gradients (list, Optional): for ``gradients`` of :func:`ops.embeddings`.
    """

    layers: list[LayerWeights]
    embedding_gradients: list[Tensor] | None

    def adding(self) -> EncoderWeights:
        """The same for a later encoding: ops add to the gradients that an earlier one wrote."""
        layers = [
            LayerWeights(*(block and block._replace(add_gradients=True) for block in layer)) for layer in self.layers
        ]
        return self._replace(layers=layers)

    def leaves(self) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`BlockWeights.leaves`, of all layers."""
        return [pair for layer in self.layers for block in layer if block is not None for pair in block.leaves()]


def stack_weights(groups: list[Group], dtype: torch.dtype) -> list[Tensor]:
    """Each group's weights one below the other in ``dtype``.

    Weights of another dtype are cast all at once into one buffer, and so are their gradients. Gradients of a stack that
    is used several times add up in ``dtype``, as they do under autocast, which casts a weight once a step.

    Args:
        groups (list): tuples of (rows, ...) weights that agree within a group but for the rows.
        dtype (torch.dtype): of the results.

    Returns:
        list: (sum of rows, ...) of each group.
    """
    weights = [weight for group in groups for weight in group]
    if all(weight.dtype == dtype for weight in weights):
        return [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
    return list(_Stack.apply(dtype, [len(group) for group in groups], *weights))


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, counts: list[int], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.counts = counts
        ctx.weights = [(weight.shape, weight.dtype) for weight in weights]
        numels = [weight.numel() for weight in weights]
        buffer = torch.empty(sum(numels), dtype=dtype, device=weights[0].device)
        places = [place.view(weight.shape) for place, weight in zip(buffer.split(numels), weights, strict=True)]
        torch._foreach_copy_(places, list(weights))
        stacks, begin = [], 0
        for count in counts:
            size = sum(numels[begin : begin + count])
            start = places[begin].storage_offset()
            stacks.append(buffer[start : start + size].view(-1, *weights[begin].shape[1:]))
            begin += count
        return tuple(stacks)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        parts, begin = [], 0
        for count, gradient in zip(ctx.counts, gradients, strict=True):
            rows = [shape[0] for shape, _ in ctx.weights[begin : begin + count]]
            parts += [None] * count if gradient is None else gradient.split(rows)
            begin += count
        given = [i for i, part in enumerate(parts) if part is not None and ctx.needs_input_grad[i + 2]]
        found: list[Tensor | None] = [None] * len(parts)
        for i in given:
            shape, dtype = ctx.weights[i]
            found[i] = torch.empty(shape, dtype=dtype, device=parts[i].device)
        if given:
            torch._foreach_copy_([found[i] for i in given], [parts[i] for i in given])
        return None, None, *found
