"""Who runs an op: eager PyTorch, torch.compile of it, our kernels, SDPA's four kernels, Liger."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from _harness import Case, Inputs, Provider
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qformer_fast import ops, reference


def reference_provider(case: Case) -> Provider:
    function = getattr(reference, case.op)
    return Provider(lambda inputs, dropout_p: case.call(function, inputs, dropout_p))


def compiled_provider(case: Case) -> Provider:
    # functions of earlier cases share their code with this one's and would use up its recompilations
    torch.compiler.reset()
    return Provider(torch.compile(reference_provider(case).run, dynamic=False))


def kernel_provider(backend: str) -> Callable[[Case], Provider | None]:
    """Our kernels; None where the op has none of this backend."""

    def provider(case: Case) -> Provider | None:
        if backend not in importlib.import_module(f"qformer_fast.ops.{case.op}").IMPLEMENTATIONS:
            return None
        function = getattr(ops, case.op)
        return Provider(lambda inputs, dropout_p: case.call(function, inputs, dropout_p, backend=backend))

    return provider


def sdpa_provider(backend: SDPBackend) -> Callable[[Case], Provider | None]:
    """SDPA on padded tensors; padding, and copying an image's keys for each of its readers, is not timed."""

    def provider(case: Case) -> Provider | None:
        make = {"query_text_attention": _padded_self_attention, "image_cross_attention": _gathered_cross_attention}
        if case.op not in make:
            return None
        prepare, mask, restore = make[case.op](case)

        def run(inputs: Inputs, dropout_p: float) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(**inputs, attn_mask=mask, dropout_p=dropout_p)

        return Provider(run, prepare, restore)

    return provider


def _padded_self_attention(case: Case) -> tuple[Callable, Tensor, Callable]:
    layout = case.options["layout"]
    # padding sees everything: a row without any key is where SDPA's kernels differ
    mask = layout.padded_mask | ~layout.padded_mask.any(-1, keepdim=True)

    def prepare(inputs: Inputs) -> Inputs:
        padded = inputs["qkv"][layout.padded_rows].permute(2, 0, 3, 1, 4)
        return dict(zip(("query", "key", "value"), (x.contiguous() for x in padded), strict=True))

    def restore(out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(0, 1)[layout.row_places]

    return prepare, mask, restore


def _gathered_cross_attention(case: Case) -> tuple[Callable, None, Callable]:
    layout = case.options["layout"]

    def prepare(inputs: Inputs) -> Inputs:
        query = inputs["q"].unflatten(0, (-1, layout.num_queries)).transpose(1, 2).contiguous()
        key, value = (inputs[name][layout.image_index].transpose(1, 2).contiguous() for name in "kv")
        return {"query": query, "key": key, "value": value}

    return prepare, None, lambda out: out.transpose(1, 2).flatten(0, 1)


def liger_provider(case: Case) -> Provider | None:
    if case.op == "linear_cross_entropy":
        return Provider(_liger_linear_cross_entropy, capturable=False)
    return Provider(_liger_layer_norm) if case.op == "dropout_add_layer_norm" else None


def _liger_linear_cross_entropy(inputs: Inputs, _dropout_p: float) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1)
    return loss(inputs["weight"], inputs["x"], inputs["labels"], inputs["bias"])


def _liger_layer_norm(inputs: Inputs, dropout_p: float) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x = F.dropout(inputs["x"], dropout_p) + inputs["residual"]
    return LigerLayerNormFunction.apply(x, inputs["weight"], inputs["bias"], 1e-12)


# name -> provider of a case, or None where it has no such op
PROVIDERS: dict[str, Callable[[Case], Provider | None]] = {
    "reference": reference_provider,
    "compiled": compiled_provider,
    "triton": kernel_provider("triton"),
    "cuda": kernel_provider("cuda"),
    "sdpa_flash": sdpa_provider(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": sdpa_provider(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": sdpa_provider(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": sdpa_provider(SDPBackend.MATH),
    "liger": liger_provider,
}


def providers(case: Case, names: list[str]) -> dict[str, Provider]:
    """Those of ``names`` that have the case's op."""
    found = {name: PROVIDERS[name](case) for name in names}
    return {name: provider for name, provider in found.items() if provider is not None}
