"""Tar shards in webdataset's layout, indexed at the start, so that any picture can be read where it lies.

webdataset reads shards from front to end, and the indexed access that it had (wids) is gone from its version 1; the
order of a run that resumes exactly needs an index, and tarfile gives the offsets.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformer_fast.data.bad import BadData, Notes
from qformer_fast.data.files import CHUNK_BYTES
from qformer_fast.data.pictures import IMAGE_SUFFIXES, Member

TEXT_SUFFIXES = (".txt", ".json")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SPECIAL = re.compile(r"[*?\[{]")


@dataclass
class TarSample:
    """Files of one key.

    Args:
        image (str): the picture's name, "shard.tar/key.jpg" from :func:`tar_folder` on; "" where there is none.
        member (tuple, Optional): where in the shard it is.
        texts (dict): {".txt": content, ".json": content}, those that are there.
    """

    image: str = ""
    member: Member | None = None
    texts: dict[str, bytes] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        """The JSON's fields, with the text file's content, which comes first, as "caption".

        Raises:
            ValueError: no JSON object, no UTF-8.
        """
        about = json.loads(self.texts.get(".json", b"{}"))
        if not isinstance(about, dict):
            raise ValueError(f"the JSON must be an object, got {type(about).__name__}")
        return about | ({"caption": self.texts[".txt"].decode("utf-8")} if ".txt" in self.texts else {})


def are_tars(path: str | os.PathLike) -> bool:
    """Whether this is a tar, a pattern of tars, or a folder with tars in it."""
    return os.fspath(path).endswith(".tar") or any(Path(path).rglob("*.tar"))


def tar_folder(path: str | os.PathLike) -> Path:
    """The folder from which pictures in these shards are named: the folder itself, or the pattern's first part."""
    path = Path(path)
    if path.is_dir():
        return path
    return next(parent for parent in path.parents if not _SPECIAL.search(os.fspath(parent)))


def find_tars(path: str | os.PathLike) -> list[Path]:
    """The shards of a folder, or of a pattern like "cc3m-{00000..00331}.tar" or "cc3m-*.tar", sorted.

    Raises:
        FileNotFoundError: none. ValueError: a folder with pictures beside the shards.
    """
    if Path(path).is_dir():
        files = sorted(Path(path).rglob("*"))
        if pictures := [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]:
            raise ValueError(f"pairs: {path} must hold tar shards or pictures, got both, {pictures[0]} among them")
        return [file for file in files if file.suffix == ".tar"]
    parts = _RANGE.split(os.fspath(path))
    ranges = [
        [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    found: list[Path] = []
    for numbers in itertools.product(*ranges):
        name = "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::3], numbers, fillvalue="")))
        found += map(Path, sorted(glob.glob(name)) if _SPECIAL.search(name) else [name])
    if not found:
        raise FileNotFoundError(f"pairs: no tar at {path}")
    return found


def read_tar(path: Path, root: Path, bad: BadData | Notes) -> dict[str, TarSample]:
    """The samples of a shard by their key, the name up to its first dot; other files than pictures, .txt and .json are
    left alone, and pictures are not read.

    Args:
        path (Path): the shard.
        root (Path): pictures are named from there on.
        bad (BadData): what is done with a damaged shard, of which nothing is taken, and with doubled files.

    Raises:
        ValueError: a shard that is missing or damaged, two pictures or two texts of one key, where they are refused.
    """
    shard = path.relative_to(root).as_posix()
    samples: dict[str, TarSample] = {}
    doubled: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, name = os.path.split(info.name)
                key, dot, suffix = name.partition(".")
                suffix = dot + suffix.lower()
                if not info.isfile() or suffix not in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES):
                    continue
                key = os.path.join(folder, key)
                sample = samples.setdefault(key, TarSample())
                if suffix in sample.texts or (suffix in IMAGE_SUFFIXES and sample.image):
                    doubled.setdefault(key, info.name)
                elif suffix in TEXT_SUFFIXES:
                    sample.texts[suffix] = tar.extractfile(info).read()
                else:
                    sample.image, sample.member = f"{shard}/{info.name}", (info.offset_data, info.size)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError) as error:
        bad.found("corrupt_shard", f"pairs: {path} is missing, corrupted or truncated: {error}")
        return {}
    for key, name in doubled.items():
        bad.found("duplicate_id", f"pairs: {path} must have one picture and text a key, got another {name} of {key}")
    return samples


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a broken header, one of zeros, or a file cut between two members, for the end, which is a block of
    zeros with nothing but zeros behind it.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end where one is expected, at byte {offset}")
        while rest := file.read(CHUNK_BYTES):
            if rest.count(0) != len(rest):
                raise tarfile.ReadError(f"more behind the end at byte {offset}")
