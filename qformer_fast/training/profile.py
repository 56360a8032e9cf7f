"""Where a run's time goes: waiting for data, the image encoder, the Q-Former, communication."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

Part = Literal["data", "encoder", "qformer", "communication"]
Mark = float | torch.cuda.Event
Span = tuple[Part, Mark, Mark]


@dataclass(frozen=True)
class Interval:
    """Marks of some steps, which a GPU may not have come to yet."""

    begin: Mark
    end: Mark
    spans: list[Span]

    def shares(self) -> dict[str, float]:
        """Shares of the time, once the device has come to ``end``.

        Returns:
            dict: "share_data", "share_encoder", "share_qformer" and "share_other", which add up to 1; and of several
            ranks "share_communication", in which gradients are on their way, beside the Q-Former's backward, or of
            CUDA graphs the part of "share_qformer" in which the device waits for them.
        """
        whole = _seconds(self.begin, self.end)
        spans = [(part, _seconds(self.begin, a) / whole, _seconds(self.begin, b) / whole) for part, a, b in self.spans]
        shares = {
            f"share_{part}": sum(b - a for name, a, b in spans if name == part)
            for part in ("data", "encoder", "qformer")
        }
        shares["share_other"] = 1 - sum(shares.values())
        if any(part == "communication" for part, _, _ in spans):
            # buckets are on their way at the same time
            shares["share_communication"], reached = 0.0, 0.0
            for a, b in sorted((a, b) for part, a, b in spans if part == "communication"):
                shares["share_communication"] += max(b - max(a, reached), 0.0)
                reached = max(reached, b)
        return shares


class Profile:
    """Marks in a run's time.

    On a GPU they are events in its stream, between which it works on what was asked of it: those around the wait for
    data show how long it stood still for lack of data, and not how long the host waited while it worked.

    Args:
        device (torch.device): where the run's model is.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._begin, self._spans = self._mark(), []

    @contextlib.contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Counts the block's time as this part's."""
        begin = self._mark()
        yield
        self._spans.append((name, begin, self._mark()))

    def watch(self, model: DistributedDataParallel) -> None:
        """Counts the time in which its gradients are on their way as communication."""
        model.register_comm_hook(None, self._all_reduce)

    def cut(self) -> Interval:
        """What was marked since the last cut."""
        interval = Interval(self._begin, self._mark(), self._spans)
        self._begin, self._spans = interval.end, []
        return interval

    def _all_reduce(self, _state, bucket):  # DDP refuses annotations that are strings
        begin = self._mark()

        def arrived(future: torch.futures.Future[Tensor]) -> Tensor:
            self._spans.append(("communication", begin, self._mark()))
            return future.value()

        return allreduce_hook(dist.group.WORLD, bucket).then(arrived)

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class NoProfile:
    """Of runs without one."""

    def part(self, _name: Part) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def cut(self) -> None:
        return None


def _seconds(begin: Mark, end: Mark) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
