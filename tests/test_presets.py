"""Presets of training: published settings that parse, and how they are found."""

import math

import pytest
import yaml

from qformer_fast import cli
from qformer_fast.presets import FOLDER, find_preset, preset_names
from qformer_fast.training.config import TrainConfig

TRAINING = [name for name in preset_names() if not name.startswith("evaluate_")]
# pairs a step, optimizer steps, learning rate, its end, warm-up steps, second beta, image size (arXiv:2301.12597)
PUBLISHED = {
    "pretrain_stage1": (1680, 250_000, 1e-4, 1e-5, 2000, 0.98, None),
    "pretrain_stage2_opt2.7b": (1920, 80_000, 1e-4, 5e-5, 2000, 0.98, None),
    "pretrain_stage2_flant5xl": (1520, 80_000, 1e-4, 5e-5, 2000, 0.98, None),
    "caption_coco": (256, math.floor(5 * 566_747 / 256), 1e-5, 0, 1000, 0.999, 364),
    "vqa_v2": (128, math.floor(5 * (443_757 + 214_354) / 128), 1e-5, 0, 1000, 0.999, 490),
    "retrieval_coco": (224, math.floor(5 * 566_747 / 224), 1e-5, 0, 1000, 0.999, 364),
}
PATHS = ["--data.pairs", "pairs.json", "--run.output_dir", "out"]


def parse(*arguments):
    parser, commands = cli._parsers()
    chosen = parser.parse_args(["train", *arguments]).train
    chosen.pop("config")
    return TrainConfig(**vars(commands["train"].instantiate(chosen)))


def test_training_presets_are_the_published_ones():
    assert sorted(PUBLISHED) == TRAINING
    for name, (batch, steps, lr, min_lr, warmup_steps, beta2, image_size) in PUBLISHED.items():
        config = parse("--config", name, *PATHS)
        assert config.run.batch_size * config.run.accumulation == batch and config.run.steps == steps, name
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_steps) == (lr, min_lr, warmup_steps), name
        assert optimizer.betas == (0.9, beta2) and optimizer.weight_decay == 0.05, name
        assert config.data.image_size == image_size and config.data.pairs == "pairs.json", name
        assert (config.language is None) == (name in ("pretrain_stage1", "retrieval_coco")), name
    assert parse("--config", "caption_coco", *PATHS).language.prompt == "a photo of"
    vqa = parse("--config", "vqa_v2", *PATHS).language
    assert vqa.prompt == "Question: {} Answer:" and vqa.keep_text


def test_flags_override_a_preset():
    config = parse("--config", "vqa_v2", *PATHS, "--language.model", "folder", "--run.steps", "7")
    assert (config.language.model, config.run.steps, config.language.keep_text) == ("folder", 7, True)
    assert parse("--config", "vqa_v2", *PATHS, "--language", "null").language is None


def test_paths_must_be_given(capsys):
    with pytest.raises(SystemExit):
        parse("--config", "vqa_v2")
    assert "data.pairs" in capsys.readouterr().err


def test_a_file_comes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_preset("vqa_v2") == FOLDER / "vqa_v2.yaml"
    (tmp_path / "vqa_v2").write_text(yaml.safe_dump({"run": {"steps": 3, "output_dir": "out"}}))
    assert find_preset("vqa_v2").resolve() == tmp_path / "vqa_v2"
    config = parse("--config", "vqa_v2", "--data.pairs", "pairs.json")
    assert config.run.steps == 3 and config.language is None


@pytest.mark.parametrize("command", [["train"], ["extract-features"], ["evaluate", "retrieval"]])
def test_unknown_presets_are_named(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--config", "vqa_v3"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "config must be a file or one of the presets" in error and "vqa_v2" in error and "got 'vqa_v3'" in error


def test_options_of_another_command_are_named(tmp_path, capsys):
    """Below a second subcommand, too."""
    given = ["--checkpoint", "x", "--annotations", "y", "--output", "z"]
    for command, preset, lacking in [
        (["train"], "evaluate_caption_coco", "'num_beams'"),
        (["evaluate", "captioning", *given], "caption_coco", "['data', 'language', 'run', 'optimizer']"),
        (["evaluate", "retrieval", *given], "evaluate_caption_coco", "'num_beams'"),
    ]:
        with pytest.raises(SystemExit):
            cli.main([*command, "--config", preset])
        error = capsys.readouterr().err
        assert f"{preset}.yaml has options that this command lacks: " in error and lacking in error


def test_files_that_are_no_options_are_named(tmp_path, capsys):
    given = ["evaluate", "captioning", "--checkpoint", "x", "--annotations", "y", "--output", "z"]
    for content, message in [
        (b"qformer: {bogus: 1}", "lacks: ['qformer.bogus']"),
        (b"a: [", "options.yaml is no YAML"),
        (b"\xff\xfe\x00", "options.yaml is no YAML"),
    ]:
        (tmp_path / "options.yaml").write_bytes(content)
        with pytest.raises(SystemExit):
            cli.main([*given, "--config", str(tmp_path / "options.yaml")])
        assert message in capsys.readouterr().err


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in TRAINING) and "evaluate_" not in printed
