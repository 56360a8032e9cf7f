"""Image-caption pairs from a JSON list, a folder, or tar shards."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer_fast.data.bad import BadData, Notes
from qformer_fast.data.files import read_json
from qformer_fast.data.pictures import IMAGE_SUFFIXES, Member
from qformer_fast.data.tars import TarSample, are_tars, find_tars, read_tar, tar_folder


@dataclass(frozen=True, slots=True)
class Pair:
    """One caption of one image.

    Args:
        image (str): the picture's key in a feature cache, and its path in a folder of images; of one in a tar
            "shard.tar/name".
        caption (str): as a person wrote it, cleaned.
        image_id (str): pairs with the same one show the same image.
        member (tuple, Optional): where in the tar the picture is. Default: `None`, in no tar.
    """

    image: str
    caption: str
    image_id: str
    member: Member | None = None


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


def has_word(text: str) -> bool:
    """Whether something is left where BERT's tokenizer drops blanks, accents alone and what can't be seen."""
    return any(unicodedata.category(sign)[0] not in "CZM" and sign != "\ufffd" for sign in text)


def read_pairs(path: str | os.PathLike, bad: BadData | None = None, num_workers: int = 0) -> list[Pair]:
    """Pairs of a JSON list, of a folder of pictures, or of tar shards.

    Args:
        path (path): a file with a list of {"image", "caption", "image_id" (optional)}, the caption a string or a list
            of strings (LAVIS's annotation files); or a folder in which each picture has a ``.txt`` of its name with one
            caption a line; or shards in webdataset's layout, as open_clip takes them: a tar, a folder of them or a
            pattern such as "cc3m-{00000..00331}.tar", with a picture and a ``.txt`` or a ``.json`` with "caption" and
            "image_id" (optional) of each key.
        bad (BadData, Optional): what is done with samples that lack something, captions without a word, keys that come
            twice in the shards, and damaged shards. Default: `None`, they are refused.
        num_workers (int): processes that read shards. Default: 0, this one.

    Returns:
        list: one :class:`Pair` a caption, captions cleaned; images as the file names them, or relative to the folder,
        so that a feature cache can move with or without the pictures.

    Raises:
        FileNotFoundError: nothing there. ValueError: not such a list, what is bad and refused, no pair at all; the
            message names the file and the entry.
    """
    bad = bad or BadData()
    if are_tars(path):
        pairs = _read_tars(path, bad, num_workers)
    elif Path(path).is_dir():
        pairs = _read_folder(Path(path), bad)
    elif Path(path).exists():
        pairs = pairs_of(read_entries(Path(path)), Path(path), bad)
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


def pairs_of(entries: list[Any], path: Path, bad: BadData) -> list[Pair]:
    """:func:`read_pairs` of the entries of the file at ``path``."""
    pairs = []
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or not {"image", "caption"} <= entry.keys():
            bad.found("missing_sample", f'pairs: {where} must have "image" and "caption", got {entry!r}')
            continue
        image = str(entry["image"])
        pairs += _pairs(image, entry["caption"], id_of(entry, image), None, where=where, bad=bad)
    return pairs


def id_of(entry: Mapping[str, Any], image: str) -> str:
    """What an entry says that its image is, or the image's own name where it says nothing or null."""
    return image if entry.get("image_id") is None else str(entry["image_id"])


def image_folder(path: str | os.PathLike) -> Path:
    """Where the pictures of :func:`read_pairs` are unless said otherwise: the folder itself, or the file's."""
    path = Path(path)
    if are_tars(path):
        return tar_folder(path)
    return path if path.is_dir() else path.parent


def _read_folder(folder: Path, bad: BadData) -> list[Pair]:
    pairs = []
    for image in sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
        captions = image.with_suffix(".txt")
        if not captions.exists():
            bad.found("missing_sample", f"pairs: {image} has no captions, expected {captions.name} beside it")
            continue
        try:
            lines = [line for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            bad.found("missing_sample", f"pairs: {captions} must have text that can be read: {error}")
            continue
        name = image.relative_to(folder).as_posix()
        pairs += _pairs(name, lines or "", name, None, where=str(captions), bad=bad)
    return pairs


def _read_tars(path: str | os.PathLike, bad: BadData, num_workers: int) -> list[Pair]:
    shards, read = find_tars(path), functools.partial(_read_shard, root=tar_folder(path))
    with contextlib.ExitStack() as stack:
        each = stack.enter_context(ProcessPoolExecutor(num_workers)).map if num_workers else map
        pairs: list[Pair] = []
        shard_of: dict[str, Path] = {}
        for shard, (found, notes) in zip(shards, each(read, shards), strict=True):
            bad.take(notes)
            for key, of_key in found.items():
                if (before := shard_of.setdefault(key, shard)) != shard:
                    bad.found("duplicate_id", f"pairs: {shard} must have no key of {before} again, got {key}")
                else:
                    pairs += of_key
    return pairs


def _read_shard(shard: Path, root: Path) -> tuple[dict[str, list[Pair]], Notes]:
    """Pairs by their key, of some none, and what is bad."""
    notes = Notes()
    samples = read_tar(shard, root, notes)
    return {key: _pairs_of_tar(x, where=f"{shard}, key {key}", bad=notes) for key, x in samples.items()}, notes


def _pairs_of_tar(sample: TarSample, *, where: str, bad: Notes) -> list[Pair]:
    try:
        about = sample.about
    except ValueError as error:
        bad.found("missing_sample", f"pairs: {where} must have text that can be read: {error}")
        return []
    if not sample.image or "caption" not in about:
        lacks = "picture" if not sample.image else ".txt, and no .json with a caption"
        bad.found("missing_sample", f"pairs: {where} has no {lacks}")
        return []
    image_id = id_of(about, sample.image)
    return _pairs(sample.image, about["caption"], image_id, sample.member, where=where, bad=bad)


def _pairs(
    image: str, captions: Any, image_id: str, member: Member | None, *, where: str, bad: BadData | Notes
) -> list[Pair]:
    """One pair a caption, of one or a list."""
    pairs = []
    for caption in captions if isinstance(captions, list) else [captions]:
        cleaned = clean_caption(caption) if isinstance(caption, str) else ""
        if has_word(cleaned):
            pairs.append(Pair(image, cleaned, image_id, member))
        else:
            bad.found("empty_caption", f"pairs: {where} must have a caption with a word in it, got {caption!r}")
    return pairs
