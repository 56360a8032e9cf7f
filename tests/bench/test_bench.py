"""The benchmark tooling, end to end on a CPU at tiny sizes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from _breakdown import family, summarize  # noqa: E402
from _cases import CASES, Sizes  # noqa: E402
from _floor import flops, stage1_products, time_floor, time_together  # noqa: E402
from _harness import Provider, Setup, bytes_floor, measure  # noqa: E402
from _providers import providers, reference_provider  # noqa: E402
from report import best_other, groups, report, slower  # noqa: E402

from qformer_fast import Blip2QFormer, QFormerConfig, ops  # noqa: E402

SETUP = Setup("cpu", torch.float32, repeats=2)
CEILINGS = {"gb_s": 2980.0, "tflop_s": 767.0}


def tiny_cases(op):
    return list(CASES[op](Sizes.tiny(3, "cpu")))


def test_every_public_op_with_kernels_to_come_has_cases():
    assert set(CASES) == set(ops.__all__) - {"image_key_value"}


@pytest.mark.parametrize("op", CASES)
def test_cases_fit_the_public_op_and_every_row_has_a_time(op):
    for case in tiny_cases(op):
        public = Provider(lambda inputs, p, case=case: case.call(getattr(ops, case.op), inputs, p, backend="reference"))
        found = {"public": public} | providers(case, ["reference", "sdpa_math"])
        rows = measure(case, reference_provider(case), found, SETUP, CEILINGS)
        assert not [row for row in rows if "error" in row]
        assert {row["provider"] for row in rows} == set(found) | ({"gemms"} if case.gemms else set())
        timed = [row for row in rows if row["provider"] == "public"]
        assert {(row["dropout_p"], row["mode"]) for row in timed} == {(p, m) for p in case.dropouts for m in case.modes}
        assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and row["floor_ratio"] > 0 for row in timed)


def test_the_floor_of_stage_1_is_what_the_packed_path_multiplies():
    """FLOPs counted while the model runs, those of attention and of similarities aside, which are batched products."""
    config = QFormerConfig(
        vocab_size=30592, hidden_size=64, num_attention_heads=2, num_hidden_layers=3, intermediate_size=96,
        encoder_hidden_size=40, num_query_tokens=5, cross_attention_frequency=2,
    )  # fmt: skip
    model = Blip2QFormer(config, embed_dim=16)
    ids = torch.tensor([[101, 7, 8, 102], [101, 9, 102, 0], [101, 102, 0, 0]])
    negatives = torch.tensor([1, 2, 0]), torch.tensor([1, 0, 1])
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 6, 40), ids, ids.bool(), negatives=negatives).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    single = sum(counted[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    products = stage1_products(config, batch=3, tokens=6, text_rows=9, negative_rows=3 + 4 + 3, embed_dim=16)
    assert flops(products) == single
    few = Counter({("dweight", (5, 3, 4)): 2, ("out", (5, 3, 4)): 1})
    assert time_floor(few, SETUP, 3).keys() == {"ms", "in_a_row_ms", "gflop"}
    with FlopCounterMode(display=False) as counter:
        time_together(few, SETUP, 3)
    assert counter.get_total_flops() == SETUP.repeats * 3 * flops(few)


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout / 2


def test_a_wrong_gradient_gets_no_time():
    (case,) = tiny_cases("bias_gelu")
    right = reference_provider(case)
    wrong = Provider(lambda inputs, p: HalfGradient.apply(right.run(inputs, p)))
    (row,) = measure(case, right, {"wrong": wrong}, SETUP, CEILINGS)
    assert row["error"].startswith("ValueError: dx has error") and "p50_us" not in row


def test_an_excluded_negative_gets_no_time():
    (case,) = tiny_cases("sample_negatives")
    wrong = Provider(lambda inputs, _: torch.arange(len(inputs["logits"])))
    (row,) = measure(case, reference_provider(case), {"wrong": wrong}, SETUP, CEILINGS)
    assert row["error"] == "ValueError: an excluded index was drawn"


def test_floor_of_image_cross_attention():
    """q, k, v and out of 128 images in bf16: 38 us at 2.98 TB/s."""
    case = next(CASES["image_cross_attention"](Sizes(128, "cpu")))
    inputs = case.make(lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    floor = bytes_floor(case, inputs, inputs["q"], "fwd", 0.0)
    assert floor == 2 * 128 * 768 * (32 + 257 + 257 + 32)
    assert floor / 2.98e6 == pytest.approx(38.1, abs=0.1)


def test_floor_of_gathered_rows_and_equal_gradients():
    (case,) = CASES["embeddings"](Sizes(8, "cpu"))
    inputs = case.make(lambda *shape: torch.empty(shape, device="meta"))
    rows = len(inputs["input_ids"])
    read = 2 * 8 * rows + 4 * 768 * (sum(case.rows_read.values()) + 2)
    out = torch.empty(rows, 768, device="meta")
    assert bytes_floor(case, inputs, out, "fwd", 0.0) == read + out.nbytes
    (case,) = CASES["dropout_add_layer_norm"](Sizes(8, "cpu"))
    inputs = case.make(lambda *shape: torch.empty(shape, device="meta"))
    plain, dropped = (bytes_floor(case, inputs, inputs["x"], "bwd", p) for p in (0.0, 0.1))
    assert dropped - plain == inputs["x"].nbytes


def test_command_line_and_report(tmp_path):
    out = tmp_path / "ops.json"
    command = [sys.executable, str(ROOT / "bench" / "bench_ops.py"), "--tiny", "--device", "cpu", "--dtype", "fp32"]
    command += ["--op", "bias_gelu", "--batch", "2", "--repeats", "2", "--out", str(out)]
    command += ["--providers", "reference", "triton"]
    pytest.importorskip("triton")
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"command", "machine", "settings", "ceilings", "rows"} <= result.keys()
    assert [(row["provider"], row["mode"]) for row in result["rows"]] == [
        (provider, mode) for provider in ("reference", "triton") for mode in ("fwd", "bwd", "fwd_bwd")
    ]
    assert "| 24x48 | float32 | 0.0 | fwd_bwd |" in "\n".join(report("ops.json", result))


def made_up(provider, p50, mode="fwd", **others):
    row = {"op": "bias_gelu", "shape": "2x3", "dtype": "bfloat16", "provider": provider, "mode": mode}
    times = {"p50_us": p50, "floor_us": 10.0, "floor_ratio": p50 / 10, "peak_mib": 5.0, "timing": "graph"}
    return row | {"dropout_p": 0.0} | times | others


def test_report_of_a_made_up_record():
    rows = [
        made_up("reference", 30.0),
        made_up("compiled", 18.0, timing="events"),
        made_up("triton", 12.0),
        made_up("gemms", 1.0),
        made_up("reference", 20.0, mode="fwd_bwd"),
        made_up("triton", 25.0, mode="fwd_bwd"),
        {"op": "bias_gelu", "shape": "2x3", "dtype": "bfloat16", "provider": "liger", "error": "ImportError: no"},
    ]
    forward = groups(rows)["bias_gelu", "2x3", "bfloat16", 0.0, "fwd"]
    assert best_other(forward)["provider"] == "compiled"
    assert slower(rows) == [
        "- bias_gelu 2x3 bfloat16, dropout 0.0, fwd_bwd: 25.0 us, 1.25 times reference's 20.0",
    ]
    machine = {"gpu": "H100", "cpu": "", "versions": {"torch": "2", "triton": "3"}, "commit": "abc", "time": "now"}
    result = {"machine": machine, "ceilings": CEILINGS, "command": "python bench/bench_ops.py", "rows": rows}
    text = "\n".join(report("made_up.json", result))
    assert "| 2x3 | bfloat16 | 0.0 | fwd | 30.0 | 18.0* | 12.0 | 1.0 | 10.0 | 1.20 | 1.50 |" in text
    assert "| 2x3 | bfloat16 | 0.0 | fwd_bwd | 20.0 |  | 25.0 |  | 10.0 | 2.50 | 0.80 |" in text
    assert "| bias_gelu | 2x3 | bfloat16 | 0.0 | 5.0 | 5.0 |" in text
    assert "- liger, bias_gelu 2x3: ImportError: no" in text


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from report import plot

    (path,) = plot([made_up("reference", 30.0), made_up("triton", 12.0)], tmp_path, "made_up")
    assert path.stat().st_size > 1000


def test_breakdown_counts_overlaps_once_and_knows_families():
    spans = [
        (0.0, 10.0, "nvjet_sm90_tst_192x96_64x5_1x2_h_bz_NTT"),
        (5.0, 15.0, "image_cross_attention_bwd_kernel"),
        (6.0, 8.0, "Memset (Device)"),
        (35.0, 40.0, "nvjet_sm90_tss_128x128_64x6_2x4_h_badd_NTT"),
    ]
    found = summarize(spans[::-1])
    assert (found["span_ms"], found["busy_ms"], found["launches"]) == (0.04, 0.02, 4)
    assert found["families"]["matrix products"] == [0.015, 2]
    assert list(found["families"]) == ["matrix products", "image cross-attention", "copies and fills"]
    assert family("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>") == (
        "other elementwise"
    )
