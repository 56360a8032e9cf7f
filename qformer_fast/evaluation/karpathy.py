"""Images and captions of a Karpathy split: COCO 5K and Flickr30K 1K, from either kind of file that people have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qformer_fast.data.captions import clean_caption
from qformer_fast.data.files import read_json
from qformer_fast.evaluation._json import shown

SPLITS = ("train", "restval", "val", "test")


@dataclass(frozen=True)
class CaptionedImages:
    """Images, each with its captions.

    Args:
        images (list): paths as the file names them, all different.
        captions (list): of the first image, then of the second and so on; cleaned.
        image_index (list): of each caption the image, a place in ``images``.
    """

    images: list[str]
    captions: list[str]
    image_index: list[int]

    @property
    def relevant(self) -> Tensor:
        """(images, captions) bool, which captions describe which image."""
        return torch.arange(len(self.images))[:, None] == torch.tensor(self.image_index)


def read_karpathy(path: str | os.PathLike, *, split: str = "test") -> CaptionedImages:
    """A split of COCO or Flickr30K.

    Args:
        path (path): LAVIS's annotations of one split (``coco_karpathy_test.json``, ``flickr30k_test.json``), a list of
            {"image", "caption"} with a list of captions; or Karpathy's own file of all splits (``dataset_coco.json``,
            ``dataset_flickr30k.json``), {"images": [{"filename", "filepath" (optional), "split", "sentences"}]}.
        split (str): "train", "restval", "val" or "test", of a file of all splits. Default: "test".

    Returns:
        CaptionedImages: in the file's order; images as "filepath/filename" from a file of all splits.

    Raises:
        FileNotFoundError: nothing there. ValueError: no such file, another split, one without images, a missing field,
            an image twice or without captions, a caption without a word; the message names the entry.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    content = read_json(path, "annotations")
    images: dict[str, int] = {}
    captions, image_index = [], []
    for where, image, texts in listed_images(content, path, split):
        if image in images:
            raise ValueError(f"annotations: {where} names {image} again; each image must have one entry")
        if not texts:
            raise ValueError(f"annotations: {where} must have captions of {image}, got none")
        images[image] = len(images)
        captions += [_cleaned(text, where) for text in texts]
        image_index += [images[image]] * len(texts)
    if not images:
        found = "no entry" if isinstance(content, list) else f'no image of split "{split}"'
        raise ValueError(f"annotations: {path} has {found}")
    return CaptionedImages(list(images), captions, image_index)


def listed_images(content: Any, path: str | os.PathLike, split: str) -> Iterator[tuple[str, str, list[Any]]]:
    """Of each image in the content of a file of :func:`read_karpathy`: the words that name its entry, its path, and its
    captions as they are.

    Raises:
        ValueError: no such file, an entry without a field.
    """
    if isinstance(content, list):
        return _lavis_entries(path, content)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return _karpathy_entries(path, content["images"], split)
    raise ValueError(f'annotations: {path} must hold a list, or "images" with a list, got {shown(content)}')


def _lavis_entries(path: str | os.PathLike, entries: list[Any]) -> Iterator[tuple[str, str, list[Any]]]:
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or not {"image", "caption"} <= entry.keys():
            raise ValueError(f'annotations: {where} must have "image" and "caption", got {shown(entry)}')
        captions = entry["caption"]
        yield where, str(entry["image"]), captions if isinstance(captions, list) else [captions]


def _karpathy_entries(path: str | os.PathLike, entries: list[Any], split: str) -> Iterator[tuple[str, str, list[Any]]]:
    for number, entry in enumerate(entries):
        where = f"{path}, image {number}"
        if not isinstance(entry, dict) or not {"filename", "split", "sentences"} <= entry.keys():
            raise ValueError(f'annotations: {where} must have "filename", "split" and "sentences", got {shown(entry)}')
        sentences = entry["sentences"]
        if not isinstance(sentences, list) or not all(isinstance(x, dict) and "raw" in x for x in sentences):
            raise ValueError(f'annotations: {where} must have "raw" in each of its sentences, got {shown(sentences)}')
        if entry["split"] == split:
            parts = [part for part in (entry.get("filepath"), entry["filename"]) if part]
            yield where, "/".join(parts), [sentence["raw"] for sentence in sentences]


def _cleaned(text: Any, where: str) -> str:
    cleaned = clean_caption(text) if isinstance(text, str) else ""
    if not cleaned:
        raise ValueError(f"annotations: {where} must have captions with a word in them, got {text!r}")
    return cleaned
