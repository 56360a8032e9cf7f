"""The command line: what is written, what is refused, and that nothing is left behind then."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import open_clip
import pytest
import torch
import yaml
from PIL import Image

from qformer_fast import Blip2QFormer, QFormerConfig, cli
from qformer_fast.assemble import load_encoder
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer, tokenize
from qformer_fast.demo import emoji_pairs
from qformer_fast.training.checkpoint import list_checkpoints

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (99, 99, 99)}
SMALL = {
    "model": {
        "embed_dim": 16,
        "qformer": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "encoder_hidden_size": 64,
            "num_query_tokens": 8,
        },
    },
    "run": {"steps": 3, "batch_size": 4, "log_every": 1, "precision": "fp32", "device": "cpu"},
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_encoder(tmp_path_factory):
    """An open_clip model "tiny-vit": 5 tokens of 64."""
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    path = tmp_path_factory.mktemp("encoder") / "tiny-vit.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"A {name} one.\nall {name}\n")
    return folder


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of tiny-vit, so that two encoders are the same one."""
    torch.manual_seed(3)
    model = open_clip.create_model("tiny-vit")
    torch.save(model.state_dict(), tmp_path / "tiny-vit.pt")
    return tmp_path / "tiny-vit.pt"


@pytest.fixture
def cache(tmp_path, pictures, weights):
    assert run("extract-features", pairs=pictures, output=tmp_path / "cache", **encoder(weights)) == 0
    return tmp_path / "cache"


def encoder(weights):
    return {"encoder": "tiny-vit", "encoder_pretrained": weights}


def run(command, *flags, **options):
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return cli.main([command, *arguments, *map(str, flags)])


@pytest.fixture
def train(tmp_path, pictures):
    """Runs ``train`` with a YAML file of small sizes; arguments override it."""

    def train(*flags, output="run", data=None, **changes):
        options = {**SMALL, **changes, "data": {"pairs": str(pictures), **{k: str(v) for k, v in (data or {}).items()}}}
        options["run"] = {**SMALL["run"], **changes.get("run", {}), "output_dir": str(tmp_path / output)}
        (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
        return run("train", "--config", tmp_path / "options.yaml", *flags)

    return train


def log(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "samples_per_second"} for entry in entries]


def test_features_are_the_encoders(cache, pictures, weights):
    features = FeatureCache(cache, expect={"encoder": "tiny-vit", "encoder_pretrained": str(weights)})
    assert features.keys == ["blue.png", "green.png", "grey.png", "red.png"]
    tiny = load_encoder("tiny-vit", str(weights), random=False)
    with Image.open(pictures / "grey.png") as picture:
        expected = tiny(tiny.transform(picture)[None])[0]
    assert (features.tokens, features.width) == (5, 64)
    torch.testing.assert_close(features["grey.png"].float(), expected, rtol=1e-3, atol=1e-3)


def test_training_from_pixels_and_from_features_agree(train, cache, weights, tmp_path, capsys):
    assert train(output="pixels", data=encoder(weights)) == 0
    assert train(output="features", data={"feature_cache": cache, **encoder(weights)}) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    pixels, features = log(tmp_path / "pixels"), log(tmp_path / "features")
    assert [entry["step"] for entry in pixels] == [1, 2, 3] and printed[0]["step"] == 3
    for a, b in zip(pixels, features, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)  # the cache is fp16
    model = Blip2QFormer.from_pretrained(list_checkpoints(tmp_path / "pixels")[-1])
    assert model.config.num_query_tokens == 8 and model.embed_dim == 16


def test_the_kept_configuration_gives_the_same_run(train, cache, tmp_path):
    assert train("--optimizer.lr", "3e-4", "--optimizer.warmup_steps", 1, data={"feature_cache": cache}) == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["optimizer"]["lr"] == 3e-4 and kept["optimizer"]["betas"] == [0.9, 0.98]
    assert kept["run"]["steps"] == 3 and kept["model"]["qformer"]["hidden_size"] == 64
    assert run("train", "--config", tmp_path / "run" / "config.yaml", "--run.output_dir", tmp_path / "again") == 0
    assert log(tmp_path / "again") == log(tmp_path / "run")
    assert log(tmp_path / "run")[1]["lr"] == 3e-4


def test_a_run_goes_on_with_resume(train, cache, tmp_path, capsys):
    options = {"data": {"feature_cache": cache}, "optimizer": {"min_lr": 1e-4, "warmup_steps": 0}}
    assert train("--run.steps", 2, **options) == 0
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert train("--run.steps", 5, **options) == 1
    assert "run.output_dir has checkpoints in it" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    assert train("--run.steps", 5, "--run.resume", "true", **options) == 0
    assert train("--run.steps", 5, output="whole", **options) == 0
    assert log(tmp_path / "run") == log(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_the_run_with_a_checkpoint(train, cache, tmp_path, number):
    """A terminal's Ctrl-C and a cluster's SIGTERM reach the data workers too, which must outlive the step.

    A step takes more batches than the workers have ready, so a run whose workers are gone cannot end one.
    """
    assert train("--run.steps", 1, output="short", data={"feature_cache": cache}) == 0
    options = ["--run.steps", "100000", "--run.accumulation", "16", "--data.num_workers", "2"]
    paths = ["--config", str(tmp_path / "short" / "config.yaml"), "--run.output_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "qformer_fast.cli", "train", *paths, *options]
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        path = tmp_path / "run" / "log.jsonl"
        while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= 2):
            time.sleep(0.01)
        os.killpg(process.pid, number)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"stopped at step {step} of 100000; go on with run.resume=true" in printed
    assert log(tmp_path / "run")[-1]["step"] == step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer.learning_rate", 1], "unrecognized arguments: --optimizer.learning_rate"),
        (["--run.precision", "int8"], 'Parser key "run.precision"'),
        (["--run.steps", "many"], 'Parser key "run.steps"'),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(train, cache, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train(*flags, data={"feature_cache": cache})
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_the_file_is_named(train, cache, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(data={"feature_cache": cache}, optimizer={"learning_rate": 1.0})
    assert "has options that this command lacks: ['optimizer.learning_rate']" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.steps", 0], "run.steps must be at least 1, got 0"),
        (["--optimizer.max_grad_norm", -1], "optimizer.max_grad_norm must be above 0"),
        (["--model.qformer.num_attention_heads", 5], "hidden_size must be a multiple of num_attention_heads"),
        (["--data.max_length", 513], "max_length must lie in (2, 512]"),
        (["--data.pairs", "nowhere.json"], "pairs: no file or folder at nowhere.json"),
        (["--data.feature_cache", "nowhere"], "feature_cache: no feature cache in nowhere"),
        (["--data.feature_cache", "null"], "encoder must name an open_clip model when there is no feature_cache"),
        (["--data.encoder", "ViT-L-14"], "must have encoder = 'ViT-L-14', got 'tiny-vit'"),
        (["--data.encoder_pretrained", "openai"], "must have encoder_pretrained = 'openai'"),
        (["--model.checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
    ],
)
def test_bad_values_are_named_before_anything_is_written(train, cache, tmp_path, capsys, flags, message):
    assert train(*flags, data={"feature_cache": cache}) == 1
    error = capsys.readouterr().err
    assert error.startswith("qformer-fast train: ") and message in error
    assert not (tmp_path / "run").exists()


def test_a_corrupted_cache_is_named(train, cache, tmp_path, capsys):
    data = cache / "shard-00000" / "features.bin"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert train(data={"feature_cache": cache}) == 1
    assert "features.bin is corrupted or truncated" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_random_encoders_must_be_asked_for(pictures, tmp_path, capsys):
    assert run("extract-features", pairs=pictures, output=tmp_path / "new", encoder="tiny-vit") == 1
    assert "encoder_pretrained must name weights of tiny-vit" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    options = dict(pairs=pictures, output=tmp_path / "new", encoder="tiny-vit", random_encoder="true")
    assert run("extract-features", **options) == 0
    assert len(FeatureCache(tmp_path / "new")) == 4
    capsys.readouterr()
    # of other random weights; what is whole is kept
    assert run("extract-features", **options) == 0
    assert "new: 4 of 4 pictures in 1 shards" in capsys.readouterr().out
    assert run("extract-features", **options, dtype="int8") == 1
    assert "must have dtype 'int8', got 'float16'" in capsys.readouterr().err
    (tmp_path / "new" / "notes.txt").touch()
    assert run("extract-features", **options) == 1
    assert "exists already and is no extraction" in capsys.readouterr().err


def test_pictures_may_be_larger_than_the_encoders(train, pictures, weights, tmp_path, capsys):
    """At 48 x 48 tiny-vit, whose own size is 32, has nine patches instead of four."""
    assert run("extract-features", pairs=pictures, output=tmp_path / "large", image_size=48, **encoder(weights)) == 0
    features = FeatureCache(tmp_path / "large")
    assert features.tokens == 10 and features.metadata["image_size"] == 48
    assert train(output="pixels", data={"image_size": 48, **encoder(weights)}) == 0
    assert train(output="features", data={"image_size": 48, "feature_cache": tmp_path / "large"}) == 0
    for a, b in zip(log(tmp_path / "pixels"), log(tmp_path / "features"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)  # the cache is fp16
    assert train(output="small", data={"image_size": 32, "feature_cache": tmp_path / "large"}) == 1
    assert "must have image_size = 32, got 48" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_is_refused_or_skipped_and_counted(pictures, weights, tmp_path, capsys, workers):
    """What was done before it is kept, and the same command goes on once it is repaired."""
    (pictures / "green.png").write_bytes(b"no picture")
    options = dict(pairs=pictures, batch_size=1, shard_images=1, num_workers=workers, **encoder(weights))
    assert run("extract-features", output=tmp_path / "new", **options) == 1
    assert "green.png is no readable picture" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["shard-00000"]
    options["shard_images"] = 2
    assert run("extract-features", output=tmp_path / "three", on_bad="skip", **options) == 0
    printed = capsys.readouterr().out
    assert "skipped 1 unreadable_picture, the first: " in printed and "green.png is no readable picture" in printed
    assert "three: 3 of 4 pictures in 2 shards" in printed
    three = FeatureCache(tmp_path / "three")
    assert three.keys == ["blue.png", "grey.png", "red.png"]
    assert run("extract-features", output=tmp_path / "three", on_bad="skip", **options) == 0
    assert "skipped 1 unreadable_picture, the first: " in capsys.readouterr().out
    assert run("extract-features", output=tmp_path / "three", **options) == 1
    assert "shard-00000 was written without green.png" in capsys.readouterr().err
    tiny = load_encoder("tiny-vit", str(weights), random=False)
    expected = tiny(cli.read_pixels(pictures / "grey.png", tiny.transform)[None])[0]
    torch.testing.assert_close(three["grey.png"].float(), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def tars(tmp_path, pictures):
    """The pictures in two shards, with the same captions in the same order."""
    (tmp_path / "tars").mkdir()
    names = sorted(COLOURS)
    for number in (0, 1):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            for name in names[2 * number : 2 * number + 2]:
                about = pictures / f"{name}.json"
                about.write_text(json.dumps({"caption": (pictures / f"{name}.txt").read_text().splitlines()}))
                for file in (pictures / f"{name}.png", about):
                    tar.add(file, file.name)
    return tmp_path / "tars"


def test_tar_shards_give_the_same_run_as_a_folder(train, tars, weights, tmp_path):
    """From pixels, from features, and stopped and resumed, where workers read the tars."""
    assert train(output="folder", data=encoder(weights)) == 0
    assert train("--data.pairs", tars / "{0..1}.tar", output="tars", data=encoder(weights)) == 0
    assert log(tmp_path / "tars") == log(tmp_path / "folder")
    assert run("extract-features", pairs=tars, output=tmp_path / "cache", dtype="float32", **encoder(weights)) == 0
    keys = ["0.tar/blue.png", "0.tar/green.png", "1.tar/grey.png", "1.tar/red.png"]
    assert FeatureCache(tmp_path / "cache").keys == keys
    assert train("--data.pairs", tars, output="features", data={"feature_cache": tmp_path / "cache"}) == 0
    for a, b in zip(log(tmp_path / "features"), log(tmp_path / "folder"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    options = {"data": {"num_workers": 1, **encoder(weights)}, "optimizer": {"min_lr": 1e-4, "warmup_steps": 0}}
    for output, steps in (("parts", 2), ("parts", 4), ("whole", 4)):
        flags = ["--data.pairs", tars, "--run.steps", steps, "--run.resume", "true"]
        assert train(*flags, output=output, **options) == 0
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_mixed_data_sets_have_a_cache_each_or_one_together(train, tars, pictures, weights, tmp_path, capsys):
    extra = tmp_path / "extra" / "list.json"
    extra.parent.mkdir()
    extra.write_text(json.dumps([{"image": "red.png", "caption": "crimson"}]))
    (extra.parent / "red.png").write_bytes((pictures / "blue.png").read_bytes())
    both = f"[{tars}, {extra}]"
    for pairs, output in ((tars, "a"), (extra, "b"), (both, "both")):
        assert run("extract-features", pairs=pairs, output=tmp_path / output, **encoder(weights)) == 0
    assert FeatureCache(tmp_path / "both").keys[-2:] == ["tars/1.tar/red.png", "extra/red.png"]
    one_each = ["--data.pairs", both, "--data.feature_cache", f"[{tmp_path / 'a'}, {tmp_path / 'b'}]"]
    assert train(*one_each, output="each") == 0
    together = ["--data.pairs", both, "--data.feature_cache", tmp_path / "both"]
    assert train(*together, output="together") == 0
    assert log(tmp_path / "each") == log(tmp_path / "together")
    kept = yaml.safe_load((tmp_path / "each" / "config.yaml").read_text())
    assert kept["data"]["pairs"] == [str(tars), str(extra)]
    assert train("--data.pairs", both, output="pixels", data=encoder(weights)) == 0
    for a, b in zip(log(tmp_path / "each"), log(tmp_path / "pixels"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert train("--data.pairs", both, "--data.feature_cache", f"[{tmp_path / 'a'}]", output="none") == 1
    assert "data.feature_cache must be one or 2, one for each pairs, got 1" in capsys.readouterr().err


def test_bad_data_end_a_run_before_it_begins_or_are_skipped_and_counted(train, pictures, weights, tmp_path, capsys):
    more = [{"image": "red.png", "caption": "scarlet"}, {"image": "red.png", "caption": "ruddy"}]
    bad = [{"image": "red.png", "caption": "."}, {"image": "none.png", "caption": "nothing"}]
    bad.append({"image": "half.png", "caption": "half of it"})
    content = (pictures / "blue.png").read_bytes()
    (pictures / "half.png").write_bytes(content[: len(content) // 2])
    lists = {"good": [*more, *more], "bad": [*more, *bad, *more]}
    for name, entries in lists.items():
        (pictures / f"{name}.json").write_text(json.dumps(entries))
    flags = ["--data.pairs", pictures / "bad.json", "--data.on_bad"]
    assert train(*flags, "refuse", data=encoder(weights)) == 1
    assert "bad.json, entry 2 must have a caption with a word in it, got '.'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(*flags, "skip", output="skip", data=encoder(weights)) == 0
    printed = capsys.readouterr().out
    for kind, case in (("empty_caption", "entry 2"), ("missing_sample", "none"), ("unreadable_picture", "half")):
        assert f"skipped 1 {kind}, the first: " in printed and case in printed
    assert train("--data.pairs", pictures / "good.json", output="good", data=encoder(weights)) == 0
    assert "skipped" not in capsys.readouterr().out
    assert log(tmp_path / "skip") == log(tmp_path / "good")


def test_a_run_goes_without_a_damaged_shard_of_its_cache(train, pictures, weights, tmp_path, capsys):
    options = dict(pairs=pictures, output=tmp_path / "cache", shard_images=1, **encoder(weights))
    assert run("extract-features", **options) == 0
    (tmp_path / "cache" / "shard-00002" / "features.bin").write_bytes(b"")
    data = {"feature_cache": tmp_path / "cache"}
    assert train(data=data) == 1
    assert "shard-00002/features.bin must be 640 bytes, got 0" in capsys.readouterr().err
    assert train("--data.on_bad", "skip", data=data) == 0
    printed = capsys.readouterr().out
    assert "skipped 1 corrupt_shard, the first: feature_cache: " in printed
    assert "skipped 1 missing_sample, the first: pairs: the feature cache lacks grey.png" in printed
    assert run("extract-features", **options) == 0
    assert train(output="mended", data=data) == 0


@pytest.fixture
def torchrun(tmp_path):
    """Runs a command in two processes and gives what they printed."""
    script = tmp_path / "command.py"
    configs = open_clip.factory._MODEL_CONFIG_PATHS
    script.write_text(
        "import sys, open_clip, qformer_fast.cli\n"
        f"for path in {[str(path) for path in configs]!r}: open_clip.add_model_config(path)\n"
        "sys.exit(qformer_fast.cli.main(sys.argv[1:]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}

    def torchrun(command, **options):
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command = [*launch, command, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return torchrun


def test_processes_of_torchrun_share_an_extraction(torchrun, pictures, weights, tmp_path):
    options = dict(pairs=pictures, shard_images=1, batch_size=1, dtype="int8", **encoder(weights))
    assert run("extract-features", output=tmp_path / "one", **options) == 0
    torchrun("extract-features", output=tmp_path / "two", **options)
    one, two = FeatureCache(tmp_path / "one"), FeatureCache(tmp_path / "two")
    assert len(two.shards) == 4 and one.keys == two.keys
    assert torch.equal(one.rows(one.keys), two.rows(one.keys))


def test_processes_of_torchrun_train_without_the_same_damaged_data(torchrun, train, pictures, weights, tmp_path):
    """Each looks at half of the shards, or of the pictures; what is bad is printed once."""
    options = dict(pairs=pictures, output=tmp_path / "cache", shard_images=1, **encoder(weights))
    assert run("extract-features", **options) == 0
    (tmp_path / "cache" / "shard-00001" / "features.bin").write_bytes(b"")
    (pictures / "green.png").write_bytes(b"no picture")
    entries = {}
    for name, data in (("features", {"feature_cache": tmp_path / "cache"}), ("pixels", encoder(weights))):
        assert train("--data.on_bad", "skip", output=f"one_{name}", data=data) == 0
        printed = torchrun(
            "train",
            config=tmp_path / f"one_{name}" / "config.yaml",
            **{
                "run.output_dir": tmp_path / name,
                "run.batch_size": 2,
            },
        )
        assert printed.count("skipped 1 ") == (2 if name == "features" else 1) and "green.png" in printed
        entries[name] = log(tmp_path / name)
    for a, b in zip(entries["features"], entries["pixels"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # the cache is fp16


def test_pictures_may_lie_elsewhere(pictures, weights, tmp_path):
    (tmp_path / "annotations").mkdir()
    pairs = tmp_path / "annotations" / "pairs.json"
    pairs.write_text(json.dumps([{"image": "red.png", "caption": "red", "image_id": "1"}]))
    options = dict(pairs=pairs, output=tmp_path / "new", image_root=pictures, **encoder(weights))
    assert run("extract-features", **options) == 0
    assert FeatureCache(tmp_path / "new").keys == ["red.png"]


def test_features_of_questions_pictures(pictures, weights, tmp_path):
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"image": "red.png", "question": "what colour?", "answer": "red"}] * 2))
    options = dict(pairs=questions, output=tmp_path / "new", image_root=pictures, **encoder(weights))
    assert run("extract-features", **options) == 0
    assert FeatureCache(tmp_path / "new").keys == ["red.png"]


def test_a_model_starts_from_a_checkpoint(train, cache, tmp_path):
    assert train(data={"feature_cache": cache}) == 0
    (folder,) = list_checkpoints(tmp_path / "run")
    assert train("--model.checkpoint", folder, "--run.steps", 1, output="next", data={"feature_cache": cache}) == 0
    saved, next_model = (Blip2QFormer.from_pretrained(list_checkpoints(tmp_path / x)[-1]) for x in ("run", "next"))
    for name, tensor in next_model.state_dict().items():
        # one warm-up step of AdamW moves no weight by more than about its learning rate, 1e-6
        torch.testing.assert_close(tensor, saved.state_dict()[name], rtol=1e-5, atol=2e-6)


@pytest.fixture
def evaluate(tmp_path, pictures, spread_weights):
    """Runs ``evaluate retrieval`` on two pictures of two captions each and one of one; returns its status."""
    torch.manual_seed(5)
    model = Blip2QFormer(QFormerConfig(**SMALL["model"]["qformer"]))
    spread_weights(model)
    model.save_pretrained(tmp_path / "model")
    torch.save({"model": model.to_lavis_state_dict()}, tmp_path / "lavis.pth")
    entries = [
        {"image": f"{name}.png", "caption": captions}
        for name, captions in {"red": ["A red one.", "all red"], "blue": ["blue!", "very blue"], "grey": ["x"]}.items()
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(entries))

    def evaluate(**changes):
        options = {"checkpoint": tmp_path / "model", "annotations": tmp_path / "annotations.json"}
        options |= {"output": tmp_path / "out", "k": 2, "precision": "fp32", "device": "cpu"}
        options |= {"image_root": pictures, "image_batch_size": 2, **changes}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return cli.main(["evaluate", "retrieval", *arguments])

    return evaluate


def recall_by_hand(scores, relevant):
    """Percent of rows with a wanted column at the top, among the five best and among the ten best; no ties."""
    ranks = [
        min(sum(other > row[column] for other in row) for column in wanted)
        for row, wanted in zip(scores.tolist(), relevant, strict=True)
    ]
    return [100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)]


def test_retrieval_is_evaluated_from_pixels_and_from_features(evaluate, cache, pictures, weights, tmp_path, capsys):
    assert evaluate(**encoder(weights)) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    model = Blip2QFormer.from_pretrained(tmp_path / "model").eval()
    tiny = load_encoder("tiny-vit", str(weights), random=False)
    pixels = [cli.read_pixels(pictures / f"{name}.png", tiny.transform) for name in ("red", "blue", "grey")]
    captions = ["a red one", "all red", "blue", "very blue", "x"]
    text = tokenize(load_tokenizer(), captions)
    with torch.no_grad():
        tokens = tiny(torch.stack(pixels))
        cosines = (model.image_features(tokens) @ model.text_features(*text).T).amax(1)
        logits = torch.stack([model.match(tokens[[i] * 5], *text)[:, 1] for i in range(3)])
    near = torch.zeros(3, 5, dtype=torch.bool).scatter(1, cosines.topk(2).indices, True)
    near_text = torch.zeros(5, 3, dtype=torch.bool).scatter(1, cosines.T.topk(2).indices, True)
    scores = (logits + cosines).where(near, -100.0), (logits + cosines).T.where(near_text, -100.0)
    names = ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"]
    texts_of, image_of = [[0, 1], [2, 3], [4]], [[0], [0], [1], [1], [2]]
    for row, (i2t, t2i) in {"itc": (cosines, cosines.T), "reranked": scores}.items():
        # of a wanted column that is no candidate ties decide about the five best, which other tests look at
        expected = dict(zip(names, recall_by_hand(i2t, texts_of) + recall_by_hand(t2i, image_of), strict=True))
        for name in ("TR@1", "IR@1", "TR@10", "IR@10"):
            assert found[row][name] == pytest.approx(expected[name], abs=0.01), (row, name)
        assert found[row]["mean"] == pytest.approx(sum(found[row][name] for name in names) / 6, abs=0.01)
        assert f"{found[row]['TR@1']:.2f}" in printed
    assert found["pairs"] == int((near | near_text.T).sum()) and f"re-ranked {found['pairs']} pairs" in printed
    assert (found["images"], found["captions"], found["k"], found["score"]) == (3, 5, 2, "itm+itc")
    images, texts = (
        [json.loads(line) for line in (tmp_path / "out" / f"per_{name}.jsonl").read_text().splitlines()]
        for name in ("image", "caption")
    )
    assert [entry["image"] for entry in images] == ["red.png", "blue.png", "grey.png"]
    assert [(entry["caption"], entry["image"]) for entry in texts] == [
        (caption, images[of[0]]["image"]) for caption, of in zip(captions, image_of, strict=True)
    ]
    for entries, rows, names, wanted in (
        (images, scores[0], captions, texts_of),
        (texts, scores[1], [entry["image"] for entry in images], image_of),
    ):
        for entry, row, right in zip(entries, rows, wanted, strict=True):
            by_score = sorted(range(len(row)), key=lambda i, row=row: (row[i], i), reverse=True)
            best = [i for i in by_score if row[i] != -100]
            assert entry["rank"] == min((best.index(i) for i in right if i in best), default=None)
            assert entry["best"] == [names[i] for i in best] and len(best) == 2
    assert evaluate(feature_cache=cache, output=tmp_path / "cached", score="itm", **encoder(weights)) == 0
    again = json.loads((tmp_path / "cached" / "metrics.json").read_text())
    assert again["itc"] == found["itc"] and again["score"] == "itm"


def test_an_interrupted_retrieval_gives_the_same_numbers(evaluate, cache, tmp_path, monkeypatch, capsys):
    def read(folder):
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        metrics = json.loads(found.pop("metrics.json"))
        return found, {name: x for name, x in metrics.items() if not name.endswith(("seconds", "_second"))}

    assert evaluate(feature_cache=cache, output=tmp_path / "whole") == 0
    match, passes = Blip2QFormer.match_packed, []

    def fail_at_the_second(*args):
        passes.append(args)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return match(*args)

    monkeypatch.setattr(Blip2QFormer, "match_packed", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(feature_cache=cache)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["logits.jsonl"]
    assert evaluate(feature_cache=cache) == 0
    assert len(passes) == 3  # two pictures were done, the third was not
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["seconds"] is metrics["pairs_per_second"] is None
    assert "re-ranked 12 pairs\n" in capsys.readouterr().out
    assert evaluate(feature_cache=cache, score="itm") == 0  # of the same logits
    assert len(passes) == 3
    assert evaluate(feature_cache=cache, k=1) == 1
    error = capsys.readouterr().err
    assert "logits.jsonl is of another run" in error and "k 2 now 1" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"split": "tets"}, "split must be one of"),
        ({"annotations": "nowhere.json"}, "annotations: no file at nowhere.json"),
        ({"max_length": 2}, "max_length must lie in (2, 512]"),
        ({"output": __file__}, f"output must be a folder, got {__file__}, a file"),
        ({"checkpoint": "nowhere.pth"}, "no checkpoint at nowhere.pth"),
        ({}, "encoder must name an open_clip model when there is no feature_cache"),
        ({"encoder": "tiny-vit"}, "encoder_pretrained must name weights of tiny-vit"),
        ({"encoder": "tiny-vit", "random_encoder": "true", "image_root": "nowhere"}, "red.png is no readable picture"),
        ({"feature_cache": "nowhere"}, "feature_cache: no feature cache in nowhere"),
    ],
)
def test_what_retrieval_refuses_is_named(evaluate, tmp_path, capsys, changes, message):
    assert evaluate(**changes) == 1
    error = capsys.readouterr().err
    assert "qformer-fast evaluate retrieval: " in error and message in error
    assert not (tmp_path / "out").exists()


def test_images_that_a_cache_lacks_are_named(evaluate, tmp_path, capsys):
    FeatureCache.create(tmp_path / "some", ["red.png"], [torch.randn(1, 5, 64)], metadata={})
    assert evaluate(feature_cache=tmp_path / "some") == 1
    assert "annotations name 2 images that the feature cache lacks: ['blue.png', 'grey.png']" in capsys.readouterr().err


def test_a_lavis_file_is_evaluated_like_its_folder(evaluate, cache, tmp_path):
    sizes = {f"qformer.{name}": value for name, value in SMALL["model"]["qformer"].items()}
    assert evaluate(feature_cache=cache) == 0
    assert evaluate(feature_cache=cache, checkpoint=tmp_path / "lavis.pth", output=tmp_path / "2", **sizes) == 0
    folder, lavis = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "2"))
    assert lavis["itc"] == folder["itc"] and lavis["reranked"] == folder["reranked"]


def test_an_evaluation_must_be_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate"])
    assert "{captioning,vqa,retrieval}" in capsys.readouterr().err


def test_doctor_prints_text_and_json(capsys):
    assert cli.main(["doctor"]) == 0
    assert "reference" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert torch.__version__.startswith(json.loads(capsys.readouterr().out)["versions"]["torch"])


def test_a_command_must_be_given(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "train,extract-features,demo,explain,doctor" in capsys.readouterr().err


def test_missing_demo_packages_are_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(emoji_pairs.PACKAGES, "no_such_module", "no-such-package")
    assert cli.main(["demo", "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "no-such-package" in error and "--synthetic" in error
    assert list(tmp_path.iterdir()) == []
