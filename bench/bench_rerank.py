"""Retrieval's re-ranking in pairs a second: keys and values once per image and packed captions, against the original's
own code in the original's order.

The original repeats an image's tokens for each of its candidates, projects their keys and values again and pads
captions to 35 tokens; it keeps the tokens on the host and sends them for each query. "original_resident" is the same
with all tokens on the device. All rows come from one run with the same weights, tokens, captions and candidates, and
before anything is timed their logits must agree.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _original
import torch
from _harness import seconds_in_a_row
from _machine import write_result
from torch import Tensor, nn

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.evaluation.retrieval import PAIR_BATCH_SIZE, embed, rerank, similarity

ROWS = ("ours", "original", "original_resident")
PADDED_LENGTH = 35
AUTOCAST = {"bf16": torch.bfloat16}
# how far logits in fp32 may be from the original's, and in bf16 from fp32 as often as the original's are
TOLERANCE, FACTOR = 1e-4, 2.0
PRECISIONS = ("fp32", "bf16")
TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, num_query_tokens=4)

Scores = tuple[Tensor, Tensor]


def make_captions(texts: int, shortest: int, longest: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of captions of uniformly drawn lengths, padded as the original does for retrieval."""
    lengths = torch.randint(shortest, longest + 1, (texts,))
    input_ids = torch.randint(1000, 30522, (texts, PADDED_LENGTH))
    input_ids[:, 0] = 101
    input_ids[torch.arange(texts), lengths - 1] = 102
    input_ids[torch.arange(PADDED_LENGTH) >= lengths[:, None]] = 0
    return input_ids, (input_ids != 0).long()


def original_rerank(
    original: nn.Module, vit_feats: Tensor, input_ids: Tensor, attention_mask: Tensor, similarities: Tensor, k: int
) -> Scores:
    """The two loops of ``compute_sim_matrix`` (lavis/models/blip2_models/blip2.py) without the cosines.

    Args:
        vit_feats (Tensor): (images, tokens, width) after ``ln_vision``, on the host as there, or on the device.
        input_ids, attention_mask (Tensor): (texts, length), on the device.
    """
    device = similarities.device
    scores = tuple(torch.full(x.shape, -100.0, device=device) for x in (similarities, similarities.T))
    for i, sims in enumerate(similarities):
        index = sims.topk(k=min(k, len(sims)), dim=0).indices
        images = vit_feats[i].repeat(len(index), 1, 1).to(device)
        logits = original.compute_itm(
            image_inputs=images, text_ids=input_ids[index], text_atts=attention_mask[index]
        ).float()
        scores[0][i, index] = logits
    for j, sims in enumerate(similarities.T):
        index = sims.topk(k=min(k, len(sims)), dim=0).indices
        images = vit_feats[index.to(vit_feats.device)].to(device)
        text = (x[j].repeat(len(index), 1) for x in (input_ids, attention_mask))
        logits = original.compute_itm(image_inputs=images, **dict(zip(("text_ids", "text_atts"), text, strict=True)))
        scores[1][j, index] = logits.float()
    return scores


def check_agreement(
    rows: dict[str, Callable[[], Scores]], tolerance: float, exact: Scores | None = None
) -> dict[str, dict[str, float]]:
    """Each row's differences to the original's logits, and with ``exact``, logits in fp32, its errors.

    Raises:
        AssertionError: another set of candidates; a difference above ``tolerance``, or with ``exact`` an error above
            ``FACTOR`` times the original's. Nothing is timed then.
    """
    expected = rows["original"]()
    chosen = [x != -100 for x in expected]

    def differences(scores: Scores, others: Scores) -> Tensor:
        return torch.cat([(x - y).abs()[where] for x, y, where in zip(scores, others, chosen, strict=True)])

    allowed = tolerance
    if exact is not None:
        allowed = FACTOR * float(differences(expected, exact).max())
    found = {}
    for name, run in rows.items():
        scores = run()
        for x, where in zip(scores, chosen, strict=True):
            assert torch.equal(x != -100, where), f"{name} has other candidates than the original"
        difference = differences(scores, expected)
        found[name] = {"largest_difference": float(difference.max()), "mean_difference": float(difference.mean())}
        if exact is not None:
            found[name]["largest_error"] = float(differences(scores, exact).max())
        print(name, *(f"{what.replace('_', ' ')} {value:.2g}" for what, value in found[name].items()), flush=True)
        worst = found[name].get("largest_error", found[name]["largest_difference"])
        assert worst <= allowed, f"{name} is off by {worst:.2g}, {allowed:.2g} is allowed"
    return found


def measure(rows: dict[str, Callable[[], Scores]], pairs: dict[str, int], repeats: int, device: str) -> dict[str, Any]:
    """Median seconds of each row, taken in turn, with its pairs a second and its peak memory, in which is what all rows
    keep.
    """
    times: dict[str, list[float]] = {name: [] for name in rows}
    peaks: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in rows.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[name].append(seconds_in_a_row(run, 1, device))
            if device == "cuda":
                peaks[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    found = {}
    for name, taken in times.items():
        seconds = statistics.median(taken)
        found[name] = {"pairs": pairs[name], "seconds": seconds, "pairs_per_second": round(pairs[name] / seconds, 1)}
        found[name] |= {"peak_gib": peaks[name]} if peaks else {}
    for name in ("original", "original_resident"):
        found[name]["ours_is_times_as_fast_per_pair"] = round(
            found["ours"]["pairs_per_second"] / found[name]["pairs_per_second"], 2
        )
        found[name]["ours_is_times_as_fast_in_all"] = round(found[name]["seconds"] / found["ours"]["seconds"], 2)
    return found


@torch.no_grad()
def bench(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """One precision: agreement, then times."""
    device, dtype = options.device, AUTOCAST.get(precision)
    torch.manual_seed(0)
    config = QFormerConfig(**TINY, encoder_hidden_size=48) if options.tiny else QFormerConfig()
    model = Blip2QFormer(config).to(device).eval()
    original = _original.build_stage1(model)
    tokens = torch.randn(options.images, options.tokens, config.encoder_hidden_size, dtype=dtype)
    text = make_captions(options.texts, options.shortest, options.longest)
    on_device = [x.to(device) for x in text]
    if device == "cuda":
        tokens = tokens.pin_memory()
    with torch.autocast(device, dtype, enabled=dtype is not None):
        similarities = similarity(*embed(model, tokens, *text))
        # LAVIS's own ln_vision gives back the dtype that it gets
        vit_feats = torch.cat([original.ln_vision(x.to(device).float()).to(x.dtype) for x in tokens.split(16)])
        ours = functools.partial(rerank, model, tokens, *text, similarities, k=options.k, score="itm")
        theirs = functools.partial(original_rerank, original)
        rows = {
            "ours": functools.partial(ours, pair_batch_size=options.pair_batch),
            "original": functools.partial(theirs, vit_feats.cpu(), *on_device, similarities, options.k),
            "original_resident": functools.partial(theirs, vit_feats, *on_device, similarities, options.k),
        }
        exact = None
        if dtype is not None:
            with torch.autocast(device, enabled=False):
                exact = ours()
        agreement = check_agreement(rows, TOLERANCE, exact)
        i2t, t2i = (x != -100 for x in rows["ours"]())
        both = int(i2t.sum() + t2i.sum())
        pairs = {"ours": int((i2t | t2i.T).sum()), "original": both, "original_resident": both}
        found = measure(rows, pairs, options.repeats, device)
    return {name: found[name] | agreement[name] for name in ROWS}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=677, help="of an image; 677 at 364 pixels")
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=8, help="caption, in tokens")
    parser.add_argument("--longest", type=int, default=18)
    parser.add_argument("--pair-batch", type=int, default=PAIR_BATCH_SIZE)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model, for tests")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args(arguments)
    if reason := _original.why_missing():
        parser.error(reason)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result: dict[str, Any] = {"bench": "rerank", "settings": settings, "precisions": {}}
    for precision in options.precision:
        found = result["precisions"][precision] = bench(options, precision)
        for name, row in found.items():
            print(f"{precision} {name:<20} {row['pairs_per_second']:>10} pairs/s, {row['seconds']:.3f} s", end="")
            print(f", peak {row['peak_gib']} GiB" if "peak_gib" in row else "", end="")
            ratio = row.get("ours_is_times_as_fast_per_pair")
            print(f", ours {ratio} times as fast" if ratio else "", flush=True)
        if options.output:
            write_result(options.output, result)


if __name__ == "__main__":
    main()
