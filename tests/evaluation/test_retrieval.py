"""Retrieval against the original's own function and brute force: every pair matched on its own, every rank counted by
hand.
"""

from __future__ import annotations

import ast
import datetime
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qformer_fast.data.features import FeatureCache
from qformer_fast.evaluation import retrieval
from qformer_fast.evaluation.retrieval import CachedTokens, chance_at_k, embed, recall_at_k, rerank, similarity
from qformer_fast.reference.encoder import encode

IMAGES, TEXTS, TOKENS = 6, 9, 5


@pytest.fixture
def bank(tiny_model, make_captions) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens and captions of different lengths."""
    image_embeds = torch.randn(IMAGES, TOKENS, tiny_model.config.encoder_hidden_size)
    return image_embeds, *make_captions([3, 7, 4, 4, 6, 3, 5, 7, 4], 7)


def ranks_by_hand(scores: np.ndarray, relevant: np.ndarray) -> list[int]:
    """The original's loop (tasks/retrieval.py), with a stable sort so that ties are defined."""
    ranks = []
    for row, wanted in zip(scores, relevant, strict=True):
        order = np.argsort(row, kind="stable")[::-1]
        ranks.append(min(int(np.where(order == column)[0][0]) for column in np.flatnonzero(wanted)))
    return ranks


def compute_sim_matrix(original) -> Callable:
    """The original's function, cut out of blip2.py, whose imports are not here."""
    source = ast.parse((original.FOLDER / "blip2.py").read_text())
    functions = [node for node in source.body if getattr(node, "name", "") == "compute_sim_matrix"]
    one_process = dict(get_world_size=lambda: 1, get_rank=lambda: 0, is_dist_avail_and_initialized=lambda: False)
    names = dict(torch=torch, F=F, logging=logging, time=time, datetime=datetime)
    names["dist_utils"] = SimpleNamespace(**one_process)
    names["MetricLogger"] = lambda **_: SimpleNamespace(log_every=lambda rows, *_: rows)
    exec(compile(ast.Module(functions, []), "blip2.py", "exec"), names)
    return names["compute_sim_matrix"]


class Loader(list):
    """Batches of images, with the data set that the original's function asks for."""

    def __init__(self, image_embeds: Tensor, texts: int):
        super().__init__({"image": images} for images in image_embeds.split(4))
        self.dataset = SimpleNamespace(text=list(range(texts)), image=list(range(len(image_embeds))))


class Slices:
    """Image tokens that are never whole anywhere."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.sizes = tokens, []

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice) -> Tensor:
        assert isinstance(index, slice)
        self.sizes.append(len(self.tokens[index]))
        return self.tokens[index]


@pytest.mark.parametrize("k", [1, 3, IMAGES])
def test_rank_gives_the_originals_score_matrices(original, tiny_model, bank, k) -> None:
    image_embeds, ids, mask = bank
    model = tiny_model.float()
    padded_ids, padded_mask = (F.pad(x, (0, 35 - x.shape[1])) for x in (ids, mask))
    theirs = original.build_stage1(model)
    theirs.device = torch.device("cpu")
    theirs.tokenizer = lambda rows, **_: original._Tokens(input_ids=padded_ids[rows], attention_mask=padded_mask[rows])
    with torch.no_grad():
        expected = compute_sim_matrix(original)(theirs, Loader(image_embeds, TEXTS), k_test=k)
    out = model.rank(image_embeds, ids, mask, k=k)
    for ours, scores in zip((out.image_to_text, out.text_to_image), expected, strict=True):
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        assert int((ours != -100).sum()) == len(scores) * k
        torch.testing.assert_close(ours, torch.from_numpy(scores), atol=1e-4, rtol=0)


def test_itm_alone_is_the_logit_of_the_original_order(tiny_model, bank) -> None:
    image_embeds, ids, mask = bank
    out = tiny_model.rank(image_embeds, ids, mask, k=100, score="itm")
    queries = tiny_model.query_tokens.expand(TEXTS, -1, -1)
    keep = torch.cat([mask.new_ones(TEXTS, queries.shape[1]), mask], dim=1).bool()[:, None, None, :]
    with torch.no_grad():
        for i in range(IMAGES):
            tokens = tiny_model.ln_vision(image_embeds[i].double()).expand(TEXTS, -1, -1)
            options = dict(query_embeds=queries, input_ids=ids, attention_mask=keep, image_embeds=tokens)
            rows, _ = encode(tiny_model.qformer, **options)
            logits = tiny_model.itm_head(rows[:, : queries.shape[1]])[..., 1].mean(1).float()
            torch.testing.assert_close(out.image_to_text[i], logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(out.text_to_image[:, i], logits, atol=1e-5, rtol=0)
    both = tiny_model.rank(image_embeds, ids, mask, k=100)
    cosines = similarity(*embed(tiny_model, image_embeds, ids, mask))
    torch.testing.assert_close(both.image_to_text - out.image_to_text, cosines.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(both.similarities, cosines)


@pytest.mark.parametrize("image_batch_size, pair_batch_size", [(1, 1), (2, 5), (4, 1000), (6, 7), (64, 2)])
def test_rank_does_not_depend_on_how_it_streams(tiny_model, bank, image_batch_size, pair_batch_size) -> None:
    image_embeds, ids, mask = bank
    whole = tiny_model.rank(image_embeds, ids, mask, k=4)
    slices = Slices(image_embeds)
    batches = dict(image_batch_size=image_batch_size, pair_batch_size=pair_batch_size)
    parts = tiny_model.rank(slices, ids, mask, k=4, **batches)
    assert max(slices.sizes) == min(image_batch_size, IMAGES) and sum(slices.sizes) == 2 * IMAGES
    for name in ("image_to_text", "text_to_image", "similarities"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-6, rtol=0)


def test_rank_reads_a_feature_cache(tiny_model, bank, tmp_path) -> None:
    image_embeds, ids, mask = bank
    names = [f"{i}.png" for i in range(IMAGES)]
    cache = FeatureCache.create(tmp_path / "cache", names, [image_embeds], metadata={}, dtype="float32")
    expected = tiny_model.rank(image_embeds, ids, mask, k=3).image_to_text
    assert torch.equal(tiny_model.rank(cache, ids, mask, k=3).image_to_text, expected)
    chosen = [4, 0, 2]
    some = CachedTokens(cache, [names[i] for i in chosen])
    found = tiny_model.rank(some, ids, mask, k=3, image_batch_size=2).image_to_text
    torch.testing.assert_close(found, expected[chosen], atol=1e-6, rtol=0)


def test_a_pair_is_matched_once_and_passes_are_even(tiny_model, bank, monkeypatch) -> None:
    image_embeds, ids, mask = bank
    passes: list[tuple[int, int, int]] = []
    match = tiny_model.match_packed

    def match_packed(image_kv, text, image_index):
        assert set(image_index.tolist()) == set(range(image_kv.num_images))
        assert text.max_length == text.lengths.max() and text.num_rows == text.lengths.sum()
        passes.append((len(text), image_kv.num_images, text.num_rows))
        return match(image_kv, text, image_index)

    monkeypatch.setattr(tiny_model, "match_packed", match_packed)
    out = tiny_model.rank(image_embeds, ids, mask, k=4, image_batch_size=3, pair_batch_size=8)
    candidates = (out.image_to_text != -100) | (out.text_to_image.T != -100)
    assert sum(pairs for pairs, _, _ in passes) == int(candidates.sum())
    assert sum(rows for _, _, rows in passes) == int((candidates.sum(0) * mask.sum(1)).sum())
    for chunk in (candidates[:3], candidates[3:]):
        pairs, here = int(chunk.sum()), -(-int(chunk.sum()) // 8)
        sizes = sorted(n for n, _, _ in passes[:here])
        assert sum(sizes) == pairs and sizes[-1] - sizes[0] <= 1 and sizes[-1] <= 8
        passes = passes[here:]


@pytest.mark.cuda
def test_rank_on_a_gpu_waits_for_nothing_within_a_pass(tiny_model, bank, monkeypatch) -> None:
    image_embeds, ids, mask = bank
    model = tiny_model.float()
    expected = model.rank(image_embeds, ids, mask, k=4)
    model.cuda()
    model.rank(image_embeds, ids, mask, k=4, image_batch_size=4, pair_batch_size=6)  # compiles kernels
    match = model.match_packed

    def match_packed(*inputs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return match(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(model, "match_packed", match_packed)
    found = model.rank(image_embeds, ids, mask, k=4, image_batch_size=4, pair_batch_size=6)
    for name in ("image_to_text", "text_to_image", "similarities"):
        assert getattr(found, name).is_cuda
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), atol=1e-4, rtol=0)
    with torch.autocast("cuda", torch.bfloat16):
        low = model.rank(image_embeds, ids, mask, k=100)
    assert low.image_to_text.dtype == torch.float32
    full = model.rank(image_embeds, ids, mask, k=100)
    torch.testing.assert_close(low.image_to_text, full.image_to_text, atol=0.05, rtol=0.05)


def test_cosines_stay_exact_under_autocast() -> None:
    images = F.normalize(torch.randn(7, 3, 8), dim=-1)
    texts = F.normalize(torch.randn(5, 8), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = similarity(images, texts)
    assert torch.equal(found, similarity(images, texts))


def test_evaluate_against_ranks_by_hand(tiny_model, bank) -> None:
    image_embeds, ids, mask = bank
    relevant = torch.arange(TEXTS) % IMAGES == torch.arange(IMAGES)[:, None]
    out = tiny_model.rank(image_embeds, ids, mask, k=4)
    found = retrieval.evaluate(tiny_model, image_embeds, ids, mask, relevant, k=4)
    cosines = out.similarities, out.similarities.T
    for name, both in (("itc", cosines), ("reranked", (out.image_to_text, out.text_to_image))):
        expected = {}
        for way, scores, wanted in zip(("TR", "IR"), both, (relevant, relevant.T), strict=True):
            ranks = np.array(ranks_by_hand(scores.numpy(), wanted.numpy()))
            expected |= {f"{way}@{k}": 100.0 * float((ranks < k).mean()) for k in (1, 5, 10)}
        expected["mean"] = sum(expected.values()) / 6
        assert getattr(found, name) == pytest.approx(expected, abs=0.005)
    assert found.pairs == int(((out.image_to_text != -100) | (out.text_to_image.T != -100)).sum())
    assert found.pairs_per_second == pytest.approx(found.pairs / found.seconds, rel=0.05)
    ranked = ((found.per_image, out.image_to_text, relevant), (found.per_text, out.text_to_image, relevant.T))
    for entries, scores, wanted in ranked:
        ranks = ranks_by_hand(scores.numpy(), wanted.numpy())
        for entry, row, rank, right in zip(entries, scores, ranks, wanted, strict=True):
            assert entry["rank"] == (rank if row[right].max() > -100 else None)
            candidates = [x for x in sorted(row.tolist(), reverse=True) if x > -100]
            assert len(entry["best"]) == min(10, len(candidates)) == len(set(entry["best"]))
            assert row[entry["best"]].tolist() == candidates[:10]
    assert None in [entry["rank"] for entry in found.per_image + found.per_text]


class KeptInMemory:
    """What a journal would keep, of ``entries`` that were found."""

    def __init__(self, entries=()):
        self.entries, self.new = list(entries), []

    def append(self, entries):
        self.new += entries


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_re_ranking_goes_on_after_the_images_that_were_done(tiny_model, bank, monkeypatch, done) -> None:
    image_embeds, ids, mask = bank
    cosine = similarity(*embed(tiny_model, image_embeds, ids, mask))
    inputs = (tiny_model, image_embeds, ids, mask, cosine)
    options = dict(k=4, image_batch_size=2, pair_batch_size=3)
    whole = KeptInMemory()
    expected = rerank(*inputs, **options, journal=whole)
    assert len(whole.new) == 3 and all(
        torch.equal(a, b) for a, b in zip(expected, rerank(*inputs, **options), strict=True)
    )
    projected: list[int] = []
    image_kv = tiny_model.image_kv
    monkeypatch.setattr(tiny_model, "image_kv", lambda tokens: projected.append(len(tokens)) or image_kv(tokens))
    journal = KeptInMemory(whole.new[:done])
    found = rerank(*inputs, **options, journal=journal)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert projected == [2] * (3 - done) and journal.new == whole.new[done:]


def test_similarity_is_the_best_query_in_any_batch_size() -> None:
    images = torch.nn.functional.normalize(torch.randn(7, 3, 8), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    expected = torch.tensor([[max(float(q @ t) for q in image) for t in texts] for image in images])
    for batch_size in (1, 3, 256):
        torch.testing.assert_close(similarity(images, texts, batch_size=batch_size), expected)


def test_embed_matches_one_at_a_time(tiny_model, bank) -> None:
    image_embeds, ids, mask = bank
    images, texts = embed(tiny_model, image_embeds, ids, mask, image_batch_size=4, text_batch_size=2)
    for i in range(IMAGES):
        torch.testing.assert_close(images[i : i + 1], tiny_model.image_features(image_embeds[i : i + 1].double()))
    for j in range(TEXTS):
        torch.testing.assert_close(texts[j : j + 1], tiny_model.text_features(ids[j : j + 1], mask[j : j + 1]))


@pytest.mark.parametrize("k", [1, 3, TEXTS + 5])
@pytest.mark.parametrize("image_batch_size, pair_batch_size", [(64, 256), (4, 3)])
def test_rerank_against_brute_force(tiny_model, bank, k, image_batch_size, pair_batch_size) -> None:
    image_embeds, ids, mask = bank
    cosine = similarity(*embed(tiny_model, image_embeds, ids, mask))
    texts_of, images_of = rerank(
        tiny_model, image_embeds, ids, mask, cosine, k=k, image_batch_size=image_batch_size,
        pair_batch_size=pair_batch_size,
    )  # fmt: skip
    expected_texts = torch.full((IMAGES, TEXTS), -100.0)
    expected_images = torch.full((TEXTS, IMAGES), -100.0)
    for i in range(IMAGES):
        for j in range(TEXTS):
            pair = image_embeds[i : i + 1].double(), ids[j : j + 1], mask[j : j + 1]
            score = tiny_model.match(*pair)[0, 1] + cosine[i, j]
            if (cosine[i] > cosine[i, j]).sum() < k:
                expected_texts[i, j] = score
            if (cosine[:, j] > cosine[i, j]).sum() < k:
                expected_images[j, i] = score
    torch.testing.assert_close(texts_of, expected_texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(images_of, expected_images, atol=1e-5, rtol=0)


def test_rerank_projects_each_image_once(tiny_model, bank, monkeypatch) -> None:
    image_embeds, ids, mask = bank
    cosine = similarity(*embed(tiny_model, image_embeds, ids, mask))
    projected: list[int] = []
    image_kv = tiny_model.image_kv
    monkeypatch.setattr(tiny_model, "image_kv", lambda tokens: projected.append(len(tokens)) or image_kv(tokens))
    rerank(tiny_model, image_embeds, ids, mask, cosine, k=4, image_batch_size=2, pair_batch_size=3)
    assert projected == [2, 2, 2]


def test_recall_counts_ties_as_the_original() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.1, 0.9, 0.9]])
    relevant = torch.tensor([[False, False, True], [True, False, False], [False, True, False]])
    assert recall_at_k(scores, relevant, ks=(1, 2, 3)) == pytest.approx({1: 100 / 3, 2: 200 / 3, 3: 100.0})


@pytest.mark.parametrize("seed", range(5))
def test_recall_against_brute_force(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (40, 25), generator=generator).float()
    relevant = torch.rand(40, 25, generator=generator) < 0.1
    relevant[torch.arange(40), torch.randint(0, 25, (40,), generator=generator)] = True
    ranks = np.array(ranks_by_hand(scores.numpy(), relevant.numpy()))
    expected = {k: 100.0 * float((ranks < k).mean()) for k in (1, 5, 10)}
    assert recall_at_k(scores, relevant) == pytest.approx(expected)


def test_chance_is_the_mean_recall_of_random_scores() -> None:
    relevant = torch.zeros(6, 12, dtype=torch.bool)
    relevant[:, 0] = True
    relevant[3:, 5:8] = True
    drawn = [recall_at_k(torch.rand(6, 12), relevant, ks=(1, 3)) for _ in range(4000)]
    for k, expected in chance_at_k(relevant, ks=(1, 3)).items():
        assert np.mean([found[k] for found in drawn]) == pytest.approx(expected, abs=1.5)


def test_bad_input_is_named(tiny_model, bank) -> None:
    image_embeds, ids, mask = bank
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="row 1 has none"):
        recall_at_k(scores, torch.tensor([[True, False, False], [False, False, False]]))
    with pytest.raises(ValueError, match=r"scores and relevant must both be .* got \(2, 3\) and \(3, 2\)"):
        recall_at_k(scores, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="scores must be numbers"):
        recall_at_k(scores * float("nan"), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"similarities must be \(images, texts\) = \(6, 9\), got \(2, 3\)"):
        rerank(tiny_model, image_embeds, ids, mask, scores)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        rerank(tiny_model, image_embeds, ids, mask, torch.zeros(IMAGES, TEXTS), k=0)
    with pytest.raises(ValueError, match=r"score must be one of \('itm\+itc', 'itm'\), got 'itc'"):
        tiny_model.rank(image_embeds, ids, mask, score="itc")
    with pytest.raises(ValueError, match="image_batch_size must be at least 1, got -1"):
        tiny_model.rank(image_embeds, ids, mask, image_batch_size=-1)
    with pytest.raises(ValueError, match="pair_batch_size must be at least 1, got 0"):
        tiny_model.rank(image_embeds, ids, mask, pair_batch_size=0)
    with pytest.raises(ValueError, match="image_embeds must hold at least one image, got none"):
        tiny_model.rank(image_embeds[:0], ids, mask)
    tiny_model.train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        embed(tiny_model, image_embeds, ids, mask)
