"""When a drop-in's encodings are captured, without a GPU: a stand-in counts captures and leaves the work to PyTorch."""

import pytest
import torch

from qformer_fast.integrations.lavis import BertConfig, BertModel
from qformer_fast.models import graphed
from qformer_fast.models.borrowed import BorrowedQFormer

QUERIES, WIDTH, BATCH = 8, 32, 16


@pytest.fixture
def bert():
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.encoder_width, config.add_cross_attention, config.cross_attention_freq = 24, True, 2
    config.query_length = QUERIES
    return BertModel(config)


@pytest.fixture
def captures(monkeypatch):
    """The shapes of inputs that were captured."""
    found = []

    class Capture:
        has_gradients = False

        def __init__(self, encode, inputs, places, pool):
            found.append([None if x is None else tuple(x.shape) for x in inputs])

    monkeypatch.setattr(graphed, "_Graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(BorrowedQFormer, "_graphs_for", lambda self, call, *_: self._training_graphs[call])
    return found


def text(batch, width=WIDTH):
    """Captions of 5 to 20 tokens."""
    mask = (torch.arange(width) < torch.randint(5, 21, (batch, 1))).long()
    return torch.randint(1, 50, (batch, width)), mask


@pytest.mark.parametrize("queries", [False, True])
def test_captions_of_any_length_come_in_few_kinds(bert, captures, queries):
    images = torch.randn(BATCH, 5, 24)
    for _ in range(60):
        ids, mask = text(BATCH)
        options = {}
        if queries:
            options = dict(query_embeds=torch.randn(1, QUERIES, 32), encoder_hidden_states=images)
        bert(ids, attention_mask=mask, **options)
    assert 1 <= len(captures) <= 3


def test_queries_and_text_of_one_width_in_sum_are_other_kinds(bert, captures):
    images = torch.randn(2, 5, 24)
    for queries, width in ((8, 8), (4, 12)) * 2:
        mask = (torch.arange(width) < 4).long().expand(2, -1)
        ids = torch.ones(2, width, dtype=torch.long)
        bert(ids, attention_mask=mask, query_embeds=torch.randn(1, queries, 32), encoder_hidden_states=images)
    assert len(captures) == 2


def test_more_kinds_than_graphs_are_captured_less_and_less(bert, captures):
    rounds = 200
    for step in range(rounds):
        images = torch.randn(1 + step % (graphed.MAX_GRAPHS + 2), 5, 24)
        bert(query_embeds=torch.randn(1, QUERIES, 32), encoder_hidden_states=images)
    assert graphed.MAX_GRAPHS <= len(captures) <= 16


def test_texts_that_are_all_hidden(bert, captures):
    """They fill up like any others, and give zeros."""
    images, ids = torch.randn(2, 5, 24), torch.ones(2, WIDTH, dtype=torch.long)
    queries = dict(query_embeds=torch.randn(1, QUERIES, 32), encoder_hidden_states=images)
    hidden, alone = (bert(ids, attention_mask=torch.zeros_like(ids), **queries), bert(**queries))
    assert not hidden.last_hidden_state[:, QUERIES:].any()
    torch.testing.assert_close(hidden.last_hidden_state[:, :QUERIES], alone.last_hidden_state)
    hidden.last_hidden_state.sum().backward()
    assert all(x.grad.isfinite().all() for x in bert.parameters() if x.grad is not None)
