"""Batches of image-caption pairs in an order that depends on the seed and the position alone."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from qformer_fast.data.captions import Pair
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import encode, pad


@dataclass(frozen=True, eq=False)
class Batch:
    """What a training step takes.

    Args:
        images (Tensor): image tokens (batch, tokens, width) from a cache, or pixels (batch, 3, height, width).
        input_ids, attention_mask (Tensor): (batch, length) int64.
        image_ids (Tensor): (batch,) int64, equal where pairs show one image.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor

    def pin_memory(self) -> Batch:
        return Batch(*(x.pin_memory() for x in vars(self).values()))


class PairDataset(Dataset):
    """Image-caption pairs; an index is a list of pair numbers and gives a :class:`Batch`.

    All captions are tokenized at once, so that one without a word is found now and not in the middle of a run.

    Args:
        pairs (Sequence): of :class:`Pair`.
        tokenizer: from :func:`load_tokenizer`.
        cache (FeatureCache, Optional): where the pairs' images are keys.
        transform (Callable, Optional): picture to pixels (3, height, width), say ``ImageEncoder.transform``; one of
            ``cache`` and ``transform`` must be given.
        image_root (path): the folder that the pairs' images are in, for ``transform``. Default: the current one.
        max_length (int): of captions in tokens. Default: 32.

    Raises:
        ValueError: no pair, both or neither of ``cache`` and ``transform``, images that the cache lacks, a caption
            without a word.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache: FeatureCache | None = None,
        transform: Callable[[Image.Image], Tensor] | None = None,
        image_root: str | os.PathLike = ".",
        max_length: int = 32,
    ):
        if len(pairs) == 0:
            raise ValueError("pairs must hold at least one image-caption pair, got none")
        if (cache is None) == (transform is None):
            raise ValueError("cache or transform must be given, one of them, got both or neither")
        if cache is not None:
            missing = sorted({pair.image for pair in pairs if pair.image not in cache})
            if missing:
                raise ValueError(f"pairs name {len(missing)} images that the feature cache lacks: {missing[:5]}")
        self.pairs, self.cache, self.transform, self.image_root = list(pairs), cache, transform, Path(image_root)
        encoded = encode(tokenizer, [pair.caption for pair in pairs], max_length=max_length)
        self._token_ids = torch.tensor(list(itertools.chain.from_iterable(encoded)), dtype=torch.int32)
        self._starts = list(itertools.accumulate(map(len, encoded), initial=0))
        numbers = {image_id: number for number, image_id in enumerate(dict.fromkeys(p.image_id for p in pairs))}
        self.image_ids = torch.tensor([numbers[pair.image_id] for pair in pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, indices: list[int]) -> Batch:
        names = [self.pairs[i].image for i in indices]
        if self.cache is not None:
            images = self.cache.rows(names)
        else:
            images = torch.stack([read_pixels(self.image_root / name, self.transform) for name in names])
        ids, mask = pad([self._token_ids[self._starts[i] : self._starts[i + 1]] for i in indices])
        return Batch(images, ids, mask, self.image_ids[indices])


def read_pixels(path: str | os.PathLike, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """A picture in RGB through ``transform``.

    Raises:
        ValueError: no picture there that can be read; the message names it.
    """
    try:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} is no readable picture: {error}") from error


class ShuffledBatches(Sampler[list[int]]):
    """Lists of ``batch_size`` pair numbers, without end: each epoch a permutation of its own, its last short batch
    dropped.

    Args:
        num_pairs, batch_size (int): at least one batch an epoch.
        seed (int): with the epoch's number it fixes the permutation.
        start (int): batches already seen, which are skipped. Default: 0.

    Raises:
        ValueError: a batch larger than the data.
    """

    def __init__(self, num_pairs: int, batch_size: int, *, seed: int, start: int = 0):
        if not 1 <= batch_size <= num_pairs:
            raise ValueError(f"batch_size must lie in [1, {num_pairs}], the number of pairs, got {batch_size}")
        self.num_pairs, self.batch_size, self.seed, self.start = num_pairs, batch_size, seed, start
        self.per_epoch = num_pairs // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = divmod(self.start, self.per_epoch)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_pairs, generator=generator).tolist()
            for batch in range(first, self.per_epoch):
                yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
            epoch, first = epoch + 1, 0


def batch_loader(dataset: PairDataset, order: ShuffledBatches, *, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches in ``order``; the same ones whatever ``num_workers``, and without touching the global random state.

    Workers leave SIGINT and SIGTERM, which often go to all processes of a run, to the main process, whose last
    step they would otherwise take down.
    """
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_ignore_stop_signals,
    )


def _ignore_stop_signals(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
