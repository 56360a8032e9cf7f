import json
import os
import pickle

import numpy as np
import pytest
import torch

from qformer_fast.data.bad import BadData
from qformer_fast.data.features import FeatureCache

KEYS = ["a", "b", "c"]
SHARD = "shard-00000"


def create(folder, tokens=None, keys=KEYS, **options):
    tokens = torch.randn(3, 4, 5) if tokens is None else tokens
    return FeatureCache.create(folder, keys, tokens.split(2), metadata={"encoder": "test"}, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read(tmp_path, dtype):
    tokens = torch.randn(3, 4, 5)
    create(tmp_path / "cache", tokens, dtype=dtype)
    cache = FeatureCache(tmp_path / "cache", expect={"encoder": "test"})
    expected = tokens.to(getattr(torch, dtype))
    assert torch.equal(cache.rows(["c", "a", "c"]), expected[[2, 0, 2]])
    assert torch.equal(cache["b"], expected[1])
    assert len(cache) == 3 and "b" in cache and "x" not in cache
    with pytest.raises(KeyError, match=r"no features of \['x'\]"):
        cache.rows(["a", "x"])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("given", ["float32", "float16", "bfloat16"])
def test_int8_is_the_nearest_of_255_levels_of_each_token(tmp_path, given):
    """Against numpy in fp64, whole token by whole token."""
    tokens = (torch.randn(3, 4, 5) * torch.logspace(-3, 3, 4)[:, None]).to(getattr(torch, given))
    tokens[1, 2] = 0
    cache = create(tmp_path / "cache", tokens, dtype="int8")
    assert cache.dtype == torch.float16 and cache.stored == "int8"
    assert (tmp_path / "cache" / SHARD / "features.bin").stat().st_size == 3 * 4 * (5 + 4)
    for i, key in enumerate(KEYS):
        for token, found in zip(tokens[i].double().numpy(), cache[key].double().numpy(), strict=True):
            step = np.abs(token).max() / 127
            expected = np.zeros(5) if step == 0 else np.rint(token / step) * step
            np.testing.assert_allclose(found, expected, rtol=2**-10, atol=2**-24)
            assert (np.abs(found - token) <= 0.5 * step * 1.01 + np.abs(token) * 2**-10 + 2**-24).all()


@pytest.mark.cuda
def test_a_gpu_makes_the_same_tokens_of_int8(tmp_path):
    cache = create(tmp_path / "cache", torch.randn(3, 4, 5) * 100, dtype="int8")
    stored = cache.read(KEYS, pin_memory=True)
    assert stored.is_pinned() and torch.equal(cache.unpack(stored.cuda()).cpu(), cache.rows(KEYS))


def test_int8_keeps_a_token_beside_an_outlier(tmp_path):
    """A scale is a token's own: one that is 1000 times as large does not cost the others their digits."""
    tokens = torch.ones(3, 4, 5)
    tokens[:, 0] *= 1000
    cache = create(tmp_path / "cache", tokens, dtype="int8")
    torch.testing.assert_close(cache.rows(KEYS), tokens.half(), rtol=1e-3, atol=0)


def test_what_int8_does_to_stage_1s_losses_is_bounded(tmp_path, tiny_model, make_captions):
    """Tokens of the spread that vision transformers have, one of them 50 times as large as the others."""
    batch = 8
    tokens = torch.randn(batch, 17, 48) * (1 + torch.rand(48))
    tokens[:, 3] *= 50
    ids, mask = make_captions([7] * batch, 9)
    negatives = torch.arange(batch).roll(1), torch.arange(batch).roll(3)
    keys = [str(i) for i in range(batch)]
    losses = {}
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        cache = FeatureCache.create(tmp_path / dtype, keys, [tokens], metadata={}, dtype=dtype)
        with torch.no_grad():
            out = tiny_model(cache.rows(keys).double(), ids, mask, negatives=negatives)
        losses[dtype] = torch.stack([out.loss_itc, out.loss_itm, out.loss_itg])
    error = {dtype: (x - losses["float32"]).abs() / losses["float32"] for dtype, x in losses.items()}
    assert (error["int8"] > 0).all() and error["int8"].max() < 1e-3
    assert error["float16"].max() < error["int8"].max() and error["bfloat16"].max() < 1e-3


@pytest.mark.parametrize(
    ("tokens", "keys", "options", "match"),
    [
        (torch.tensor([1.0, torch.nan, 2.0])[:, None, None].expand(3, 4, 5), KEYS, {}, r"NaN or Inf in \['b'\]"),
        (torch.full((3, 4, 5), 1e6), KEYS, {}, "NaN or Inf"),
        (torch.full((3, 4, 5), 1e6), KEYS, {"dtype": "int8"}, "NaN or Inf"),
        (torch.full((3, 4, 5), torch.nan), KEYS, {"dtype": "int8"}, "NaN or Inf"),
        (torch.zeros(3, 4, 5), KEYS[:2], {}, "batches must hold 2 images, one a key, got more"),
        (torch.zeros(3, 4, 5), [*KEYS, "d"], {}, "batches must hold 4 images, one a key, got 3"),
        (torch.zeros(3, 4, 5), ["a", "b", "a"], {}, "keys must be different names"),
        (torch.zeros(3, 4, 5), KEYS, {"dtype": "int4"}, "dtype must be one of"),
        (torch.zeros(3), KEYS, {}, r"batches must be \(batch, tokens, width\)"),
        (torch.zeros(3, 0, 5), KEYS, {}, r"batches must be \(batch, tokens, width\), none of them 0"),
    ],
)
def test_a_refused_cache_leaves_nothing_behind(tmp_path, tokens, keys, options, match):
    with pytest.raises(ValueError, match=match):
        create(tmp_path / "cache", tokens, keys, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_creation_leaves_nothing_behind(tmp_path):
    def batches():
        yield torch.zeros(2, 4, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.create(tmp_path / "cache", KEYS, batches(), metadata={})
    assert list(tmp_path.iterdir()) == []


def test_images_of_other_shapes_are_refused(tmp_path):
    batches = [torch.zeros(2, 4, 5), torch.zeros(1, 4, 6)]
    with pytest.raises(ValueError, match=r"batches must all be \(batch, 4, 5\), got \(1, 4, 6\)"):
        FeatureCache.create(tmp_path / "cache", KEYS, batches, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_pickling_passes_on_the_place_and_not_the_tokens(tmp_path):
    cache = create(tmp_path / "cache", torch.randn(3, 40, 50))
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled).rows(KEYS), cache.rows(KEYS))


def test_an_existing_cache_is_kept(tmp_path):
    create(tmp_path / "cache")
    with pytest.raises(FileExistsError, match="exists already"):
        create(tmp_path / "cache")


def test_damage_is_found(tmp_path):
    folder = tmp_path / "cache"
    create(folder)
    shard = folder / SHARD
    data, index = (shard / "features.bin").read_bytes(), (shard / "index.json").read_text()
    (shard / "features.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"feature_cache: .*features.bin is corrupted or truncated .*extract"):
        FeatureCache(folder)
    assert len(FeatureCache(folder, verify=False)) == 3
    (shard / "features.bin").write_bytes(data[:-7])
    with pytest.raises(ValueError, match="features.bin must be 120 bytes, got 113; it is truncated"):
        FeatureCache(folder)
    (shard / "features.bin").write_bytes(data)
    (shard / "index.json").write_text(index[:20])
    with pytest.raises(ValueError, match="shard-00000/index.json is corrupted"):
        FeatureCache(folder)
    (shard / "index.json").write_text(index.replace('"a", "b"', '"b", "a"'))
    with pytest.raises(ValueError, match="shard-00000/index.json is corrupted"):
        FeatureCache(folder, verify=False)
    (shard / "index.json").write_text(index)
    with pytest.raises(ValueError, match="must have encoder = 'ViT-L-14', got 'test'"):
        FeatureCache(folder, expect={"encoder": "ViT-L-14"})
    (folder / "index.json").write_text(json.dumps({"shards": 2}))
    with pytest.raises(ValueError, match="cache/index.json is corrupted"):
        FeatureCache(folder)
    (folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no feature cache in .*cache, its extraction has not ended"):
        FeatureCache(folder)
    with pytest.raises(FileNotFoundError, match="no feature cache in .*other$"):
        FeatureCache(tmp_path / "other")


def test_all_images_are_asked_for_before_one_is_read(tmp_path, monkeypatch):
    """Those of a batch, wherever they lie."""
    cache, calls = create(tmp_path / "cache"), []
    for name in ("posix_fadvise", "preadv"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *x, name=name, real=real: calls.append((name, x)) or real(*x))
    cache.rows(["c", "a"])
    assert [name for name, _ in calls] == ["posix_fadvise"] * 2 + ["preadv"] * 2
    size = cache.tokens * cache.width * cache.dtype.itemsize
    assert [x[1:] for _, x in calls[:2]] == [(at, size, os.POSIX_FADV_WILLNEED) for at in (2 * size, 0)]


def test_a_cache_that_is_cut_while_it_is_read_is_named(tmp_path):
    cache = create(tmp_path / "cache")
    with (tmp_path / "cache" / SHARD / "features.bin").open("rb+") as file:
        file.truncate(100)
    assert cache.rows(["a", "b"]).shape == (2, 4, 5)
    with pytest.raises(ValueError, match="features.bin must have 120 bytes, it was cut since the cache was opened"):
        cache.rows(["b", "c"])


def test_a_cache_without_a_whole_shard_is_refused_even_where_bad_data_are_skipped(tmp_path):
    create(tmp_path / "cache")
    (tmp_path / "cache" / SHARD / "features.bin").write_bytes(b"")
    bad = BadData("skip")
    with pytest.raises(ValueError, match="must have at least one whole shard with images, got none"):
        FeatureCache(tmp_path / "cache", bad=bad)
    assert bad.counts == {"corrupt_shard": 1}
