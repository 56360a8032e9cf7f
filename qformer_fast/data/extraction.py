"""Feature extraction shard by shard, by any number of processes, which goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qformer_fast.data.bad import BadData
from qformer_fast.data.features import (
    INDEX,
    FeatureCache,
    check_keys,
    read_index,
    shard_damage,
    shard_folder,
    write_cache_index,
    write_shard,
)
from qformer_fast.data.files import CHECKSUMS

Encode = Callable[[Sequence[Sequence[str]]], Iterable[tuple[Sequence[str], Tensor]]]


def extract(
    folder: str | os.PathLike,
    keys: Sequence[str],
    encode: Encode,
    *,
    metadata: Mapping[str, Any],
    dtype: str = "float16",
    shard_images: int = 4096,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    bad: BadData | None = None,
) -> FeatureCache | None:
    """Writes a :class:`FeatureCache`, keeping the whole shards that an earlier, interrupted call left.

    Of W processes the one of rank r writes shards r, r + W, ...; they do not wait for each other, and the one that
    finds all shards there makes them a cache. A damaged shard is written again, and what is whole is not.

    Args:
        folder (path): new, or of an extraction of the same keys with the same metadata, dtype and ``shard_images``; the
            number of processes may have been another.
        keys (Sequence): one name an image, all different.
        encode (Callable): is given lists of up to ``batch_size`` keys and yields for each the keys and their tokens
            (batch, tokens, width), in the same order; it may leave out keys.
        metadata (Mapping), dtype (str): see :meth:`FeatureCache.create`.
        shard_images (int): keys a shard. Default: 4096.
        batch_size (int): keys a list. Default: 32.
        rank, world_size (int): which process this is, of how many; no two at once may be the same. Default: 0 and 1.
        bad (BadData, Optional): what is done with keys that an earlier call left out; they are not tried again.
            Default: `None`, they are refused.

    Returns:
        FeatureCache: or `None` where other processes have not written all of theirs yet.

    Raises:
        FileExistsError: something else in ``folder``. ValueError: shards there of other keys, metadata or dtype, or
            that lack keys, which are refused; keys, dtype or tokens that can't be stored, see
            :meth:`FeatureCache.create`; no image in all shards. Whole shards stay then.
    """
    folder, bad = Path(folder), bad or BadData()
    check_keys(keys)
    for name, value in (("shard_images", shard_images), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    shards = [keys[start : start + shard_images] for start in range(0, len(keys), shard_images)]
    _check_folder(folder, len(shards))
    own, todo = range(rank, len(shards), world_size), []
    _clear_away(folder, {shard_folder(folder, number).name for number in own})
    for number in own:
        place = shard_folder(folder, number)
        if not place.exists():
            todo.append(number)
            continue
        if damage := shard_damage(place):
            print(f"{damage}; extracting {place.name} again")
            shutil.rmtree(place)
            todo.append(number)
            continue
        index = read_index(place)
        _check_same(place, index, shards[number], metadata, dtype)
        for key in index["skipped"]:
            bad.found("unreadable_picture", f"output: {place} was written without {key}; remove it to try again")
    lists = {number: _lists(shards[number], batch_size) for number in todo}
    encoded = iter(encode([part for number in todo for part in lists[number]]))
    for number in todo:
        batches = _take(encoded, len(lists[number]))
        write_shard(shard_folder(folder, number), shards[number], batches, metadata=metadata, dtype=dtype)
    # another process may be about to write a damaged one again
    if any(shard_damage(shard_folder(folder, number), verify=False) for number in range(len(shards))):
        return None
    write_cache_index(folder, len(shards))
    return FeatureCache(folder, verify=False)


def _lists(keys: Sequence[str], batch_size: int) -> list[Sequence[str]]:
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


def _take(encoded: Iterator[tuple[Sequence[str], Tensor]], count: int) -> Iterator[tuple[Sequence[str], Tensor]]:
    """The next ``count`` batches that are not empty."""
    for _ in range(count):
        keys, tokens = next(encoded)
        if len(keys):
            yield keys, tokens


def _check_folder(folder: Path, shards: int) -> None:
    """Refuses a folder with anything but these shards, killed ones and a cache's index in it."""
    if not folder.exists():
        return
    names = {shard_folder(folder, number).name for number in range(shards)}
    known = names | {INDEX, CHECKSUMS}
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    if others := sorted(name for name in found if name not in known and not name.startswith(".")):
        raise FileExistsError(f"output: {folder} exists already and is no extraction in {shards} shards: {others[:5]}")


def _clear_away(folder: Path, names: Container[str]) -> None:
    """Removes what killed processes left of these shards."""
    for scratch in folder.glob(".shard-*"):
        if scratch.name[1:].rpartition("-")[0] in names:
            shutil.rmtree(scratch)


def _check_same(
    place: Path, index: Mapping[str, Any], keys: Sequence[str], metadata: Mapping[str, Any], dtype: str
) -> None:
    for name, expected in (("metadata", json.loads(json.dumps(dict(metadata)))), ("dtype", dtype)):
        if index[name] != expected:
            raise ValueError(f"output: {place} must have {name} {expected!r}, got {index[name]!r}")
    kept = set(index["keys"]) | set(index["skipped"])
    if kept != set(keys):
        odd = sorted(kept.symmetric_difference(keys))
        raise ValueError(f"output: {place} must hold the same {len(keys)} images, they differ in {odd[:5]}")
