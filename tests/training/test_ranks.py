"""Training in several processes (gloo): the same losses as in one, resumed on another number, stopped and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import OPTConfig, OPTForCausalLM

from qformer_fast import Blip2QFormer, QFormerConfig, use_backend
from qformer_fast.data.batches import LanguageDataset, PairDataset, ShuffledBatches
from qformer_fast.data.captions import Pair
from qformer_fast.data.examples import Example
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.models.blip2_opt import Blip2OPT
from qformer_fast.ranks import Ranks, process_group
from qformer_fast.training.checkpoint import list_checkpoints
from qformer_fast.training.config import OptimizerConfig, RunConfig
from qformer_fast.training.loop import train
from qformer_fast.training.stages import Stage1, build_stage

WORDS = ["cat", "dog", "bird", "fish", "horse", "cow", "pig", "bee", "ant", "fox", "owl", "hen"]
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    encoder_hidden_size=24,
    num_query_tokens=3,
)
FAST = OptimizerConfig(lr=2e-3, warmup_steps=2, max_grad_norm=1.0)


def nearest_negatives(model, contrast, same_image):
    """Instead of the draw, so that negatives do not depend on who draws them."""
    return tuple(x.detach().masked_fill(same_image, -1e4).argmax(1) for x in (contrast.sim_t2i, contrast.sim_i2t))


def work(folder: Path, output: Path, options: dict) -> None:
    """One process of a run; the environment says which."""
    torch.set_num_threads(1)
    dropout, stage, lacking = (options.pop(name) for name in ("dropout", "stage", "lacking"))
    on_gpu = options.get("device") == "cuda"
    if not dropout:
        Blip2QFormer.draw_negatives = nearest_negatives
    cache = FeatureCache(folder / "cache")
    if stage == 2:
        model, dataset = build_stage2(cache)
    else:
        pairs = [Pair(word, f"{start} {word}", word) for word in WORDS for start in ("a", "one small")]
        pairs = pairs[: len(pairs) - (int(os.environ["RANK"]) == lacking)]
        dataset = PairDataset(pairs, load_tokenizer(), cache=cache)
        torch.manual_seed(7)
        sizes = SIZES | dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        if on_gpu:  # whose kernels take heads of 32
            sizes |= dict(hidden_size=64, num_attention_heads=2)
        model = Blip2QFormer(QFormerConfig(**sizes), embed_dim=16)
    run = RunConfig(
        **{"output_dir": str(output), "precision": "fp32", "device": "cpu", "log_every": 1, "timeout": 30.0, **options}
    )
    slow = options.get("steps", 0) >= 30
    with process_group(run.timeout), contextlib.nullcontext() if on_gpu else use_backend("reference"):
        train(model, dataset, run, FAST, on_log=(lambda _: time.sleep(0.05)) if slow else None)


def build_stage2(cache: FeatureCache) -> tuple[Blip2OPT, LanguageDataset]:
    """A model with a tiny language model and no dropout, and captions of two lengths in its tokens."""
    torch.manual_seed(7)
    language = dict(vocab_size=30523, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1)
    language_model = OPTForCausalLM(
        OPTConfig(**language, num_attention_heads=2, max_position_embeddings=64, dropout=0.0)
    )
    sizes = SIZES | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, use_qformer_text_input=False)
    examples = [Example(word, f"{start} {word}") for word in WORDS for start in ("a", "one small")]
    return Blip2OPT(QFormerConfig(**sizes), language_model), LanguageDataset(
        examples, LanguageTokenizer(load_tokenizer(), end="."), cache=cache
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("data")
    FeatureCache.create(folder / "cache", WORDS, [torch.randn(len(WORDS), 4, 24)], metadata={}, dtype="float32")
    return folder


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def start(folder, tmp_path):
    """Starts a run's processes, which write to ``tmp_path / output``."""

    def start(output, world_size, *, dropout=0.0, stage=1, lacking=None, **options) -> list[subprocess.Popen]:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world_size)}
        # NCCL's watchdog waits four times as long before it ends a process
        place["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "1000"
        given = json.dumps(options | {"dropout": dropout, "stage": stage, "lacking": lacking})
        command = [sys.executable, __file__, str(folder), str(tmp_path / output), given]
        return [
            subprocess.Popen(
                command,
                env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=(tmp_path / f"{output}.{rank}.txt").open("w"),
            )
            for rank in range(world_size)
        ]

    return start


@pytest.fixture
def run(start, tmp_path):
    """Runs them to the end; gives the log's entries without times."""

    def run(output, world_size, **options):
        assert [process.wait(timeout=120) for process in start(output, world_size, **options)] == [0] * world_size
        return read_log(tmp_path / output)

    return run


def read_log(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
    return [{k: x for k, x in json.loads(line).items() if k != "samples_per_second"} for line in lines]


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def assert_same_curve(found, expected, tolerance=1e-4) -> None:
    assert len(found) == len(expected) and [x["step"] for x in found] == [x["step"] for x in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance / 10)


def test_losses_do_not_depend_on_the_number_of_processes(run, tmp_path) -> None:
    """And a run that two began one ends, from the last checkpoint."""
    common = dict(steps=6, accumulation=2, save_every=3)
    one = run("one", 1, batch_size=4, **common)
    assert len({entry["loss"] for entry in one}) == 6
    assert_same_curve(run("two", 2, batch_size=2, **common), one)
    for checkpoint in list_checkpoints(tmp_path / "two")[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    resumed = run("two", 1, batch_size=4, resume=True, **common)
    assert_same_curve(resumed, one)
    assert resumed[:3] != one[:3] and [path.name for path in list_checkpoints(tmp_path / "two")] == [
        "checkpoint-00000003",
        "checkpoint-00000006",
    ]


def test_a_profile_has_the_share_of_communication_and_changes_nothing(run) -> None:
    common = dict(steps=4, batch_size=2, dropout=0.1)
    plain, profiled = run("plain", 2, **common), run("profiled", 2, profile=True, **common)
    for entry, expected in zip(profiled, plain, strict=True):
        shares = {name: entry.pop(name) for name in list(entry) if name.startswith("share_")}
        assert entry == expected
        assert 0 < shares.pop("share_communication") < 1
        assert sum(shares.values()) == pytest.approx(1) and shares["share_qformer"] > shares["share_encoder"]


def test_stage_2_has_the_mean_of_its_ranks_losses(run, folder) -> None:
    entries = run("two", 2, stage=2, steps=2, batch_size=3)
    model, dataset = build_stage2(FeatureCache(folder / "cache"))
    batch = next(iter(ShuffledBatches(len(dataset), 6, seed=0)))
    losses = []
    with use_backend("reference"):
        for share in (dataset[batch[:3]], dataset[batch[3:]]):
            out = model(share.images, share.input_ids, share.attention_mask, share.labels)
            losses.append(float(out.loss.detach()))
    assert entries[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5) and losses[0] != losses[1]
    assert entries[1]["loss"] != entries[0]["loss"]


def test_a_killed_run_goes_on_with_the_same_losses(start, run, tmp_path) -> None:
    """Dropout on and negatives drawn, the same number of processes: every bit."""
    common = dict(steps=30, batch_size=2, save_every=4, dropout=0.1)
    whole = run("whole", 2, **common)
    processes = start("parts", 2, **common)
    wait_for(lambda: len(read_log(tmp_path / "parts")) >= 6)
    for process in processes:
        process.kill()
    assert [process.wait(timeout=60) for process in processes] == [-signal.SIGKILL] * 2
    assert run("parts", 2, resume=True, **common) == whole


LOOK = """
import json, os
from qformer_fast.ranks import process_group

looked_at = []

def find(items):
    looked_at.extend(items)
    return {x: f"bad {x}" for x in items if x in (2, 4) or (x == 1 and os.environ["RANK"] == "3")}

with process_group(60.0) as ranks:
    found = ranks.look(range(5), find)
print(json.dumps([looked_at, list(found)]))
"""


def test_ranks_of_a_host_share_the_search_for_damage_and_all_are_told() -> None:
    """Two hosts of two; on the second one another item is damaged too."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOOK],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)},
            stdout=subprocess.PIPE,
        )
        for rank in range(4)
    ]
    said = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert said == [[[0, 2, 4], [1, 2, 4]], [[1, 3], [1, 2, 4]]] * 2


def test_ranks_with_other_data_are_refused(start, tmp_path) -> None:
    """One that skipped a pair more would have other batches."""
    processes = start("run", 2, steps=2, batch_size=2, lacking=1)
    assert [process.wait(timeout=60) for process in processes] == [1, 1]
    for rank in (0, 1):
        said = (tmp_path / f"run.{rank}.txt").read_text()
        assert "the checksum of dataset must be the same on all ranks, got [" in said
    assert read_log(tmp_path / "run") == []


def test_a_rank_that_is_killed_ends_the_others(start, tmp_path) -> None:
    processes = start("run", 2, steps=10_000, batch_size=2)
    wait_for(lambda: len(read_log(tmp_path / "run")) >= 3)
    begin = time.monotonic()
    processes[1].kill()
    assert processes[0].wait(timeout=60) not in (0, None) and time.monotonic() - begin < 40
    said = (tmp_path / "run.0.txt").read_text()
    assert "rank 0 of 2" in said and "another rank ended or was too slow" in said


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_of_two_gpus_one_goes_on_where_the_other_was_killed(cuda_graphs, start, run, tmp_path) -> None:
    common = dict(device="cuda", cuda_graphs=cuda_graphs, steps=30, save_every=4)
    whole = run("whole", 2, batch_size=2, **common)
    processes = start("parts", 2, batch_size=2, **common)
    wait_for(lambda: len(read_log(tmp_path / "parts")) >= 6)
    begin = time.monotonic()
    processes[1].kill()
    assert processes[0].wait(timeout=90) not in (0, None) and time.monotonic() - begin < 60
    assert "rank 0" in (tmp_path / "parts.0.txt").read_text().lower()
    assert_same_curve(run("parts", 1, batch_size=4, resume=True, **common), whole, 1e-3)


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(start, tmp_path) -> None:
    processes = start("run", 2, steps=10_000, batch_size=2)
    wait_for(lambda: len(read_log(tmp_path / "run")) >= 3)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert int(checkpoint.name.split("-")[1]) == read_log(tmp_path / "run")[-1]["step"]


def test_torchrun_and_the_command(folder, tmp_path) -> None:
    pairs = [{"image": word, "caption": f"a {word}"} for word in WORDS]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    options = {
        "data": {"pairs": str(tmp_path / "pairs.json"), "feature_cache": str(folder / "cache")},
        "run": {"output_dir": str(tmp_path / "run"), "steps": 2, "batch_size": 2, "log_every": 1, "device": "cpu"},
        "model": {"qformer": SIZES, "embed_dim": 16},
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "qformer_fast.cli", "train", "--config", str(tmp_path / "options.yaml")]
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1, 2]
    assert done.stdout.count('"step": 2') == 1
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert json.loads((checkpoint / "state.json").read_text())["identity"]["batch_size"] == 4
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert again.returncode != 0 and "run.output_dir has checkpoints in it" in again.stderr


def test_what_one_process_alone_trains_is_named(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(0, 2)))
    cache = FeatureCache(folder / "cache")
    dataset = PairDataset([Pair(word, word, word) for word in WORDS], load_tokenizer(), cache=cache)
    model = Blip2QFormer(QFormerConfig(**SIZES), embed_dim=16)
    run = RunConfig(output_dir=str(tmp_path), steps=1, batch_size=2)
    monkeypatch.setattr(Stage1, "has_ranks", False)
    with pytest.raises(ValueError, match="a Blip2QFormer needs a run of one process, got 2 of them"):
        build_stage(model, dataset, run)


def test_ranks_share_the_batches() -> None:
    for world_size in (2, 4):
        orders = [ShuffledBatches(30, 8, seed=3, start=2, rank=i, world_size=world_size) for i in range(world_size)]
        whole = ShuffledBatches(30, 8, seed=3, start=2)
        for _, batch, *shares in zip(range(7), whole, *orders, strict=False):
            assert sum(shares, []) == batch and {len(share) for share in shares} == {8 // world_size}


def test_alone_there_is_no_group(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(1.0) as ranks:
        assert ranks == Ranks.current() == Ranks(0, 1) and ranks.alone and ranks.first
    x = torch.ones(2)
    assert ranks.mean(x) is x and bool((x == 1).all())


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
