"""Image tokens extracted once and read from disk: in shards, checksummed, each whole or not there."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qformer_fast.data.bad import BadData
from qformer_fast.data.files import CHECKSUMS, find_damage, new_folder, write_text
from qformer_fast.data.token_bytes import DTYPES, pack, read_dtype, token_bytes, unpack
from qformer_fast.ranks import Ranks

INDEX = "index.json"
DATA = "features.bin"


class FeatureCache:
    """Tokens of many images: folders ``shard-00000``, ... of a ``features.bin`` (images, tokens, width) and an
    ``index.json`` each, and beside them an ``index.json`` that says how many there are.

    Opening checks sizes and, unless told not to, the checksums of the tokens. Pickling passes on where the cache is,
    not what is in it.

    Args:
        folder (path): what :meth:`create` or :func:`qformer_fast.data.extraction.extract` wrote.
        verify (bool): compare the tokens' checksums, which reads all files once. Default: True.
        expect (Mapping, Optional): entries that the metadata must have, say {"encoder": "ViT-L-14"}.
        bad (BadData, Optional): what is done with damaged shards. Default: `None`, they are refused.
        ranks (Ranks, Optional): processes that all open the cache now and share the reading. Default: `None`, this one
            reads all.

    ``dtype`` is that of :meth:`rows`; ``shards`` has the number of images of each shard that is whole.

    Raises:
        FileNotFoundError: no cache there. ValueError: no shard that is whole, a damaged one that is refused, shards
            that do not belong together, other metadata; the message says which file and what to do.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        verify: bool = True,
        expect: Mapping[str, Any] | None = None,
        bad: BadData | None = None,
        ranks: Ranks | None = None,
    ):
        self.folder, bad = Path(folder), bad or BadData()
        self._skips = bad.skips
        if not (self.folder / INDEX).exists():
            unfinished = ", its extraction has not ended" if shard_folder(self.folder, 0).exists() else ""
            raise FileNotFoundError(f"feature_cache: no feature cache in {self.folder}{unfinished}")
        if damage := find_damage(self.folder, [INDEX]):
            raise ValueError(f"feature_cache: {damage}; extract the features again")
        about = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        if "shards" not in about:
            raise ValueError(f"feature_cache: {self.folder / INDEX} must have shards, extract the features again")
        places = [shard_folder(self.folder, number) for number in range(about["shards"])]
        damages = (ranks or Ranks()).look(places, functools.partial(_damages, verify=verify))
        for damage in damages.values():
            bad.found("corrupt_shard", f"feature_cache: {damage}; extract the features again")
        indices = {place: read_index(place) for place in places if place not in damages}
        # of a shard without images no picture could be read, nor what tokens would be like
        indices = {place: index for place, index in indices.items() if index["keys"]}
        if not indices:
            raise ValueError(f"feature_cache: {self.folder} must have at least one whole shard with images, got none")
        first = next(iter(indices))
        self._take(indices[first], first, expect or {})
        for place, index in indices.items():
            for name in ("tokens", "width", "dtype", "metadata"):
                expected = indices[first][name]
                if index[name] != expected:
                    raise ValueError(
                        f"feature_cache: {place} must have {name} {expected!r} as {first}, got {index[name]!r}"
                    )
        self.keys: list[str] = [key for index in indices.values() for key in index["keys"]]
        self._numbers = {key: number for number, key in enumerate(self.keys)}
        if len(self._numbers) != len(self.keys):
            raise ValueError(f"feature_cache: {self.folder} must have each key once, got some in two shards")
        self.shards = [len(index["keys"]) for index in indices.values()]
        self._starts = list(itertools.accumulate(self.shards, initial=0))
        self._files = [place / DATA for place in indices]

    def _take(self, index: Mapping[str, Any], place: Path, expect: Mapping[str, Any]) -> None:
        """What all shards have in common."""
        self.tokens: int = index["tokens"]
        self.width: int = index["width"]
        self.stored: str = index["dtype"]
        self.dtype = read_dtype(self.stored)
        self.metadata: dict[str, Any] = index["metadata"]
        for name, value in expect.items():
            if self.metadata.get(name) != value:
                raise ValueError(
                    f"feature_cache: {place} must have {name} = {value!r}, got {self.metadata.get(name)!r}"
                )

    def __reduce__(self) -> tuple[Callable[..., FeatureCache], tuple[Path]]:
        return functools.partial(_reopen, skips=self._skips), (self.folder.absolute(),)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._numbers

    def rows(self, keys: Sequence[str]) -> Tensor:
        """Tokens of these images: (len(keys), tokens, width) in the cache's ``dtype``.

        Raises:
            KeyError, ValueError: as of :meth:`read`.
        """
        return self.unpack(self.read(keys))

    def unpack(self, stored: Tensor) -> Tensor:
        """Tokens (images, tokens, width) in the cache's ``dtype``, of what :meth:`read` gave, on its device."""
        return unpack(stored, self.stored, self.tokens, self.width)

    def read(self, keys: Sequence[str], *, pin_memory: bool = False) -> Tensor:
        """Tokens of these images as they are stored: (len(keys), bytes) uint8.

        Raises:
            KeyError: a key that is not there. ValueError: a file that was cut since the cache was opened.
        """
        size = self.tokens * token_bytes(self.stored, self.width)
        raw = torch.empty(len(keys), size, dtype=torch.uint8, pin_memory=pin_memory)
        self.read_into(raw.numpy(), keys)
        return raw

    def read_into(self, rows: Iterable[np.ndarray], keys: Sequence[str]) -> None:
        """As :meth:`read`, each image into a row of bytes."""
        missing = [key for key in keys if key not in self._numbers]
        if missing:
            raise KeyError(f"feature_cache: {self.folder} has no features of {missing[:5]}")
        numbers = [self._numbers[key] for key in keys]
        shards = [bisect.bisect_right(self._starts, number) - 1 for number in numbers]
        size = self.tokens * token_bytes(self.stored, self.width)
        places = [
            (self._files[shard], size * (number - self._starts[shard]))
            for shard, number in zip(shards, numbers, strict=True)
        ]
        for place in places:
            _ask_for(*place, size)
        for out, place in zip(rows, places, strict=True):
            _read_at(*place, out)

    def __getitem__(self, key: str) -> Tensor:
        return self.rows([key])[0]

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        keys: Sequence[str],
        batches: Iterable[Tensor],
        *,
        metadata: Mapping[str, Any],
        dtype: str = "float16",
    ) -> FeatureCache:
        """Writes a cache of one shard from batches of tokens as they come; it appears when complete and not before.

        Args:
            folder (path): must not exist yet.
            keys (Sequence): one name an image, all different.
            batches (Iterable): (batch, tokens, width) tensors, together len(keys) images in the keys' order.
            metadata (Mapping): what the tokens are, kept in the index; JSON values.
            dtype (str): "float32", "float16", "bfloat16", or "int8" with an fp32 scale a token, which is read as
                float16. Default: "float16".

        Raises:
            FileExistsError: the folder is there. ValueError: no or doubled keys, NaN or Inf (after rounding to
                ``dtype``), tokens of changing shape, more or fewer images than keys. Nothing is left behind then.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"folder: {folder} exists already")
        check_keys(keys)
        scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        try:
            write_shard(shard_folder(scratch, 0), keys, _keyed(keys, batches), metadata=metadata, dtype=dtype)
            write_cache_index(scratch, 1)
            os.replace(scratch, folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return cls(folder, verify=False)


def shard_folder(folder: Path, number: int) -> Path:
    """Where a cache's shard lies."""
    return folder / f"shard-{number:05d}"


def read_index(place: Path) -> dict[str, Any]:
    """What a shard says of itself: keys, tokens, width, dtype, metadata and the keys that were skipped."""
    return json.loads((place / INDEX).read_text(encoding="utf-8"))


def shard_damage(place: Path, *, verify: bool = True) -> str | None:
    """What is wrong with a shard, of its tokens' bytes only the number unless ``verify``; None if it is whole."""
    if damage := find_damage(place, [INDEX]):
        return damage
    index, path = read_index(place), place / DATA
    expected = len(index["keys"]) * index["tokens"] * token_bytes(index["dtype"], index["width"])
    if not path.exists() or path.stat().st_size != expected:
        size = path.stat().st_size if path.exists() else "no file"
        return f"{path} must be {expected} bytes, got {size}; it is truncated or of another cache"
    return find_damage(place, [DATA]) if verify else None


def _damages(places: Sequence[Path], *, verify: bool) -> dict[Path, str]:
    with ThreadPoolExecutor() as pool:
        damages = pool.map(functools.partial(shard_damage, verify=verify), places)
        return {place: damage for place, damage in zip(places, damages, strict=True) if damage is not None}


def check_keys(keys: Sequence[str]) -> None:
    """Refuses no keys and doubled ones.

    Raises:
        ValueError: they are such.
    """
    if len(keys) == 0 or len(set(keys)) != len(keys):
        raise ValueError(f"keys must be different names, at least one, got {len(keys)} with {len(set(keys))} different")


def write_shard(
    place: Path,
    keys: Sequence[str],
    batches: Iterable[tuple[Sequence[str], Tensor]],
    *,
    metadata: Mapping[str, Any],
    dtype: str,
) -> None:
    """Writes one shard, which appears when it is complete.

    Args:
        place (Path): the shard's folder.
        keys (Sequence): the images that belong in it; those that no batch has are named in its index as skipped.
        batches (Iterable): keys, and their tokens (batch, tokens, width).
        metadata, dtype: see :meth:`FeatureCache.create`.

    Raises:
        ValueError: what :meth:`FeatureCache.create` refuses of batches and dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    with new_folder(place) as scratch:
        written, tokens, width = _write_batches(scratch / DATA, batches, dtype)
        kept = set(written)
        index = dict(keys=written, tokens=tokens, width=width, dtype=dtype, metadata=dict(metadata))
        index["skipped"] = [key for key in keys if key not in kept]
        (scratch / INDEX).write_text(json.dumps(index), encoding="utf-8")


def write_cache_index(folder: Path, shards: int) -> None:
    """Makes a cache of a folder with all its shards."""
    text = json.dumps({"shards": shards})
    write_text(folder / CHECKSUMS, json.dumps({INDEX: zlib.crc32(text.encode())}))
    write_text(folder / INDEX, text)


def _ask_for(path: Path, offset: int, size: int) -> None:
    """Tells the system what will be read, so that a disk has much to do at once."""
    if hasattr(os, "posix_fadvise"):
        with _opened(path) as descriptor:
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def _read_at(path: Path, offset: int, out: np.ndarray) -> None:
    """Fills ``out`` from there on; a memory map would take a fault every few pages, and a signal at a file cut since.

    Raises:
        ValueError: the file ends before.
    """
    end = offset + len(out)
    with _opened(path) as descriptor:
        while len(out):
            count = os.preadv(descriptor, [out], end - len(out))
            if count == 0:
                raise ValueError(f"feature_cache: {path} must have {end} bytes, it was cut since the cache was opened")
            out = out[count:]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Its descriptor. No file stays open: a large cache has more shards than a process may have open files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _reopen(folder: Path, *, skips: bool) -> FeatureCache:
    return FeatureCache(folder, verify=False, bad=BadData("skip" if skips else "refuse"))


def _keyed(keys: Sequence[str], batches: Iterable[Tensor]) -> Iterator[tuple[Sequence[str], Tensor]]:
    """Each batch with its share of the keys, all of which must be used up."""
    start = 0
    for batch in batches:
        if start + len(batch) > len(keys):
            raise ValueError(f"batches must hold {len(keys)} images, one a key, got more")
        yield keys[start : start + len(batch)], batch
        start += len(batch)
    if start != len(keys):
        raise ValueError(f"batches must hold {len(keys)} images, one a key, got {start}")


def _write_batches(
    path: Path, batches: Iterable[tuple[Sequence[str], Tensor]], dtype: str
) -> tuple[list[str], int, int]:
    """Writes the tokens and returns the keys, how many tokens an image has and how wide they are; 0 without images."""
    written: list[str] = []
    shape = None
    with path.open("wb") as file:
        for keys, batch in batches:
            if batch.ndim != 3 or 0 in batch.shape:
                raise ValueError(f"batches must be (batch, tokens, width), none of them 0, got {tuple(batch.shape)}")
            shape = shape or tuple(batch.shape[1:])
            if tuple(batch.shape[1:]) != shape:
                raise ValueError(f"batches must all be (batch, {shape[0]}, {shape[1]}), got {tuple(batch.shape)}")
            bad = ~batch.detach().to(read_dtype(dtype)).isfinite().flatten(1).all(1)
            if bool(bad.any()):
                names = [keys[i] for i in bad.nonzero().flatten().tolist()]
                raise ValueError(f"batches must hold finite image tokens, got NaN or Inf in {names[:5]}")
            file.write(pack(batch, dtype))
            written += keys
    return written, *(shape or (0, 0))
