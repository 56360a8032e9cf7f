"""Pictures read from files, or from the tar shards that hold them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

Transform = Callable[[Image.Image], Tensor]
Member = tuple[int, int]
"""Where a file lies in a tar: its offset and size in bytes."""


class PictureError(ValueError):
    """A picture that can't be read."""


def read_pixels(path: str | os.PathLike, transform: Transform, member: Member | None = None) -> Tensor:
    """A picture in RGB through ``transform``.

    Args:
        path (path): its file; of a tar's member "shard.tar/name".
        transform (Callable): picture to pixels.
        member (Member, Optional): where in the tar it is. Default: `None`, in no tar.

    Raises:
        PictureError: no picture there that can be read; the message names it.
    """
    path = Path(path)
    try:
        with Image.open(path if member is None else _member_file(path, member)) as image:
            picture = image.convert("RGB")
    # of damaged files Pillow's decoders raise what they happen to stumble on
    except Exception as error:
        raise PictureError(f"{path} is no readable picture: {error}") from error
    return transform(picture)


def _member_file(path: Path, member: Member) -> io.BytesIO:
    offset, size = member
    # names in a tar may have folders
    shard = next((parent for parent in path.parents if parent.is_file()), path.parent)
    with shard.open("rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(size))


class PictureBatches(Dataset):
    """Pictures of a folder; an index is a list of names and gives those of them that can be read, their pixels
    (pictures, 3, height, width), and what is wrong with the others.

    Args:
        root (path): the folder that the names are in.
        transform (Callable): picture to pixels (3, height, width).
        members (Mapping, Optional): where in their tars those lie that are in one. Default: `None`, in none.
    """

    def __init__(
        self, root: str | os.PathLike, transform: Transform, members: Mapping[str, Member | None] | None = None
    ):
        self.root, self.transform, self.members = Path(root), transform, members or {}

    def __getitem__(self, names: Sequence[str]) -> tuple[list[str], Tensor, list[str]]:
        read, pixels, problems = [], [], []
        for name in names:
            try:
                pixels.append(read_pixels(self.root / name, self.transform, self.members.get(name)))
                read.append(name)
            except PictureError as error:
                problems.append(str(error))
        return read, torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0), problems

    def loader(self, lists: Sequence[Sequence[str]], num_workers: int) -> DataLoader:
        """What these lists give, one after the other, read by ``num_workers`` processes."""
        generator = torch.Generator()  # the global random state is not touched
        return DataLoader(self, sampler=lists, batch_size=None, num_workers=num_workers, generator=generator)
