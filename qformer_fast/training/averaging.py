"""Means of gradients over ranks, made beside the work that makes other gradients."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qformer_fast import overlap

PRIORITY = -5  # before the kernels that they are hidden behind


class Averaging(ABC):
    """Turns tensors that it gave, the same on every rank, into their means over the ranks."""

    @abstractmethod
    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size,); every rank asks for the same."""

    @abstractmethod
    def begin(self, whole: Tensor) -> None:
        """With all of ``whole``, a tensor of :meth:`zeros`, once the current stream has it; on every rank in the same
        order.
        """

    @abstractmethod
    def join(self) -> None:
        """The current stream has the means from now on."""


class ByCollectives(Averaging):
    """All-reduces of a process group.

    Args:
        group (ProcessGroup): of the ranks.
        device (torch.device): of the tensors.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._group, self._device = group, device
        self._under_way: list[dist.Work] = []

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self._device)

    def begin(self, whole: Tensor) -> None:
        self._under_way.append(dist.all_reduce(whole, dist.ReduceOp.AVG, group=self._group, async_op=True))

    def join(self) -> None:
        while self._under_way:
            self._under_way.pop(0).wait()


class Shared(NamedTuple):
    """Tensors of one size, one of each rank.

    Args:
        of_ranks (list): each rank's, within reach of this one.
        barrier (Callable): what the current stream has from now on waits for what those of the other ranks had when
            they called it.
    """

    of_ranks: list[Tensor]
    barrier: Callable[[], None]


class ByCopies(Averaging):
    """Copies between the ranks' memory: of a tensor each rank fetches its share from all others, makes the mean, and
    fetches theirs.

    Copy engines move as many bytes as an all-reduce does, but hold none of the multiprocessors that the kernels beside
    it run on. NCCL's all-reduce holds a sixth of an H200's; a kernel with a block for each of them then takes twice as
    long.

    Args:
        rank (int): this one.
        shared (Callable): (size, dtype) -> :class:`Shared` zeros.
        branch (Branch): on which copies and means are made.
    """

    def __init__(self, rank: int, shared: Callable[[int, torch.dtype], Shared], branch: overlap.Branch):
        self._rank, self._shared, self._branch = rank, shared, branch
        self._given: dict[int, Shared] = {}
        self._last: Shared | None = None

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        shared = self._shared(size, dtype)
        whole = shared.of_ranks[self._rank]
        self._given[whole.data_ptr()] = shared
        return whole

    def begin(self, whole: Tensor) -> None:
        shared = self._last = self._given[whole.data_ptr()]
        ranks = len(shared.of_ranks)
        share = -(-len(whole) // ranks)
        # each from another, so that no two fetch from one at a time
        others = [(self._rank + step) % ranks for step in range(1, ranks)]

        def of(rank: int, x: Tensor) -> Tensor:
            return x[rank * share : (rank + 1) * share]

        own = of(self._rank, whole)
        self._branch.begin()
        with self._branch.here():
            shared.barrier()
            fetched = [of(self._rank, shared.of_ranks[other]).clone() for other in others]
            for count, x in enumerate(fetched, 2):
                own.lerp_(x, 1 / count)
            shared.barrier()
            for other in others:
                of(other, whole).copy_(of(other, shared.of_ranks[other]))

    def join(self) -> None:
        if self._last is not None:
            with self._branch.here():
                # others may still fetch what may be written from now on
                self._last.barrier()
            self._last = None
        self._branch.join()


def averaging_over(group: dist.ProcessGroup | None, device: torch.device) -> Averaging:
    """By copies where the ranks are of one host and their devices reach each other's memory, which NCCL_P2P_DISABLE=1
    forbids; by collectives elsewhere.

    Args:
        group (ProcessGroup, Optional): Default: `None`, all ranks.
        device (torch.device): a CUDA device, with its index.
    """
    group = group or dist.group.WORLD
    hosts, devices = zip(*_of_all_ranks((socket.gethostname(), device.index), group), strict=True)
    reached = all(i == device.index or torch.cuda.can_device_access_peer(device, i) for i in devices)
    alone = len(set(hosts)) == 1 < len(set(devices)) == len(devices)
    if all(_of_all_ranks(alone and reached and os.environ.get("NCCL_P2P_DISABLE") != "1", group)):
        shared = partial(_symmetric_zeros, group=group, device=device)
        return ByCopies(dist.get_rank(group), shared, overlap.Branch(device, PRIORITY))
    return ByCollectives(group, device)


def _of_all_ranks(own: Any, group: dist.ProcessGroup) -> list[Any]:
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def _symmetric_zeros(size: int, dtype: torch.dtype, *, group: dist.ProcessGroup, device: torch.device) -> Shared:
    from torch.distributed import _symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(size, dtype=dtype, device=device).zero_()
    memory = symmetric_memory.rendezvous(own, group)
    ranks = range(memory.world_size)
    return Shared([own if i == memory.rank else memory.get_buffer(i, (size,), dtype) for i in ranks], memory.barrier)
