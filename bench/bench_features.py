"""What storing image tokens in fewer bits does to stage 1's losses and gradients.

Tokens of a feature cache in floats are stored in each dtype and read again, as a cache does; the same pairs, negatives
and weights, without dropout, in fp32. ``qformer-fast demo`` leaves a cache and a trained model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _machine import write_result
from torch import Tensor

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.data.batches import Batch, PairDataset, ShuffledBatches
from qformer_fast.data.captions import Pair, read_pairs
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.token_bytes import pack, token_bytes, unpack
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.demo import emoji_pairs

LOSSES = ("loss_itc", "loss_itm", "loss_itg")


def demo_pairs(cache: FeatureCache) -> list[Pair]:
    """The drawings whose tokens are in the demo's cache, with their names."""
    return [Pair(x.key, x.caption, x.concept) for x in emoji_pairs.load_pictures() if x.key in cache]


def stored(images: Tensor, dtype: str) -> Tensor:
    """Tokens (batch, tokens, width) as a cache of ``dtype`` gives them, fp32."""
    return unpack(torch.from_numpy(pack(images, dtype)), dtype, *images.shape[1:]).float()


def losses_and_gradient(model: Blip2QFormer, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The three losses, and the gradient of their sum as one vector."""
    count, device = len(images), next(model.parameters()).device
    number = torch.arange(count, device=device)
    model.zero_grad(set_to_none=True)
    text = batch.input_ids.to(device), batch.attention_mask.to(device)
    out = model(images.to(device), *text, batch.image_ids, negatives=((number + 1) % count, (number + 3) % count))
    out.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.stack([getattr(out, name).detach() for name in LOSSES]).cpu(), gradient


def compare(model: Blip2QFormer, dataset: PairDataset, dtypes: list[str], batch_size: int, batches: int) -> dict:
    """Of each dtype the largest and the mean difference of each loss over the batches, the gradient's relative
    difference, and the tokens'.
    """
    rows: dict[str, dict[str, list]] = {dtype: {"losses": [], "gradient": [], "tokens": []} for dtype in dtypes}
    means = []
    for _, numbers in zip(range(batches), ShuffledBatches(len(dataset), batch_size, seed=0), strict=False):
        batch = dataset[numbers]
        exact = batch.images.float()
        losses, gradient = losses_and_gradient(model, exact, batch)
        means.append(losses)
        for dtype, row in rows.items():
            images = stored(exact, dtype)
            found, other = losses_and_gradient(model, images, batch)
            row["losses"].append((found - losses).abs())
            row["gradient"].append(float((other - gradient).norm() / gradient.norm()))
            row["tokens"].append(float((images - exact).norm() / exact.norm()))
    result: dict[str, Any] = {"losses": dict(zip(LOSSES, torch.stack(means).mean(0).tolist(), strict=True))}
    for dtype, row in rows.items():
        differences = torch.stack(row["losses"])
        result[dtype] = {
            "bytes_an_image": dataset.cache.tokens * token_bytes(dtype, dataset.cache.width),
            "mean_difference": dict(zip(LOSSES, differences.mean(0).tolist(), strict=True)),
            "largest_difference": dict(zip(LOSSES, differences.amax(0).tolist(), strict=True)),
            "gradient_relative_difference": max(row["gradient"]),
            "tokens_relative_difference": max(row["tokens"]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", help="as of data.pairs; without, the demo's drawings and names")
    parser.add_argument("--feature-cache", required=True, help="of any dtype but int8, best of float32")
    parser.add_argument("--checkpoint", help="a folder of a trained model; without, BLIP-2's sizes and random weights")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "int8"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    cache = FeatureCache(options.feature_cache)
    if cache.stored == "int8":
        parser.error("--feature-cache must hold floats, got int8")
    pairs = demo_pairs(cache) if options.pairs is None else read_pairs(options.pairs)
    dataset = PairDataset(pairs, load_tokenizer(), cache=cache)
    torch.manual_seed(0)
    if options.checkpoint is None:
        model = Blip2QFormer(QFormerConfig(encoder_hidden_size=cache.width))
    else:
        model = Blip2QFormer.from_pretrained(options.checkpoint)
    model = model.to(options.device).eval()
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    found = compare(model, dataset, options.dtypes, options.batch, options.batches)
    print("  ".join(f"{name} {x:.4f}" for name, x in found["losses"].items()))
    for dtype in options.dtypes:
        row = found[dtype]
        losses = "  ".join(f"{name} {x:.1e}" for name, x in row["largest_difference"].items())
        print(f"{dtype:<9} {losses}  gradient {row['gradient_relative_difference']:.1e}")
    if options.output:
        write_result(options.output, {"bench": "features", "settings": settings, "metadata": cache.metadata, **found})


if __name__ == "__main__":
    main()
