"""Files that are whole or not there at all, and that tell when they were damaged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
CHUNK_BYTES = 1 << 24
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name and a ``checksums.json`` when the block ends.

    Until then it has a hidden temporary name beside ``folder``; when the block fails it is removed. Its files are on
    disk, not just on their way there, when they appear, and as readable for others as the umask says.

    Args:
        folder (Path): must not exist, or be empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    scratch.mkdir()
    try:
        yield scratch
        files = sorted(scratch.iterdir())
        (scratch / CHECKSUMS).write_text(json.dumps({file.name: crc32(file) for file in files}), encoding="utf-8")
        mode = stat.S_IMODE(scratch.stat().st_mode) & 0o666  # safetensors creates files that only their owner may read
        for file in scratch.iterdir():
            file.chmod(mode)
            _to_disk(file)
        os.replace(scratch, folder)
        _to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def find_damage(folder: Path, names: Iterable[str]) -> str | None:
    """What is wrong with the first damaged one of these files of a :func:`new_folder`; None if all are as written."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {name: checksums[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / CHECKSUMS} is missing or corrupted ({error!r})"
    for name, checksum in expected.items():
        if not (folder / name).exists():
            return f"{folder / name} is missing"
        if crc32(folder / name) != checksum:
            return f"{folder / name} is corrupted or truncated (checksum differs)"
    return None


def crc32(path: Path) -> int:
    """Checksum of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def read_json(path: str | os.PathLike, name: str, *, unique_keys: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        path (path): of the file.
        name (str): what errors call the file.
        unique_keys (bool): refuse an object with a key twice, of which JSON readers keep the last. Default: False.

    Raises:
        FileNotFoundError: no such file. ValueError: no JSON, a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except ValueError as error:
        raise ValueError(f"{name}: {path} is no JSON: {error}") from error


def check_folder_or_id(path_or_id: str | os.PathLike, name: str) -> None:
    """Refuses what is no folder here and can't be the id of a model on the Hugging Face hub.

    Raises:
        FileNotFoundError: ``path_or_id`` is such; the message calls it ``name``.
    """
    path_or_id = os.fspath(path_or_id)
    if not os.path.isdir(path_or_id) and (path_or_id[:1] in ("", ".", "~") or not _HUB_ID.fullmatch(path_or_id)):
        raise FileNotFoundError(f"{name}: no folder at {path_or_id!r}, which is no id of the Hugging Face hub either")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, or replaces one, in one go."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, or replaces one, in one go."""
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} comes twice")
        content[key] = value
    return content


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
