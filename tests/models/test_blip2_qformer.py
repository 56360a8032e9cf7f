"""Stage 1 in two sweeps against the original's own code and against the original-order reference."""

import math
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from qformer_fast import Blip2QFormer, QFormer, QFormerConfig
from qformer_fast.integrations.checkpoints import convert
from qformer_fast.models.blip2_qformer import init_from_bert
from qformer_fast.reference.stage1 import original_order_stage1

LOSSES = ("loss_itc", "loss_itm", "loss_itg", "loss")


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run(model, forward, *args, **kwargs):
    model.zero_grad()
    out = forward(*args, **kwargs)
    out.loss.backward()
    return out, gradients(model)


def assert_losses_close(actual, expected, tolerance):
    for name in LOSSES:
        assert abs(float(getattr(actual, name).detach() - getattr(expected, name).detach())) <= tolerance, name


def neighbours(batch):
    """Fixed negatives: the next image, the text after the next."""
    return (torch.arange(batch) + 1) % batch, (torch.arange(batch) + 2) % batch


def test_trainable_parameters_of_blip2():
    with torch.device("meta"):
        stage1 = Blip2QFormer(QFormerConfig())
        stage2 = QFormer(QFormerConfig(use_qformer_text_input=False))
        language_projection = torch.nn.Linear(768, 2560)

    def count(*parts):
        return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)

    assert count(stage1) == 186_705_470
    assert count(stage2, stage1.ln_vision, language_projection) + stage1.query_tokens.numel() == 107_133_696


def test_equals_the_originals_own_code(original, tiny_config, make_captions, spread_weights, assert_gradients_close):
    """LAVIS's Blip2Qformer.forward, its file unchanged, from one set of weights."""
    model = Blip2QFormer(tiny_config, embed_dim=32).double().eval()
    spread_weights(model)
    images, (ids, mask) = torch.randn(7, 17, 48).double(), make_captions([2, 5, 32, 7, 12, 3, 20], 32)
    negatives = neighbours(7)
    theirs = original.build_stage1(model)
    with original.process_group(), original.fixed_negatives(*negatives):
        expected = theirs({"image": images, "text_input": (ids, mask)})
    expected.loss.backward()
    actual, ours = run(model, model, images, ids, mask, negatives=negatives)
    for name, value in (
        ("loss_itc", expected.loss_itc),
        ("loss_itm", expected.loss_itm),
        ("loss_itg", expected.loss_lm),
    ):
        assert abs(float((getattr(actual, name) - value).detach())) <= 1e-6, name
    converted = convert({name: p.grad for name, p in theirs.named_parameters()}, "lavis", "qformer_fast")
    assert_gradients_close(ours, converted, 1e-4)


@pytest.fixture(scope="module")
def wide():
    """BLIP-2's width and image tokens, fewer layers."""
    torch.manual_seed(0)
    model = Blip2QFormer(QFormerConfig(num_hidden_layers=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


IMAGE_IDS = [None, ["a", "b", "a", "c", "b", "a", "d"], torch.tensor([3, 3, 3, 3, 9, 9, 1])]


@pytest.mark.parametrize(
    ("batch", "tokens", "image_ids"),
    [
        (1, 257, None),
        (2, 1, None),
        (2, 677, IMAGE_IDS[1]),
        (7, 17, IMAGE_IDS[2]),
        (7, 49, None),
        (7, 257, IMAGE_IDS[1]),
    ],
)
def test_equals_the_original_order_at_full_width(wide, batch, tokens, image_ids, make_captions, assert_gradients_close):
    images = torch.randn(batch, tokens, 1408)
    ids, mask = make_captions([2, 32, 9, 5, 17, 3, 12][-batch:], 32)
    options = dict(negatives=neighbours(batch), image_ids=None if image_ids is None else image_ids[:batch])
    actual, ours = run(wide, wide, images, ids, mask, **options)
    expected, theirs = run(wide, lambda *a, **k: original_order_stage1(wide, *a, **k), images, ids, mask, **options)
    assert_losses_close(actual, expected, 1e-5)
    # a softmax over one token is 1 whatever its score
    assert_gradients_close(ours, theirs, 1e-3, zero=r"crossattention.*(query|key)\." if tokens == 1 else "$^")
    torch.testing.assert_close(actual.itm_logits, expected.itm_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(actual.sim_i2t, expected.sim_i2t, atol=1e-4, rtol=0)
    assert torch.equal(actual.itm_labels, expected.itm_labels)


def test_equals_the_original_order_at_blip2_size(make_captions, assert_gradients_close):
    """All 12 layers at once; fp32, one batch."""
    model = Blip2QFormer(QFormerConfig()).eval()
    images, (ids, mask) = torch.randn(2, 257, 1408), make_captions([6, 18], 32)
    actual, ours = run(model, model, images, ids, mask, negatives=neighbours(2))
    expected, theirs = run(
        model, lambda *a, **k: original_order_stage1(model, *a, **k), images, ids, mask, negatives=neighbours(2)
    )
    assert_losses_close(actual, expected, 1e-5)
    assert_gradients_close(ours, theirs, 1e-3)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("image_ids", IMAGE_IDS, ids=["none", "names", "tensor"])
def test_equals_the_original_order_in_fp64(tiny_model, batch, image_ids, make_captions, assert_gradients_close):
    images, (ids, mask) = torch.randn(batch, 9, 48).double(), make_captions([4, 11, 2, 7, 9, 3, 6][:batch], 11)
    options = dict(negatives=neighbours(batch), image_ids=None if image_ids is None else image_ids[:batch])
    actual, ours = run(tiny_model, tiny_model, images, ids, mask, **options)
    expected, theirs = run(
        tiny_model, lambda *a, **k: original_order_stage1(tiny_model, *a, **k), images, ids, mask, **options
    )
    assert_losses_close(actual, expected, 1e-12)
    assert_gradients_close(ours, theirs, 1e-9)


def test_padding_changes_nothing(tiny_model, make_captions):
    images, (ids, mask) = torch.randn(3, 9, 48).double(), make_captions([4, 8, 6], 8)
    wide_ids, wide_mask = F.pad(ids, (0, 5)), F.pad(mask, (0, 5))
    narrow = tiny_model(images, ids, mask, negatives=neighbours(3))
    padded = tiny_model(images, wide_ids, wide_mask, negatives=neighbours(3))
    assert_losses_close(padded, narrow, 1e-12)


def test_local_gradients_are_the_originals_and_full_ones_are_clips(tiny_config, make_captions, spread_weights):
    """With both flows on, the ITC gradient is that of the written-out loss without any detach."""
    images, (ids, mask) = torch.randn(4, 9, 48).double(), make_captions([4, 8, 6, 3], 8)
    model = Blip2QFormer(tiny_config, embed_dim=32, local_gradients=False).double().eval()
    spread_weights(model)
    model(images, ids, mask).loss_itc.backward()
    actual = gradients_that_exist(model)
    model.zero_grad()
    image, text = model.image_features(images), model.text_features(ids, mask)
    scores = torch.stack([torch.stack([(i @ t).max() for t in text]) for i in image]) / model.temp
    target = torch.full((4, 4), 0.1 / 4, dtype=torch.float64) + 0.9 * torch.eye(4).double()
    rows = -(target * scores.log_softmax(1)).sum(1).mean()
    columns = -(target * scores.T.log_softmax(1)).sum(1).mean()
    ((rows + columns) / 2).backward()
    expected = gradients_that_exist(model)
    for name in ("vision_proj.weight", "text_proj.weight", "temp", "ln_vision.weight", "query_tokens"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-8, atol=1e-12)
    model.local_gradients = True
    model.zero_grad()
    model(images, ids, mask).loss_itc.backward()
    assert (model.vision_proj.weight.grad - actual["vision_proj.weight"]).norm() > 1e-3 * actual[
        "vision_proj.weight"
    ].norm()


def gradients_that_exist(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_products_over_image_tokens(model, images, ids, mask):
    """Matrix products of forward and backward whose FLOPs are those of one product over all image tokens."""
    config = model.config
    rows, width = images.shape[0] * images.shape[1], images.shape[2]
    one = 2 * rows * width * 2 * config.hidden_size * len(config.cross_attention_layers)
    out = model(images, ids, mask, negatives=neighbours(len(images)))
    seen = []

    class Count(FlopCounterMode):
        def _count_flops(self, func_packet, result, args, kwargs):
            name = func_packet.__name__
            if name in ("mm", "addmm", "bmm"):
                before = self.get_total_flops()
                returned = super()._count_flops(func_packet, result, args, kwargs)
                seen.append(self.get_total_flops() - before)
                return returned
            return super()._count_flops(func_packet, result, args, kwargs)

    with Count(display=False):
        out.loss.backward()
    return seen.count(one)


def test_no_gradient_product_over_frozen_image_tokens(tiny_model, make_captions, assert_gradients_close):
    ids, mask = make_captions([4, 8, 6], 8)
    frozen = torch.randn(3, 23, 48).double()
    wanted = frozen.clone().requires_grad_()
    assert count_products_over_image_tokens(tiny_model, frozen, ids, mask) == 1, "dW' alone"
    without = gradients(tiny_model)
    tiny_model.zero_grad()
    assert count_products_over_image_tokens(tiny_model, wanted, ids, mask) == 2, "dW' and dx"
    assert_gradients_close(gradients(tiny_model), without, 1e-12)
    reference = frozen.clone().requires_grad_()
    tiny_model.zero_grad()
    original_order_stage1(tiny_model, reference, ids, mask, negatives=neighbours(3)).loss.backward()
    torch.testing.assert_close(wanted.grad, reference.grad, rtol=1e-9, atol=1e-12)
    assert_gradients_close(gradients(tiny_model), without, 1e-9)


@pytest.mark.parametrize("level", ["feed_forward", "layer"])
def test_gradient_checkpointing_keeps_all_losses_and_gradients(
    tiny_model, make_captions, assert_gradients_close, level
):
    images, (ids, mask) = torch.randn(3, 9, 48).double(), make_captions([4, 8, 6], 8)
    tiny_model.train()
    results = []
    for on in (False, True):
        tiny_model.gradient_checkpointing_enable(level) if on else tiny_model.gradient_checkpointing_disable()
        torch.manual_seed(3)
        results.append(run(tiny_model, tiny_model, images, ids, mask, negatives=neighbours(3)))
    assert_losses_close(results[1][0], results[0][0], 1e-12)
    assert_gradients_close(results[1][1], results[0][1], 1e-9)


def test_checkpointing_levels_keep_less(tiny_model, make_captions):
    """Bytes of the tensors that autograd keeps, each storage counted once."""
    images, (ids, mask) = torch.randn(3, 9, 48).double(), make_captions([4, 8, 6], 8)
    tiny_model.train()
    kept = []
    for level in ("none", "feed_forward", "layer"):
        tiny_model.gradient_checkpointing_enable(level)
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = tiny_model(images, ids, mask, negatives=neighbours(3))
        kept.append(sum(sizes.values()))
        del out
    saved_by_feed_forward, saved_by_layer = kept[0] - kept[1], kept[0] - kept[2]
    assert saved_by_layer > saved_by_feed_forward > 0.25 * saved_by_layer
    with pytest.raises(ValueError, match=r"level must be one of \('none', 'feed_forward', 'layer'\), got 'all'"):
        tiny_model.gradient_checkpointing_enable("all")


def test_negatives_avoid_the_same_image(tiny_model, make_captions):
    images, (ids, mask) = torch.randn(4, 5, 48).double(), make_captions([4, 8, 6, 5], 8)
    names = ["x", "y", "x", "z"]
    for _ in range(20):
        image_index, text_index = tiny_model(images, ids, mask, image_ids=names).negatives
        for drawn in (image_index, text_index):
            assert all(names[own] != names[other] for own, other in enumerate(drawn.tolist()))


def test_negatives_follow_the_similarities(tiny_model, make_captions):
    """Draws have the softmax's frequencies: t2i chooses images, i2t chooses texts."""
    images, (ids, mask) = torch.randn(4, 5, 48).double(), make_captions([4, 8, 6, 5], 8)
    out = tiny_model(images, ids, mask)
    eye = torch.eye(4, dtype=torch.bool)
    wanted = [s.masked_fill(eye, -math.inf).softmax(1) for s in (out.sim_t2i, out.sim_i2t)]
    counts = [torch.zeros(4, 4), torch.zeros(4, 4)]
    repeats = 4000
    for _ in range(repeats):
        drawn = tiny_model.draw_negatives(out, eye)
        for count, index in zip(counts, drawn, strict=True):
            count[torch.arange(4), index] += 1
    for count, expected in zip(counts, wanted, strict=True):
        assert (count / repeats - expected).abs().max() < 0.04


def test_match_scores_the_pairs_of_the_matching_loss(tiny_model, make_captions):
    images, (ids, mask) = torch.randn(3, 5, 48).double(), make_captions([4, 8, 6], 8)
    image_index, text_index = neighbours(3)
    expected = tiny_model(images, ids, mask, negatives=(image_index, text_index)).itm_logits
    own = torch.arange(3)
    texts = torch.cat([own, own, text_index])
    actual = tiny_model.match(
        tiny_model.image_kv(images), ids[texts], mask[texts], image_index=torch.cat([own, image_index, own])
    )
    torch.testing.assert_close(actual.detach(), expected)


def test_features_are_those_of_the_contrastive_loss(tiny_model, make_captions):
    images, (ids, mask) = torch.randn(3, 5, 48).double(), make_captions([4, 8, 6], 8)
    image, text = tiny_model.image_features(images), tiny_model.text_features(ids, mask)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3, 8).double())
    cosine = torch.einsum("iqd,td->itq", image, text).amax(-1)
    torch.testing.assert_close((cosine / tiny_model.temp).detach(), tiny_model(images, ids, mask).sim_i2t)


def uncached_logits(model, images, tokens):
    """Next-token logits after ``tokens`` by a whole multi-modal causal pass, nothing cached."""
    ids = torch.tensor([tokens])
    out = model.qformer(model.query_tokens, ids, None, model.ln_vision(images), mask="multimodal_causal").text_output[
        :, -1
    ]
    return model.next_token_logits(out)[0]


@pytest.fixture
def talkative(tiny_config, spread_weights):
    """A small model of 40 words whose captions differ from image to image."""
    config = QFormerConfig(**{**tiny_config.to_dict(), "vocab_size": 40})
    model = Blip2QFormer(config, embed_dim=32, dec_token_id=39, sep_token_id=2).double().eval()
    spread_weights(model, 0.3)
    return model


@torch.no_grad()
def test_greedy_generation_equals_uncached_argmax(talkative):
    images = torch.randn(3, 5, 48).double() * 3
    actual = talkative.generate(images, max_new_tokens=8)
    for image, row in zip(images, actual.tolist(), strict=True):
        tokens = [39]
        while len(tokens) < 9 and (tokens[-1] != 2 or len(tokens) == 1):
            tokens.append(int(uncached_logits(talkative, image[None], tokens).argmax()))
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {0}


@torch.no_grad()
def test_beam_search_finds_the_best_of_all_short_captions(tiny_config, spread_weights):
    """With as many beams as words, two steps of beam search are exhaustive."""
    config = QFormerConfig(**{**tiny_config.to_dict(), "vocab_size": 12})
    model = Blip2QFormer(config, embed_dim=32, dec_token_id=11, sep_token_id=2).double().eval()
    spread_weights(model, 0.3)
    images = torch.randn(2, 5, 48).double() * 3
    # 2 is the end of a caption, forbidden for two tokens so that all hypotheses have one length
    actual = model.generate(images, max_new_tokens=2, min_new_tokens=2, num_beams=12, length_penalty=0.0)
    for image, row in zip(images, actual.tolist(), strict=True):
        scores = {}
        first = uncached_logits(model, image[None], [11])
        first[2] = -math.inf
        for a in range(12):
            if a == 2:
                continue
            second = uncached_logits(model, image[None], [11, a])
            second[2] = -math.inf
            for b, score in enumerate((first.log_softmax(0)[a] + second.log_softmax(0)).tolist()):
                scores[a, b] = score
        best = max(scores, key=scores.get)
        assert tuple(row[1:3]) == best


@torch.no_grad()
def test_nucleus_sampling_stays_in_the_nucleus(talkative):
    image = torch.randn(1, 5, 48).double() * 3
    p = uncached_logits(talkative, image, [39]).softmax(0)
    order = p.argsort(descending=True)
    nucleus = set(order[: int((p[order].cumsum(0) < 0.6).sum()) + 1].tolist())
    drawn = talkative.generate(image, max_new_tokens=1, do_sample=True, top_p=0.6, top_k=0, num_return_sequences=300)[
        :, 1
    ].tolist()
    assert set(drawn) == nucleus


def test_generation_leaves_the_training_mode(talkative):
    talkative.train()
    talkative.generate(torch.randn(1, 5, 48).double(), max_new_tokens=2)
    assert talkative.training and talkative.qformer.training


def test_bert_initialisation_copies_query_layers_and_leaves_the_rest_fresh(tiny_config):
    from transformers import BertConfig, BertForMaskedLM

    bert = BertForMaskedLM(
        BertConfig(hidden_size=64, num_hidden_layers=5, num_attention_heads=4, intermediate_size=128, vocab_size=30522)
    )
    theirs = bert.state_dict()
    model = Blip2QFormer(tiny_config)
    fresh = {name: x.clone() for name, x in model.state_dict().items()}
    report = init_from_bert(model, theirs)
    state = model.state_dict()
    assert torch.equal(
        state["qformer.embeddings.word_embeddings.weight"][:30522], theirs["bert.embeddings.word_embeddings.weight"]
    )
    assert torch.equal(
        state["qformer.embeddings.word_embeddings.weight"][30522],
        fresh["qformer.embeddings.word_embeddings.weight"][30522],
    )
    for i in range(4):
        ours, bert_layer = f"qformer.encoder.layer.{i}.", f"bert.encoder.layer.{i}."
        for part in ("intermediate.dense.weight", "output.dense.bias", "output.LayerNorm.weight"):
            expected = theirs[bert_layer + part]
            head, tail = part.split(".", 1)
            assert torch.equal(state[ours + part], expected)
            assert torch.equal(state[f"{ours}{head}_query.{tail}"], expected)
        assert torch.equal(
            state[ours + "attention.attention.key.weight"], theirs[bert_layer + "attention.self.key.weight"]
        )
        assert torch.equal(
            state[ours + "attention.output.dense.weight"], theirs[bert_layer + "attention.output.dense.weight"]
        )
    untouched = [
        name for name in state if "crossattention" in name or name in ("query_tokens", "temp", "itm_head.weight")
    ]
    assert all(torch.equal(state[name], fresh[name]) and name in report.missing for name in untouched)
    assert torch.equal(state["lm_head.transform.dense.weight"], theirs["cls.predictions.transform.dense.weight"])
    assert all("token_type" in n or "pooler" in n or ".layer.4." in n or "decoder" in n for n in report.unexpected)


def test_fresh_queries_are_normal_and_identical_ones_are_named(tiny_config):
    model = Blip2QFormer(QFormerConfig())
    assert abs(float(model.query_tokens.detach().std()) - 0.02) < 1e-3
    tiny = Blip2QFormer(tiny_config)
    state = tiny.state_dict()
    state["query_tokens"] = torch.zeros_like(state["query_tokens"])
    with pytest.warns(UserWarning, match="all query_tokens are identical"):
        tiny.load_lavis_state_dict(convert(state, "qformer_fast", "lavis"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.load_lavis_state_dict(Blip2QFormer(tiny_config).to_lavis_state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(image_embeds=torch.randn(2, 5, 47)), r"image_embeds must be \(images, tokens, 48\)"),
        (dict(image_embeds=torch.full((2, 5, 48), math.nan)), "image_embeds must be finite, got NaN or Inf"),
        (dict(image_embeds=torch.full((2, 5, 48), math.inf)), "image_embeds must be finite, got NaN or Inf"),
        (dict(input_ids=torch.ones(3, 6).long(), attention_mask=None), "input_ids must have batch size 2"),
        (dict(input_ids=torch.ones(2, 513).long(), attention_mask=None), "input_ids is 513 tokens long"),
        (dict(attention_mask=torch.tensor([[1] * 6, [0] * 6])), r"attention_mask must keep .* rows \[1\]"),
        (dict(attention_mask=torch.tensor([[1] + [0] * 5] * 2)), "attention_mask must keep at least two tokens"),
        (dict(input_ids=torch.full((2, 6), 30523)), r"input_ids must lie in \[0, 30523\), got 30523"),
        (dict(image_ids=["a"]), "image_ids must name 2 images, got 1"),
        (dict(negatives=(torch.tensor([1, 2]), torch.tensor([1, 0]))), r"negatives must lie in \[0, 2\), got 2"),
        (dict(negatives=(torch.tensor([1, -1]), torch.tensor([1, 0]))), r"negatives must lie in \[0, 2\), got -1"),
        (dict(negatives=(torch.tensor([1]), torch.tensor([1, 0]))), "negatives must be two indices"),
    ],
)
def test_bad_input_is_named(tiny_config, change, match):
    model = Blip2QFormer(tiny_config)
    good = dict(
        image_embeds=torch.randn(2, 5, 48),
        input_ids=torch.randint(1000, 30000, (2, 6)),
        attention_mask=torch.ones(2, 6).long(),
    )
    model(**good)
    with pytest.raises(ValueError, match=match):
        model(**{**good, **change})


def test_match_names_a_bad_image_index(tiny_model, make_captions):
    ids, mask = make_captions([4, 6], 6)
    with pytest.raises(ValueError, match=r"image_index must lie in \[0, 1\), got \[1\]"):
        tiny_model.match(torch.randn(1, 5, 48).double(), ids, mask, image_index=[0, 1])
    with pytest.raises(ValueError, match="image_index must name one image for each of 2 texts, got 1"):
        tiny_model.match(torch.randn(1, 5, 48).double(), ids, mask)


@pytest.mark.parametrize("field", ["dec_token_id", "sep_token_id"])
def test_special_tokens_must_be_words(tiny_config, field):
    with pytest.raises(ValueError, match=f"{field} must lie in the vocabulary"):
        Blip2QFormer(tiny_config, **{field: 30523})
