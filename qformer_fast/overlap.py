"""Kernels beside each other, on streams of their own.

One that is bound by memory leaves the tensor cores idle, and the last wave of a product's tiles most of the
multiprocessors. CUDA graphs keep what streams say about order, so it costs the host nothing there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
HELD_BYTES = 256 * 2**20

# of the process: autograd runs backward in threads of its own
_streams: Streams | None = None
# of one op's call, and so of a thread
_of_call = threading.local()


class Streams:
    """Two streams beside the one that is current when :func:`overlapping` begins.

    Args:
        device (torch.device): a CUDA device.
        held_bytes (int): how large the inputs of work left aside may grow before the current stream waits for it, since
            their memory is not free before. Default: 256 MiB.
    """

    def __init__(self, device: torch.device, held_bytes: int = HELD_BYTES):
        self.held_bytes = held_bytes
        self._aside, self._branch = torch.cuda.Stream(device), Branch(device)
        self._held: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def begin(self) -> None:
        self._home = torch.cuda.current_stream()
        self._held.clear()
        # what a capture joins must have begun in it
        self._aside.wait_stream(self._home)

    def aside(self, work: Callable[[], object], *inputs: Tensor) -> None:
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            work()
            self._held.append((self._aside.record_event(), inputs))
        # a branch's wait would not keep the home stream from memory that is freed here
        while torch.cuda.current_stream() == self._home and len(self._held) > 1 and self._held_now() > self.held_bytes:
            done, _ = self._held.popleft()
            self._home.wait_event(done)

    def _held_now(self) -> int:
        return sum(x.nbytes for _, inputs in self._held for x in inputs)

    def side_by_side(self, first: Callable[[], T], *others: Callable[[], T]) -> list[T]:
        self._branch.begin()
        with self._branch.here():
            found = [task() for task in others]
        found.insert(0, first())
        self._branch.join()
        return found

    def mark(self, event: torch.cuda.Event) -> None:
        # what is left aside later waits for the current stream anyway
        self._aside.wait_stream(torch.cuda.current_stream())
        event.record(self._aside)

    def join(self) -> None:
        here = torch.cuda.current_stream()
        here.wait_stream(self._aside)
        if here == self._home:
            self._held.clear()


class Branch:
    """A stream beside the current one.

    Tensors that are made there may be used by whoever comes after :meth:`join`, and given up if :meth:`begin` comes
    before its next work.

    Args:
        device (torch.device, Optional): a CUDA device. Default: `None`, work comes in the order in which it is asked
            for.
        priority (int): kernels of a lower one go before those of a higher one. Default: 0.
    """

    def __init__(self, device: torch.device | None = None, priority: int = 0):
        self._stream = None if device is None else torch.cuda.Stream(device, priority)

    def begin(self) -> None:
        """What runs on it from now on comes after what the current stream has."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def here(self) -> contextlib.AbstractContextManager:
        """What is asked for inside runs on it."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def join(self) -> None:
        """What the current stream has from now on comes after what runs on the branch."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def _current() -> Streams | None:
    return getattr(_of_call, "streams", None) or _streams


@contextlib.contextmanager
def overlapping(streams: Streams) -> Iterator[None]:
    """Has the functions below use ``streams``; what runs inside is joined at the end."""
    global _streams
    before, _streams = _streams, streams
    try:
        streams.begin()
        yield
        streams.join()
    finally:
        _streams = before


@contextlib.contextmanager
def overlapping_in_captures() -> Iterator[None]:
    """As :func:`overlapping`, for this thread, where a CUDA graph is captured; elsewhere it changes nothing."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if _current() is not None or not capturing:
        yield
        return
    streams = _of_call.streams = _streams_of_captures(torch.cuda.current_device())
    try:
        streams.begin()
        yield
        streams.join()
    finally:
        _of_call.streams = None


@functools.cache
def _streams_of_captures(device: int) -> Streams:
    return Streams(torch.device("cuda", device))


def aside(work: Callable[[], object], *inputs: Tensor) -> None:
    """Runs ``work``, which reads ``inputs`` and gives nothing that is needed before :func:`join`.

    One work after the other; nothing may write to the inputs before :func:`join`.
    """
    streams = _current()
    work() if streams is None else streams.aside(work, *inputs)


def side_by_side(*tasks: Callable[[], T]) -> list[T]:
    """The results of ``tasks``, none of which needs another's."""
    streams = _current()
    if streams is None or len(tasks) == 1:
        return [task() for task in tasks]
    return streams.side_by_side(*tasks)


def mark(event: torch.cuda.Event) -> None:
    """Records ``event`` behind what was asked for so far, also what was left aside; nothing waits for it."""
    streams = _current()
    event.record() if streams is None else streams.mark(event)


def join() -> None:
    """What was left aside is done for whoever comes later on the current stream."""
    streams = _current()
    if streams is not None:
        streams.join()
