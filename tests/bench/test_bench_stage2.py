"""The benchmark of stage 2's step, end to end on a CPU at tiny sizes."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import bench_stage2 as bench  # noqa: E402

pytestmark = pytest.mark.usefixtures("original")
ARGUMENTS = [
    "--tiny", "--layers", "3", "--lm-layers", "2", "--batch", "3", "--tokens", "6", "--lengths", "2", "7",
    "--repeats", "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def parts():
    return make_parts("fp32")


def make_parts(precision):
    """Rows, image tokens, text and language model without dropout."""
    options = SimpleNamespace(tiny=True, lm_layers=2, device="cpu", precision=precision)
    language_model = bench.build_language_model(options)
    batch = SimpleNamespace(batch=3, tokens=6, lengths=(2, 7), device="cpu", precision=precision)
    images, text = bench.make_batch(batch, bench.TINY_QFORMER["encoder_hidden_size"], language_model.config)
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = bench.QFormerConfig(**bench.TINY_QFORMER, **rates, num_hidden_layers=3, use_qformer_text_input=False)
    rows = bench.build_rows(config, language_model, text, "cpu")
    return SimpleNamespace(rows=rows, images=images, text=text, language_model=language_model)


def test_a_run_writes_what_it_found(tmp_path):
    path = tmp_path / "stage2.json"
    bench.main([*ARGUMENTS, "--precision", "fp32", "--output", str(path)])
    result = json.loads(path.read_text())
    assert result["bench"] == "stage2" and result["machine"]["versions"] and result["settings"]["layers"] == 3
    losses = result["agreement"]["losses"]
    assert losses["ours"] == pytest.approx(losses["original"], rel=1e-5)
    assert result["agreement"]["gradient_difference"] <= 1e-4
    assert tuple(result["rows"]) == bench.ROWS
    for part in ("whole", "q_former", "language_model", "head"):
        ours, original = (result["rows"][name][part]["median_ms"] for name in ("ours", "original"))
        assert result["times_as_fast"][part] == pytest.approx(original / ours, abs=0.02)


def test_both_rows_are_the_same_function(parts):
    found = {}
    for name, row in parts.rows.items():
        row.loss(parts.images).backward()
        query_output = row.encode(parts.images)
        found[name] = row.loss(parts.images).detach(), row.module.query_tokens.grad, query_output.detach()
        assert torch.allclose(row.language_loss(query_output), found[name][0], rtol=1e-6), name
    (loss, gradient, output), (expected_loss, expected_gradient, expected_output) = found["ours"], found["original"]
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()
    assert torch.allclose(output, expected_output, atol=1e-5)


def test_the_original_row_is_the_originals_own_forward(parts):
    """lavis/models/blip2_models/blip2_opt.py itself, with a tokenizer that knows the captions already."""
    input_ids, attention_mask, _ = parts.text

    class Tokens(SimpleNamespace):
        def to(self, _device):
            return self

    class Tokenizer:
        pad_token_id = parts.language_model.config.pad_token_id

        def __call__(self, text, **_options):
            return Tokens(input_ids=input_ids, attention_mask=attention_mask)

    own = bench._original.build_stage2(parts.rows["ours"].module, Tokenizer())
    samples = {"image": parts.images, "text_input": ["a caption"] * 3}
    assert torch.equal(own(samples)["loss"], parts.rows["original"].loss(parts.images))


def test_a_row_that_differs_gets_no_time(parts):
    def check(loss):
        rows = parts.rows | {"ours": dataclasses.replace(parts.rows["ours"], loss=loss)}
        return bench.check_agreement(rows, parts.images, parts.language_model, "fp32")

    right = parts.rows["ours"].loss
    assert check(right)["loss_difference"] <= 1e-5
    with pytest.raises(AssertionError, match="losses differ"):
        check(lambda images: 1.001 * right(images))
    with pytest.raises(AssertionError, match="gradients of the queries are off"):
        check(lambda images: 1.001 * right(images) - 0.001 * right(images).detach())


def test_bf16_is_held_to_the_original_in_fp32():
    parts = make_parts("bf16")
    before = [x.clone() for x in parts.language_model.parameters()]
    found = bench.check_agreement(parts.rows, parts.images, parts.language_model, "bf16")
    assert all(map(torch.equal, parts.language_model.parameters(), before))
    assert 0 < found["gradient_errors"]["ours"] <= 3 * found["gradient_errors"]["original"] < 0.3
    assert found["losses"]["fp32"] == pytest.approx(found["losses"]["original"], rel=2e-3)


def test_the_head_is_the_language_model_without_its_layers(parts):
    row, layers = parts.rows["ours"], parts.language_model.model.decoder.layers
    calls = []
    hook = layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    steps = bench.build_steps(row, parts.images, parts.language_model)
    steps["head"]()
    assert calls == [] and parts.language_model.model.decoder.layers is layers
    assert float(row.module.language_projection.weight.grad.norm()) > 0
    steps["language_model"]()
    assert calls == ["layer"]
    hook.remove()
