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
from qformer_fast.layout import round_up

PRIORITY = -3  # the copies' and means', before the kernels that they are hidden behind
ALIGNMENT = 64  # elements


class Averaging(ABC):
    """Turns tensors that it gave, the same on every rank, into their means over the ranks."""

    @abstractmethod
    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size,); every rank asks for the same."""

    @abstractmethod
    def begin(self, whole: Tensor) -> None:
        """Starts to turn ``whole``, a tensor of :meth:`zeros` as the current stream has it, into the mean; all ranks in
        the same order.
        """

    @abstractmethod
    def join(self) -> None:
        """The current stream has from now on all means that were begun."""


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
        barrier (Callable): holds the current stream until every rank's has come to its own call.
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
        self._room: dict[torch.dtype, Tensor] = {}  # for what is fetched of the largest tensor
        self._last: Shared | None = None

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        shared = self._shared(size, dtype)
        whole = shared.of_ranks[self._rank]
        self._given[whole.data_ptr()] = shared
        room = (len(shared.of_ranks) - 1) * self._share(whole, shared)
        if dtype not in self._room or len(self._room[dtype]) < room:
            self._room[dtype] = whole.new_empty(room)
        return whole

    def begin(self, whole: Tensor) -> None:
        shared = self._last = self._given[whole.data_ptr()]
        ranks, share = len(shared.of_ranks), self._share(whole, shared)
        # each begins with another, so that few fetch from one at a time
        others = [(self._rank + step) % ranks for step in range(1, ranks)]

        def of(rank: int, x: Tensor) -> Tensor:
            return x[rank * share : (rank + 1) * share]

        own = of(self._rank, whole)
        self._branch.begin()
        with self._branch.here():
            shared.barrier()
            fetched = [room[: len(own)] for room in self._room[whole.dtype].split(share)[: len(others)]]
            for room, other in zip(fetched, others, strict=True):
                room.copy_(of(self._rank, shared.of_ranks[other]))
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

    @staticmethod
    def _share(whole: Tensor, shared: Shared) -> int:
        """Elements of each rank but the last ones, which may have fewer or none."""
        return round_up(-(-len(whole) // len(shared.of_ranks)), ALIGNMENT)


def averaging_over(group: dist.ProcessGroup | None, device: torch.device, timeout: float) -> Averaging:
    """By copies where the ranks are of one host and reach each other's devices, which each must see and
    NCCL_P2P_DISABLE=1 forbids; by collectives elsewhere.

    Args:
        group (ProcessGroup, Optional): Default: `None`, all ranks.
        device (torch.device): of the tensors; with its index.
        timeout (float): seconds after which a device that waits for another in vain stops with an error; collectives
            have their group's.
    """
    group = group or dist.group.WORLD
    if device.type == "cuda" and _reach_each_other(group, device):
        shared = partial(_symmetric_zeros, group=group, device=device, timeout=timeout)
        return ByCopies(dist.get_rank(group), shared, overlap.Branch(device, PRIORITY))
    return ByCollectives(group, device)


def _reach_each_other(group: dist.ProcessGroup, device: torch.device) -> bool:
    hosts, devices = zip(*_of_all_ranks((socket.gethostname(), _uuid(device)), group), strict=True)
    visible = {_uuid(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    others = [visible.get(uuid) for uuid in set(devices) - {_uuid(device)}]
    reached = (
        len(set(hosts)) == 1
        and len(set(devices)) == len(devices) > 1
        and os.environ.get("NCCL_P2P_DISABLE") != "1"
        and all(i is not None and torch.cuda.can_device_access_peer(device, i) for i in others)
    )
    return all(_of_all_ranks(reached, group))


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _of_all_ranks(own: Any, group: dist.ProcessGroup) -> list[Any]:
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def _symmetric_zeros(
    size: int, dtype: torch.dtype, *, group: dist.ProcessGroup, device: torch.device, timeout: float
) -> Shared:
    from torch.distributed import _symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(size, dtype=dtype, device=device).zero_()
    try:
        memory = symmetric_memory.rendezvous(own, group)
    except RuntimeError as error:
        message = f"{device} can't share memory with those of the other ranks, NCCL_P2P_DISABLE=1 has NCCL average"
        raise RuntimeError(f"{message} gradients: {error}") from error
    ranks = range(memory.world_size)
    of_ranks = [own if i == memory.rank else memory.get_remote_tensor(i, (size,), dtype) for i in ranks]
    return Shared(of_ranks, partial(memory.barrier, timeout_ms=round(1000 * timeout)))
