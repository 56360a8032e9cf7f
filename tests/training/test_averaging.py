"""Means over ranks by copies, the ranks being threads that see each other's memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qformer_fast import overlap
from qformer_fast.training.averaging import ByCopies, Shared


class Memory:
    """Of all ranks; ``called`` has which of them came to a barrier, in their order."""

    def __init__(self, ranks):
        self.ranks, self.barrier, self.called = ranks, threading.Barrier(ranks, timeout=30), []
        self.zeros = [[] for _ in range(ranks)]

    def shared(self, rank):
        def of_size(size, dtype):
            self.zeros[rank].append(torch.zeros(size, dtype=dtype))
            number = len(self.zeros[rank]) - 1
            self.barrier.wait()

            def wait():
                self.called.append(rank)
                self.barrier.wait()

            return Shared([zeros[number] for zeros in self.zeros], wait)

        return of_size


@pytest.mark.parametrize("ranks, sizes", [(1, (5,)), (2, (64, 7)), (3, (64, 2, 9)), (4, (5, 128))])
def test_every_rank_has_the_means(ranks, sizes):
    """Sizes that ranks have unequal shares of, or some none; twice, as steps follow each other."""
    memory = Memory(ranks)
    generator = torch.Generator().manual_seed(0)
    given = [[torch.randn(ranks, size, dtype=torch.float64, generator=generator) for size in sizes] for _ in range(2)]

    def work(rank):
        averaging = ByCopies(rank, memory.shared(rank), overlap.Branch())
        wholes = [averaging.zeros(size, torch.float64) for size in sizes]
        found = []
        for step in given:
            for whole, values in zip(wholes, step, strict=True):
                whole.copy_(values[rank])
            for whole in wholes:
                averaging.begin(whole)
            averaging.join()
            found.append([whole.clone() for whole in wholes])
            for whole in wholes:
                whole.fill_(torch.nan)
        return found

    with ThreadPoolExecutor(ranks) as pool:
        everyone = list(pool.map(work, range(ranks)))
    for of_rank in everyone:
        for step, found, first in zip(given, of_rank, everyone[0], strict=True):
            for values, mean, same in zip(step, found, first, strict=True):
                torch.testing.assert_close(mean, values.mean(0), rtol=1e-14, atol=1e-15)
                assert torch.equal(mean, same)  # to the bit, or the ranks' parameters drift apart


def test_no_rank_is_waited_for_where_nothing_began():
    memory = Memory(1)
    averaging = ByCopies(0, memory.shared(0), overlap.Branch())
    averaging.zeros(8, torch.float32)
    averaging.join()
    assert memory.called == []
