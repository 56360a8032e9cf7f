"""Image-caption pairs from a JSON list or a folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer_fast.data.files import read_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Pair:
    """One caption of one image.

    Args:
        image (str): the picture's key in a feature cache, and its path in a folder of images.
        caption (str): as a person wrote it, cleaned.
        image_id (str): pairs with the same one show the same image.
    """

    image: str
    caption: str
    image_id: str


def clean_caption(text: str, *, max_words: int = 50) -> str:
    """Lower case without the signs ``.!"()*#:;~``, spaces joined, cut to ``max_words``.

    Replaces LAVIS ``BlipCaptionProcessor.pre_caption`` (blip_processors.py:30-52).
    """
    words = re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split()
    return " ".join(words[:max_words])


def clean_question(text: str, *, max_words: int = 50) -> str:
    """Lower case without the signs ``.!"()*#:;~``, the question mark kept, cut to ``max_words``.

    Replaces LAVIS ``BlipQuestionProcessor.pre_question`` (blip_processors.py:87-102).
    """
    words = re.sub(r"[.!\"()*#:;~]", "", text.lower()).rstrip(" ").split(" ")
    return " ".join(words[:max_words])


def read_pairs(path: str | os.PathLike) -> list[Pair]:
    """Pairs of a JSON list, or of a folder of pictures.

    Args:
        path (path): a file with a list of {"image", "caption", "image_id" (optional)}, the caption a string or a list
            of strings (LAVIS's annotation files); or a folder in which each picture has a ``.txt`` of its name with one
            caption a line.

    Returns:
        list: one :class:`Pair` a caption, captions cleaned; images as the file names them, or relative to the folder,
        so that a feature cache can move with or without the pictures.

    Raises:
        FileNotFoundError: nothing there. ValueError: not such a list, a missing field, an empty caption, no pair at
            all; the message names the entry.
    """
    path = Path(path)
    if path.is_dir():
        pairs = _read_folder(path)
    elif path.exists():
        pairs = pairs_of(read_entries(path), path)
    else:
        raise FileNotFoundError(f"pairs: no file or folder at {path}")
    if not pairs:
        raise ValueError(f"pairs must hold at least one image-caption pair, found none in {path}")
    return pairs


def read_entries(path: Path) -> list[Any]:
    """A JSON list, not yet looked at.

    Raises:
        ValueError: no JSON, or no list.
    """
    entries = read_json(path, "pairs")
    if not isinstance(entries, list):
        raise ValueError(f"pairs: {path} must hold a list, got {type(entries).__name__}")
    return entries


def pairs_of(entries: list[Any], path: Path) -> list[Pair]:
    """:func:`read_pairs` of the entries of the file at ``path``."""
    pairs = []
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or not {"image", "caption"} <= entry.keys():
            raise ValueError(f'pairs: {where} must have "image" and "caption", got {entry!r}')
        image = str(entry["image"])
        captions = entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
        pairs += [_pair(image, caption, str(entry.get("image_id", image)), where=where) for caption in captions]
    return pairs


def image_folder(path: str | os.PathLike) -> Path:
    """Where the pictures of :func:`read_pairs` are unless said otherwise: the folder itself, or the file's."""
    path = Path(path)
    return path if path.is_dir() else path.parent


def _read_folder(folder: Path) -> list[Pair]:
    pairs = []
    for image in sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
        captions = image.with_suffix(".txt")
        if not captions.exists():
            raise ValueError(f"pairs: {image} has no captions, expected {captions.name} beside it")
        lines = [line for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
        name = image.relative_to(folder).as_posix()
        pairs += [_pair(name, line, name, where=str(captions)) for line in lines]
    return pairs


def _pair(image: str, caption: str, image_id: str, *, where: str) -> Pair:
    cleaned = clean_caption(caption) if isinstance(caption, str) else ""
    if not cleaned:
        raise ValueError(f"pairs: {where} must have a caption with a word in it, got {caption!r}")
    return Pair(image, cleaned, image_id)
