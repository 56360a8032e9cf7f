"""Retrieval against brute force: every pair matched on its own, every rank counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qformer_fast.evaluation.retrieval import chance_at_k, embed, recall_at_k, rerank, similarity

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


def test_similarity_is_the_best_query_in_any_batch_size() -> None:
    images = torch.nn.functional.normalize(torch.randn(7, 3, 8), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    expected = torch.tensor([[max(float(q @ t) for q in image) for t in texts] for image in images])
    for batch_size in (1, 3, 256):
        torch.testing.assert_close(similarity(images, texts, batch_size=batch_size), expected)


def test_embed_matches_one_at_a_time(tiny_model, bank) -> None:
    image_embeds, ids, mask = bank
    images, texts = embed(tiny_model, image_embeds, ids, mask, batch_size=4)
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
    tiny_model.train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        embed(tiny_model, image_embeds, ids, mask)
