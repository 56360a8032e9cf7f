"""Extraction in shards: the same cache however often it was interrupted and by however many processes it was made."""

import os
import pickle

import pytest
import torch

from qformer_fast.data.bad import BadData
from qformer_fast.data.extraction import extract
from qformer_fast.data.features import FeatureCache

KEYS = [f"image{i}" for i in range(10)]
TOKENS = {key: torch.full((2, 3), float(i)) + torch.arange(6).view(2, 3) / 8 for i, key in enumerate(KEYS)}


class Encoder:
    """Tokens of ``TOKENS``, and the keys that were asked for; fails at one of them, leaves out others."""

    def __init__(self, fail_at=None, unreadable=()):
        self.seen, self.fail_at, self.unreadable = [], fail_at, unreadable

    def __call__(self, lists):
        for keys in lists:
            if self.fail_at in keys:
                raise KeyboardInterrupt
            keys = [key for key in keys if key not in self.unreadable]
            self.seen += keys
            yield keys, torch.stack([TOKENS[key] for key in keys]) if keys else torch.empty(0)


def run(folder, encode, *, keys=KEYS, shard_images=4, batch_size=3, metadata=None, **options):
    options |= dict(shard_images=shard_images, batch_size=batch_size)
    return extract(folder, keys, encode, metadata=metadata or {"encoder": "test"}, **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_hold_what_one_file_holds(tmp_path):
    cache = run(tmp_path / "cache", Encoder())
    whole = FeatureCache.create(tmp_path / "whole", KEYS, [torch.stack(list(TOKENS.values()))], metadata={})
    assert cache.shards == [4, 4, 2] and whole.shards == [10]
    mixed = [KEYS[i] for i in (9, 0, 4, 3, 9)]
    assert torch.equal(cache.rows(mixed), whole.rows(mixed)) and cache.keys == KEYS
    assert torch.equal(pickle.loads(pickle.dumps(cache)).rows(mixed), whole.rows(mixed))
    again = FeatureCache(tmp_path / "cache", expect={"encoder": "test"})
    assert torch.equal(again.rows(mixed), torch.stack([TOKENS[key] for key in mixed]).half())


def test_shards_may_be_more_than_open_files(tmp_path):
    run(tmp_path / "cache", Encoder(), shard_images=1)
    before = len(os.listdir("/proc/self/fd"))
    cache = FeatureCache(tmp_path / "cache")
    assert torch.equal(cache.rows(KEYS), torch.stack(list(TOKENS.values())).half())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_interrupted_extraction_goes_on_where_it_stopped(tmp_path, dtype):
    run(tmp_path / "whole", Encoder(), dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cache", Encoder(fail_at="image7"), dtype=dtype)
    with pytest.raises(FileNotFoundError, match="its extraction has not ended"):
        FeatureCache(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["shard-00000"]
    (tmp_path / "cache" / ".shard-00001-killed").mkdir()
    encoder = Encoder()
    run(tmp_path / "cache", encoder, dtype=dtype)
    assert encoder.seen == KEYS[4:]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    nothing = Encoder()
    assert len(run(tmp_path / "cache", nothing, dtype=dtype)) == 10 and nothing.seen == []


def test_a_damaged_shard_is_extracted_again_and_the_others_are_kept(tmp_path, capsys):
    run(tmp_path / "cache", Encoder())
    expected = contents(tmp_path / "cache")
    data = tmp_path / "cache" / "shard-00001" / "features.bin"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    encoder = Encoder()
    run(tmp_path / "cache", encoder)
    assert encoder.seen == KEYS[4:8] and contents(tmp_path / "cache") == expected
    assert "features.bin is corrupted or truncated" in capsys.readouterr().out


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_share_the_shards(tmp_path, world_size):
    """In any order; only the last one, which finds all shards there, makes the cache."""
    run(tmp_path / "whole", Encoder())
    encoders = [Encoder() for _ in range(world_size)]
    found = []
    scratch = tmp_path / "cache" / ".shard-00000-written_now"
    scratch.mkdir(parents=True)
    for rank in reversed(range(world_size)):
        assert scratch.exists()
        found.append(run(tmp_path / "cache", encoders[rank], rank=rank, world_size=world_size))
    assert [cache is None for cache in found] == [True] * (world_size - 1) + [False]
    assert sorted(key for encoder in encoders for key in encoder.seen) == KEYS
    assert encoders[1].seen == KEYS[4:8]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_cache_waits_for_another_processs_damaged_shard(tmp_path):
    run(tmp_path / "cache", Encoder())
    expected = contents(tmp_path / "cache")
    (tmp_path / "cache" / "shard-00001" / "index.json").write_bytes(b"{")
    assert run(tmp_path / "cache", Encoder(), rank=0, world_size=2) is None
    assert run(tmp_path / "cache", Encoder(), rank=1, world_size=2) is not None
    assert contents(tmp_path / "cache") == expected


def test_an_extraction_goes_on_with_another_number_of_processes(tmp_path):
    assert run(tmp_path / "cache", Encoder(), rank=1, world_size=2) is None
    encoder = Encoder()
    assert len(run(tmp_path / "cache", encoder)) == 10
    assert encoder.seen == KEYS[:4] + KEYS[8:]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"metadata": {"encoder": "other"}}, "must have metadata {'encoder': 'other'}, got {'encoder': 'test'}"),
        ({"dtype": "int8"}, "must have dtype 'int8', got 'float16'"),
        ({"keys": [*KEYS[:2], "new", *KEYS[3:]]}, r"must hold the same 4 images, they differ in \['image2', 'new'\]"),
        ({"shard_images": 3}, "must hold the same 3 images, they differ in"),
    ],
)
def test_an_extraction_of_another_kind_is_refused(tmp_path, change, match):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cache", Encoder(fail_at="image7"))
    before = contents(tmp_path / "cache")
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "cache", Encoder(), **change)
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize("name", ["notes.txt", "shard-00003"])
def test_another_folder_is_kept(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"exists already and is no extraction in 3 shards: .*{name}"):
        run(tmp_path, Encoder())


def test_more_images_are_extracted_behind_those_that_are_there(tmp_path):
    run(tmp_path / "cache", Encoder(), keys=KEYS[:8])
    encoder = Encoder()
    assert run(tmp_path / "cache", encoder).keys == KEYS and encoder.seen == KEYS[8:]


def test_what_is_left_out_is_remembered_and_not_tried_again(tmp_path):
    unreadable = ["image1", "image3", "image4", "image5", "image6"]
    cache = run(tmp_path / "cache", Encoder(unreadable=unreadable))
    assert cache.keys == [key for key in KEYS if key not in unreadable]
    assert torch.equal(cache["image7"], TOKENS["image7"].half())
    again, bad = Encoder(), BadData("skip")
    assert len(run(tmp_path / "cache", again, bad=bad)) == 5 and again.seen == []
    assert bad.counts == {"unreadable_picture": 5}
    with pytest.raises(ValueError, match="shard-00000 was written without image1; remove it to try again"):
        run(tmp_path / "cache", again)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_shard_may_be_left_without_an_image(tmp_path, dtype):
    for lost in (KEYS[8:], KEYS[:4]):
        folder = tmp_path / lost[0]
        cache = run(folder, Encoder(unreadable=lost), dtype=dtype)
        kept = [key for key in KEYS if key not in lost]
        assert cache.keys == kept and sum(cache.shards) == len(kept)
        assert torch.equal(FeatureCache(folder).rows(kept)[:, 0, 0].round(), torch.tensor([float(x[5:]) for x in kept]))
        assert run(folder, Encoder(), dtype=dtype, bad=BadData("skip")).keys == kept
    with pytest.raises(ValueError, match="none must have at least one whole shard with images, got none"):
        run(tmp_path / "none", Encoder(unreadable=KEYS))


def test_damaged_shards_are_refused_or_skipped_and_counted(tmp_path):
    run(tmp_path / "cache", Encoder())
    (tmp_path / "cache" / "shard-00001" / "features.bin").write_bytes(b"")
    (tmp_path / "cache" / "shard-00002" / "index.json").unlink()
    with pytest.raises(ValueError, match="feature_cache: .*shard-00001/features.bin must be 48 bytes, got 0"):
        FeatureCache(tmp_path / "cache")
    bad = BadData("skip")
    cache = FeatureCache(tmp_path / "cache", bad=bad)
    assert cache.keys == KEYS[:4] and bad.counts == {"corrupt_shard": 2}
    assert bad.summary().startswith("skipped 2 corrupt_shard, the first: feature_cache: ")
    assert pickle.loads(pickle.dumps(cache)).keys == KEYS[:4]


def test_shards_of_two_caches_do_not_mix(tmp_path):
    run(tmp_path / "cache", Encoder())
    run(tmp_path / "other", Encoder(), metadata={"encoder": "other"})
    for path in (tmp_path / "other" / "shard-00001").iterdir():
        (tmp_path / "cache" / "shard-00001" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="shard-00001 must have metadata {'encoder': 'test'} as .*shard-00000, got"):
        FeatureCache(tmp_path / "cache")


@pytest.mark.parametrize("name", ["shard_images", "batch_size"])
def test_sizes_must_be_positive(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        run(tmp_path / "cache", Encoder(), **{name: 0})
