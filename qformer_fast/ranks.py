"""The processes of a run: which of them this one is, and what they agree on."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item", bound=Hashable)


class RankError(RuntimeError):
    """Other ranks ended or did not come in time."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among those that train together; alone it is 0 of 1."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Of torch's process group, where one was made."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    @property
    def first(self) -> bool:
        """Whether this one writes the run's files."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, the same bits on each."""
        if not self.alone:
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def check_same(self, name: str, value: int) -> None:
        """Refuses what differs between the ranks.

        Raises:
            ValueError: on all ranks, where ``value`` is not the same on each.
        """
        if self.alone:
            return
        everyone = [0] * self.world_size
        dist.all_gather_object(everyone, value)
        if len(set(everyone)) > 1:
            raise ValueError(f"{name} must be the same on all ranks, got {everyone}")

    def look(self, items: Sequence[Item], find: Callable[[Sequence[Item]], dict[Item, str]]) -> dict[Item, str]:
        """What ``find`` says is wrong with some of ``items``, in their order: the ranks of a host, which may have files
        of its own, look at a share each, and all ranks are told.
        """
        if self.alone:
            return find(items)
        of_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = int(os.environ.get("LOCAL_RANK", "0")) % of_host
        everyone: list[dict[Item, str]] = [{}] * self.world_size
        dist.all_gather_object(everyone, find(items[first::of_host]))
        found = functools.reduce(operator.or_, everyone)
        return {item: found[item] for item in items if item in found}

    def wait(self) -> None:
        """Until every rank is here."""
        if not self.alone:
            dist.barrier()

    def seed(self, seed: int, step: int) -> None:
        """Random states of a step, other ones on every rank, which depend on nothing that came before; those of rank 0
        go on as they are, as in a run of one process.
        """
        if not self.first:
            torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + self.rank) % 2**63)


@contextlib.contextmanager
def process_group(timeout: float) -> Iterator[Ranks]:
    """torchrun's process group while the block runs: NCCL, each process with the GPU of its LOCAL_RANK, and for tensors
    of the host gloo. Nothing is made where torchrun did not start this process, or started it alone. After an error the
    group stays: its end would wait for what is under way.

    Args:
        timeout (float): seconds after which a rank that waits for others in vain ends with an error.

    Raises:
        RankError: other ranks ended or did not come in time; the message names this rank and the collective.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if (local_rank := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # or a reduction waits behind the kernels that hide it
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    ranks = Ranks.current()
    try:
        yield ranks
    except RuntimeError as error:
        if not _of_a_collective(error):
            raise
        raise RankError(
            f"rank {ranks.rank} of {ranks.world_size}: another rank ended or was too slow (run.timeout {timeout} s), "
            f"see what it said: {error}"
        ) from error
    else:
        dist.destroy_process_group()


def _of_a_collective(error: RuntimeError) -> bool:
    """Gloo's errors are plain ones; a launch fails where a device has waited for another in vain."""
    words = "gloo", "Gloo", "NCCL", "unspecified launch failure"
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
