"""Image tokens extracted once and read from disk: memory-mapped, checksummed, whole or not there at all."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qformer_fast.data.files import find_damage, new_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class FeatureCache:
    """Tokens of many images in one file: ``features.bin`` of (images, tokens, width) and ``index.json``.

    Opening checks sizes and, unless told not to, the checksum of the tokens. Pickling passes on where the cache is, not
    what is in it.

    Args:
        folder (path): what :meth:`create` wrote.
        verify (bool): compare the tokens' checksum, which reads the file once. Default: True.
        expect (Mapping, Optional): entries that the metadata must have, say {"encoder": "ViT-L-14"}.

    Raises:
        FileNotFoundError: no cache there. ValueError: a corrupted or truncated cache, or one of other metadata; the
            message says which file and what to do.
    """

    def __init__(self, folder: str | os.PathLike, *, verify: bool = True, expect: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        data_path = self.folder / "features.bin"
        if not data_path.exists():
            raise FileNotFoundError(f"feature_cache: no feature cache in {self.folder}")
        self._refuse_damage("index.json")
        index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        self.keys: list[str] = index["keys"]
        self.tokens: int = index["tokens"]
        self.width: int = index["width"]
        self.dtype = DTYPES[index["dtype"]]
        self.metadata: dict[str, Any] = index["metadata"]
        expected = len(self.keys) * self.tokens * self.width * self.dtype.itemsize
        if data_path.stat().st_size != expected:
            raise ValueError(
                f"feature_cache: {data_path} must be {expected} bytes, got {data_path.stat().st_size}; "
                "it is truncated or of another cache, extract the features again"
            )
        if verify:
            self._refuse_damage("features.bin")
        for name, value in (expect or {}).items():
            if self.metadata.get(name) != value:
                raise ValueError(
                    f"feature_cache: {self.folder} must have {name} = {value!r}, got {self.metadata.get(name)!r}"
                )
        self._rows = {key: row for row, key in enumerate(self.keys)}
        self._data = np.memmap(data_path, dtype=np.uint8, mode="r").reshape(len(self.keys), -1)

    def _refuse_damage(self, name: str) -> None:
        damage = find_damage(self.folder, [name])
        if damage is not None:
            raise ValueError(f"feature_cache: {damage}; extract the features again")

    def __reduce__(self) -> tuple[Callable[..., FeatureCache], tuple[Path]]:
        return functools.partial(FeatureCache, verify=False), (self.folder.absolute(),)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def rows(self, keys: Sequence[str]) -> Tensor:
        """Tokens of these images: (len(keys), tokens, width) in the cache's dtype.

        Raises:
            KeyError: a key that is not there.
        """
        missing = [key for key in keys if key not in self._rows]
        if missing:
            raise KeyError(f"feature_cache: {self.folder} has no features of {missing[:5]}")
        raw = torch.from_numpy(self._data[[self._rows[key] for key in keys]])
        return raw.view(self.dtype).view(len(keys), self.tokens, self.width)

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
        """Writes a cache from batches of tokens as they come; it appears when complete and not before.

        Args:
            folder (path): must not exist yet.
            keys (Sequence): one name an image, all different.
            batches (Iterable): (batch, tokens, width) tensors, together len(keys) images in the keys' order.
            metadata (Mapping): what the tokens are, kept in the index; JSON values.
            dtype (str): "float32", "float16" or "bfloat16". Default: "float16".

        Raises:
            FileExistsError: the folder is there. ValueError: no or doubled keys, NaN or Inf (after rounding to
                ``dtype``), tokens of changing shape, more or fewer images than keys. Nothing is left behind then.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"folder: {folder} exists already")
        if len(keys) == 0 or len(set(keys)) != len(keys):
            raise ValueError(
                f"keys must be different names, at least one, got {len(keys)} with {len(set(keys))} different"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        with new_folder(folder) as scratch:
            tokens, width = _write_batches(scratch / "features.bin", keys, batches, DTYPES[dtype])
            index = dict(keys=list(keys), tokens=tokens, width=width, dtype=dtype, metadata=dict(metadata))
            (scratch / "index.json").write_text(json.dumps(index), encoding="utf-8")
        return cls(folder, verify=False)


def _write_batches(path: Path, keys: Sequence[str], batches: Iterable[Tensor], dtype: torch.dtype) -> tuple[int, int]:
    """Writes the tokens and returns how many there are of each image and how wide they are."""
    shape, written = None, 0
    with path.open("wb") as file:
        for batch in batches:
            if batch.ndim != 3 or 0 in batch.shape:
                raise ValueError(f"batches must be (batch, tokens, width), none of them 0, got {tuple(batch.shape)}")
            shape = shape or tuple(batch.shape[1:])
            if tuple(batch.shape[1:]) != shape:
                raise ValueError(f"batches must all be (batch, {shape[0]}, {shape[1]}), got {tuple(batch.shape)}")
            if written + len(batch) > len(keys):
                raise ValueError(f"batches must hold {len(keys)} images, one a key, got more")
            batch = batch.detach().to(device="cpu", dtype=dtype).contiguous()
            bad = ~batch.isfinite().flatten(1).all(1)
            if bool(bad.any()):
                names = [keys[written + i] for i in bad.nonzero().flatten().tolist()]
                raise ValueError(f"batches must hold finite image tokens, got NaN or Inf in {names[:5]}")
            file.write(batch.view(torch.uint8).numpy())
            written += len(batch)
    if written != len(keys):
        raise ValueError(f"batches must hold {len(keys)} images, one a key, got {written}")
    return shape
