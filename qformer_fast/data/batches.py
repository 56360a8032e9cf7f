"""Batches of images with text in an order that depends on the seed and the position alone."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from qformer_fast.data.captions import Pair
from qformer_fast.data.examples import Example
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.joined import JoinedCaches
from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.data.pictures import Member, Transform, read_pixels
from qformer_fast.data.tokenizer import encode, pad


@dataclass(frozen=True, eq=False)
class Batch:
    """What a training step of stage 1 takes.

    Args:
        images (Tensor): image tokens (batch, tokens, width) from a cache, or pixels (batch, 3, height, width); of
            :func:`batch_loader` what :meth:`ImageTextDataset.read` says.
        input_ids, attention_mask (Tensor): (batch, length) int64.
        image_ids (Tensor): (batch,) int64, equal where pairs show one image.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor

    def pin_memory(self) -> Batch:
        return _pinned(self)


@dataclass(frozen=True, eq=False)
class LanguageBatch:
    """What a training step with a frozen language model takes; text is (batch, length) int64.

    Args:
        images, image_ids: as of :class:`Batch`.
        input_ids, attention_mask, labels (Tensor): prompts and texts in the language model's tokens, see
            :class:`qformer_fast.data.language.LanguageText`.
        qformer_input_ids, qformer_attention_mask (Tensor, Optional): the prompts in BERT's tokens.
        caption_input_ids, caption_attention_mask (Tensor, Optional): the texts in BERT's tokens.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    qformer_input_ids: Tensor | None
    qformer_attention_mask: Tensor | None
    caption_input_ids: Tensor | None
    caption_attention_mask: Tensor | None
    image_ids: Tensor

    def pin_memory(self) -> LanguageBatch:
        return _pinned(self)


class ImageTextDataset(Dataset, ABC):
    """Images with a text each; an index is a list of their numbers and gives a batch.

    Args:
        kind (str): what errors call them.
        images (Sequence): keys of the cache, or paths in ``image_root``.
        image_ids (Sequence): equal where they show one image.
        members (Sequence): where in tars the images are, `None` for those in none.
        cache (FeatureCache, Optional): or :class:`JoinedCaches`, where the images are keys.
        transform (Callable, Optional): picture to pixels (3, height, width), say ``ImageEncoder.transform``; one of
            ``cache`` and ``transform`` must be given.
        image_root (path): the folder that the images are in, for ``transform``.

    ``skipped`` has how many of each kind of bad data were left out when the texts were read, see
    :class:`qformer_fast.data.bad.BadData`.

    Raises:
        ValueError: no image, both or neither of ``cache`` and ``transform``, images that the cache lacks.
    """

    def __init__(
        self,
        kind: str,
        images: Sequence[str],
        image_ids: Sequence[str],
        members: Sequence[Member | None],
        *,
        cache: FeatureCache | JoinedCaches | None,
        transform: Transform | None,
        image_root: str | os.PathLike,
    ):
        if len(images) == 0:
            raise ValueError(f"{kind} must hold at least one image with a text, got none")
        if (cache is None) == (transform is None):
            raise ValueError("cache or transform must be given, one of them, got both or neither")
        if cache is not None:
            missing = sorted({image for image in images if image not in cache})
            if missing:
                raise ValueError(f"{kind} name {len(missing)} images that the feature cache lacks: {missing[:5]}")
        self.cache, self.transform, self.image_root = cache, transform, Path(image_root)
        self.skipped: dict[str, int] = {}
        self._images, self._members = list(images), list(members)
        numbers = {image_id: number for number, image_id in enumerate(dict.fromkeys(image_ids))}
        self.image_ids = torch.tensor([numbers[image_id] for image_id in image_ids])

    def __len__(self) -> int:
        return len(self._images)

    @property
    def digest(self) -> int:
        """A checksum of which images there are and which are the same."""
        return zlib.crc32("\n".join(self._images).encode(), zlib.crc32(self.image_ids.numpy()))

    def __getitem__(self, indices: list[int]) -> Batch | LanguageBatch:
        batch = self.read(indices)
        return replace(batch, images=self.unpack(batch.images))

    @abstractmethod
    def read(self, indices: list[int], *, pin_memory: bool = False) -> Batch | LanguageBatch:
        """The batch, but of a cache the images' tokens as they are stored: (len(indices), bytes) uint8. ``pin_memory``:
        these are read into pinned memory.
        """

    def unpack(self, images: Tensor) -> Tensor:
        """Image tokens (batch, tokens, width), or pixels, of the images that :meth:`read` gave, on their device."""
        return images if self.cache is None else self.cache.unpack(images)

    def images(self, indices: list[int], *, pin_memory: bool = False) -> Tensor:
        """As :meth:`read` has them."""
        names = [self._images[i] for i in indices]
        if self.cache is not None:
            return self.cache.read(names, pin_memory=pin_memory)
        members = [self._members[i] for i in indices]
        read = [read_pixels(self.image_root / x, self.transform, at) for x, at in zip(names, members, strict=True)]
        return torch.stack(read)


class PairDataset(ImageTextDataset):
    """Image-caption pairs; an index is a list of pair numbers and gives a :class:`Batch`.

    All captions are tokenized at once, so that one without a word is found now and not in the middle of a run.

    Args:
        pairs (Sequence): of :class:`Pair`.
        tokenizer: from :func:`load_tokenizer`.
        cache, transform, image_root: see :class:`ImageTextDataset`. Default of the last: the current folder.
        max_length (int): of captions in tokens. Default: 32.

    Raises:
        ValueError: what :class:`ImageTextDataset` refuses, a caption without a word.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache: FeatureCache | JoinedCaches | None = None,
        transform: Transform | None = None,
        image_root: str | os.PathLike = ".",
        max_length: int = 32,
    ):
        where = {"cache": cache, "transform": transform, "image_root": image_root}
        images, image_ids = [pair.image for pair in pairs], [pair.image_id for pair in pairs]
        super().__init__("pairs", images, image_ids, [pair.member for pair in pairs], **where)
        self.pairs = list(pairs)
        self._captions = _Rows(encode(tokenizer, [pair.caption for pair in pairs], max_length=max_length))

    def read(self, indices: list[int], *, pin_memory: bool = False) -> Batch:
        images = self.images(indices, pin_memory=pin_memory)
        return Batch(images, *pad(self._captions[indices]), self.image_ids[indices])


class LanguageDataset(ImageTextDataset):
    """Images with what a language model is to say of them; an index is a list of example numbers and gives a
    :class:`LanguageBatch`.

    All text is tokenized at once, so that what can't be is found now and not in the middle of a run.

    Args:
        examples (Sequence): of :class:`Example`.
        language (LanguageTokenizer): the language model's.
        cache, transform, image_root: see :class:`ImageTextDataset`. Default of the last: the current folder.
        qformer_tokenizer (Optional): from :func:`load_tokenizer`: the prompts also go to the Q-Former, as [CLS] prompt
            [SEP] (InstructBLIP). Default: `None`, they do not.
        qformer_max_length (int): of prompts and captions in BERT's tokens; longer prompts lose their beginning, as
            InstructBLIP's. Default: 32.
        captions_tokenizer (Optional): from :func:`load_tokenizer`: the texts also come in BERT's tokens, for
            :class:`qformer_fast.models.blip2_joint.Blip2Joint`. Default: `None`, they do not.

    Raises:
        ValueError: what :class:`ImageTextDataset` and :meth:`LanguageTokenizer.target_rows` refuse, a prompt for the
            Q-Former or a caption without a word.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        language: LanguageTokenizer,
        *,
        cache: FeatureCache | JoinedCaches | None = None,
        transform: Transform | None = None,
        image_root: str | os.PathLike = ".",
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        qformer_max_length: int = 32,
        captions_tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        images = [example.image for example in examples]
        image_ids = [example.image_id or example.image for example in examples]
        where = {"cache": cache, "transform": transform, "image_root": image_root}
        super().__init__("examples", images, image_ids, [example.member for example in examples], **where)
        self.examples, self.language = list(examples), language
        texts, prompts = [example.text for example in examples], [example.prompt for example in examples]
        if silent := [i for i, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"examples must each have a text, none in {len(silent)} of them: {silent[:5]}")
        self._input_ids, self._labels = map(_Rows, language.target_rows(texts, prompts))
        self._prompts, self._captions = None, None
        if qformer_tokenizer is not None:
            if untold := [i for i, prompt in enumerate(prompts) if not prompt.strip()]:
                raise ValueError(
                    f"examples must each have a prompt for the Q-Former, none in {len(untold)} of them: {untold[:5]}"
                )
            self._prompts = _Rows(
                encode(qformer_tokenizer, prompts, max_length=qformer_max_length, truncation_side="left")
            )
        if captions_tokenizer is not None:
            self._captions = _Rows(encode(captions_tokenizer, texts, max_length=qformer_max_length))

    @property
    def has_prompts(self) -> bool:
        """Whether batches hold prompts for the Q-Former."""
        return self._prompts is not None

    @property
    def content(self) -> dict[str, Tensor]:
        """The images' names, and all tokens of each kind that batches hold, the rows one after the other."""
        kinds = {"input_ids": self._input_ids, "labels": self._labels}
        kinds |= {"qformer_input_ids": self._prompts, "caption_input_ids": self._captions}
        names = torch.frombuffer(bytearray("\n".join(self._images), "utf-8"), dtype=torch.uint8)
        return {"images": names} | {name: rows.ids for name, rows in kinds.items() if rows is not None}

    @property
    def has_captions(self) -> bool:
        """Whether batches hold the texts in BERT's tokens."""
        return self._captions is not None

    def read(self, indices: list[int], *, pin_memory: bool = False) -> LanguageBatch:
        text = self.language.pad(self._input_ids[indices], self._labels[indices])
        prompts = (None, None) if self._prompts is None else pad(self._prompts[indices])
        captions = (None, None) if self._captions is None else pad(self._captions[indices])
        images = self.images(indices, pin_memory=pin_memory)
        return LanguageBatch(images, *vars(text).values(), *prompts, *captions, self.image_ids[indices])


class _Rows:
    """Token ids of many texts in one tensor, which processes share; a list of numbers gives the rows of these texts."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self._starts = np.cumsum([0, *map(len, rows)])
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32, count=self._starts[-1])
        self.ids = torch.from_numpy(flat)

    def __getitem__(self, indices: Iterable[int]) -> list[Tensor]:
        return [self.ids[self._starts[i] : self._starts[i + 1]] for i in indices]


def _pinned(batch: Batch | LanguageBatch) -> Batch | LanguageBatch:
    return type(batch)(*(None if x is None else x.pin_memory() for x in vars(batch).values()))


class ShuffledBatches(Sampler[list[int]]):
    """Lists of pair numbers, without end: each epoch a permutation of its own, its last short batch dropped.

    A batch is that of all ranks; each rank gets its share of it, so that the batches do not depend on how many share
    them.

    Args:
        num_pairs, batch_size (int): at least one batch an epoch; of all ranks, a multiple of their number.
        seed (int): with the epoch's number it fixes the permutation.
        start (int): batches already seen, which are skipped. Default: 0.
        rank, world_size (int): which share, of how many. Default: 0 and 1.

    Raises:
        ValueError: a batch larger than the data.
    """

    def __init__(
        self, num_pairs: int, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ):
        if not 1 <= batch_size <= num_pairs:
            raise ValueError(f"batch_size must lie in [1, {num_pairs}], the number of pairs, got {batch_size}")
        self.num_pairs, self.batch_size, self.seed, self.start = num_pairs, batch_size, seed, start
        self.per_epoch = num_pairs // batch_size
        self.first, self.share = rank * (batch_size // world_size), batch_size // world_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = divmod(self.start, self.per_epoch)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_pairs, generator=generator).tolist()
            for batch in range(first, self.per_epoch):
                begin = batch * self.batch_size + self.first
                yield order[begin : begin + self.share]
            epoch, first = epoch + 1, 0


def batch_loader(
    dataset: ImageTextDataset, order: ShuffledBatches, *, num_workers: int, pin_memory: bool
) -> Generator[Batch | LanguageBatch, None, None]:
    """What :meth:`ImageTextDataset.read` gives in ``order``, the same whatever ``num_workers``; the global random state
    stays as it is. Closing it ends its workers.

    A cache's tokens are read by threads, to where a GPU takes them from: processes would copy each batch twice, and
    reading keeps no thread from another. Pictures are decoded by processes. These leave SIGINT and SIGTERM, which often
    go to all processes of a run, to the main process, whose last step they would otherwise take down.
    """
    if dataset.cache is not None:
        return _read_ahead(dataset, order, num_workers, pin_memory=pin_memory)
    loader = DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_ignore_stop_signals,
    )
    return (batch for batch in loader)


def _read_ahead(
    dataset: ImageTextDataset, order: ShuffledBatches, num_threads: int, *, pin_memory: bool
) -> Generator[Batch | LanguageBatch, None, None]:
    """A batch a thread ahead: pinned memory comes in powers of two."""

    def read(numbers: list[int]) -> Batch | LanguageBatch:
        batch = dataset.read(numbers, pin_memory=pin_memory)
        return batch.pin_memory() if pin_memory else batch

    if num_threads == 0:
        yield from map(read, order)
        return
    # a new thread has the first device, on which pinned memory may make a context
    begin = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
    pool, ahead = ThreadPoolExecutor(num_threads, initializer=begin), deque()
    try:
        for numbers in order:
            ahead.append(pool.submit(read, numbers))
            if len(ahead) > num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_stop_signals(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
