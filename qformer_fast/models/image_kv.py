"""Keys and values of images, which all encodings of a step share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class LayerKV(NamedTuple):
    """What one cross-attention layer reads of an :class:`ImageKV`, views of it.

    Args:
        k, v (Tensor): (images, tokens, nheads, headdim).
        mask (Tensor, Optional): as in :class:`ImageKV`.
        gradients (tuple, Optional): two like k and v, for ``kv_gradients`` of :func:`ops.cross_attention_block`.
        accumulate (bool): as there.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    gradients: tuple[Tensor, Tensor] | None
    accumulate: bool


@dataclass(frozen=True, eq=False)
class ImageKV:
    """Keys and values of every cross-attention layer for a bank of images, computed once.

    Args:
        buffer (Tensor): (images, tokens, cross-attention layers, 2, nheads, headdim); keys at 0, values at 1.
        mask (Tensor, Optional): (images, 1 or num_queries, tokens), bool (True = may look) or float (added to the
            scores).
        gradient (Tensor, Optional): like ``buffer``, where the kernels write its gradient instead of giving it to
            autograd. Default: `None`.
        accumulate (bool): they add to ``gradient``. Default: False.
    """

    buffer: Tensor
    mask: Tensor | None = None
    gradient: Tensor | None = None
    accumulate: bool = False

    @property
    def num_images(self) -> int:
        return self.buffer.shape[0]

    @cached_property
    def layers(self) -> list[LayerKV]:
        """Of each cross-attention layer."""
        gradients = itertools.repeat(None) if self.gradient is None else _keys_and_values(self.gradient)
        pairs = zip(_keys_and_values(self.buffer), gradients, strict=False)
        return [LayerKV(*kv, self.mask, gradient, self.accumulate) for kv, gradient in pairs]

    def select(self, index: Tensor) -> ImageKV:
        """The images ``index``, copied."""
        return ImageKV(self.buffer[index], None if self.mask is None else self.mask[index])


def _keys_and_values(buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
    found = buffer.flatten(2, 3).unbind(2)
    return list(zip(found[::2], found[1::2], strict=True))
