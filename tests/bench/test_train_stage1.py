"""The training proofs at a size for CPUs; bench/train_stage1.py runs them at BLIP-2's."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import train_stage1 as proofs  # noqa: E402

from qformer_fast import QFormerConfig  # noqa: E402
from qformer_fast.data.batches import PairDataset  # noqa: E402
from qformer_fast.data.captions import Pair  # noqa: E402
from qformer_fast.data.features import FeatureCache  # noqa: E402
from qformer_fast.data.tokenizer import load_tokenizer  # noqa: E402

SMALL = """
import sys
sys.path[:0] = [{bench!r}, {tests!r}]
import torch
import test_train_stage1 as small
from qformer_fast import Blip2QFormer
from qformer_fast.training.config import RunConfig
from qformer_fast.training.loop import train

torch.manual_seed(0)
dataset = small.make_dataset({cache!r})
options = dict(batch_size=6, precision="fp32", device="cpu", log_every=1, save_every=2, resume=True)
train(Blip2QFormer(small.config()), dataset, RunConfig(output_dir=sys.argv[1], steps=int(sys.argv[2]), **options))
"""


def config(dropout=0.1):
    sizes = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96, num_hidden_layers=2, num_query_tokens=4)
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return QFormerConfig(vocab_size=30523, encoder_hidden_size=48, **sizes, **rates)


def make_dataset(folder):
    words = ["cat", "dog", "bird", "fish", "horse", "cow", "pig", "bee", "ant", "fox", "owl", "hen"]
    if not Path(folder).exists():
        torch.manual_seed(0)
        FeatureCache.create(folder, words, torch.randn(12, 4, 48).split(4), metadata={}, dtype="float32")
    return PairDataset([Pair(w, f"a {w}", w) for w in words], load_tokenizer(), cache=FeatureCache(folder))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features") / "cache"


def test_curves_hold_and_a_wrong_loss_does_not(cache, monkeypatch):
    options = dict(batch_size=6, steps=12, device="cpu")
    found = proofs.compare_curves(config, make_dataset(cache), **options)
    assert len(found["ours"]) == len(found["reference"]) == 12
    assert found["ours"][0] != found["ours"][-1]

    def wrong(model, *args, **more):
        out = model(*args, **more)
        return type(out)(**vars(out) | {"loss_itm": out.loss_itm * 1.3})

    monkeypatch.setattr(proofs, "ours", wrong)
    with pytest.raises(AssertionError, match="losses differ by"):
        proofs.compare_curves(config, make_dataset(cache), **options)


def test_long_runs_with_large_logits(cache):
    found = proofs.train_long(
        config(), make_dataset(cache), batch_size=6, steps=20, precision="bf16", device="cpu", logits_scale=30.0
    )
    assert [entry["step"] for entry in found["entries"]] == list(range(1, 21))


def test_a_killed_run_goes_on(cache, tmp_path):
    make_dataset(cache)
    script = tmp_path / "small.py"
    script.write_text(SMALL.format(bench=str(ROOT / "bench"), tests=str(Path(__file__).parent), cache=str(cache)))
    found = proofs.kill_and_resume([sys.executable, str(script)], tmp_path, steps=30, kill_at=9)
    assert 9 <= found["killed_after"] < 30 and found["largest_difference"] == 0.0
