"""Forward + backward of stage 2 around a frozen language model of OPT-2.7B's size with random weights: ours against the
same step as the original writes it.

The original's step is its own Qformer.py without the text branch and the lines of its blip2_opt.py around it, in bf16
where the original takes fp16. Both rows have the same weights, the same image tokens and captions (on the host, as a
tokenizer leaves them) and the very same language model: Hugging Face's OPT, whose attention is PyTorch's, in eval mode,
where the original leaves its dropout on. Before anything is timed the losses and the gradients of the queries must
agree without dropout. Parts are timed alone with the same code: the Q-Former from image tokens to query outputs and
back, the language model with its projection from query outputs to the loss and back, and of that part what is left
without its layers ("head": projection, word embeddings, LM head, loss).
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import _original
import torch
from _breakdown import measure_breakdown
from _harness import graph_pools, seconds_in_a_row
from _machine import write_result
from bench_stage1 import IN_A_ROW
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from qformer_fast import QFormerConfig
from qformer_fast.data.language import IGNORED
from qformer_fast.models.blip2_opt import Blip2OPT

ROWS = ("ours", "original")
PARTS = ("whole", "q_former", "language_model", "head")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# of losses relative to the original's, of the queries' gradient in fp32 too; in bf16 that may be off from fp32's by
# FACTOR times what the original's is
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
GRADIENT_TOLERANCE, FACTOR = 1e-4, 3.0
# calls after which graphs are captured
WARM_UP = 5
OPT_2_7B = dict(hidden_size=2560, num_attention_heads=32, ffn_dim=10240, vocab_size=50272)
TINY_QFORMER = dict(
    hidden_size=64, num_attention_heads=2, intermediate_size=96, num_query_tokens=4, encoder_hidden_size=48
)
TINY_OPT = dict(hidden_size=32, num_attention_heads=2, ffn_dim=64, vocab_size=80)

Text = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One way to compute the step.

    Args:
        module (nn.Module): whose parameters are trained.
        loss (Callable): image tokens -> loss, the whole forward.
        encode (Callable): image tokens -> query outputs.
        language_loss (Callable): query outputs -> loss.
    """

    module: nn.Module
    loss: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    language_loss: Callable[[Tensor], Tensor]


class OriginalLayerNorm(nn.LayerNorm):
    """The original's of image tokens: fp32 inside, the tokens' dtype outside (blip2.py:107-113 of LAVIS 506965b)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.type(torch.float32)).type(x.dtype)


class OriginalStage2(nn.Module):
    """The original's ``Blip2OPT`` (blip2_opt.py of LAVIS 506965b) with the weights and the language model of ``model``.

    Its ``maybe_autocast`` is the caller's autocast. The language model is not registered, so it stays in its mode.
    """

    def __init__(self, model: Blip2OPT):
        super().__init__()
        config = model.config
        self.ln_vision = OriginalLayerNorm(config.encoder_hidden_size, eps=model.ln_vision.eps)
        self.query_tokens = nn.Parameter(torch.zeros_like(model.query_tokens))
        self.Qformer = _original.build_query_qformer(config)
        self.opt_proj = nn.Linear(config.hidden_size, model.language_model.config.hidden_size)
        # a buffer that the original keeps without the embeddings it is for
        positions = {"Qformer.bert.embeddings.position_ids": self.Qformer.bert.embeddings.position_ids}
        self.load_state_dict(model.to_lavis_state_dict() | positions, strict=True)
        self.to(model.query_tokens.device)
        self._held = (model.language_model,)

    def encode_images(self, image: Tensor) -> Tensor:
        """blip2_opt.py:97-110."""
        image_embeds = self.ln_vision(image)
        image_atts = torch.ones(image_embeds.size()[:-1], dtype=torch.long).to(image.device)
        query_tokens = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        query_output = self.Qformer.bert(
            query_embeds=query_tokens,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=image_atts,
            return_dict=True,
        )
        return query_output.last_hidden_state

    def language_loss(self, query_output: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """blip2_opt.py:112-148, after the tokenizer."""
        (opt_model,), device = self._held, query_output.device
        inputs_opt = self.opt_proj(query_output)
        atts_opt = torch.ones(inputs_opt.size()[:-1], dtype=torch.long).to(device)
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        targets = input_ids.masked_fill(input_ids == opt_model.config.pad_token_id, IGNORED)
        empty_targets = torch.ones(atts_opt.size(), dtype=torch.long).to(device).fill_(IGNORED)
        targets = torch.cat([empty_targets, targets], dim=1)
        inputs_embeds = opt_model.model.decoder.embed_tokens(input_ids)
        inputs_embeds = torch.cat([inputs_opt, inputs_embeds], dim=1)
        attention_mask = torch.cat([atts_opt, attention_mask], dim=1)
        outputs = opt_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, labels=targets
        )
        return outputs.loss

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.language_loss(self.encode_images(image), input_ids, attention_mask)


def build_language_model(options: argparse.Namespace) -> PreTrainedModel:
    """OPT in the dtype of ``--precision``, made on the device, in eval mode."""
    sizes = TINY_OPT if options.tiny else OPT_2_7B
    config = OPTConfig(**sizes, num_hidden_layers=options.lm_layers, word_embed_proj_dim=sizes["hidden_size"])
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=PRECISIONS[options.precision]).eval()


def make_batch(options: argparse.Namespace, encoder_hidden: int, lm: OPTConfig) -> tuple[Tensor, Text]:
    """Image tokens on the device; ids, mask and labels of captions, right-padded to the longest, on the host."""
    shortest, longest = options.lengths
    lengths = torch.randint(shortest, longest + 1, (options.batch,))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(4, lm.vocab_size, mask.shape)
    ids[:, 0] = lm.bos_token_id
    ids = ids.masked_fill(mask == 0, lm.pad_token_id)
    images = torch.randn(options.batch, options.tokens, encoder_hidden)
    return images.to(options.device, PRECISIONS[options.precision]), (ids, mask, ids.masked_fill(mask == 0, IGNORED))


def build_rows(config: QFormerConfig, language_model: PreTrainedModel, text: Text, device: str) -> dict[str, Row]:
    """Both rows in training mode, no parameter at its initial value."""
    torch.manual_seed(0)
    model = Blip2OPT(config, language_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * config.initializer_range)
    model.to(device).train()
    original = OriginalStage2(model).train()
    return {
        "ours": Row(
            model,
            lambda images: model(images, *text).loss,
            model.encode_images,
            lambda query_output: model.language_projection.loss(query_output, *text),
        ),
        "original": Row(
            original,
            lambda images: original(images, *text[:2]),
            original.encode_images,
            lambda query_output: original.language_loss(query_output, *text[:2]),
        ),
    }


def check_agreement(
    rows: dict[str, Row], images: Tensor, language_model: PreTrainedModel, precision: str
) -> dict[str, Any]:
    """Losses and relative differences of the queries' gradients; in bf16 also the original's step all in fp32.

    Raises:
        AssertionError: they differ by more than is allowed; nothing is timed then.
    """

    def loss_and_gradient(row: Row, images: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
        for _ in range(WARM_UP):
            row.module.zero_grad(set_to_none=True)
            with _autocast(images, dtype):
                loss = row.loss(images)
            loss.backward()
        gradient = row.module.query_tokens.grad.clone()
        row.module.zero_grad(set_to_none=True)
        return float(loss.detach()), gradient

    dtype = PRECISIONS[precision]
    exact = None
    if precision != "fp32":
        language_model.float()
        exact = loss_and_gradient(rows["original"], images.float(), torch.float32)
        language_model.to(dtype)
    found = {name: loss_and_gradient(row, images, dtype) for name, row in rows.items()}
    (ours, our_gradient), (original, gradient) = found["ours"], found["original"]
    result: dict[str, Any] = {
        "losses": {name: loss for name, (loss, _) in found.items()},
        "loss_difference": abs(ours - original) / original,
        "gradient_difference": _relative(our_gradient, gradient),
    }
    error, allowed = result["gradient_difference"], GRADIENT_TOLERANCE
    if exact is not None:
        result["losses"]["fp32"] = exact[0]
        errors = result["gradient_errors"] = {name: _relative(x, exact[1]) for name, (_, x) in found.items()}
        error, allowed = errors["ours"], FACTOR * errors["original"]
    assert result["loss_difference"] <= LOSS_TOLERANCE[precision], f"losses differ: {result}"
    assert error <= allowed, f"gradients of the queries are off by {error}, {allowed} is allowed: {result}"
    return result


def _relative(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


def _autocast(images: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def build_steps(row: Row, images: Tensor, language_model: PreTrainedModel) -> dict[str, Callable[[], None]]:
    """Forward and backward of each of ``PARTS``."""

    def backward(run: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor | None = None) -> None:
        row.module.zero_grad(set_to_none=True)
        with _autocast(images, images.dtype):
            out = run(x)
        out.backward(dout)

    with torch.no_grad(), _autocast(images, images.dtype):
        query_output = row.encode(images).clone()
    torch.manual_seed(1)
    dout = torch.randn_like(query_output, dtype=torch.float32).to(query_output.dtype)
    query_output.requires_grad_()

    def language_model_step() -> None:
        query_output.grad = None
        backward(row.language_loss, query_output)

    def head_step() -> None:
        with mock.patch.object(language_model.model.decoder, "layers", nn.ModuleList()):
            language_model_step()

    return {
        "whole": lambda: backward(row.loss, images),
        "q_former": lambda: backward(row.encode, images, dout),
        "language_model": language_model_step,
        "head": head_step,
    }


def measure(
    rows: dict[str, Row], images: Tensor, language_model: PreTrainedModel, repeats: int
) -> dict[str, dict[str, Any]]:
    """Of every row and part the milliseconds, taken in turn, the mean of steps in a row; on a GPU also what they go to,
    and the memory of the whole step.
    """
    device = images.device.type
    found: dict[str, dict[str, Any]] = {name: {} for name in rows}
    steps = {name: build_steps(row, images, language_model) for name, row in rows.items()}
    for part in PARTS:
        for name, row in rows.items():
            run = steps[name][part]
            pools = graph_pools() if device == "cuda" else 0
            for _ in range(WARM_UP):
                run()
            if device == "cuda" and part == "whole":
                weights = sum(x.nbytes for module in (row.module, language_model) for x in module.parameters())
                found[name] |= _memory(row, run, weights, graph_pools() - pools)
            found[name][part] = {"ms": []}
        for _ in range(repeats):
            for name in rows:
                seconds = seconds_in_a_row(steps[name][part], IN_A_ROW[device], device)
                found[name][part]["ms"].append(round(seconds * 1e3, 3))
        for name, row in rows.items():
            result = found[name][part]
            result["median_ms"] = round(statistics.median(result["ms"]), 3)
            if device == "cuda":
                result["breakdown"] = measure_breakdown(steps[name][part])
            row.module.zero_grad(set_to_none=True)
    return found


def _memory(row: Row, run: Callable[[], None], weights: int, held: int) -> dict[str, float]:
    """GiB of the parameters, of a step at its peak above them with what graphs hold, and of both."""
    row.module.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    step = torch.cuda.max_memory_allocated() - before + held
    sizes = {"weights_gib": weights, "step_gib": step, "peak_gib": weights + step}
    return {name: round(size / 2**30, 2) for name, size in sizes.items()}


def times_as_fast(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of each part the median of the original's time over ours."""
    ratios = {}
    for part in PARTS:
        times = (rows[name][part]["ms"] for name in ("original", "ours"))
        ratios[part] = round(statistics.median(a / b for a, b in zip(*times, strict=True)), 2)
    return ratios


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Agreement without dropout, then times and memory with it."""
    torch.manual_seed(0)
    language_model = build_language_model(options)
    sizes = (TINY_QFORMER if options.tiny else {}) | dict(num_hidden_layers=options.layers)
    images, text = make_batch(options, QFormerConfig(**sizes).encoder_hidden_size, language_model.config)

    def rows_with(dropout: float) -> dict[str, Row]:
        rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        config = QFormerConfig(**sizes, **rates, use_qformer_text_input=False)
        return build_rows(config, language_model, text, options.device)

    rows = rows_with(0.0)
    agreement = check_agreement(rows, images, language_model, options.precision)
    del rows  # with their graphs, which are no part of the memory
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    rows = measure(rows_with(options.dropout), images, language_model, options.repeats)
    return {"agreement": agreement, "rows": rows, "times_as_fast": times_as_fast(rows)}


def print_result(found: dict[str, Any]) -> None:
    print(*(f"{name} {value}" for name, value in found["agreement"].items()), sep="\n")
    for name, row in found["rows"].items():
        for part in PARTS:
            print(f"{name:<10}{part:<16}{row[part]['median_ms']:>10.2f} ms", end="")
            if breakdown := row[part].get("breakdown"):
                print(" busy {busy_ms} of {span_ms} ms, {launches} launches".format(**breakdown), end="")
            print()
        if "peak_gib" in row:
            print(name, "weights {weights_gib} GiB, a step {step_gib}, both {peak_gib}".format(**row))
    print("ours is times as fast:", found["times_as_fast"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=257, help="image tokens")
    parser.add_argument("--lengths", type=int, nargs=2, default=(6, 18), help="shortest and longest caption, in tokens")
    parser.add_argument("--layers", type=int, default=12, help="of the Q-Former")
    parser.add_argument("--lm-layers", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the Q-Former, while it is timed")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="narrow models, for tests")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args(arguments)
    if reason := _original.why_missing():
        parser.error(reason)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    found = bench(options)
    print_result(found)
    if options.output:
        write_result(options.output, {"bench": "stage2", "settings": settings, **found})


if __name__ == "__main__":
    main()
