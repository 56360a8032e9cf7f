"""The benchmark of several processes, end to end on a CPU at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = [
    "--device", "cpu", "--tiny", "--layers", "2", "--batch", "4", "--tokens", "9",
    "--warm-up", "1", "--repeats", "1", "--in-a-row", "1", "--candidates", "8", "12",
]  # fmt: skip


def test_two_processes_agree_with_one(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "bench" / "bench_ranks.py"),
        *ARGUMENTS,
        "--output",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    one, two = result["ranks"]["1"], result["ranks"]["2"]
    assert result["efficiency"] == pytest.approx(one["median_ms"] / two["median_ms"], abs=1e-4)
    assert set(one["itc_ms"]) == {"8", "12"} and min(one["itc_ms"].values()) > 0
    agreement = two["agreement"]
    assert agreement["losses"] == pytest.approx(agreement["losses_of_one"], rel=1e-5)
    assert agreement["gradient_difference"] < 1e-5
    # of the other process: 4 captions' features, 256 wide, and gradients of as many; 4 x 4 similarities and gradients
    received = two["received_bytes"]
    assert received["features"] == 2 * 4 * 256 * 4 and received["similarities"] == 2 * 4 * 4 * 4
    assert received["negatives"] == 4 * 8
    # of four pairs three each, and at most the other process's negatives as well
    assert two["matched_pairs"] == 12 <= two["matched_pairs_of_the_rank_with_most"] <= 16
    assert two["originals_image_tokens_bytes"] == 4 * 9 * 48 * 2
    assert "weak scaling" in done.stdout
