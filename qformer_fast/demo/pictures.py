"""What the demo's two sources of pictures have in common, and the split that holds concepts out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from qformer_fast.data.examples import Example

IMAGE_SIZE = 224


@dataclass(frozen=True)
class Picture:
    """One drawing of one concept.

    Args:
        key (str): unique name; its row in the feature cache.
        caption (str): the name that retrieval is measured on, cleaned.
        aliases (tuple): other names of the same concept, cleaned.
        concept (str): drawings of one concept by several vendors share it.
        base (str): concepts that are variants of each other share it; never in both halves of the split.
        vendor (str): who drew it.
        source (str): what the picture is rendered from.
        mirrored (bool): shown as in a mirror. Default: False.
    """

    key: str
    caption: str
    aliases: tuple[str, ...]
    concept: str
    base: str
    vendor: str
    source: str
    mirrored: bool = False


@dataclass(frozen=True)
class Questions:
    """Questions about pictures, which are in training or in test but not in both.

    Args:
        pictures (list): their keys are the examples' images.
        render (Callable): draws one, 224 x 224 RGB.
        train, test (list): of :class:`Example`, the text the answer, the prompt with the question in it.
        about (str): where they are from.
    """

    pictures: list[Picture]
    render: Callable[[Picture], Image.Image]
    train: list[Example]
    test: list[Example]
    about: str


def mirrored(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures as a mirror shows them, but for those whose names speak of a side."""
    sides = {"left", "right", "leftwards", "rightwards"}
    return [
        replace(picture, key=f"{picture.key}/mirrored", mirrored=True)
        for picture in pictures
        if not sides.intersection(" ".join((picture.caption, *picture.aliases)).split())
    ]


def split_by_base(pictures: Sequence[Picture], *, held_out: float = 0.2) -> tuple[list[Picture], list[Picture]]:
    """Training pictures and pictures of concepts never seen in training.

    A base concept goes to the held-out side by the hash of its name: the same on every machine, whatever other
    pictures there are.

    Args:
        pictures (Sequence): of any vendors.
        held_out (float): share of base concepts, in (0, 1). Default: 0.2.

    Returns:
        tuple: (train, test).

    Raises:
        ValueError: a side that would be empty.
    """
    train, test = [], []
    for picture in pictures:
        (test if _uniform(picture.base) < held_out else train).append(picture)
    if not train or not test:
        raise ValueError(f"held_out = {held_out} leaves {len(train)} pictures to train on and {len(test)} to test")
    check_disjoint(train, test)
    return train, test


def check_disjoint(train: Sequence[Picture], test: Sequence[Picture]) -> None:
    """Raises ValueError where a base concept or a caption is on both sides."""
    for what in ("base", "caption"):
        both = {getattr(picture, what) for picture in train} & {getattr(picture, what) for picture in test}
        if both:
            raise ValueError(f"the split must not have one {what} on both sides, got {sorted(both)[:5]}")


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
