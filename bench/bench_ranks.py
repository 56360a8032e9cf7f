"""Stage 1's step over several GPUs of one host: weak scaling, the bytes that travel, agreement with one process.

Each number of processes is started by torchrun; one alone trains without a process group. The batch is each process's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _harness import between_events, seconds_in_a_row
from _machine import write_result
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.models.blip2_qformer import Exchange, Stage1Output
from qformer_fast.models.distributed import DistributedStage1
from qformer_fast.ranks import Ranks, process_group
from qformer_fast.training.graphs import GraphedStage1
from qformer_fast.training.graphs_over_ranks import GraphedRanks

SLEEP_CYCLES = 20_000_000  # in which the host launches ITC
LOSSES = ("loss_itc", "loss_itm", "loss_itg")
TINY = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96, encoder_hidden_size=48, num_query_tokens=4)
Pairs = tuple[Tensor, Tensor, Tensor]


def build_model(options: argparse.Namespace, device: torch.device, dropout: float) -> Blip2QFormer:
    """The same on every rank, no parameter at its initial value."""
    torch.manual_seed(0)
    sizes = (TINY if options.tiny else {}) | {"num_hidden_layers": options.layers}
    config = QFormerConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = Blip2QFormer(config).to(device).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * config.initializer_range)
    return model


def make_pairs(options: argparse.Namespace, rank: int, width: int, device: torch.device) -> Pairs:
    """A rank's image tokens, ids and mask: captions of six to 18 tokens."""
    generator = torch.Generator().manual_seed(100 + rank)
    lengths = torch.randint(6, 19, (options.batch,), generator=generator)
    mask = (torch.arange(18) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape, generator=generator) * mask
    images = torch.randn(options.batch, options.tokens, width, generator=generator)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return images.to(device, dtype), ids, mask


def losses_and_gradients(
    model: nn.Module, pairs: Pairs, negatives: tuple[Tensor, Tensor], *, bf16: bool
) -> tuple[Tensor, Tensor]:
    """The three losses, and all gradients as one vector."""
    model.zero_grad(set_to_none=True)
    images, ids, mask = pairs
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        out = model(images if bf16 else images.float(), ids, mask, negatives=negatives)
    out.loss.backward()
    return losses_of(out), gradients_of(model)


def losses_of(out: Stage1Output) -> Tensor:
    return torch.stack([getattr(out, name).detach().float() for name in LOSSES])


def gradients_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in model.parameters()])


def compare(options: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Without dropout and with given negatives: all ranks together against one process with the whole batch in the same
    precision, beside what that precision itself changes.
    """
    model = build_model(options, device, dropout=0.0)
    every = [make_pairs(options, rank, model.config.encoder_hidden_size, device) for rank in range(ranks.world_size)]
    count = options.batch * ranks.world_size
    number = torch.arange(count, device=device)
    negatives = (number + 1) % count, (number + 3) % count
    own = slice(ranks.rank * options.batch, (ranks.rank + 1) * options.batch)
    bf16 = device.type == "cuda"
    stage1, given = DistributedStage1(model), tuple(x[own] for x in negatives)
    if options.graphs:
        model.zero_grad(set_to_none=True)
        out = GraphedRanks(stage1, dtype=torch.bfloat16)(*every[ranks.rank], negatives=given)
        share, found = losses_of(out), gradients_of(model)
    else:
        share, found = losses_and_gradients(DistributedDataParallel(stage1), every[ranks.rank], given, bf16=bf16)
    losses = ranks.mean(share)
    whole = tuple(torch.cat(parts) for parts in zip(*every, strict=True))
    one, expected = losses_and_gradients(model, whole, negatives, bf16=bf16)
    exact_losses, exact = losses_and_gradients(model, whole, negatives, bf16=False)
    return {
        "losses": dict(zip(LOSSES, losses.tolist(), strict=True)),
        "losses_of_one": dict(zip(LOSSES, one.tolist(), strict=True)),
        "losses_of_one_fp32": dict(zip(LOSSES, exact_losses.tolist(), strict=True)),
        "gradient_difference": float((found - expected).norm() / expected.norm()),
        "gradient_error": float((found - exact).norm() / exact.norm()),
        "gradient_error_of_one": float((expected - exact).norm() / exact.norm()),
    }


def time_steps(options: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Steps with dropout, drawn negatives and AdamW, ``--in-a-row`` at a time; and what one of them receives."""
    model = build_model(options, device, dropout=0.1)
    torch.manual_seed(ranks.rank)
    pairs = make_pairs(options, ranks.rank, model.config.encoder_hidden_size, device)
    stage1 = model if ranks.alone else DistributedStage1(model)
    if options.graphs:
        graphs = GraphedStage1 if ranks.alone else GraphedRanks
        forward_and_backward = graphs(stage1, dtype=torch.bfloat16)
    else:
        trained = stage1 if ranks.alone else DistributedDataParallel(stage1)

        def forward_and_backward(*pairs: Tensor) -> Stage1Output:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = trained(*pairs)
            out.loss.backward()
            return out

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    matched: list[int] = []

    def step() -> None:
        matched.append(len(forward_and_backward(*pairs).itm_logits))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(options.warm_up):
        step()
    matched.clear()
    seconds = []
    for _ in range(options.repeats):
        ranks.wait()
        seconds.append(seconds_in_a_row(step, options.in_a_row, device.type))
    found: dict[str, Any] = {"ms": [round(1000 * x, 3) for x in seconds]}
    found["median_ms"] = round(1000 * statistics.median(seconds), 3)
    if device.type == "cuda":
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    if not ranks.alone:
        everyone: list[list[int]] = [[]] * ranks.world_size
        dist.all_gather_object(everyone, matched)
        found["matched_pairs"] = round(statistics.mean(map(statistics.mean, everyone)), 2)
        found["matched_pairs_of_the_rank_with_most"] = round(statistics.mean(map(max, zip(*everyone, strict=True))), 2)
        others, width = ranks.world_size - 1, model.config.encoder_hidden_size
        parameters = sum(p.numel() for p in model.parameters())
        found["received_bytes"] = dict(stage1.received)
        found["gradient_all_reduce_bytes"] = 2 * others * 4 * parameters // ranks.world_size
        # bf16 tokens of every other rank, and in backward as large a gradient reduced over all
        found["originals_image_tokens_bytes"] = others * options.batch * options.tokens * width * 2
    return found


def itc_ms(options: argparse.Namespace, device: torch.device) -> dict[int, float]:
    """ITC, its backward and the draw of negatives, of a rank's pairs with the texts and images of so many."""
    model = build_model(options, device, dropout=0.0)
    queries, width, batch = model.query_tokens.shape[1], model.vision_proj.out_features, options.batch

    def features(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, width, device=device), dim=-1)

    def of_own_texts(similarities: Tensor) -> Tensor:
        """As ranks' parts are put side by side."""
        return torch.cat(similarities.split(batch), dim=1)

    def time_once(step: Callable[[], None]) -> float:
        if device.type == "cuda":  # beside a step's graphs the host is ahead of it
            return between_events(step, SLEEP_CYCLES)
        return 1e6 * seconds_in_a_row(step, 1, device.type)

    found = {}
    for count in options.candidates:
        own = tuple(x.requires_grad_() for x in (features(batch, queries), features(batch)))
        others = features(count - batch)
        same_image = torch.eye(batch, count, dtype=torch.bool, device=device)
        exchange = Exchange(lambda texts, others=others: torch.cat([texts, others]), of_own_texts)

        def step(own=own, exchange=exchange, same_image=same_image) -> None:
            contrast = model.contrast(own, same_image, exchange)
            model.draw_negatives(contrast, same_image)
            torch.autograd.grad(contrast.loss_itc, own)

        step()
        found[count] = round(statistics.median(time_once(step) for _ in range(9)) / 1e3, 3)
    return found


def work(options: argparse.Namespace) -> None:
    """One process of those that torchrun started; rank 0 writes."""
    with process_group(300.0) as ranks:
        device = (
            torch.device("cuda", int(os.environ["LOCAL_RANK"])) if options.device == "cuda" else torch.device("cpu")
        )
        found = time_steps(options, ranks, device)
        if ranks.alone:
            found["itc_ms"] = itc_ms(options, device)
        else:
            found["agreement"] = compare(options, ranks, device)
        if ranks.first:
            options.work.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--batch", type=int, default=128, help="pairs of each process")
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--candidates", type=int, nargs="*", default=[], help="pairs of all ranks to time ITC with")
    parser.add_argument("--warm-up", type=int, default=300, help="steps, in which most graphs are recorded")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-a-row", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="narrow layers, for tests")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, help="by default on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if any(count % options.batch for count in options.candidates):
        parser.error(f"--candidates must be multiples of --batch, {options.batch}, got {options.candidates}")
    if options.graphs is None:
        options.graphs = options.device == "cuda"
    if options.work:
        work(options)
        return
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "work")}
    result: dict[str, Any] = {"bench": "ranks", "settings": settings, "ranks": {}}
    given = [x for x in sys.argv[1:] if x != "--output" and x != str(options.output)]
    for count in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            subprocess.run([*launch, os.path.abspath(__file__), *given, "--work", str(file)], check=True)
            result["ranks"][count] = found = json.loads(file.read_text())
        print(count, "processes:", json.dumps(found), flush=True)
    first, last = (result["ranks"][count]["median_ms"] for count in (options.ranks[0], options.ranks[-1]))
    result["efficiency"] = round(first / last, 4)
    print(f"weak scaling: {100 * result['efficiency']:.1f}%")
    if options.output:
        write_result(options.output, result)


if __name__ == "__main__":
    main()
