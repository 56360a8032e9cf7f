"""The loop: exact resume, clear stops, schedule and groups."""

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.data.batches import PairDataset, ShuffledBatches
from qformer_fast.data.captions import Pair
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.training.checkpoint import list_checkpoints
from qformer_fast.training.config import DataConfig, OptimizerConfig, RunConfig
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


class ColourEncoder(torch.nn.Module):
    """Four tokens of 48, linear in the colour of a picture."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4 * 48), requires_grad=False)

    def transform(self, picture):
        return torch.tensor(picture.getpixel((0, 0)))[:, None, None] / 255

    def forward(self, pixels):
        # element by element: a matrix product may round otherwise in a batch of another size
        red, green, blue = pixels.flatten(1).unsqueeze(-1).unbind(1)
        return (red * self.weight[0] + green * self.weight[1] + blue * self.weight[2]).view(-1, 4, 48)


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
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000003"]
    assert signal.getsignal(signal.SIGTERM) is before
    again = train(build(), dataset, run_config(tmp_path, save_every=100, resume=True), FAST)
    whole = train(build(), dataset, run_config(tmp_path / "whole"), FAST)
    assert without_times(again) == without_times(whole)


def test_a_second_signal_ends_the_run_at_once(dataset, build, tmp_path):
    def send(entry):
        if entry["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    # who is started in the background ignores it
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(build(), dataset, run_config(tmp_path, save_every=100), FAST, on_log=send)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(batch_size=4), "run.resume: batch_size must be 5 as in"),
        (dict(seed=1), "run.resume: seed must be 0 as in"),
        (dict(frozen="temp"), "run.resume: trainable_parameters must be"),
        (dict(embed_dim=24), "run.resume: trainable_parameters must be"),
    ],
)
def test_a_run_of_another_kind_is_not_resumed(dataset, build, tmp_path, change, match):
    train(build(), dataset, run_config(tmp_path, steps=1), FAST)
    model = build() if "embed_dim" not in change else Blip2QFormer(build().config, embed_dim=change.pop("embed_dim"))
    if "frozen" in change:
        model.get_parameter(change.pop("frozen")).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        train(model, dataset, run_config(tmp_path, steps=2, resume=True, **change), FAST)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_log_line_cut_off_in_writing_does_not_stop_a_resumed_run(dataset, build, tmp_path):
    train(build(), dataset, run_config(tmp_path, steps=7, save_every=2, keep=9), FAST)
    whole = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(tmp_path / "checkpoint-00000007")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "ep')
    resumed = train(build(), dataset, run_config(tmp_path, steps=7, save_every=2, resume=True), FAST)
    assert without_times(resumed) == without_times(whole)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == resumed


def test_a_killed_save_is_cleared_away(dataset, build, tmp_path):
    (tmp_path / ".checkpoint-00000001-killed").mkdir()
    train(build(), dataset, run_config(tmp_path, steps=1), FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001", "log.jsonl"]


def test_epochs_are_those_of_the_last_batch(dataset, build, tmp_path):
    entries = train(build(), dataset, run_config(tmp_path, batch_size=9), FAST)
    assert [entry["epoch"] for entry in entries] == [0, 0, 1, 1, 2, 2, 3]


def test_accumulation_takes_the_mean_over_forward_passes(dataset, build, tmp_path):
    """Against the same passes by hand, with the same dropout and drawn negatives."""
    (entry,) = train(build(), dataset, run_config(tmp_path, steps=1, accumulation=3), FAST)
    model = build().train()
    torch.manual_seed(0)
    outputs = []
    for _, numbers in zip(range(3), ShuffledBatches(len(dataset), 5, seed=0), strict=False):
        batch = dataset[numbers]
        out = model(batch.images, batch.input_ids, batch.attention_mask, image_ids=batch.image_ids)
        out.loss.backward()
        outputs.append(out)
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()]) / 3
    assert entry["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
        assert entry[name] == pytest.approx(sum(getattr(out, name).item() for out in outputs) / 3, rel=1e-5)
    right = sum((out.itm_logits.argmax(1) == out.itm_labels).sum().item() for out in outputs)
    assert entry["itm_accuracy"] == pytest.approx(right / 45)


def test_clipping_bounds_the_gradient_that_adam_sees(dataset, build, tmp_path):
    config = dataclasses.replace(FAST, max_grad_norm=1e-3)
    (entry,) = train(build(), dataset, run_config(tmp_path, steps=1), config)
    assert entry["grad_norm"] > 1e-2
    saved = load_file(tmp_path / "checkpoint-00000001" / "training.safetensors")
    names = {name for name, _ in build().named_parameters()}
    averages = {key.removeprefix("optimizer.exp_avg."): x for key, x in saved.items() if ".exp_avg." in key}
    assert averages.keys() == names
    gradient = torch.cat([x.double().flatten() for x in averages.values()]) / (1 - config.betas[0])
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_pixels_are_encoded_as_they_come(dataset, build, tmp_path):
    """The same run from pixels and from a cache of what the encoder makes of them, whole and resumed."""
    words = [f"word{i}" for i in range(10)]
    for number, word in enumerate(words):
        Image.new("RGB", (2, 2), (25 * number, 255 - 25 * number, 7 * number)).save(tmp_path / f"{word}.png")
    encoder = ColourEncoder()
    pixels = [encoder.transform(Image.open(tmp_path / f"{word}.png")) for word in words]
    images = [f"{word}.png" for word in words]
    tokens = encoder(torch.stack(pixels))
    cache = FeatureCache.create(tmp_path / "cache", images, [tokens], metadata={}, dtype="float32")
    pairs = [Pair(image, f"a {image[:-4]}", image) for image in images]
    cached = PairDataset(pairs, load_tokenizer(), cache=cache)
    pictured = PairDataset(pairs, load_tokenizer(), transform=encoder.transform, image_root=tmp_path)
    expected = train(build(), cached, run_config(tmp_path / "cached", steps=4), FAST)
    whole = train(build(), pictured, run_config(tmp_path / "pixels", steps=4), FAST, encoder=encoder, num_workers=1)
    assert without_times(whole) == without_times(expected)
    for steps in (2, 4):
        options = run_config(tmp_path / "parts", steps=steps, resume=True)
        schedule = dataclasses.replace(FAST, min_lr=FAST.lr)
        parts = train(build(), pictured, options, schedule, encoder=encoder)
    constant = train(build(), pictured, run_config(tmp_path / "constant", steps=4), schedule, encoder=encoder)
    assert without_times(parts) == without_times(constant)
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "a bit changed"])
def test_a_damaged_checkpoint_is_named(dataset, build, tmp_path, name, damage):
    train(build(), dataset, run_config(tmp_path, steps=1), FAST)
    path = tmp_path / "checkpoint-00000001" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    if damage == "a bit changed":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    how = "missing" if damage == "missing" else "corrupted or truncated"
    with pytest.raises(ValueError, match=f"checkpoint: .*checkpoint-00000001/{name} is {how}"):
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
    """The losses of step 4 are read when step 5 is over."""
    model, weights, threads = build(), {}, set(threading.enumerate())

    def spoil(entry):
        if entry["step"] == 4:
            with torch.no_grad():
                model.get_parameter(poison).fill_(math.nan)
            weights.update({name: p.detach().clone() for name, p in model.named_parameters() if name != poison})

    with pytest.raises(FloatingPointError, match=f"{named} is nan at step 6; .*checkpoint-00000003"):
        train(model, dataset, run_config(tmp_path, steps=9, save_every=3), FAST, on_log=spoil, num_workers=2)
    readers = [x for x in set(threading.enumerate()) - threads if x.name.startswith("ThreadPoolExecutor")]
    assert not readers
    saved = Blip2QFormer.from_pretrained(tmp_path / "checkpoint-00000003")
    assert all(p.isfinite().all() for p in saved.parameters())
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


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


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_any_cache_serves_any_precision(dataset, build, tmp_path, stored, precision):
    images = dataset.cache.keys
    cache = FeatureCache.create(tmp_path / "c", images, [dataset.cache.rows(images)], metadata={}, dtype=stored)
    rounded = PairDataset(dataset.pairs, load_tokenizer(), cache=cache)
    exact = train(build(), dataset, run_config(tmp_path / "exact", steps=2), FAST)
    low = train(build(), rounded, run_config(tmp_path / "low", steps=2, precision=precision), FAST)
    for a, b in zip(exact, low, strict=True):
        assert b["loss_itg"] == pytest.approx(a["loss_itg"], rel=0.03)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(dataset, build, tmp_path, precision):
    exact = train(build(), dataset, run_config(tmp_path / "fp32", steps=3), FAST)
    low = train(build(), dataset, run_config(tmp_path / precision, steps=3, precision=precision), FAST)
    for a, b in zip(exact, low, strict=True):
        assert b["loss_itg"] == pytest.approx(a["loss_itg"], rel=0.03)


@pytest.mark.parametrize("level", ["feed_forward", "layer"])
def test_gradient_checkpointing_gives_the_same_losses(dataset, build, tmp_path, level):
    plain = train(build(), dataset, run_config(tmp_path / "plain", steps=4), FAST)
    saving = train(build(), dataset, run_config(tmp_path / "saving", steps=4, gradient_checkpointing=level), FAST)
    for a, b in zip(plain, saving, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_graphs_train_and_resume(dataset, build, tmp_path, precision):
    """A resumed run knows less of how long negatives get, so its products may have other shapes: close, not equal."""
    options = dict(device="cuda", cuda_graphs=True, accumulation=2, precision=precision)
    whole = train(build(), dataset, run_config(tmp_path / "whole", **options), FAST)

    def interrupt(entry):
        if entry["step"] == 5:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(build(), dataset, run_config(tmp_path / "parts", **options), FAST, on_log=interrupt)
    resumed = train(build(), dataset, run_config(tmp_path / "parts", **options, resume=True), FAST)
    for a, b in zip(whole, resumed, strict=True):
        assert b["loss_itg"] == pytest.approx(a["loss_itg"], rel=1e-4 if precision == "fp32" else 0.02)
    assert whole[-1]["loss_itg"] < whole[0]["loss_itg"]


def test_cuda_graphs_need_a_gpu(dataset, build, tmp_path):
    with pytest.raises(ValueError, match="model must be on a CUDA device, got cpu"):
        train(build(), dataset, run_config(tmp_path, cuda_graphs=True), FAST)


def test_a_missing_tensorboard_is_named(dataset, build, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match=r"run.tensorboard needs qformer_fast\[tensorboard\] installed"):
        train(build(), dataset, run_config(tmp_path, tensorboard=True), FAST)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_are_written(dataset, build, tmp_path):
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
        (dict(seed=-1), "run.seed must lie in"),
    ],
)
def test_bad_run_configurations_are_named(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        run_config(tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(lr=math.nan), "optimizer.lr must be at least 0, got nan"),
        (dict(warmup_steps=-1), "optimizer.warmup_steps must be at least 0, got -1"),
        (dict(betas=(0.9, 1.0)), r"optimizer.betas must be two numbers in \[0, 1\)"),
        (dict(max_grad_norm=0.0), "optimizer.max_grad_norm must be above 0, got 0.0"),
    ],
)
def test_bad_optimizer_configurations_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        OptimizerConfig(**change)


def test_bad_data_configurations_are_named():
    with pytest.raises(ValueError, match="data.num_workers must be at least 0, got -1"):
        DataConfig(pairs="pairs.json", num_workers=-1)
