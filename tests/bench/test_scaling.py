"""What would be on more GPUs, from measurements made up here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RANKS = {
    "machine": {"gpu": "a GPU"},
    "settings": {"batch": 128},
    "ranks": {
        "1": {"median_ms": 40.0, "itc_ms": {"256": 1.0, "1024": 2.0, "8192": 10.0}},
        "2": {"median_ms": 41.0, "gradient_all_reduce_bytes": 800_000_000},
    },
}
PIXELS = {"machine": {"gpu": "another"}, "encoders": {"ViT-L-14": {"rows": {"encoder": {"median_ms": 46.0}}}}}


def test_scaling(tmp_path):
    for name, content in (("ranks.json", RANKS), ("pixels.json", PIXELS)):
        (tmp_path / name).write_text(json.dumps(content))
    command = [sys.executable, ROOT / "bench" / "scaling.py", "--ranks", "ranks.json", "--pixels", "pixels.json"]
    done = subprocess.run(
        [*command, "--output", "scaling.md"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "scaling.md").read_text().splitlines()]
    steps, data = ({int(row[0]): row for row in lines if len(row) == n and row[0].isdigit()} for n in (12, 6))
    assert list(steps) == list(data) == [2, 8, 64, 512]
    # on two GPUs what was measured
    assert steps[2][4:9] == ["41.0", "0.0", "0.0", "0.0", "0.0"] and steps[2][2] == "800"
    # of 511 GPUs: 128 texts of 256 numbers and 128 x 128 similarities, and gradients of both, in four bytes
    assert float(steps[512][1]) == pytest.approx(511 * 2 * 4 * (128 * 256 + 128 * 128) / 1e6, abs=0.6)
    # 65,536 candidates lie on the slope of the last two counts: 8 ms for 7,168
    assert float(steps[512][6]) == pytest.approx(10 + (65536 - 8192) * 8 / 7168 - 1, abs=0.06)
    # 504 GPUs' texts there and back through eight links of 50 GB/s, and similarities through one, at 80%
    texts, similarities = 128 * 256 * 4 / 400e9, 128 * 128 * 4 / 50e9
    assert float(steps[512][5]) == pytest.approx(504 * 2 * (texts + similarities) / 0.8 * 1e3, abs=0.06)
    assert all(float(steps[a][4]) < float(steps[b][4]) for a, b in ((2, 8), (8, 64), (64, 512)))
    assert steps[2][-1] == "the step itself" and steps[512][-1] == "itc"
    # eight batches of 257 x 1408 numbers of two bytes
    assert float(data[2][1]) == pytest.approx(8 * 128 * 257 * 1408 * 2 / 0.041 / 1e9, abs=0.06)
