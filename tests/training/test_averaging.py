"""Means over ranks by copies: of threads that see each other's memory, and of two GPUs."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from qformer_fast import overlap
from qformer_fast.training.averaging import ByCopies, Shared, averaging_over


class Memory:
    """Of all ranks; ``called`` has which of them came to a barrier, and when."""

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


@pytest.mark.parametrize("ranks, sizes", [(1, (5,)), (2, (70, 7)), (3, (200, 2, 9)), (4, (5, 257))])
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
            before = memory.called.count(rank)
            for whole in wholes:
                averaging.begin(whole)
            averaging.join()
            # one more than two each: what others still fetch may not be written yet
            assert memory.called.count(rank) - before == 2 * len(sizes) + 1
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


def average_on_gpu(rank: int, store: str, kind: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    averaging = averaging_over(None, device, 60.0)
    assert type(averaging).__name__ == kind
    sizes = (1_000_001, 64, 64, 128, 4_000_000)
    wholes = [averaging.zeros(size, torch.float32) for size in sizes]
    generator = torch.Generator(device).manual_seed(0)
    for number in range(30):
        given = [torch.randn(2, size, device=device, generator=generator) for size in sizes]
        for whole, values in zip(wholes, given, strict=True):
            if number % 3 == rank:  # now one is late, now the other, now none
                torch.cuda._sleep(1_000_000)
            whole.copy_(values[rank])
            averaging.begin(whole)
        averaging.join()
        for whole, values in zip(wholes, given, strict=True):
            torch.testing.assert_close(whole, values.mean(0), rtol=1e-6, atol=1e-6)
            whole.fill_(torch.nan)
    dist.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("p2p_disable, kind", [("0", "ByCopies"), ("1", "ByCollectives")])
def test_two_gpus_have_the_means_whichever_is_late(p2p_disable, kind, tmp_path):
    environment = os.environ | {"NCCL_P2P_DISABLE": p2p_disable}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path / "store"), kind] for rank in (0, 1)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    average_on_gpu(int(sys.argv[1]), *sys.argv[2:])
