"""Every kernel compiles for every architecture, without a GPU: see bench/compile_kernels.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# fp16 where it is run; elsewhere it takes the registers and the shared memory of bf16
TARGETS = ("80-bf16", "90-bf16", "90-fp16", "100-bf16", "120-bf16")
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    command = [sys.executable, str(ROOT / "bench" / "compile_kernels.py"), "--quick", "--target", *TARGETS]
    command += ["--sizes", "blip2", "long_text", "few_heads"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def summary(row: dict) -> str:
    found = {name: row[name] for name in ("registers", "spills", "shared_bytes", "constants")}
    return f"{row['kernel']} {row['arch']} {row['dtype']} {found}"


def test_fits_into_shared_memory(rows):
    assert [summary(row) for row in rows if row["shared_bytes"] > row["shared_limit"]] == []


def test_no_register_spills_at_blip2_sizes(rows):
    spilling = [row for row in rows if row["spills"] and not row["kernel"].startswith("streamed_")]
    assert not spilling, "\n".join(map(summary, spilling))


def test_attention_uses_hopper_instructions(rows):
    hopper = {row["kernel"] for row in rows if row["arch"] == "sm_90" and row["wgmma"]}
    assert {"query_text_attention_fwd_kernel", "query_text_attention_bwd_kernel"} <= hopper
