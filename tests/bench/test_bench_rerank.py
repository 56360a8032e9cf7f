"""The re-ranking benchmark, end to end on a CPU at tiny sizes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

SIZES = ["--tiny", "--images", "5", "--texts", "7", "--tokens", "6", "--k", "3", "--repeats", "1", "--device", "cpu"]


@pytest.fixture
def bench(original):
    """bench_rerank.py, where the original's code is."""
    spec = importlib.util.spec_from_file_location("bench_rerank", ROOT / "bench" / "bench_rerank.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_agree_and_pairs_are_counted(bench, tmp_path):
    bench.main([*SIZES, "--precision", "fp32", "--output", str(tmp_path / "rerank.json")])
    result = json.loads((tmp_path / "rerank.json").read_text())
    rows = result["precisions"]["fp32"]
    assert tuple(rows) == bench.ROWS and result["settings"]["k"] == 3
    # three texts of each of 5 images and three images of each of 7 texts, of which ours matches none twice
    assert rows["original"]["pairs"] == 3 * 5 + 3 * 7 and max(3 * 5, 3 * 7) <= rows["ours"]["pairs"] <= 35
    for row in rows.values():
        assert row["largest_difference"] <= 1e-4 and row["seconds"] > 0
        assert row["pairs_per_second"] == pytest.approx(row["pairs"] / row["seconds"], abs=0.051)


def test_wrong_logits_get_no_time(bench):
    right = torch.tensor([[0.5, -100.0], [0.25, 0.75]]), torch.tensor([[0.5, 0.25], [-100.0, 0.75]])
    wrong = right[0] + torch.tensor([[0.0, 0.0], [0.01, 0.0]]), right[1]
    rows = {"ours": lambda: wrong, "original": lambda: right}
    assert bench.check_agreement(rows, 0.02)["ours"]["largest_difference"] == pytest.approx(0.01, abs=1e-5)
    with pytest.raises(AssertionError, match="ours is off by 0.01, 0.005 is allowed"):
        bench.check_agreement(rows, 0.005)
    near = tuple(x + 0.004 for x in right)
    assert bench.check_agreement(rows, 0.0, near)["ours"]["largest_error"] == pytest.approx(0.006, abs=1e-5)
    with pytest.raises(AssertionError, match="ours is off by 0.009"):
        bench.check_agreement(rows, 0.0, tuple(x + 0.001 for x in right))
    others = right[0].flip(1), right[1]
    with pytest.raises(AssertionError, match="ours has other candidates"):
        bench.check_agreement({"ours": lambda: others, "original": lambda: right}, 1.0)


def test_captions_have_the_lengths_asked_for(bench):
    ids, mask = bench.make_captions(500, 8, 18)
    lengths = mask.sum(1)
    assert ids.shape == (500, 35) and (int(lengths.min()), int(lengths.max())) == (8, 18)
    assert bool((ids.gather(1, lengths[:, None] - 1) == 102).all()) and bool((ids[:, 0] == 101).all())
