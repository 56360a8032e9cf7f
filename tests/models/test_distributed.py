"""Stage 1 over several processes (gloo) against one process with the whole batch."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from qformer_fast import Blip2QFormer, QFormerConfig, use_backend
from qformer_fast.models.distributed import DistributedStage1, MatchRoom, shard_parameters
from qformer_fast.models.packing import GradientBuffers
from qformer_fast.training.graphs_over_ranks import SweepsAsTheyCome, segments, step_over_ranks
from qformer_fast.training.sweeps import SweepInputs, written_groups

LOSSES = ("loss", "loss_itc", "loss_itm", "loss_itg")
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    encoder_hidden_size=24,
    num_query_tokens=3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@dataclass(frozen=True)
class Case:
    """Captions' lengths of each rank's pairs, and how they are trained; ``negatives`` of all pairs by their number."""

    lengths: list[list[int]]
    local_gradients: bool = True
    image_ids: Any = None
    negatives: str = "next"
    wrap: str = "ddp"
    feature_dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9

    @property
    def pairs(self) -> int:
        return sum(map(len, self.lengths))

    def fixed_negatives(self) -> tuple[torch.Tensor, torch.Tensor]:
        number = torch.arange(self.pairs)
        if self.negatives == "first":  # all texts choose images of rank 0: the other ranks receive no pair
            count = len(self.lengths[0])
            return torch.where(number % count == number, (number + 1) % count, number % count), (
                number + 1
            ) % self.pairs
        return (number + 1) % self.pairs, (number + 3) % self.pairs

    def data(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        lengths = [n for rank in self.lengths for n in rank]
        images = torch.randn(len(lengths), 5, 24, generator=generator, dtype=torch.float64)
        ids = torch.randint(1000, 20000, (len(lengths), 12), generator=generator)
        mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
        return images, ids * mask, mask


EVEN, RAGGED = [[4, 7, 3], [5, 2, 6]], [[4, 7, 3, 9], [5, 2]]
CASES = {
    "even": Case(EVEN),
    "ragged": Case(RAGGED),
    "no pair received": Case(EVEN, negatives="first"),
    "full gradients": Case(RAGGED, local_gradients=False),
    "image ids": Case(EVEN, image_ids=["a", "b", "a", "c", "b", "d"]),
    "image numbers": Case(RAGGED, image_ids=[3, 3, 9, 1, 9, 3]),
    "fsdp": Case(EVEN, wrap="fsdp"),
    "fp32 features": Case(RAGGED, local_gradients=False, feature_dtype=torch.float32, tolerance=1e-6),
    "bf16 features": Case(EVEN, feature_dtype=torch.bfloat16, tolerance=2e-2),
    "four": Case([[4, 7], [3, 9], [5, 2], [8, 6]]),
    "four ragged": Case([[4, 7, 3], [3], [5, 2], [8]], local_gradients=False, negatives="first"),
}


def build_model(case: Case) -> Blip2QFormer:
    torch.manual_seed(0)
    model = Blip2QFormer(QFormerConfig(**SIZES), embed_dim=16, local_gradients=case.local_gradients)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double()


def share_of(case: Case, rank: int) -> slice:
    start = sum(map(len, case.lengths[:rank]))
    return slice(start, start + len(case.lengths[rank]))


def run_case(case: Case, rank: int) -> dict[str, Any]:
    model = build_model(case)
    own = share_of(case, rank)
    images, ids, mask = (x[own] for x in case.data())
    stage1 = DistributedStage1(model, feature_dtype=case.feature_dtype)
    wrapped = shard_parameters(stage1) if case.wrap == "fsdp" else DistributedDataParallel(stage1)
    negatives = tuple(index[own] for index in case.fixed_negatives())
    image_ids = None if case.image_ids is None else case.image_ids[own]
    with use_backend("reference"):
        out = wrapped(images, ids, mask, image_ids, negatives)
        out.loss.backward()
    if case.wrap == "ddp":
        in_parts(stage1, (images, ids, mask), image_ids, negatives)
    names = {name: p.grad for name, p in model.named_parameters()}
    gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in names.items()}
    losses = torch.stack([getattr(out, name).detach() for name in LOSSES])
    dist.all_reduce(losses, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
    return {
        "losses": losses / dist.get_world_size(),
        "gradients": gradients,
        "pairs": len(out.itm_logits),
        "similarities": (out.sim_i2t, out.sim_t2i),
        "received": dict(stage1.received),
    }


class SweepsIntoRoom(SweepsAsTheyCome):
    """With more room than the pairs need, as the graphs have it."""

    def room(self, pairs, text_rows, max_length):
        return MatchRoom(pairs + 3, text_rows + 17, 24, max_length)


def in_parts(stage1, data, image_ids, negatives) -> None:
    """What the CUDA graphs over ranks run, without them, against the gradients that DDP has averaged: once on new
    gradients, then adding to them. Behind each segment its gradients are done.
    """
    model, (images, ids, mask) = stage1.model, data
    text = model.pack_captions(ids, mask, len(images))
    label_rows, labels = text.next_tokens()
    filled = text.filled(text.num_rows + 9, 24)
    features = images.new_zeros(len(images), 3, 16), images.new_zeros(len(images), 16)
    inputs = SweepInputs(
        model.standardize(images), filled, label_rows, labels, features, images.new_zeros(()), images.new_zeros(())
    )
    gradients = GradientBuffers(model.groups)
    for parameter, gradient in gradients.of_parameters():
        if any(parameter is p for group in written_groups(model) for p in group):
            gradient.fill_(torch.nan)
    for add in (False, True):
        pairs = stage1.gather_pairs(text, image_ids, labels, images.device)
        with use_backend("reference"):
            sweeps = SweepsIntoRoom(model, inputs, gradients, add=add)
            found = {}

            def keep(segment: int, found: dict = found) -> None:
                for buffer, done in zip(gradients.buffers, segments(model), strict=True):
                    if done == segment:
                        found[id(buffer)] = buffer.clone()

            step_over_ranks(stage1, sweeps, inputs, gradients, pairs, 0.5, negatives, keep)
        assert all(torch.equal(buffer, found[id(buffer)]) for buffer in gradients.buffers)
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, total in gradients.of_parameters():
        total = total.clone()
        dist.all_reduce(total)
        difference = (total / dist.get_world_size() - parameter.grad).abs().max()
        assert difference <= 1e-6 * max(1.0, float(parameter.grad.abs().max())), names[id(parameter)]


def worker(rank: int, world_size: int, port: int, folder: str, names: list[str]) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: run_case(CASES[name], rank) for name in names}
    if world_size == 2:
        found["refused"] = refusals(rank)
        found["contrasts"] = contrasts(rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def contrasts(rank: int) -> dict[str, list[torch.Tensor]]:
    """ITC of ragged batches in fp32 on each backend, with local gradients and without: the loss, and gradients of its
    features and of the temperature.
    """
    found, case = {}, CASES["ragged"]
    images, ids, mask = (x[share_of(case, rank)] for x in case.data())
    for local in (True, False):
        model = build_model(dataclasses.replace(case, local_gradients=local)).float()
        stage1 = DistributedStage1(model)
        text = model.pack_captions(ids, mask, len(ids))
        for backend in ("reference", "triton"):
            pairs = stage1.gather_pairs(text, None, text.next_tokens()[1], images.device)
            generator = torch.Generator().manual_seed(rank)
            shapes = (len(ids), 3, 16), (len(ids), 16)
            features = tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
            with use_backend(backend):
                contrast = stage1.contrast(features, pairs)
                gradients = torch.autograd.grad(contrast.loss_itc, [*features, model.temp])
            with torch.no_grad(), use_backend(backend):
                assert torch.equal(stage1.contrast(features, pairs).loss_itc, contrast.loss_itc)
            found[f"{backend}, {local}"] = [contrast.loss_itc.detach(), *gradients]
    return found


def refusals(rank: int) -> dict[str, str]:
    """What a rank says of models that differ, and of image ids on one rank alone."""
    said = {}
    other = Blip2QFormer(QFormerConfig(**SIZES), embed_dim=16 + 8 * rank)
    try:
        DistributedStage1(other)
    except ValueError as error:
        said["model"] = str(error)
    case = CASES["even"]
    stage1 = DistributedStage1(build_model(case))
    images, ids, mask = (x[share_of(case, rank)] for x in case.data())
    try:
        stage1(images, ids, mask, None if rank else ["a", "b", "c"])
    except ValueError as error:
        said["image_ids"] = str(error)
    return said


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> tuple[int, list[dict[str, Any]]]:
    """What each rank found of the cases for so many."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    world_size, folder = request.param, tmp_path_factory.mktemp("ranks")
    names = [name for name, case in CASES.items() if len(case.lengths) == world_size]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, str(world_size), str(port), str(folder), *names]
    processes = [subprocess.Popen([*command[:2], str(rank), *command[2:]]) for rank in range(world_size)]
    assert [process.wait(timeout=300) for process in processes] == [0] * world_size
    return world_size, [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def test_losses_and_gradients_are_those_of_one_process(ranks, assert_gradients_close) -> None:
    world_size, found = ranks
    for name, case in CASES.items():
        if len(case.lengths) != world_size:
            continue
        model = build_model(case)
        with use_backend("reference"):
            out = model(*case.data(), image_ids=case.image_ids, negatives=case.fixed_negatives())
            out.loss.backward()
        expected = torch.stack([getattr(out, loss).detach() for loss in LOSSES])
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for rank, result in enumerate(ranks[1]):
            of_case = result[name]
            tolerance = dict(rtol=case.tolerance, atol=case.tolerance)
            assert (of_case["losses"] - expected).abs().max() <= case.tolerance * expected.max(), f"{name}, rank {rank}"
            assert_gradients_close(of_case["gradients"], gradients, min(100 * case.tolerance, 0.05))
            for similarities, whole in zip(of_case["similarities"], (out.sim_i2t, out.sim_t2i), strict=True):
                own = whole[share_of(case, rank)]
                torch.testing.assert_close(similarities * model.temp, own * model.temp, **tolerance)
        assert sum(result[name]["pairs"] for result in found) == 3 * case.pairs


def test_the_kernels_contrast_over_ranks_is_the_formulas(ranks) -> None:
    world_size, found = ranks
    if world_size != 2:
        return
    for result in found:
        for local in (True, False):
            kernels, formula = (result["contrasts"][f"{backend}, {local}"] for backend in ("triton", "reference"))
            for x, expected in zip(kernels, formula, strict=True):
                torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
        local, full = result["contrasts"]["reference, True"], result["contrasts"]["reference, False"]
        torch.testing.assert_close(local[0], full[0])
        assert (local[1] - full[1]).abs().max() > 1e-3 and (local[2] - full[2]).abs().max() > 1e-3


def test_a_rank_may_receive_no_pair(ranks) -> None:
    world_size, found = ranks
    name = {2: "no pair received", 4: "four ragged"}[world_size]
    batches = [len(x) for x in CASES[name].lengths]
    received = [result[name]["pairs"] - 2 * batch for result, batch in zip(found, batches, strict=True)]
    assert received[0] == sum(batches) and not any(received[1:])


def test_ranks_that_differ_are_named(ranks) -> None:
    world_size, found = ranks
    if world_size == 2:
        for rank, result in enumerate(found):
            said = result["refused"]
            assert "embed_dim is 16 on rank 0 and 24 on rank 1" in said["model"]
            assert f"image_ids must be given on all ranks or on none, rank {rank} got" in said["image_ids"]


def test_what_travels_is_small(ranks) -> None:
    """Of a caption its features, their gradient and its tokens; of an image its similarities. No image tokens."""
    world_size, found = ranks
    name = {2: "even", 4: "four"}[world_size]
    case = CASES[name]
    batch = len(case.lengths[0])
    longest = max(sum(x) for x in case.lengths)
    for result in found:
        received = result[name]["received"]
        assert received["features"] == 2 * (world_size - 1) * batch * 16 * 8
        assert received["similarities"] == 2 * (world_size - 1) * batch**2 * 8
        assert received["captions"] == (world_size - 1) * (longest * 2 * 2 + batch * 2 * 8)
        assert received["negatives"] == (world_size - 1) * batch * 8
        assert set(received) == {"features", "similarities", "captions", "negatives", "sizes"}


if __name__ == "__main__":
    worker(*map(int, sys.argv[1:4]), sys.argv[4], sys.argv[5:])
