"""Several data sets as one: images named from one folder, and what can't be used found before a run begins."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from qformer_fast.data.bad import BadData, Kind
from qformer_fast.data.captions import Pair, image_folder
from qformer_fast.data.examples import Example
from qformer_fast.data.pictures import Member, PictureBatches
from qformer_fast.data.tars import are_tars
from qformer_fast.ranks import Ranks

Row = TypeVar("Row", Pair, Example)
PICTURES_AT_ONCE = 64


@dataclass(frozen=True)
class Mixture(Generic[Row]):
    """Pairs or examples of one or several sources.

    Args:
        rows (list): one after the other; images are named from ``root``.
        root (Path): the folder that the pictures are in.
        prefixes (list): what stands before each source's own image names, "" or a folder with a "/".
    """

    rows: list[Row]
    root: Path
    prefixes: list[str]

    @property
    def members(self) -> dict[str, Member | None]:
        """Of each image, in the order in which they are first named, where in its tar it is."""
        return {row.image: row.member for row in self.rows}


def read_mixture(
    paths: Sequence[str], read: Callable[[str], list[Row]], *, image_root: str | None, bad: BadData
) -> Mixture[Row]:
    """Reads sources and puts them behind each other.

    Image ids that the data give are the data's own: equal ones in two sources mean the same picture, as where COCO's
    captions and Visual Genome's are mixed. An image without one is known by where it lies, so that pictures of two
    sources that happen to have the same name stay apart.

    Args:
        paths (Sequence): one or more, as ``read`` takes them.
        read (Callable): say :func:`qformer_fast.data.captions.read_pairs`.
        image_root (str, Optional): the folder that the images of all sources but tar shards, which hold theirs, are
            in. Default: `None`, each source's own. Images in several folders are named from the one that these have in
            common.
        bad (BadData): what is done with rows that give an image another id than those before.

    Raises:
        ValueError: no source; such a row, where it is refused; what ``read`` refuses.
    """
    if not paths:
        raise ValueError("pairs must name at least one source, got none")
    roots = [os.path.abspath(image_folder(x) if image_root is None or are_tars(x) else image_root) for x in paths]
    root = Path(os.path.commonpath(roots))
    prefixes = ["" if own == root else f"{own.relative_to(root).as_posix()}/" for own in map(Path, roots)]
    rows, ids = [], {}
    for path, prefix in zip(paths, prefixes, strict=True):
        for row in read(path):
            image = os.path.join(prefix, row.image)
            image_id = image if row.image_id in (None, row.image) else row.image_id
            if (before := ids.setdefault(image, image_id)) != image_id:
                problem = f"pairs: {path} must give {row.image} the id {before!r} as before, got {image_id!r}"
                bad.found("duplicate_id", problem)
                continue
            rows.append(dataclasses.replace(row, image=image, image_id=image_id))
    return Mixture(rows, root, prefixes)


def keep_known(mixture: Mixture[Row], known: Container[str], bad: BadData) -> Mixture[Row]:
    """Without the rows whose images a feature cache lacks.

    Raises:
        ValueError: there are such, and they are refused.
    """
    missing = [image for image in mixture.members if image not in known]
    if missing and not bad.skips:
        raise ValueError(f"pairs name {len(missing)} images that the feature cache lacks: {missing[:5]}")
    return _without(mixture, {x: f"pairs: the feature cache lacks {x}" for x in missing}, "missing_sample", bad)


def keep_present(mixture: Mixture[Row], bad: BadData, ranks: Ranks | None = None) -> Mixture[Row]:
    """Without the rows whose pictures are not there; those in tars were seen when these were indexed.

    Args:
        mixture (Mixture): of any sources.
        bad (BadData): what is done with those that are missing.
        ranks (Ranks, Optional): processes that all call this now and share the pictures. Default: `None`, this one
            looks for all.

    Raises:
        ValueError: there are such, and they are refused.
    """
    root = mixture.root

    def find(images: Sequence[str]) -> dict[str, str]:
        return {image: f"pairs: {root / image} is missing" for image in images if not (root / image).is_file()}

    images = [image for image, member in mixture.members.items() if member is None]
    return _without(mixture, (ranks or Ranks()).look(images, find), "missing_sample", bad)


def keep_readable(
    mixture: Mixture[Row], bad: BadData, num_workers: int = 0, ranks: Ranks | None = None
) -> Mixture[Row]:
    """Without the rows whose pictures can't be read, which takes as long as reading all of them.

    Args:
        mixture (Mixture): whose pictures are there.
        bad (BadData): what is done with those that can't be read.
        num_workers (int): processes that read. Default: 0, this one.
        ranks (Ranks, Optional): processes that all call this now and share the pictures. Default: `None`, this one
            looks at all.

    Raises:
        ValueError: there are such, and they are refused.
    """
    pictures = PictureBatches(mixture.root, _nothing, mixture.members)

    def find(images: Sequence[str]) -> dict[str, str]:
        lists = [images[start : start + PICTURES_AT_ONCE] for start in range(0, len(images), PICTURES_AT_ONCE)]
        found: dict[str, str] = {}
        progress = tqdm(pictures.loader(lists, num_workers), desc="looking at pictures", disable=None)
        for names, (read, _, problems) in zip(lists, progress, strict=True):
            found |= zip(sorted(set(names) - set(read), key=names.index), problems, strict=True)
        return found

    return _without(mixture, (ranks or Ranks()).look(list(mixture.members), find), "unreadable_picture", bad)


def _nothing(_picture: Image.Image) -> Tensor:
    """A transform for pictures that are only to be read."""
    return torch.empty(0)


def _without(mixture: Mixture[Row], problems: dict[str, str], kind: Kind, bad: BadData) -> Mixture[Row]:
    """Without these images' rows; ``problems`` says of each image what is wrong."""
    for problem in problems.values():
        bad.found(kind, problem)
    return dataclasses.replace(mixture, rows=[row for row in mixture.rows if row.image not in problems])
