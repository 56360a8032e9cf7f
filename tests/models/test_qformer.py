"""The encoder at BLIP-2's size against the original's own Qformer.py and Hugging Face's modules; fp32, dropout 0."""

import pytest
import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from qformer_fast import Blip2QFormer, QFormer, QFormerConfig
from qformer_fast.models.packing import GradientBuffers

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def full():
    """One BLIP-2-size Q-Former, no parameter at its initial value, and a batch for it."""
    torch.manual_seed(0)
    qformer = QFormer(QFormerConfig()).eval()
    with torch.no_grad():
        for parameter in qformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    batch, tokens = 2, 257
    inputs = dict(
        queries=torch.randn(1, 32, 768) * 0.02,
        images=torch.randn(batch, tokens, 1408),
        input_ids=torch.randint(1000, 30522, (batch, 12)),
    )
    inputs["attention_mask"] = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    return qformer, inputs


@pytest.fixture(scope="module")
def lavis(full, original):
    qformer, _ = full
    theirs = original.build_qformer(qformer.config).eval()
    theirs.bert.load_state_dict(qformer.to_lavis_state_dict())
    return theirs


def assert_within(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_queries_alone_equal_the_original(full, lavis):
    qformer, x = full
    ours = qformer(query_embeds=x["queries"], encoder_hidden_states=x["images"])
    theirs = lavis.bert(
        query_embeds=x["queries"].expand(2, -1, -1), encoder_hidden_states=x["images"], return_dict=True
    )
    assert_within(ours.query_output, theirs.last_hidden_state)
    assert ours.text_output is None


@torch.no_grad()
def test_text_alone_equals_the_original(full, lavis):
    qformer, x = full
    ours = qformer(input_ids=x["input_ids"], attention_mask=x["attention_mask"])
    theirs = lavis.bert(x["input_ids"], attention_mask=x["attention_mask"], return_dict=True).last_hidden_state
    keep = x["attention_mask"].bool()
    assert_within(ours.text_output[keep], theirs[keep])
    assert ours.text_output[~keep].abs().max() == 0
    assert ours.query_output is None


@torch.no_grad()
def test_queries_and_text_equal_the_original(full, lavis):
    qformer, x = full
    ours = qformer(x["queries"], x["input_ids"], x["attention_mask"], x["images"])
    mask = torch.cat([torch.ones(2, 32), x["attention_mask"]], dim=1)
    theirs = lavis.bert(
        x["input_ids"],
        query_embeds=x["queries"].expand(2, -1, -1),
        attention_mask=mask,
        encoder_hidden_states=x["images"],
        return_dict=True,
    ).last_hidden_state
    keep = mask.bool()
    assert_within(ours.last_hidden_state[keep], theirs[keep])


@torch.no_grad()
def test_multimodal_causal_equals_the_originals_cached_prefix(full, lavis):
    """The original runs the queries first and the text after their cached keys and values; here it is one sequence."""
    qformer, x = full
    ours = qformer(x["queries"], x["input_ids"], x["attention_mask"], x["images"], mask="multimodal_causal")
    prefix = lavis.bert(
        query_embeds=x["queries"].expand(2, -1, -1),
        encoder_hidden_states=x["images"],
        use_cache=True,
        return_dict=True,
    )
    mask = torch.cat([torch.ones(2, 32), x["attention_mask"]], dim=1)
    theirs = lavis.bert(
        x["input_ids"],
        attention_mask=mask,
        past_key_values=prefix.past_key_values,
        is_decoder=True,
        return_dict=True,
    ).last_hidden_state
    keep = x["attention_mask"].bool()
    assert_within(ours.query_output, prefix.last_hidden_state)
    assert_within(ours.text_output[keep], theirs[keep])


def hf_config(cls, config, **more):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "encoder_hidden_size")
    options = {name: getattr(config, name) for name in names}
    return cls(**options, vocab_size=config.vocab_size, cross_attention_frequency=2, **more)


@torch.no_grad()
def test_equals_hf_blip2(full):
    qformer, x = full
    theirs = Blip2QFormerModel(hf_config(Blip2QFormerConfig, qformer.config, use_qformer_text_input=True)).eval()
    state = {name: tensor for name, tensor in qformer.state_dict().items() if not name.startswith("embeddings.")}
    theirs.load_state_dict(state, strict=True)
    queries = x["queries"].expand(2, -1, -1)
    assert_within(
        qformer(query_embeds=queries, encoder_hidden_states=x["images"]).query_output,
        theirs(query_embeds=queries, encoder_hidden_states=x["images"]).last_hidden_state,
    )
    words = qformer.embeddings.word_embeddings(x["input_ids"])
    words = words + qformer.embeddings.position_embeddings(torch.arange(12))
    mask = torch.cat([torch.ones(2, 32), x["attention_mask"]], dim=1)
    theirs_out = theirs(
        query_embeds=torch.cat([queries, words], dim=1),
        query_length=32,
        attention_mask=mask,
        encoder_hidden_states=x["images"],
    ).last_hidden_state
    ours = qformer(queries, x["input_ids"], x["attention_mask"], x["images"]).last_hidden_state
    assert_within(ours[mask.bool()], theirs_out[mask.bool()])


@torch.no_grad()
def test_loads_and_equals_hf_instructblip(full):
    qformer, x = full
    theirs = InstructBlipQFormerModel(hf_config(InstructBlipQFormerConfig, qformer.config)).eval()
    ours = QFormer(qformer.config).eval()
    ours.load_hf_state_dict(theirs.state_dict())
    mask = torch.cat([torch.ones(2, 32, dtype=torch.int64), x["attention_mask"]], dim=1)
    expected = theirs(
        x["input_ids"],
        attention_mask=mask,
        query_embeds=x["queries"].expand(2, -1, -1),
        encoder_hidden_states=x["images"],
    ).last_hidden_state
    actual = ours(x["queries"], x["input_ids"], mask, x["images"]).last_hidden_state
    assert_within(actual[mask.bool()], expected[mask.bool()])


SIZES = [
    dict(hidden_size=64, num_attention_heads=2, num_query_tokens=1, encoder_hidden_size=8, cross_attention_frequency=1),
    dict(hidden_size=128, num_attention_heads=2, num_query_tokens=5, encoder_hidden_size=96),
    dict(hidden_size=160, num_attention_heads=2, num_query_tokens=33, encoder_hidden_size=160),
    dict(
        hidden_size=256,
        num_attention_heads=2,
        num_query_tokens=256,
        encoder_hidden_size=31,
        cross_attention_frequency=3,
    ),
]


@pytest.mark.parametrize("tokens", [1, 17, 1025])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"headdim{s['hidden_size'] // s['num_attention_heads']}")
@torch.no_grad()
def test_sizes_agree_with_the_original(original, sizes, tokens, make_captions, spread_weights):
    config = QFormerConfig(num_hidden_layers=3, intermediate_size=96, vocab_size=30523, **sizes)
    qformer = QFormer(config).eval()
    spread_weights(qformer)
    theirs = original.build_qformer(config).eval()
    theirs.bert.load_state_dict(qformer.to_lavis_state_dict())
    queries, images = (
        torch.randn(1, config.num_query_tokens, config.hidden_size),
        torch.randn(3, tokens, config.encoder_hidden_size),
    )
    ids, keep = make_captions([2, 9, 5], 9)
    image_keep = torch.rand(3, tokens) > 0.3
    image_keep[:, 0] = True
    mask = torch.cat([torch.ones(3, config.num_query_tokens), keep], dim=1)
    expected = theirs.bert(
        ids,
        query_embeds=queries.expand(3, -1, -1),
        attention_mask=mask,
        encoder_hidden_states=images,
        encoder_attention_mask=image_keep.long(),
        return_dict=True,
    ).last_hidden_state
    actual = qformer(queries, ids, mask, images, image_keep).last_hidden_state
    assert_within(actual[mask.bool()], expected[mask.bool()])


@pytest.fixture
def tiny(tiny_config, spread_weights):
    qformer = QFormer(tiny_config).double().eval()
    spread_weights(qformer)
    return qformer


@torch.no_grad()
def test_left_padding_keeps_columns_as_positions(tiny, make_captions):
    """A left-padded caption is the right-padded one with its positions moved, as the original numbers columns."""
    ids, keep = make_captions([5], 8)
    left = tiny(input_ids=ids.roll(3, 1), attention_mask=keep.roll(3, 1)).text_output
    weight = tiny.embeddings.position_embeddings.weight
    weight.copy_(weight.roll(-3, 0))
    right = tiny(input_ids=ids, attention_mask=keep).text_output
    torch.testing.assert_close(left[:, 3:], right[:, :5])
    assert left[:, :3].abs().max() == 0


@torch.no_grad()
def test_masks_of_two_three_and_four_dimensions_agree(tiny, make_captions):
    queries, images = torch.randn(1, 8, 64).double(), torch.randn(2, 5, 48).double()
    ids, keep = make_captions([6, 4], 6)
    expected = tiny(queries, ids, keep, images)
    with_queries = torch.cat([torch.ones(2, 8, dtype=torch.int64), keep], dim=1)
    seen = with_queries[:, None, :].expand(2, 14, 14)
    added = (1.0 - seen.double())[:, None] * -1e9
    valid = with_queries.bool()
    for mask in (with_queries, seen, seen[:, None].bool(), added):
        actual = tiny(queries, ids, mask, images).last_hidden_state
        torch.testing.assert_close(actual[valid], expected.last_hidden_state[valid])


@torch.no_grad()
def test_hidden_queries_equal_the_original(original, tiny_config, make_captions):
    """A 2-D mask that hides queries from all readers, which no packed layout describes."""
    qformer = QFormer(tiny_config).eval()
    theirs = original.build_qformer(tiny_config).eval()
    theirs.bert.load_state_dict(qformer.to_lavis_state_dict())
    queries, images = torch.randn(2, 8, 64), torch.randn(2, 5, 48)
    ids, keep = make_captions([6, 4], 6)
    mask = torch.cat([torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1]] * 2), keep], dim=1)
    expected = theirs.bert(
        ids, query_embeds=queries, attention_mask=mask, encoder_hidden_states=images, return_dict=True
    ).last_hidden_state
    actual = qformer(queries, ids, mask, images).last_hidden_state
    valid = mask.bool()
    valid[:, :8] = True
    assert_within(actual[valid], expected[valid])


@torch.no_grad()
def test_one_row_of_queries_is_broadcast(tiny):
    queries, images = torch.randn(1, 8, 64).double(), torch.randn(3, 5, 48).double()
    one = tiny(query_embeds=queries, encoder_hidden_states=images).query_output
    each = tiny(query_embeds=queries.expand(3, -1, -1), encoder_hidden_states=images).query_output
    torch.testing.assert_close(one, each)


def test_dropout_is_on_in_training_only(tiny):
    queries, images = torch.randn(1, 8, 64).double(), torch.randn(2, 5, 48).double()
    run = lambda: tiny(query_embeds=queries, encoder_hidden_states=images).query_output  # noqa: E731
    assert torch.equal(run(), run())
    tiny.train()
    assert not torch.equal(run(), run())


def test_autocast_is_close_to_fp32(tiny_config, spread_weights):
    qformer = QFormer(tiny_config).eval()
    spread_weights(qformer)
    queries, images = torch.randn(1, 8, 64), torch.randn(2, 5, 48)
    exact = qformer(query_embeds=queries, encoder_hidden_states=images).query_output
    with torch.autocast("cpu", torch.bfloat16):
        low = qformer(query_embeds=queries, encoder_hidden_states=images).query_output
    assert low.dtype == torch.float32, "LayerNorm's output stays fp32 under autocast, as in the original"
    assert 1e-6 < (low - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(query_embeds=None, input_ids=None), "query_embeds or input_ids must be given"),
        (dict(encoder_hidden_states=None), "encoder_hidden_states must be given with query_embeds"),
        (dict(encoder_hidden_states=torch.randn(2, 5, 47)), r"image_embeds must be .* 48\), got \(2, 5, 47\)"),
        (dict(encoder_hidden_states=torch.randn(2, 0, 48)), r"image_embeds must be .* 48\), got \(2, 0, 48\)"),
        (dict(encoder_hidden_states=torch.full((2, 5, 48), torch.nan)), "image_embeds must be finite"),
        (dict(query_embeds=torch.randn(3, 8, 64)), "query_embeds must be|must have batch size 3"),
        (dict(query_embeds=torch.randn(1, 0, 64)), "query_embeds must be"),
        (dict(query_embeds=torch.randn(1, 8, 65)), "query_embeds must be 64 wide, got 65"),
        (dict(mask="causal"), "mask must be one of"),
        (dict(attention_mask=torch.ones(2, 13)), "attention_mask must have one of the shapes"),
        (dict(encoder_attention_mask=torch.ones(2, 6)), "encoder_attention_mask must have one of the shapes"),
        (dict(input_ids=torch.ones(3, 6).long()), "input_ids must have batch size|must be|must have batch size 3"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tiny_config, change, match):
    qformer = QFormer(tiny_config)
    good = dict(
        query_embeds=torch.randn(1, 8, 64),
        input_ids=torch.randint(1, 99, (2, 6)),
        encoder_hidden_states=torch.randn(2, 5, 48),
    )
    qformer(**good)
    with pytest.raises(ValueError, match=match):
        qformer(**{**good, **change})


def test_text_needs_a_text_branch():
    qformer = QFormer(QFormerConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
                                    encoder_hidden_size=8, use_qformer_text_input=False))  # fmt: skip
    with pytest.raises(ValueError, match="input_ids need a text branch"):
        qformer(input_ids=torch.ones(1, 3).long())
    assert not any("embeddings" in name or ".intermediate." in name for name in qformer.state_dict())


@pytest.mark.parametrize("level", ["feed_forward", "layer"])
def test_gradient_checkpointing_changes_nothing(tiny, make_captions, assert_gradients_close, level):
    ids, keep = make_captions([6, 4], 6)
    inputs = (torch.randn(1, 8, 64).double(), ids, keep, torch.randn(2, 5, 48).double())
    tiny.train()
    direction = torch.randn(2, 14, 64).double()
    gradients = []
    for chosen in ("none", level):
        tiny.gradient_checkpointing = chosen
        tiny.zero_grad()
        torch.manual_seed(1)
        (tiny(*inputs).last_hidden_state * direction).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in tiny.named_parameters()})
    assert_gradients_close(gradients[1], gradients[0], 1e-12)


def test_weights_of_keys_and_values_belong_to_one_norm(tiny_model):
    images, own = torch.randn(2, 3, 48).double(), tiny_model.qformer.kv_weights()
    with pytest.raises(ValueError, match=r"weights must be 4 tensors, of kv_weights\(norm\), got 2"):
        tiny_model.image_kv(images, own)
    weights = tiny_model.qformer.kv_weights(tiny_model.ln_vision)
    torch.testing.assert_close(tiny_model.image_kv(images, weights).buffer, tiny_model.image_kv(images).buffer)


@pytest.mark.parametrize(("layers", "parts"), [(2, [[0]]), (6, [[1, 2], [0]]), (12, [[2, 3, 4, 5], [0, 1]])])
def test_backward_of_keys_and_values_by_parts_is_autograds(tiny_config, layers, parts):
    """Written to what there is, and added; a part's gradients are done when it is."""
    config = QFormerConfig(**tiny_config.to_dict() | {"num_hidden_layers": layers})
    model = Blip2QFormer(config).double()
    qformer, norm = model.qformer, model.ln_vision
    for p in model.parameters():
        nn.init.normal_(p)
    images = torch.randn(2, 5, config.encoder_hidden_size).double()
    made = model.image_kv(images).buffer
    gradient = torch.randn_like(made)
    made.backward(gradient)
    assert [list(part) for part in qformer.kv_parts] == parts
    weights = qformer.kv_weights(norm)
    gradients = GradientBuffers(model.groups)
    for buffer in gradients.buffers:
        buffer.fill_(torch.nan)
    standardized = model.standardize(images)
    for add, times in ((False, 1), (True, 2)):
        backward = qformer.image_kv_backward(
            standardized, gradient, norm=norm, weights=weights, gradients=gradients, add=add
        )
        for part, _ in zip(qformer.kv_parts, backward, strict=True):
            for group in qformer.kv_groups(part):
                expected = torch.cat([p.grad for p in group])
                torch.testing.assert_close(gradients[group], times * expected, rtol=1e-10, atol=1e-10)
        for p in norm.parameters():
            torch.testing.assert_close(gradients[(p,)], times * p.grad, rtol=1e-10, atol=1e-10)
    assert not any(buffer.requires_grad for buffer in gradients.buffers)
