"""Feature caches of several data sets, read as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qformer_fast.data.features import FeatureCache
from qformer_fast.data.token_bytes import name_of, token_bytes, unpack


class JoinedCaches:
    """Caches of which each has images whose names begin in one way, as
    :class:`qformer_fast.data.sources.Mixture` names those of its sources.

    Args:
        caches (Sequence): at least one.
        prefixes (Sequence): what stands before the names that each cache knows; where two are the same, the first cache
            that has the name is read.

    Raises:
        ValueError: tokens of other shapes, dtypes or metadata, say of another encoder.
    """

    def __init__(self, caches: Sequence[FeatureCache], prefixes: Sequence[str]):
        self._parts = list(zip(prefixes, caches, strict=True))
        first = caches[0]
        for cache in caches:
            for name in ("tokens", "width", "dtype", "metadata"):
                expected, found = getattr(first, name), getattr(cache, name)
                if found != expected:
                    raise ValueError(
                        f"feature_cache: {cache.folder} must have {name} {expected!r} as {first.folder}, got {found!r}"
                    )
        self.tokens, self.width, self.dtype = first.tokens, first.width, first.dtype
        self.stored = first.stored if len({cache.stored for cache in caches}) == 1 else name_of(first.dtype)

    def _find(self, name: str) -> tuple[int, str] | None:
        """Which cache has an image, and under which key."""
        for number, (prefix, cache) in enumerate(self._parts):
            if name.startswith(prefix) and (key := name[len(prefix) :]) in cache:
                return number, key
        return None

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def rows(self, names: Sequence[str]) -> Tensor:
        """As :meth:`FeatureCache.rows`.

        Raises:
            KeyError: a name that no cache has. ValueError: as of :meth:`FeatureCache.read`.
        """
        return self.unpack(self.read(names))

    def unpack(self, stored: Tensor) -> Tensor:
        """As :meth:`FeatureCache.unpack`."""
        return unpack(stored, self.stored, self.tokens, self.width)

    def read(self, names: Sequence[str], *, pin_memory: bool = False) -> Tensor:
        """As :meth:`FeatureCache.read`; tokens that caches store in several ways come in :attr:`dtype`.

        Raises:
            KeyError, ValueError: as of :meth:`rows`.
        """
        found = [self._find(name) for name in names]
        if None in found:
            missing = [name for name, place in zip(names, found, strict=True) if place is None]
            raise KeyError(f"feature_cache: none has features of {missing[:5]}")
        size = self.tokens * token_bytes(self.stored, self.width)
        out = torch.empty(len(names), size, dtype=torch.uint8, pin_memory=pin_memory)
        for number, (_, cache) in enumerate(self._parts):
            rows = [row for row, (part, _) in enumerate(found) if part == number]
            if rows:
                keys = [found[row][1] for row in rows]
                if cache.stored == self.stored:
                    cache.read_into([out[row].numpy() for row in rows], keys)
                else:
                    out[rows] = cache.rows(keys).flatten(1).view(torch.uint8)
        return out
