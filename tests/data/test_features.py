import pickle

import pytest
import torch

from qformer_fast.data.features import FeatureCache

KEYS = ["a", "b", "c"]


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


@pytest.mark.parametrize(
    ("tokens", "keys", "options", "match"),
    [
        (torch.tensor([1.0, torch.nan, 2.0])[:, None, None].expand(3, 4, 5), KEYS, {}, r"NaN or Inf in \['b'\]"),
        (torch.full((3, 4, 5), 1e6), KEYS, {}, "NaN or Inf"),
        (torch.zeros(3, 4, 5), KEYS[:2], {}, "batches must hold 2 images, one a key, got more"),
        (torch.zeros(3, 4, 5), [*KEYS, "d"], {}, "batches must hold 4 images, one a key, got 3"),
        (torch.zeros(3, 4, 5), ["a", "b", "a"], {}, "keys must be different names"),
        (torch.zeros(3, 4, 5), KEYS, {"dtype": "int8"}, "dtype must be one of"),
        (torch.zeros(3), KEYS, {}, r"batches must be \(batch, tokens, width\)"),
        (torch.zeros(3, 0, 5), KEYS, {}, r"batches must be \(batch, tokens, width\), none of them 0"),
    ],
)
def test_a_refused_cache_leaves_nothing_behind(tmp_path, tokens, keys, options, match):
    with pytest.raises(ValueError, match=match):
        create(tmp_path / "cache", tokens, keys, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_extraction_leaves_nothing_behind(tmp_path):
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
    data, index = (folder / "features.bin").read_bytes(), (folder / "index.json").read_text()
    (folder / "features.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"feature_cache: .*features.bin is corrupted or truncated .*extract"):
        FeatureCache(folder)
    assert len(FeatureCache(folder, verify=False)) == 3
    (folder / "features.bin").write_bytes(data[:-7])
    with pytest.raises(ValueError, match="features.bin must be 120 bytes, got 113; it is truncated"):
        FeatureCache(folder)
    (folder / "features.bin").write_bytes(data)
    (folder / "index.json").write_text(index[:20])
    with pytest.raises(ValueError, match="index.json is corrupted"):
        FeatureCache(folder)
    (folder / "index.json").write_text(index.replace('"a", "b"', '"b", "a"'))
    with pytest.raises(ValueError, match="index.json is corrupted"):
        FeatureCache(folder, verify=False)
    (folder / "index.json").write_text(index)
    with pytest.raises(ValueError, match="must have encoder = 'ViT-L-14', got 'test'"):
        FeatureCache(folder, expect={"encoder": "ViT-L-14"})
    with pytest.raises(FileNotFoundError, match="no feature cache in"):
        FeatureCache(tmp_path / "other")
