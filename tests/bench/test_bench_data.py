"""The benchmarks of data, end to end on a CPU at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.data.features import FeatureCache

ROOT = Path(__file__).resolve().parents[2]


def run(script, *arguments, cwd):
    command = [sys.executable, str(ROOT / "bench" / script), *map(str, arguments), "--device", "cpu"]
    done = subprocess.run([*command, "--output", "out.json"], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / "out.json").read_text()), done.stdout


def test_loader(tmp_path):
    sizes = ["--tiny", "--batch", 4, "--images", 20, "--shard-images", 8, "--tokens", 5, "--width", 16]
    result, printed = run(
        "bench_loader.py", "--folder", tmp_path / "caches", *sizes, "--workers", 0, 1, "--steps", 6, "--log-every", 1,
        cwd=tmp_path,
    )  # fmt: skip
    for dtype in ("bfloat16", "int8"):
        assert FeatureCache(tmp_path / "caches" / dtype).shards == [8, 8, 4]
        for workers in ("0", "1"):
            row = result["dtypes"][dtype][workers]
            assert 0 <= row["share_data"] <= row["most_share_data"] < 1 and row["samples_per_second"] > 0
    assert printed.count("pairs/s") == 4


def test_features(tmp_path):
    tokens = torch.randn(8, 5, 48)
    keys = [f"{i}.png" for i in range(8)]
    FeatureCache.create(tmp_path / "cache", keys, [tokens], metadata={"encoder": "test"}, dtype="float32")
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": key, "caption": f"number {key[0]}"} for key in keys]))
    sizes = dict(hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=96, num_query_tokens=4)
    Blip2QFormer(QFormerConfig(**sizes, encoder_hidden_size=48), embed_dim=16).save_pretrained(tmp_path / "model")
    options = ["--pairs", "pairs.json", "--feature-cache", "cache", "--checkpoint", "model"]
    options += ["--batch", 4, "--batches", 2]
    dtypes = ["--dtypes", "float32", "float16", "bfloat16", "int8"]
    result, _ = run("bench_features.py", *options, *dtypes, cwd=tmp_path)
    assert result["float32"]["gradient_relative_difference"] == 0 and result["losses"]["loss_itg"] > 1
    int8 = result["int8"]
    assert int8["bytes_an_image"] == 5 * (48 + 4) and result["bfloat16"]["bytes_an_image"] == 5 * 48 * 2
    # uniform in half a step of max / 127, on tokens of spread 1 whose largest of 48 values is about 2.4
    assert int8["tokens_relative_difference"] == pytest.approx(2.4 / 127 / 12**0.5, rel=0.2)
    assert 0 < max(int8["largest_difference"].values()) < 0.02
    assert result["float16"]["gradient_relative_difference"] < int8["gradient_relative_difference"] < 0.05
