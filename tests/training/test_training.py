"""The loop: exact resume, clear stops, schedule and groups."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.data.batches import PairDataset
from qformer_fast.data.captions import Pair
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.training.checkpoint import list_checkpoints
from qformer_fast.training.config import OptimizerConfig, RunConfig
from qformer_fast.training.loop import train
from qformer_fast.training.optimizer import lr_at, parameter_groups

FAST = OptimizerConfig(lr=1e-3, warmup_steps=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Nine images of three colours' worth of tokens, two captions each."""
    torch.manual_seed(0)
    words = ["cat", "dog", "bird", "fish", "horse", "cow", "pig", "bee", "ant"]
    folder = tmp_path_factory.mktemp("data") / "cache"
    cache = FeatureCache.create(folder, words, torch.randn(9, 4, 48).split(4), metadata={}, dtype="float32")
    pairs = [Pair(word, f"{start} {word}", word) for word in words for start in ("a", "one small")]
    return PairDataset(pairs, load_tokenizer(), cache=cache)


@pytest.fixture
def build(tiny_config):
    def build() -> Blip2QFormer:
        torch.manual_seed(7)
        return Blip2QFormer(QFormerConfig(**{**tiny_config.to_dict(), "num_hidden_layers": 2}), embed_dim=16)

    return build


def run_config(folder, **options):
    defaults = dict(steps=7, batch_size=5, precision="fp32", device="cpu", log_every=1, save_every=3)
    return RunConfig(output_dir=str(folder), **{**defaults, **options})


def without_times(entries):
    return [{name: value for name, value in entry.items() if name != "samples_per_second"} for entry in entries]


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_has_bit_identical_losses(dataset, build, tmp_path, accumulation):
    """Dropout and drawn negatives on; the interruption comes between two checkpoints, over an epoch's end."""
    whole_model = build()
    whole = train(whole_model, dataset, run_config(tmp_path / "whole", accumulation=accumulation), FAST)

    def interrupt(entry):
        if entry["step"] == 5:
            raise Interrupt

    options = run_config(tmp_path / "parts", accumulation=accumulation)
    with pytest.raises(Interrupt):
        train(build(), dataset, options, FAST, on_log=interrupt)
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["checkpoint-00000003"]
    torch.rand(11)
    resumed_model = build()
    options = run_config(tmp_path / "parts", accumulation=accumulation, resume=True)
    resumed = train(resumed_model, dataset, options, FAST, num_workers=1)
    assert without_times(resumed) == without_times(whole)
    assert [entry["step"] for entry in resumed] == list(range(1, 8))
    on_disk = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert on_disk == resumed
    for name, tensor in whole_model.state_dict().items():
        assert torch.equal(tensor, resumed_model.state_dict()[name]), name
    assert len({entry["loss"] for entry in whole}) == 7


def test_a_signal_ends_the_run_with_a_checkpoint(dataset, build, tmp_path):
    def send(entry):
        if entry["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    entries = train(build(), dataset, run_config(tmp_path, save_every=100), FAST, on_log=send)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000002"]
    assert signal.getsignal(signal.SIGTERM) is before
    again = train(build(), dataset, run_config(tmp_path, save_every=100, resume=True), FAST)
    whole = train(build(), dataset, run_config(tmp_path / "whole"), FAST)
    assert without_times(again) == without_times(whole)


def test_checkpoints_are_kept_in_number_and_load_as_models(dataset, build, tmp_path):
    model = build()
    train(model, dataset, run_config(tmp_path, steps=6, save_every=1, keep=2), FAST)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000005", "checkpoint-00000006"]
    loaded = Blip2QFormer.from_pretrained(tmp_path / "checkpoint-00000006")
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_finished_folder_is_not_trained_over(dataset, build, tmp_path):
    train(build(), dataset, run_config(tmp_path, steps=1), FAST)
    with pytest.raises(ValueError, match="run.output_dir has checkpoints in it"):
        train(build(), dataset, run_config(tmp_path, steps=1), FAST)
    with pytest.raises(ValueError, match="run.resume: batch_size must be 5 as in"):
        train(build(), dataset, run_config(tmp_path, steps=2, batch_size=4, resume=True), FAST)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named(dataset, build, tmp_path, name, damage):
    train(build(), dataset, run_config(tmp_path, steps=1), FAST)
    path = tmp_path / "checkpoint-00000001" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="checkpoint: .*checkpoint-00000001 is truncated or incomplete"):
        train(build(), dataset, run_config(tmp_path, steps=2, resume=True), FAST)


def test_a_failed_save_leaves_the_earlier_checkpoint(dataset, build, tmp_path, monkeypatch):
    import qformer_fast.training.checkpoint as checkpoint

    real, calls = checkpoint.save_file, []

    def full_disk(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        train(build(), dataset, run_config(tmp_path, save_every=1), FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001", "log.jsonl"]
    monkeypatch.undo()
    resumed = train(build(), dataset, run_config(tmp_path, resume=True), FAST)
    assert without_times(resumed) == without_times(train(build(), dataset, run_config(tmp_path / "whole"), FAST))


@pytest.mark.parametrize(
    ("poison", "named"),
    [("lm_head.bias", "loss_itg"), ("itm_head.bias", "loss_itm"), ("vision_proj.bias", "loss_itc")],
)
def test_nan_stops_the_run_and_names_the_loss_and_step(dataset, build, tmp_path, poison, named):
    model = build()

    def spoil(entry):
        if entry["step"] == 3:
            with torch.no_grad():
                model.get_parameter(poison).fill_(math.nan)

    with pytest.raises(FloatingPointError, match=f"{named} is nan at step 4; .*checkpoint-00000002"):
        train(model, dataset, run_config(tmp_path, save_every=2), FAST, on_log=spoil)
    saved = Blip2QFormer.from_pretrained(tmp_path / "checkpoint-00000002")
    assert all(p.isfinite().all() for p in saved.parameters())


def test_training_learns_the_pairs(dataset, build, tmp_path):
    model = build()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = dataclasses.replace(
                module.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
    config = OptimizerConfig(lr=2e-3, warmup_steps=10, max_grad_norm=1.0)
    run = run_config(tmp_path, steps=260, batch_size=9, log_every=1, save_every=500)
    entries = train(model, dataset, run, config)
    start, end = ({name: sum(e[name] for e in part) / 20 for name in part[0]} for part in (entries[:20], entries[-20:]))
    assert end["loss_itg"] < 0.5 * start["loss_itg"]
    assert end["loss_itc"] < 0.6 * start["loss_itc"]
    assert end["loss_itm"] < 0.6 * start["loss_itm"]
    assert end["r1_i2t"] == end["r1_t2i"] == 1.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(dataset, build, tmp_path, precision):
    exact = train(build(), dataset, run_config(tmp_path / "fp32", steps=3), FAST)
    low = train(build(), dataset, run_config(tmp_path / precision, steps=3, precision=precision), FAST)
    for a, b in zip(exact, low, strict=True):
        assert b["loss_itg"] == pytest.approx(a["loss_itg"], rel=0.03)


def test_gradient_checkpointing_gives_the_same_losses(dataset, build, tmp_path):
    plain = train(build(), dataset, run_config(tmp_path / "plain", steps=4), FAST)
    saving = train(build(), dataset, run_config(tmp_path / "saving", steps=4, gradient_checkpointing=True), FAST)
    for a, b in zip(plain, saving, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_tensorboard_says_when_it_is_missing_or_writes(dataset, build, tmp_path):
    pytest.importorskip("tensorboard", reason="the optional tensorboard is not installed")
    train(build(), dataset, run_config(tmp_path, steps=1, tensorboard=True), FAST)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_encoder_and_cache_exclude_each_other(dataset, build, tmp_path):
    with pytest.raises(ValueError, match="encoder must be given exactly when"):
        train(build(), dataset, run_config(tmp_path), FAST, encoder=torch.nn.Identity())


def test_groups_are_the_originals(build):
    model = build()
    decayed, kept = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (decayed, kept))
    assert {"temp", "query_tokens", "qformer.embeddings.word_embeddings.weight", "itm_head.weight"} <= decayed
    assert {"ln_vision.weight", "lm_head.bias", "qformer.layernorm.weight", "vision_proj.bias"} <= kept
    assert decayed | kept == set(names.values()) and not decayed & kept
    model.requires_grad_(False)
    assert all(group["params"] == [] for group in parameter_groups(model, 0.05))


def test_learning_rate_warms_up_and_follows_half_a_cosine():
    config = OptimizerConfig(lr=1e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=10)
    rates = [lr_at(step, 110, config) for step in range(111)]
    assert rates[0] == 1e-6 and rates[10] == 1e-4 and rates[110] == pytest.approx(1e-5)
    assert rates[5] == pytest.approx((1e-6 + 1e-4) / 2)
    assert rates[60] == pytest.approx((1e-4 + 1e-5) / 2)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(steps=0), "run.steps must be at least 1, got 0"),
        (dict(keep=0), "run.keep must be at least 1"),
        (dict(precision="int8"), "run.precision must be"),
    ],
)
def test_bad_run_configurations_are_named(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        run_config(tmp_path, **change)
