"""Shares of a run's time, against known waits."""

import threading
import time

import pytest
import torch

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.data.batches import PairDataset
from qformer_fast.data.captions import Pair
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.training.config import RunConfig
from qformer_fast.training.loop import train
from qformer_fast.training.profile import Interval, Profile

WORDS = ["cat", "dog", "bird", "fish"]
NAMES = {"share_data", "share_encoder", "share_qformer", "share_other"}


class SlowDataset(PairDataset):
    wait = 0.0

    def read(self, indices, **options):
        time.sleep(self.wait)
        return super().read(indices, **options)


class SlowEncoder(torch.nn.Module):
    wait = 0.0

    def forward(self, pixels):
        time.sleep(self.wait)
        return pixels.flatten(1)[:, None].expand(-1, 4, -1).repeat(1, 1, 16)


@pytest.fixture
def run(tmp_path, tiny_config):
    """Four steps whose data, encoder and log, which is read one step later, wait for these seconds."""

    def run(data=0.0, encoder=0.0, rest=0.0, **options):
        dataset = SlowDataset([Pair(w, f"a {w}", w) for w in WORDS], load_tokenizer(), transform=lambda _: None)
        dataset.images = lambda indices, **_: torch.ones(len(indices), 3, 1, 1)
        dataset.wait, slow = data, SlowEncoder()
        slow.wait = encoder
        slow.weight = torch.nn.Parameter(torch.zeros(1))
        model = Blip2QFormer(QFormerConfig(**{**tiny_config.to_dict(), "num_hidden_layers": 2}), embed_dim=16)
        about = dict(steps=4, batch_size=4, precision="fp32", device="cpu", log_every=1, profile=True)
        config = RunConfig(output_dir=str(tmp_path / str(time.monotonic_ns())), **about | options)
        return train(model, dataset, config, encoder=slow, on_log=lambda _: time.sleep(rest))

    return run


@pytest.mark.parametrize("part", ["data", "encoder", "rest"])
def test_the_part_that_waits_has_the_largest_share(run, part):
    for entry in run(**{part: 1.0})[2:]:
        shares = {name: x for name, x in entry.items() if name.startswith("share_")}
        assert shares.keys() == NAMES and sum(shares.values()) == pytest.approx(1)
        assert shares[f"share_{'other' if part == 'rest' else part}"] > 0.5 and min(shares.values()) >= 0


def test_shares_are_of_the_steps_since_the_entry_before(run):
    """Two steps an entry, each of which waits for half a second."""
    begin = time.perf_counter()
    entries = run(data=0.5, log_every=2)
    seconds = time.perf_counter() - begin
    waited = [entry["share_data"] * 8 / entry["samples_per_second"] for entry in entries]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert min(waited) > 0.98 and sum(waited) < seconds


def test_a_run_without_a_profile_has_no_shares(run):
    assert not any(name.startswith("share_") for name in run(profile=False)[0])


def test_transfers_at_the_same_time_count_once():
    transfers = [("communication", begin, end) for begin, end in ((1.0, 3.0), (2.0, 4.0), (6.0, 7.0))]
    shares = Interval(0.0, 10.0, [*transfers, ("qformer", 0.0, 5.0)]).shares()
    assert shares == pytest.approx(
        {"share_data": 0, "share_encoder": 0, "share_qformer": 0.5, "share_other": 0.5, "share_communication": 0.4}
    )


def test_marks_of_another_thread_count():
    profile = Profile(torch.device("cpu"))

    def work():
        with profile.part("communication"):
            time.sleep(0.2)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert profile.cut().shares()["share_communication"] > 0.5
    assert "share_communication" not in profile.cut().shares()


@pytest.mark.cuda
def test_on_a_gpu_the_wait_for_data_is_its_own(tmp_path, tiny_config):
    """Data that come while the GPU works cost nothing; data that are late are what it stands still for."""
    cache = FeatureCache.create(tmp_path / "cache", WORDS, [torch.randn(4, 4, 48)], metadata={})
    shares = {}
    for wait in (0.0, 0.5):
        dataset = SlowDataset([Pair(w, f"a {w}", w) for w in WORDS], load_tokenizer(), cache=cache)
        dataset.wait = wait
        model = Blip2QFormer(QFormerConfig(**tiny_config.to_dict()), embed_dim=16)
        run = RunConfig(output_dir=str(tmp_path / str(wait)), steps=6, batch_size=4, log_every=1, profile=True)
        entry = train(model, dataset, run)[-1]
        shares[wait] = entry["share_data"]
        assert sum(entry[name] for name in NAMES) == pytest.approx(1)
    assert shares[0.5] > 0.5 > shares[0.0]
