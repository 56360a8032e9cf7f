"""A training step of Hugging Face's Q-Former as it is and with its forward swapped: all parameters, and LoRA.

The queries and a linear layer behind them learn to tell which of a batch's pictures they see. Losses of both over the
same steps without dropout come first: they may differ by three times what bf16 itself changes Hugging Face's. Then
steps with dropout are timed in turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import seconds_in_a_row
from _machine import write_result
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from qformer_fast.integrations.hf import replace_qformer

KINDS = ("full", "lora")
# how much further from Hugging Face's losses under autocast than these are from those in fp32
FACTOR = 3.0
LORA = dict(r=8, lora_alpha=16, target_modules=["query", "key", "value"])


class Learner(nn.Module):
    """A Q-Former, queries and a head whose outputs are to find their own picture's target."""

    def __init__(self, config: Blip2QFormerConfig, queries: int = 32, classes: int = 512):
        super().__init__()
        self.qformer = Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.randn(1, queries, config.hidden_size) * 0.02)
        self.head = nn.Linear(config.hidden_size, classes)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(images), -1, -1)
        out = self.qformer(query_embeds=queries, encoder_hidden_states=images).last_hidden_state
        return F.cross_entropy(self.head(out.mean(1)).float(), targets)


def build(kind: str, config: Blip2QFormerConfig, device: str) -> Learner:
    torch.manual_seed(0)
    model = Learner(config)
    if kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        model.qformer.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(**LORA), model.qformer)
    return model.to(device).train()


def make_step(model: Learner, images: Tensor, targets: Tensor, *, autocast: bool = True) -> Callable[[], Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=images.is_cuda)

    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = model(images, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = dict(num_hidden_layers=options.layers)
    still = Blip2QFormerConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    images = torch.randn(options.batch, options.tokens, still.encoder_hidden_size, device=options.device)
    targets = torch.arange(options.batch, device=options.device)
    curves = {}
    for name in ("hf_fp32", "hf", "ours"):
        model = build(kind, still, options.device)
        if name == "ours":
            print(replace_qformer(model))
        step = make_step(model, images, targets, autocast=name != "hf_fp32")
        curves[name] = torch.stack([step() for _ in range(options.steps)]).tolist()

    def largest_difference(name: str) -> float:
        return max(abs(a - b) for a, b in zip(curves[name], curves["hf"], strict=True))

    band, difference = FACTOR * largest_difference("hf_fp32"), largest_difference("ours")
    assert difference <= band, f"losses differ by {difference}, {band} is allowed: {curves}"

    plain = build(kind, Blip2QFormerConfig(**sizes), options.device)
    swapped = copy.deepcopy(plain)
    replace_qformer(swapped)
    steps = {"hf": make_step(plain, images, targets), "ours": make_step(swapped, images, targets)}
    rows: dict[str, Any] = {name: {"seconds": []} for name in steps}
    for name, step in steps.items():
        for _ in range(3):
            step()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            rows[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    for _ in range(options.repeats):
        for name, step in steps.items():
            rows[name]["seconds"].append(round(seconds_in_a_row(step, options.in_a_row, options.device), 5))
    ratios = [a / b for a, b in zip(rows["hf"]["seconds"], rows["ours"]["seconds"], strict=True)]
    for row in rows.values():
        row["median"] = statistics.median(row["seconds"])
    return {
        "losses": curves,
        "largest_difference": difference,
        "band": band,
        "rows": rows,
        "times_as_fast": round(statistics.median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20, help="whose losses are compared")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-a-row", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result: dict[str, Any] = {"bench": "hf_training", "settings": settings, "kinds": {}}
    for kind in options.kinds:
        found = result["kinds"][kind] = measure(kind, options)
        for name, row in found["rows"].items():
            print(
                f"{kind:<6} {name:<6} {row['median'] * 1e3:9.2f} ms a step, peak {row.get('peak_gib')} GiB", flush=True
            )
        print(
            f"{kind}: {found['times_as_fast']} times as fast; losses differ by {found['largest_difference']:.4f}, "
            f"{found['band']:.4f} is allowed"
        )
        if options.output:
            write_result(options.output, result)


if __name__ == "__main__":
    main()
