"""The drop-in for LAVIS's Qformer.py against the original's own files."""

import copy
import itertools
import logging
import pickle
import re
import types

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin

from qformer_fast import Blip2QFormer, QFormerConfig, use_backend
from qformer_fast.integrations.lavis import BertConfig, BertLMHeadModel, BertModel
from qformer_fast.models.borrowed import BorrowedQFormer
from qformer_fast.models.graphed import TrainingGraphs

SIZES = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, encoder_hidden_size=48)
CONFIG = QFormerConfig(**SIZES, num_query_tokens=8, vocab_size=31000)
BATCH, QUERIES, TEXT, TOKENS = 3, 8, 6, 17


@pytest.fixture
def pair(original, spread_weights):
    """The drop-in and the original's class with the same weights, in eval mode."""
    return make_pair(original, spread_weights)


def make_pair(original, spread_weights, config=CONFIG):
    theirs = original.build_qformer(config).eval()
    spread_weights(theirs)
    ours = BertLMHeadModel(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture
def batch():
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    ids = torch.randint(1000, 30522, (BATCH, TEXT)) * mask
    return types.SimpleNamespace(
        queries=torch.randn(1, QUERIES, 64).expand(BATCH, -1, -1),
        images=torch.randn(BATCH, TOKENS, 48),
        image_mask=torch.ones(BATCH, TOKENS, dtype=torch.long),
        ids=ids,
        mask=mask,
        both=torch.cat([torch.ones(BATCH, QUERIES, dtype=torch.long), mask], dim=1),
        labels=ids.masked_fill(mask == 0, -100),
    )


def queries_call(model, x, **options):
    """Blip2Qformer.forward's first call."""
    options = dict(use_cache=True, return_dict=True) | options
    return model.bert(
        query_embeds=x.queries, encoder_hidden_states=x.images, encoder_attention_mask=x.image_mask, **options
    )


def text_call(model, x, **options):
    return model.bert(x.ids, attention_mask=x.mask, return_dict=True, **options)


def match_call(model, x, **options):
    return model.bert(
        x.ids,
        query_embeds=x.queries,
        attention_mask=x.both,
        encoder_hidden_states=x.images,
        encoder_attention_mask=x.image_mask,
        return_dict=True,
        **options,
    )


def caption_call(model, x, **options):
    past = queries_call(model, x).past_key_values
    options = dict(attention_mask=x.both, labels=x.labels, return_dict=True) | options
    return model(x.ids, past_key_values=past, **options)


CALLS = [queries_call, text_call, match_call, caption_call]


def assert_near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_calls_agree(ours, theirs, x, calls=CALLS):
    visible = {queries_call: torch.ones(BATCH, QUERIES), text_call: x.mask, match_call: x.both, caption_call: x.mask}
    for call in calls:
        actual, expected, keep = call(ours, x), call(theirs, x), visible[call].bool()
        name = "logits" if call is caption_call else "last_hidden_state"
        assert_near(actual[name][keep], expected[name][keep])
        if call is caption_call:
            assert_near(actual.loss, expected.loss)
        if call is queries_call:
            assert len(actual.past_key_values) == len(expected.past_key_values)
            for both in zip(actual.past_key_values, expected.past_key_values, strict=True):
                for kv in zip(*both, strict=True):
                    assert_near(*kv)
        if call is text_call:
            assert actual.last_hidden_state[~keep].abs().max() == 0


def warnings_of(caplog):
    return [x.message for x in caplog.records if x.name == "qformer_fast.integrations.lavis"]


# state dicts


@pytest.mark.parametrize("config", [CONFIG, QFormerConfig()], ids=["tiny", "blip2"])
def test_state_dict_is_the_originals(original, config):
    with torch.device("meta"):
        theirs = original.build_qformer(config)
        ours = BertLMHeadModel(theirs.config)
    expected = {name: x.shape for name, x in theirs.state_dict().items()}
    assert {name: x.shape for name, x in ours.state_dict().items()} == expected
    assert list(ours.state_dict()) == list(expected)


def test_bert_alone_is_the_originals(original, batch):
    config = bert_config()
    theirs = original.load_qformer_module().BertModel(config, add_pooling_layer=True).eval()
    ours = BertModel(config, add_pooling_layer=True).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    outs = [match_call(types.SimpleNamespace(bert=model), batch) for model in (ours, theirs)]
    assert_near(outs[0].pooler_output, outs[1].pooler_output)
    assert set(outs[0].keys()) == set(outs[1].keys())


def vars_of(config):
    names = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"
    more = "encoder_width", "add_cross_attention", "cross_attention_freq", "query_length"
    return {name: getattr(config, name) for name in (*names, *more)}


def test_fresh_weights_are_berts():
    model = BertLMHeadModel(bert_config())
    for name, x in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert bool((x == 1).all()), name
        elif name.endswith("bias"):
            assert bool((x == 0).all()), name
        else:
            assert 0.018 < float(x.detach().std()) < 0.022, name
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.bert.embeddings.position_ids, torch.arange(512)[None])


def bert_config(**more):
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, vocab_size=31000)
    image = dict(encoder_width=48, add_cross_attention=True, cross_attention_freq=2, query_length=QUERIES)
    return BertConfig(**(sizes | image | more))


def test_bert_weights_load_as_lavis_loads_them(tmp_path):
    """blip2.py:47-62 and blip2_qformer.py:73-78 from a folder with a small BERT."""
    plain = BertConfig(**{name: x for name, x in vars_of(bert_config()).items() if "cross" not in name})
    bert = transformers.BertForMaskedLM(plain)
    bert.save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.encoder_width, config.add_cross_attention = 48, True
    config.cross_attention_freq, config.query_length = 2, QUERIES
    model = BertLMHeadModel.from_pretrained(tmp_path, config=config)
    model.resize_token_embeddings(31001)
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        if "_query" in name:
            parameter.data.copy_(state[name.replace("_query", "")])
    for name, expected in bert.state_dict().items():
        if name in state and "token_type" not in name:
            assert torch.equal(state[name][: len(expected)], expected), name
    query_twin = model.bert.encoder.layer[1].output_query.dense.weight
    assert torch.equal(query_twin, bert.bert.encoder.layer[1].output.dense.weight)
    assert 0.018 < float(state["bert.encoder.layer.0.crossattention.self.key.weight"].std()) < 0.022
    assert torch.equal(state["bert.embeddings.position_ids"], torch.arange(512)[None])
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_resized_embeddings_stay_tied(pair, batch):
    ours, _ = pair
    before = caption_call(ours, batch).logits
    ours.resize_token_embeddings(31005)
    head, words = ours.cls.predictions, ours.bert.embeddings.word_embeddings
    assert head.decoder.weight is words.weight and head.decoder.bias is head.bias
    shapes = {name: x.shape for name, x in ours.state_dict().items() if 31005 in x.shape}
    assert shapes == {
        "bert.embeddings.word_embeddings.weight": (31005, 64),
        "cls.predictions.bias": (31005,),
        "cls.predictions.decoder.weight": (31005, 64),
        "cls.predictions.decoder.bias": (31005,),
    }
    batch.ids[:, 0] = batch.labels[:, 0] = 31004
    out = caption_call(ours, batch)
    assert out.logits.shape == (BATCH, TEXT, 31005) and out.loss.isfinite()
    batch.ids[:, 0] = 1000
    assert before.shape == (BATCH, TEXT, 31000)


def test_saved_and_loaded_is_bit_equal(pair, batch, tmp_path):
    ours, _ = pair
    torch.save({"model": ours.state_dict()}, tmp_path / "model.pth")
    loaded = BertLMHeadModel(ours.config).eval()
    loaded.load_state_dict(torch.load(tmp_path / "model.pth")["model"])
    ours.save_pretrained(tmp_path / "folder")
    from_folder = BertLMHeadModel.from_pretrained(tmp_path / "folder")
    for other in (loaded, from_folder):
        assert all(torch.equal(x, ours.state_dict()[name]) for name, x in other.state_dict().items())
        assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight
        assert torch.equal(caption_call(other, batch).loss, caption_call(ours, batch).loss)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_on_its_own_parameters(pair, batch, copied):
    ours, _ = pair
    with torch.no_grad():
        before = queries_call(ours, batch, use_cache=False).last_hidden_state
        other = copied(ours)
        assert torch.equal(queries_call(other, batch, use_cache=False).last_hidden_state, before)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(queries_call(other, batch, use_cache=False).last_hidden_state, before)
        assert torch.equal(queries_call(ours, batch, use_cache=False).last_hidden_state, before)
    caption_call(other, batch).loss.backward()
    assert all(x.grad is None for x in ours.parameters())
    assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight


# the four calls


@torch.no_grad()
def test_the_four_calls_equal_the_original(pair, batch):
    assert_calls_agree(*pair, batch)


@torch.no_grad()
def test_the_four_calls_equal_the_original_on_plain_pytorch(pair, batch, caplog):
    """A hook inside takes every call there; hidden text then equals the original's too."""
    ours, theirs = pair
    seen = []
    ours.bert.encoder.layer[1].attention.register_forward_hook(lambda *args: seen.append(args))
    for call in CALLS:
        actual, expected = call(ours, batch), call(theirs, batch)
        for name in ("loss", "logits", "last_hidden_state"):
            if name in expected:
                assert_near(actual[name], expected[name])
    assert len(seen) == 5
    assert warnings_of(caplog) == ["BertModel runs on plain PyTorch: a module inside has hooks"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@torch.no_grad()
def test_the_four_calls_on_each_backend(pair, batch, backend):
    with use_backend(backend):
        assert_calls_agree(*pair, batch)


@torch.no_grad()
def test_one_image_and_one_batch_of_queries(pair, batch):
    ours, theirs = pair
    expected = queries_call(theirs, batch).last_hidden_state
    batch.queries = batch.queries[:1]
    assert_near(queries_call(ours, batch).last_hidden_state, expected)
    batch.images, batch.image_mask = batch.images[:1], batch.image_mask[:1]
    assert_near(queries_call(ours, batch).last_hidden_state, expected[:1])


def masks(x):
    width = QUERIES + TEXT
    holes = x.both.clone()
    holes[0, QUERIES + 2] = 0
    queries_too = x.both.clone()
    queries_too[1, 3] = 0
    square = torch.rand(BATCH, width, width) < 0.7
    square |= torch.eye(width, dtype=torch.bool)
    return {"none": None, "2d": x.both, "holes": holes, "queries": queries_too, "3d": square.long()}


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("name", ["none", "2d", "holes", "queries", "3d"])
@torch.no_grad()
def test_self_masks_equal_the_original(pair, batch, name, is_decoder):
    mask = masks(batch)[name]
    keep = torch.ones(BATCH, QUERIES + TEXT).bool() if mask is None or mask.ndim == 3 else mask.bool()
    keep[:, :QUERIES] = True
    batch.both = mask
    outs = [match_call(model, batch, is_decoder=is_decoder).last_hidden_state for model in pair]
    assert_near(*(x[keep] for x in outs))


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("three", [False, True])
@torch.no_grad()
def test_masks_of_text_alone_and_of_text_after_queries(pair, batch, is_decoder, three):
    square = (torch.rand(BATCH, TEXT, QUERIES + TEXT) < 0.7) | (torch.arange(QUERIES + TEXT) == 0)
    keep = torch.ones(BATCH, TEXT).bool() if three else batch.mask.bool()
    options = dict(is_decoder=is_decoder, return_dict=True)
    alone, after = [], []
    for model in pair:
        mask = (square | (torch.arange(QUERIES + TEXT) == QUERIES)).long()[:, :, QUERIES:] if three else batch.mask
        alone.append(model.bert(batch.ids, attention_mask=mask, **options).last_hidden_state[keep])
        past = queries_call(model, batch).past_key_values
        mask = square.long() if three else batch.both
        after.append(
            model.bert(batch.ids, attention_mask=mask, past_key_values=past, **options).last_hidden_state[keep]
        )
    assert_near(*alone)
    assert_near(*after)


@torch.no_grad()
def test_image_masks_equal_the_original(pair, batch):
    batch.image_mask = (torch.rand(BATCH, TOKENS) < 0.5).long()
    batch.image_mask[:, 0] = 1
    for call in (queries_call, match_call):
        outs = [call(model, batch).last_hidden_state[:, :QUERIES] for model in pair]
        assert_near(*outs)


def test_a_row_that_may_look_at_nothing_gives_no_nan(pair, batch):
    ours, _ = pair
    past = queries_call(ours, batch).past_key_values
    mask = torch.ones(BATCH, TEXT, QUERIES + TEXT)
    mask[0, 2] = 0
    options = dict(attention_mask=mask, past_key_values=past, return_dict=True)
    fast = ours.bert(batch.ids, **options).last_hidden_state
    plain = ours.bert(batch.ids, output_attentions=True, **options).last_hidden_state
    assert_near(fast, plain)
    fast.square().sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in ours.parameters())


@torch.no_grad()
def test_text_in_two_parts_after_the_cache_is_text_in_one(pair, batch):
    """As a decoding loop calls it, with the original's tuples and with transformers' cache."""
    ours, theirs = pair
    past = queries_call(theirs, batch).past_key_values
    whole = theirs(batch.ids, torch.ones_like(batch.both), past_key_values=past, return_dict=True).logits
    first = queries_call(ours, batch).past_key_values
    cache = DynamicCache()
    for index, both in enumerate(first):
        cache.update(*both, index)
    for past in (first, cache):
        for part in ((0, 2), (2, 6)):
            out = ours(batch.ids[:, slice(*part)], past_key_values=past, return_dict=True)
            past = out.past_key_values
            assert_near(out.logits, whole[:, slice(*part)])
        assert past[0][0].shape == (BATCH, 2, QUERIES + TEXT, 32) if past is not cache else past is cache


@torch.no_grad()
def test_queries_and_text_leave_a_cache_together(pair, batch):
    expected, actual = (match_call(x, batch, use_cache=True, is_decoder=True).past_key_values for x in pair[::-1])
    keep = batch.both.bool()[:, None, :, None]
    for both in zip(actual, expected, strict=True):
        for k, expected_k in zip(*both, strict=True):
            assert k.shape == expected_k.shape
            assert_near(k * keep, expected_k * keep)


# losses


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_losses_and_logits_equal_the_original(pair, batch, reduction):
    outs = [caption_call(model, batch, reduction=reduction) for model in pair]
    assert_near(outs[0].loss, outs[1].loss, 1e-4 if reduction == "sum" else 1e-5)
    assert outs[0].past_key_values is None and list(outs[0].keys()) == ["loss", "logits"]
    keep = batch.mask.bool()
    assert_near(outs[0]["logits"][keep], outs[1].logits[keep])
    assert outs[0].to_tuple()[1] is outs[0].logits
    scores = [caption_call(model, batch, labels=None, return_logits=True) for model in pair]
    assert scores[0].shape == (BATCH, TEXT - 1, 31000)
    assert_near(*(x[keep[:, :-1]] for x in scores))


def test_logits_beside_a_loss_are_made_when_read(pair, batch, monkeypatch):
    ours, _ = pair
    rows, forward = [], type(ours.cls).forward

    def counted(self, x):
        rows.append(x.shape[:-1])
        return forward(self, x)

    monkeypatch.setattr(type(ours.cls), "forward", counted)
    out = caption_call(ours, batch)
    assert out["loss"] is out[0] is out.loss and not rows
    assert "logits" in out and len(out) == 2
    assert out.logits.shape == (BATCH, TEXT, 31000) and out.logits is out.get("logits") is out["logits"]
    assert len(rows) == 1


def test_logits_are_those_of_the_call(pair, batch):
    ours, theirs = pair
    with torch.no_grad():
        out, expected = caption_call(ours, batch).logits, caption_call(theirs, batch).logits
    assert not out.requires_grad
    assert_near(out[batch.mask.bool()], expected[batch.mask.bool()])
    with torch.autocast("cpu", torch.bfloat16):
        out = caption_call(ours, batch)
    assert out.logits.dtype == torch.bfloat16
    with torch.no_grad():
        assert caption_call(ours, batch).loss is not None and out.logits.requires_grad


def test_hooks_of_the_lm_head_and_layers_it_cannot_read(pair, batch):
    for model in pair:
        model.cls.predictions.decoder.register_forward_hook(lambda _, inputs, out: out * 0.5)
    assert_near(*(caption_call(model, batch).loss for model in pair))
    for model in pair:
        model.cls.predictions.decoder = Doubled(64, 31000)
        model.cls.predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
        model.cls.predictions.decoder.bias = model.cls.predictions.bias
    assert_near(*(caption_call(model, batch).loss for model in pair))


def test_tuples_are_the_originals(pair, batch):
    loss, logits = caption_call(pair[0], batch, return_dict=False)
    expected = caption_call(pair[1], batch, return_dict=False)
    assert len(expected) == 2
    assert_near(loss, expected[0])
    assert_near(logits[batch.mask.bool()], expected[1][batch.mask.bool()])
    actual, expected = (queries_call(model, batch, return_dict=False) for model in pair)
    assert len(actual) == len(expected) == 3 and actual[1] is expected[1] is None
    assert_near(actual[0], expected[0])
    assert_near(actual[2][3][1], expected[2][3][1])


def test_labels_of_hidden_text_count_as_in_the_original(pair, batch):
    actual, expected = (caption_call(model, batch, labels=batch.ids) for model in pair)
    assert_near(actual.loss, expected.loss)
    assert actual.hidden_states is None


def test_no_label_gives_nan_as_in_the_original(pair, batch):
    for model in pair:
        assert caption_call(model, batch, labels=torch.full_like(batch.ids, -100)).loss.isnan()


def captured(qformer):
    """The CUDA graphs of training."""
    found = qformer.bert._kernels.find(qformer.bert)._training_graphs
    return [graphs for of_kind in found.values() for graphs in of_kind._graphs]


def gradients_of(model):
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in model.named_parameters()}


def test_gradients_flow_through_the_cache(pair, batch, assert_gradients_close):
    found = []
    for model in pair:
        batch.images.grad = None
        batch.images.requires_grad_()
        caption_call(model, batch).loss.backward()
        found.append(gradients_of(model) | {"images": batch.images.grad.clone()})
    assert found[0]["images"].abs().max() > 0
    assert_gradients_close(*found, 1e-4)


# Blip2Qformer.forward and generate, their file unchanged


def stage1_pair(original, config, spread_weights, std=0.05):
    """The original's Blip2Qformer on its own class and on the drop-in."""
    model = Blip2QFormer(config, embed_dim=32)
    spread_weights(model, std)
    theirs = original.build_stage1(model)
    ours = copy.copy(theirs)
    ours._modules = dict(theirs._modules)
    for name, module in theirs._modules.items():
        if name != "Qformer":
            ours._modules[name] = copy.deepcopy(module)
    ours._parameters = {name: nn.Parameter(x.detach().clone()) for name, x in theirs._parameters.items()}
    ours.Qformer = BertLMHeadModel(theirs.Qformer.config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def run_stage1(original, model, images, text, negatives):
    with original.process_group(), original.fixed_negatives(*negatives):
        out = model({"image": images, "text_input": text})
    out.loss.backward()
    losses = {name: getattr(out, name).detach() for name in ("loss_itc", "loss_itm", "loss_lm")}
    return losses, gradients_of(model)


def neighbours(batch):
    return (torch.arange(batch) + 1) % batch, (torch.arange(batch) + 2) % batch


NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize(
    ("config", "std", "lengths", "tokens"),
    [
        (QFormerConfig(**SIZES, **NO_DROPOUT, num_query_tokens=8), 0.05, [2, 5, 32, 7, 12], 17),
        (QFormerConfig(**NO_DROPOUT), 0.02, [12, 5, 20], 257),
    ],
    ids=["tiny", "blip2"],
)
def test_stage1_forward_runs_unchanged(
    original, config, std, lengths, tokens, make_captions, spread_weights, assert_gradients_close
):
    pair = stage1_pair(original, config, spread_weights, std)
    images, text = torch.randn(len(lengths), tokens, config.encoder_hidden_size), make_captions(lengths, 32)
    (ours, our_gradients), (theirs, their_gradients) = (
        run_stage1(original, model.train(), images, text, neighbours(len(lengths))) for model in pair
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=0)
    assert_gradients_close(our_gradients, their_gradients, 1e-4)


def test_stage1_forward_on_text_filled_up_as_for_cuda_graphs(
    original, make_captions, spread_weights, assert_gradients_close, monkeypatch
):
    """Graphs themselves need a GPU; the rows that fill up their shapes do not."""
    given, fill = [], TrainingGraphs.fill

    def seen(graphs, text, width):
        filled = fill(graphs, text, width)
        given.append((text.num_rows, filled.num_rows))
        return filled

    monkeypatch.setattr(TrainingGraphs, "run", lambda *_: None)
    monkeypatch.setattr(TrainingGraphs, "fill", seen)
    monkeypatch.setattr(BorrowedQFormer, "_graphs_for", lambda self, call, *_: self._training_graphs[call])
    pair = stage1_pair(original, QFormerConfig(**SIZES, **NO_DROPOUT, num_query_tokens=8), spread_weights)
    for lengths in ([2, 5, 32, 7, 12], [32, 3, 9, 30, 4]):
        images, text = torch.randn(5, 17, 48), make_captions(lengths, 32)
        (ours, our_gradients), (theirs, their_gradients) = (
            run_stage1(original, model.train(), images, text, neighbours(5)) for model in pair
        )
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=0)
        assert_gradients_close(our_gradients, their_gradients, 1e-4)
    assert len(given) == 6 and all(before < after and after % 16 == 0 for before, after in given)


def test_stage1_forward_with_gradient_checkpointing(original, make_captions, spread_weights, assert_gradients_close):
    """The original's loses its cache there, and ITG fails; with dropout, drawn again the same."""
    ours, _ = stage1_pair(original, QFormerConfig(**SIZES, num_query_tokens=8), spread_weights)
    inputs = torch.randn(3, 17, 48), make_captions([5, 9, 3], 32), neighbours(3)

    def run():
        ours.zero_grad()
        torch.manual_seed(1)
        losses, gradients = run_stage1(original, ours.train(), *inputs)
        return losses, {name: x.clone() for name, x in gradients.items()}

    losses, gradients = run()
    ours.Qformer.gradient_checkpointing_enable()
    assert ours.Qformer.bert.encoder.gradient_checkpointing
    enabled = run()
    ours.Qformer.gradient_checkpointing_disable()
    ours.Qformer.config.gradient_checkpointing = True
    for found in (enabled, run()):
        assert found[0] == losses
        assert_gradients_close(found[1], gradients, 1e-6)


def test_gradient_checkpointing_on_plain_pytorch(pair, batch, assert_gradients_close):
    ours, theirs = pair
    ours.gradient_checkpointing_enable()
    found = []
    for model in pair:
        without_dropout(model).train()
        caption_call(model, batch, output_attentions=model is ours).loss.backward()
        found.append(gradients_of(model))
    assert_gradients_close(*found, 1e-4)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tokenizer():
    return types.SimpleNamespace(
        bos_token_id=30522, sep_token_id=102, pad_token_id=0, batch_decode=lambda ids, **_: ids.tolist()
    )


def add_generate(qformer):
    """What transformers 5 took out of PreTrainedModel; the rest of the original runs as it is. Nothing passes it
    ``past``, so that it encodes all tokens again for each.
    """

    def expand(self, expand_size, is_encoder_decoder, input_ids, **model_kwargs):
        """As transformers 4.26: LAVIS repeats images and queries for the beams itself."""
        if model_kwargs.get("attention_mask") is not None:
            model_kwargs["attention_mask"] = model_kwargs["attention_mask"].repeat_interleave(expand_size, dim=0)
        return input_ids.repeat_interleave(expand_size, dim=0), model_kwargs

    bases = type(qformer), GenerationMixin
    qformer.__class__ = type("BertLMHeadModel", bases, {"_expand_inputs_for_generation": expand})
    qformer.generation_config = GenerationConfig()


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=1),
        dict(num_beams=1, max_length=9, min_length=8, repetition_penalty=1.5),
        dict(num_beams=3, max_length=12, min_length=4),
        dict(num_beams=5, max_length=8, min_length=1),
        dict(use_nucleus_sampling=True, max_length=8, min_length=2),
    ],
)
def test_generate_runs_unchanged(original, spread_weights, options):
    assert_captions_agree(original, spread_weights, options, "cpu")


def assert_captions_agree(original, spread_weights, options, device):
    pair = stage1_pair(original, QFormerConfig(**SIZES, num_query_tokens=8), spread_weights, 0.2)
    add_generate(pair[1].Qformer)
    images = torch.randn(4, 17, 48, device=device)
    captions = []
    for model in pair:
        model.to(device).eval().tokenizer = tokenizer()
        with torch.no_grad():
            model.Qformer.cls.predictions.bias[102] += 4  # so that some captions end before others
        torch.manual_seed(1)
        captions.append(model.generate({"image": images}, **options))
    assert captions[0] == captions[1]
    assert len({tuple(x) for x in captions[0]}) > 1


def test_generate_after_a_prompt_with_and_without_cache(pair, batch):
    ours, theirs = pair
    add_generate(theirs)
    left = batch.mask.flip(1)
    options = dict(
        attention_mask=left, max_length=10, eos_token_id=102, pad_token_id=0, encoder_hidden_states=batch.images
    )
    expected = theirs.generate(batch.ids.flip(1), query_embeds=batch.queries, **options)
    for more in (dict(query_embeds=batch.queries), dict(query_embeds=batch.queries[:1], use_cache=False)):
        assert torch.equal(ours.generate(batch.ids.flip(1), **options, **more), expected)
    beams = dict(num_beams=2, query_embeds=batch.queries[:1])
    cached, again = (ours.generate(batch.ids.flip(1), use_cache=x, **options, **beams) for x in (True, False))
    assert torch.equal(cached, again)


# what the kernels don't give


def test_saved_attention_maps_and_their_gradients_equal_the_original(pair, batch):
    found = []
    for model in pair:
        blocks = [layer.crossattention.self for layer in model.bert.encoder.layer[::2]]
        for block in blocks:
            block.save_attention = True
        match_call(model, batch).last_hidden_state[:, :QUERIES].pow(3).sum().backward()
        found.append([(x.get_attention_map().detach(), x.get_attn_gradients()) for x in blocks])
    for actual, expected in zip(*found, strict=True):
        assert_near(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5 * float(expected[1].abs().max()))
    with torch.no_grad():
        match_call(pair[0], batch)
    for layer in pair[0].bert.encoder.layer[::2]:
        layer.crossattention.self.save_attention = False
    assert_calls_agree(*pair, batch, CALLS[:2])


@torch.no_grad()
def test_attentions_and_hidden_states_equal_the_original(pair, batch):
    for call in CALLS:
        actual, expected = (call(model, batch, output_attentions=True, output_hidden_states=True) for model in pair)
        for name in ("attentions", "hidden_states"):
            assert len(actual[name]) == len(expected[name])
            for x, y in zip(actual[name], expected[name], strict=True):
                assert_near(x, y)
    actual, expected = (match_call(model, batch, output_attentions=True).cross_attentions for model in pair)
    assert [x is not None for x in actual] == [True, False, True, False]
    for x, y in zip(actual[::2], expected[::2], strict=True):
        assert_near(x, y)
    assert match_call(pair[0], batch).attentions is None


@pytest.mark.parametrize("shape", [(2,), (4, 2)])
@torch.no_grad()
def test_head_masks_equal_the_original(pair, batch, shape, monkeypatch):
    """``get_head_mask`` of transformers 4, which the original calls."""
    monkeypatch.setattr(
        type(pair[1].bert),
        "get_head_mask",
        lambda self, mask, layers: [None] * layers if mask is None else mask.expand(layers, -1)[:, None, :, None, None],
    )
    head_mask = torch.rand(shape)
    for call in (match_call, text_call):
        assert_near(*(call(model, batch, head_mask=head_mask).last_hidden_state for model in pair))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_close_to_fp32_as_the_originals(pair, batch, dtype):
    found = {}
    for name, model, low in (("high", pair[1], False), ("low", pair[1], True), ("ours", pair[0], True)):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=low):
            match, caption = match_call(model, batch).last_hidden_state[:, :QUERIES], caption_call(model, batch)
            loss = match.pow(3).mean() + caption.loss
        assert match.dtype == torch.float32
        loss.backward()
        gradients = {n: x for n, x in gradients_of(model).items() if "key.bias" not in n}
        found[name] = {"match": match.detach(), "loss": caption.loss.detach()} | gradients
    for name, high in found["high"].items():
        error, plain = ((found[x][name].float() - high).norm() for x in ("ours", "low"))
        assert error <= 3 * plain + 2e-3 * high.norm(), (name, error, plain, high.norm())


def test_dropout_differs_between_calls_and_ends_in_eval_mode(pair, batch, caplog):
    ours, _ = pair
    with torch.no_grad():
        ours.train()
        for call in (queries_call, match_call):
            assert not torch.equal(call(ours, batch).last_hidden_state, call(ours, batch).last_hidden_state)
        assert not torch.equal(caption_call(ours, batch).loss, caption_call(ours, batch).loss)
        ours.eval()
        assert_calls_agree(*pair, batch)
        without_dropout(ours).train()
        assert_calls_agree(*pair, batch)
        assert warnings_of(caplog) == []
        ours.bert.encoder.layer[1].output.dropout.eval()
        assert_calls_agree(*pair, batch, [queries_call])
        ours.train().bert.encoder.layer[1].output.dropout.p = 0.5
        assert_calls_agree(*pair, batch, [queries_call])
    assert [x.partition(": ")[2] for x in warnings_of(caplog)] == [
        "a dropout inside has another mode than the encoder",
        "dropouts inside have different probabilities",
    ]


# parts taken away, replaced and frozen


def take_text_away(qformer):
    """As blip2_opt.py and MiniGPT-4 do."""
    qformer.cls = None
    qformer.bert.embeddings.word_embeddings = None
    qformer.bert.embeddings.position_embeddings = None
    for layer in qformer.bert.encoder.layer:
        layer.output = None
        layer.intermediate = None


@pytest.mark.parametrize("called_before", [False, True])
def test_text_branch_taken_away(pair, batch, called_before, assert_gradients_close):
    ours, theirs = pair
    if called_before:
        match_call(ours, batch)
        queries_call(ours, batch)
    for model in pair:
        take_text_away(model)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        assert_calls_agree(*pair, batch, [queries_call])
        outs = [queries_call(model, batch, use_cache=False).last_hidden_state for model in pair]
        assert_near(*outs)
    found = []
    for model in (copy.deepcopy(ours), theirs):
        without_dropout(model).train()
        queries_call(model, batch, use_cache=False).last_hidden_state.pow(3).sum().backward()
        found.append(gradients_of(model))
    assert_gradients_close(*found, 1e-4)
    loaded = BertLMHeadModel(bert_config()).eval()
    take_text_away(loaded)
    loaded.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(queries_call(loaded, batch).last_hidden_state, queries_call(ours, batch).last_hidden_state)
    for call in (text_call, match_call):
        with pytest.raises(ValueError, match="input_ids need the text branch"):
            call(ours, batch)
    with pytest.raises(ValueError, match="the LM head cls was taken out"):
        ours(batch.ids)


class Holder(transformers.PreTrainedModel):
    """A transformers model with a Q-Former inside whose text branch is taken away, as video chat models have."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.qformer = BertLMHeadModel(config)
        take_text_away(self.qformer)
        self.post_init()


def test_taken_apart_inside_a_model_of_transformers(batch, tmp_path):
    model = Holder(bert_config()).eval()
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = Holder.from_pretrained(tmp_path)
    outs = [queries_call(x.qformer, batch).last_hidden_state for x in (model, loaded)]
    assert torch.equal(*outs)


def test_a_replaced_layer_is_seen(pair, batch):
    ours, theirs = pair
    match_call(ours, batch)
    for model in pair:
        torch.manual_seed(3)
        model.bert.encoder.layer[1].attention.self.query = nn.Linear(64, 64)
    assert_calls_agree(*pair, batch)
    for model in pair:
        torch.manual_seed(4)
        model.bert.encoder.layer[2] = copy.deepcopy(model.bert.encoder.layer[0])
        model.bert.embeddings.LayerNorm = nn.LayerNorm(64, eps=1e-3)
    assert_calls_agree(*pair, batch)


def test_parameters_changed_in_place_are_seen_in_inference(pair, batch):
    with torch.no_grad():
        for scale in (1.0, 1.1):
            for model in pair:
                for parameter in model.parameters():
                    parameter.mul_(scale)
            assert_near(*(queries_call(model, batch, use_cache=False).last_hidden_state for model in pair))


def test_parameters_written_through_data_are_seen_after_train_or_eval(pair, batch):
    with torch.no_grad():
        queries_call(pair[0], batch, use_cache=False)
        for model in pair:
            for parameter in model.parameters():
                parameter.data.mul_(1.1)
            model.train().eval()
        assert_near(*(queries_call(model, batch, use_cache=False).last_hidden_state for model in pair))


def relu(model):
    model.bert.encoder.layer[1].intermediate_query.intermediate_act_fn = nn.ReLU()


def other_eps(model):
    model.bert.encoder.layer[1].output_query.LayerNorm.eps = 0.1


def every_other_layer(model):
    model.bert.encoder.layer = nn.ModuleList(model.bert.encoder.layer[::2])
    model.config.num_hidden_layers = 2


def no_dropout_modules(model):
    for layer in model.bert.encoder.layer:
        layer.output_query.dropout = nn.Identity()


def other_class(model):
    part = copy.copy(model.bert.encoder.layer[1].intermediate_query)
    part.__class__ = type("Other", (type(part),), {"forward": lambda self, x: self.dense(x).tanh()})
    model.bert.encoder.layer[1].intermediate_query = part


@pytest.mark.parametrize("change", [relu, other_eps, every_other_layer, no_dropout_modules, other_class])
@torch.no_grad()
def test_what_the_kernels_do_not_compute_runs_on_plain_pytorch(pair, batch, change, caplog):
    queries_call(pair[0], batch)
    for model in pair:
        change(model)
    assert_near(*(match_call(model, batch).last_hidden_state for model in pair))
    assert len(warnings_of(caplog)) == 1


@torch.no_grad()
def test_a_mask_of_the_text_beside_queries(pair, batch):
    """Queries and the longest caption are together as wide as the mask."""
    ours, theirs = pair
    ids = torch.randint(1000, 30522, (BATCH, 12))
    mask = (torch.arange(12) < torch.tensor([[4], [2], [3]])).long()
    batch.ids, batch.both = ids, torch.cat([torch.ones(BATCH, QUERIES, dtype=torch.long), mask], dim=1)
    expected = match_call(theirs, batch).last_hidden_state[:, :QUERIES]
    batch.both = mask
    assert_near(match_call(ours, batch).last_hidden_state[:, :QUERIES], expected)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_of_other_classes_run_on_plain_pytorch(pair, batch, caplog):
    for model in pair:
        torch.manual_seed(3)
        model.bert.encoder.layer[1].attention.self.query = Doubled(64, 64)
    assert_near(*(queries_call(model, batch).last_hidden_state for model in pair))
    assert_near(*(queries_call(model, batch).last_hidden_state for model in pair))
    (message,) = warnings_of(caplog)
    assert "Doubled is neither nn.Linear nor LoRA around one" in message


def test_lora_trains(pair, batch):
    peft = pytest.importorskip("peft")
    ours, _ = pair
    expected = queries_call(ours, batch).last_hidden_state
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.0, init_lora_weights=False)
    model = peft.get_peft_model(ours, config).base_model.model
    ours_with = queries_call(model, batch).last_hidden_state
    assert not torch.allclose(ours_with, expected)
    handle = model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: None)
    assert_near(queries_call(model, batch).last_hidden_state, ours_with)
    handle.remove()
    ours_with.sum().backward()
    trained = {name for name, x in model.named_parameters() if x.grad is not None}
    assert trained and all("lora" in name for name in trained)


def test_other_activations_and_no_cross_attention_run_on_plain_pytorch(original, batch, caplog):
    for more in (dict(hidden_act="relu"), dict(add_cross_attention=False)):
        theirs = original.load_qformer_module().BertLMHeadModel(bert_config(**more)).eval()
        ours = BertLMHeadModel(bert_config(**more)).eval()
        ours.load_state_dict(theirs.state_dict())
        assert_near(*(queries_call(model, batch).last_hidden_state for model in (ours, theirs)))
    assert len(warnings_of(caplog)) == 2


def test_frozen_as_minigpt4_freezes_it(pair, batch):
    ours, _ = pair
    for parameter in ours.parameters():
        parameter.requires_grad = False
    ours.train = lambda mode=True: ours
    parent = nn.ModuleList([ours]).train()
    assert not ours.bert.training and parent.training
    batch.images.requires_grad_()
    queries_call(ours, batch).last_hidden_state.sum().backward()
    assert batch.images.grad.abs().max() > 0


# errors


def test_errors_name_the_argument(pair, batch):
    ours, _ = pair
    past = queries_call(ours, batch).past_key_values
    with pytest.raises(ValueError, match="input_ids or query_embeds must be given"):
        ours.bert()
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        ours.bert(query_embeds=batch.queries)
    with pytest.raises(ValueError, match="encoder_hidden_states must be .* got"):
        ours.bert(query_embeds=batch.queries, encoder_hidden_states=batch.images[:2])
    with pytest.raises(ValueError, match="query_embeds can't be given with past_key_values"):
        ours.bert(batch.ids, query_embeds=batch.queries, past_key_values=past)
    with pytest.raises(ValueError, match="past_key_values must hold keys and values of 4 layers, got 0"):
        ours(batch.ids, past_key_values=())
    with pytest.raises(ValueError, match="attention_mask must have 2 or 3 dimensions"):
        ours.bert(batch.ids, attention_mask=batch.mask[:, None, None])
    for explicit in (False, True):
        with pytest.raises(ValueError, match=r"attention_mask must be"):
            ours.bert(batch.ids, attention_mask=batch.mask, past_key_values=past, output_attentions=explicit)
        with pytest.raises(ValueError, match=r"attention_mask must"):
            ours.bert(batch.ids, attention_mask=batch.mask[:, :3], output_attentions=explicit)
        with pytest.raises(ValueError, match=r"encoder_attention_mask must have one of the shapes"):
            queries_call(ours, types.SimpleNamespace(**(vars(batch) | {"image_mask": batch.image_mask[:, :4]})),
                         output_attentions=explicit)  # fmt: skip
    with pytest.raises(ValueError, match="labels must be"):
        ours(batch.ids, labels=batch.labels[:, :3])
    with pytest.raises(ValueError, match="input_ids must be given"):
        ours(query_embeds=batch.queries, encoder_hidden_states=batch.images)
    with pytest.raises(ValueError, match="input_ids must end before position 512"):
        ours.bert(torch.ones(1, 513, dtype=torch.long))
    with pytest.raises(ValueError, match="position_embedding_type"):
        BertLMHeadModel(bert_config(position_embedding_type="relative_key"))


def test_usual_calls_warn_of_nothing(pair, batch, caplog):
    with caplog.at_level(logging.WARNING):
        for call in CALLS:
            call(pair[0], batch)
    assert warnings_of(caplog) == []


@pytest.mark.cuda
class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def _no_tf32(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)

    @pytest.fixture
    def batch(self, batch):
        return types.SimpleNamespace(**{name: x.cuda() for name, x in vars(batch).items()})

    @pytest.fixture
    def trained(self, pair):
        """Ours and the original's, to be trained without dropout."""
        return [without_dropout(model.cuda()).train() for model in pair]

    @torch.no_grad()
    def test_the_four_calls_equal_the_original(self, pair, batch):
        assert_calls_agree(pair[0].cuda(), pair[1].cuda(), batch)

    def test_stage1_forward_in_bf16_is_as_close_to_fp32_as_the_originals(self, original, make_captions, spread_weights):
        pair = stage1_pair(original, QFormerConfig(**NO_DROPOUT), spread_weights, 0.02)
        ours, theirs = (model.cuda().train() for model in pair)
        images = torch.randn(6, 257, 1408, device="cuda")
        text = [x.cuda() for x in make_captions([12, 5, 20, 32, 2, 9], 32)]
        found = {}
        for name, model, low in (("high", theirs, False), ("low", theirs, True), ("ours", ours, True)):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=low):
                losses, gradients = run_stage1(original, model, images, text, neighbours(6))
            found[name] = losses | {n: x.clone() for n, x in gradients.items() if "key.bias" not in n}
        for name, high in found["high"].items():
            error, plain = ((found[x][name].float() - high).norm() for x in ("ours", "low"))
            assert error <= 3 * plain + 2e-3 * high.norm(), (name, error, plain, high.norm())

    def test_training_of_queries_alone_runs_as_cuda_graphs(self, trained, batch, assert_gradients_close):
        """As blip2_opt.py and MiniGPT-4 call it: without text and without a cache."""
        ours, theirs = trained
        for _ in range(4):
            found = []
            for model in (ours, theirs):
                model.zero_grad()
                queries_call(model, batch, use_cache=False).last_hidden_state.pow(3).sum().backward()
                found.append({name: x for name, x in gradients_of(model).items() if "key.bias" not in name})
            assert_gradients_close(*found, 1e-4)
        assert captured(ours)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_stage1_trains_as_cuda_graphs(self, original, dtype, make_captions, spread_weights, assert_gradients_close):
        """Four passes of a step wait for their backward at once; those with text come in two sizes."""
        config = QFormerConfig(**SIZES, **NO_DROPOUT, num_query_tokens=8)
        ours, theirs = (model.cuda().train() for model in stage1_pair(original, config, spread_weights))
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in (ours, theirs)]
        for lengths in [[2, 5, 32, 7, 12], [32, 3, 9, 30, 4]] * 4:
            images = torch.randn(5, 17, 48, device="cuda")
            text = [x.cuda() for x in make_captions(lengths, 32)]
            found = []
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                with torch.autocast("cuda", dtype, enabled=dtype is not None):
                    found.append(run_stage1(original, model, images, text, neighbours(5)))
                optimizer.step()
            (losses, gradients), (their_losses, their_gradients) = found
            for name, value in their_losses.items():
                band = 1e-3 if dtype is None else 0.1
                torch.testing.assert_close(losses[name].float(), value.float(), rtol=band, atol=0)
            if dtype is None:
                assert_gradients_close(gradients, their_gradients, 1e-3)
        assert len(captured(ours.Qformer)) == 7

    def test_dropout_of_stage1s_cuda_graphs_is_drawn_anew(self, original, make_captions, spread_weights):
        config = QFormerConfig(**SIZES, num_query_tokens=8)
        model = stage1_pair(original, config, spread_weights)[0].cuda().train()
        images, text = torch.randn(3, 17, 48, device="cuda"), [x.cuda() for x in make_captions([2, 5, 12], 32)]
        losses = [
            torch.stack(list(run_stage1(original, model, images, text, neighbours(3))[0].values())) for _ in range(5)
        ]
        assert len(captured(model.Qformer)) == 4
        assert all(bool((a != b).all()) for a, b in itertools.pairwise(losses))

    @pytest.mark.parametrize(
        ("wanted", "call", "options"),
        [
            ("crossattention", text_call, {}),
            (r"layer\.[123]\.", queries_call, dict(use_cache=True)),
            (r"layer\.3\.", caption_call, dict(use_cache=True, labels=None)),
        ],
        ids=["nothing", "queries and a cache", "text after a cache"],
    )
    def test_cuda_graphs_where_not_all_that_comes_out_is_trained(
        self, trained, batch, wanted, call, options, assert_gradients_close
    ):
        ours, theirs = trained
        for _ in range(3):
            found = []
            for model in (ours, theirs):
                model.zero_grad()
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(bool(re.search(wanted, name)))
                out = call(model, batch, **options)
                rows = out.logits if "logits" in out else out.last_hidden_state
                past = [x for both in out.past_key_values or () for x in both]
                seen = [rows[:, :1], *(x[:, :, : QUERIES + 1] for x in past)]  # no hidden text
                outs = [x for x in seen if x.requires_grad]
                found.append((len(outs), {}))
                if outs:
                    sum(x.pow(3).sum() for x in outs).backward()
                    found[-1] = len(outs), gradients_of(model)
            assert found[0][0] == found[1][0]
            if found[0][1]:
                assert_gradients_close(found[0][1], found[1][1], 1e-4)

    def test_encodings_that_wait_are_not_written_over(self, trained, batch, assert_gradients_close):
        ours, theirs = trained
        for _ in range(3):
            found = []
            for model in (ours, theirs):
                model.zero_grad()
                outs = [call(model, batch).last_hidden_state[:, 0] for call in (match_call, text_call) * 2]
                sum(scale * out.pow(3).sum() for scale, out in enumerate(outs, 1)).backward()
                found.append(gradients_of(model))
            assert_gradients_close(*found, 1e-4)
        assert len(captured(ours)) == 2

    @pytest.mark.parametrize("options", [dict(num_beams=1), dict(num_beams=3, max_length=12, min_length=4)])
    def test_generate_runs_unchanged(self, original, spread_weights, options):
        assert_captions_agree(original, spread_weights, options, "cuda")
