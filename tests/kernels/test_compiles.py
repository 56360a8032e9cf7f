"""Every kernel compiles for every architecture, without a GPU: see bench/compile_kernels.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    command = [sys.executable, str(ROOT / "bench" / "compile_kernels.py"), "--dtype", "bf16", "fp16"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_fits_into_shared_memory(rows):
    assert [row for row in rows if row["shared_bytes"] > row["shared_limit"]] == []


def test_no_register_spills(rows):
    assert [row for row in rows if row["spills"]] == []
