"""Where the GPU's time of a step goes: kernels by family, and what part of the step it waits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# what a kernel's name says, tried in this order
FAMILIES = (
    ("products with GELU", r"cutlass::?.*(GemmUniversal|gemm.*linear_gelu)|_ZN7cutlass13device_kernel"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas|splitK"),
    ("image cross-attention", r"^image_cross_attention"),
    ("query-text attention", r"^query_text_attention|^streamed"),
    ("attention of PyTorch", r"flash|fmha|attention|softmax"),
    ("LayerNorm with dropout and residual", r"^dropout_add_layer_norm"),
    ("sums of parts", r"^sum_parts"),
    ("LayerNorm of images and its folding", r"^fold_norm|^standardize"),
    ("LM head's loss", r"^linear_cross_entropy|^reduce_losses|^column_sums"),
    ("embeddings", r"^embeddings|^sort_keys|^sum_runs|^join_runs|radix|Radix"),
    ("contrast and negatives", r"^contrastive_|^sample_negatives"),
    ("copies and fills", r"Memcpy|Memset|memcpy|copy_kernel|CatArray|FillFunctor|Copy"),
    ("optimizer and lists of tensors", r"multi_tensor_apply"),
    ("sums", r"reduce_kernel"),
    ("other elementwise", r""),
)


def family(kernel: str) -> str:
    return next(name for name, pattern in FAMILIES if re.search(pattern, kernel))


def measure_breakdown(step: Callable[[], Any], steps: int = 3) -> dict[str, Any]:
    """Profiles ``steps`` calls of ``step`` that no host sync separates.

    Returns:
        dict: of one step ``span_ms`` (its share of the time from the first kernel's begin to the last one's end),
        ``busy_ms`` (of it with a kernel running), ``idle_share``, ``launches``, and ``families``: name ->
        [milliseconds, launches].
    """
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found = summarize(device_spans(profiler))
    families = {name: [round(ms / steps, 3), round(count / steps)] for name, (ms, count) in found["families"].items()}
    per_step = {name: round(found[name] / steps, 3) for name in ("span_ms", "busy_ms", "launches")}
    return per_step | {"idle_share": round(1 - found["busy_ms"] / found["span_ms"], 3), "families": families}


def device_spans(profiler: profile) -> list[tuple[float, float, str]]:
    """(begin, end, name) in microseconds of each kernel and copy."""
    return [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]


def summarize(spans: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Of (begin, end, kernel) in microseconds: ``span_ms``, ``busy_ms`` (overlaps once), ``launches``, ``families``."""
    families: dict[str, list[float]] = {}
    busy, reached = 0.0, float("-inf")
    for begin, end, kernel in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        total = families.setdefault(family(kernel), [0.0, 0])
        total[0] += (end - begin) / 1e3
        total[1] += 1
    span = (reached - min(begin for begin, *_ in spans)) / 1e3
    ordered = dict(sorted(families.items(), key=lambda item: -item[1][0]))
    return {"span_ms": span, "busy_ms": busy / 1e3, "launches": len(spans), "families": ordered}
