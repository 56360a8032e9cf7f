"""Cross-attention maps and Grad-CAM against Hugging Face's eager module and the original's own hooks."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from qformer_fast import Blip2QFormer, ImageKV, QFormerConfig, use_backend
from qformer_fast.backend import asked_for

LENGTHS = [4, 6, 3]


@pytest.fixture
def pairs(make_captions):
    return torch.randn(3, 5, 48).double() * 3, *make_captions(LENGTHS, 6)


@pytest.fixture
def hf(tiny_model):
    """Hugging Face's eager module with ``tiny_model``'s weights: pairs -> query rows, and {layer: probabilities}."""
    sizes = {name: getattr(tiny_model.config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    sizes |= {name: getattr(tiny_model.config, name) for name in ("num_attention_heads", "intermediate_size")}
    config = Blip2QFormerConfig(
        **sizes,
        encoder_hidden_size=48,
        cross_attention_frequency=2,
        use_qformer_text_input=True,
        attn_implementation="eager",
    )
    theirs = Blip2QFormerModel(config).double().eval()
    state = {name: x for name, x in tiny_model.qformer.to_hf_state_dict().items() if "embeddings." not in name}
    theirs.load_state_dict(state, strict=True)

    def run(images, ids=None, mask=None):
        queries = tiny_model.query_tokens.expand(len(images), -1, -1)
        inputs = {"query_embeds": queries, "encoder_hidden_states": tiny_model.ln_vision(images)}
        if ids is not None:
            tables = tiny_model.qformer.embeddings
            words = tables.word_embeddings(ids) + tables.position_embeddings(torch.arange(ids.shape[1]))
            inputs |= {"query_embeds": torch.cat([queries, words], 1), "query_length": queries.shape[1]}
            inputs["attention_mask"] = torch.cat([torch.ones(queries.shape[:2]), mask], 1)
        out = theirs(**inputs, output_attentions=True)
        return out.last_hidden_state[:, : queries.shape[1]], dict(zip([0, 2], out.cross_attentions, strict=True))

    return run


@torch.no_grad()
def test_maps_equal_hf(tiny_model, pairs, hf):
    for inputs in (pairs, pairs[:1]):
        maps, (_, expected) = tiny_model.cross_attention_maps(*inputs), hf(*inputs)
        assert list(maps) == [0, 2]
        for layer, probs in maps.items():
            assert probs.shape == (3, 4, 8, 5)
            torch.testing.assert_close(probs, expected[layer], rtol=0, atol=1e-10)
            torch.testing.assert_close(probs.sum(-1), torch.ones(3, 4, 8).double())
    assert (maps[2] - tiny_model.cross_attention_maps(*pairs)[2]).abs().max() > 1e-3


def expected_cam(probs, score):
    gradients = torch.autograd.grad(score, list(probs.values()))
    return {
        layer: (p * g.clamp_min(0)).mean(1).detach() for (layer, p), g in zip(probs.items(), gradients, strict=True)
    }


def assert_cams_close(actual, expected, tolerance=1e-8):
    assert list(actual) == list(expected)
    for layer, cam in actual.items():
        assert cam.shape == expected[layer].shape
        assert (cam - expected[layer]).norm() <= tolerance * expected[layer].norm(), layer
        assert cam.min() >= 0 and cam.max() > 0


def test_grad_cam_equals_hf(tiny_model, pairs, hf):
    rows, probs = hf(*pairs)
    score = tiny_model.itm_head(rows)[..., 1].mean(1)
    torch.testing.assert_close(tiny_model.match(*pairs)[:, 1], score)
    assert_cams_close(tiny_model.grad_cam(*pairs), expected_cam(probs, score.sum()))


def originals_maps(original, model, pairs, layers):
    """Attention maps and Grad-CAM of the original's compute_itm by its own hooks, as LAVIS's compute_gradcam reads them
    for BLIP.
    """
    theirs = original.build_stage1(model)
    blocks = {i: theirs.Qformer.bert.encoder.layer[i].crossattention.self for i in layers}
    for block in blocks.values():
        block.save_attention = True
    images, *text = pairs
    theirs.compute_itm(theirs.ln_vision(images), *text).sum().backward()
    maps = {i: block.get_attention_map().detach() for i, block in blocks.items()}
    return maps, {i: (maps[i] * block.get_attn_gradients().clamp(0)).mean(1) for i, block in blocks.items()}


def test_grad_cam_equals_the_originals_hooks(original, tiny_model, pairs):
    maps, cams = originals_maps(original, tiny_model, pairs, [0, 2])
    assert_cams_close(tiny_model.grad_cam(*pairs), cams, 1e-6)  # its weights went through fp32
    torch.testing.assert_close(tiny_model.cross_attention_maps(*pairs), maps, rtol=0, atol=1e-6)


def test_at_blip2s_size_in_fp32(original, make_captions, spread_weights):
    model = Blip2QFormer(QFormerConfig()).eval()
    spread_weights(model, 0.02)
    pairs = torch.randn(2, 257, 1408), *make_captions([12, 7], 12)
    maps, cams = originals_maps(original, model, pairs, [0, 10])
    assert_cams_close(model.grad_cam(*pairs, layers=[0, 10]), cams, 1e-4)
    torch.testing.assert_close(model.cross_attention_maps(*pairs, layers=[0, 10]), maps, rtol=0, atol=1e-5)


def test_layers_are_given_as_asked(tiny_model, pairs):
    for maps in (tiny_model.cross_attention_maps, tiny_model.grad_cam):
        every, swapped, one = maps(*pairs), maps(*pairs, layers=[2, 0]), maps(*pairs, layers=(2,))
        assert list(swapped) == [2, 0] and list(one) == [2]
        for found in (swapped, one):
            for layer, x in found.items():
                assert torch.equal(x, every[layer])
        with pytest.raises(
            ValueError, match=r"layers must be among those with cross-attention, \[0, 2\], got \[1, -1\]"
        ):
            maps(*pairs, layers=[0, 1, -1])


def test_a_pair_does_not_depend_on_its_batch(tiny_model, pairs):
    images, ids, mask = pairs
    together = tiny_model.grad_cam(*pairs)
    for i, length in enumerate(LENGTHS):
        alone = tiny_model.grad_cam(images[i : i + 1], ids[i : i + 1, :length])
        for layer, cam in alone.items():
            torch.testing.assert_close(cam[0], together[layer][i])


def test_keys_and_values_do_as_well_as_tokens(tiny_model, pairs):
    images, *text = pairs
    with torch.no_grad():
        image_kv = tiny_model.image_kv(images)
    for maps in (tiny_model.cross_attention_maps, tiny_model.grad_cam):
        torch.testing.assert_close(maps(image_kv, *text), maps(*pairs))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_stays_as_it_is(tiny_model, pairs, frozen, training, around):
    expected = tiny_model.grad_cam(*pairs), tiny_model.cross_attention_maps(*pairs)
    state = {name: x.clone() for name, x in tiny_model.state_dict().items()}
    tiny_model.train(training).requires_grad_(not frozen)
    tiny_model.qformer.encoder.layer[1].train(not training)
    tiny_model.itm_head.bias.requires_grad_(frozen)
    kept = torch.ones_like(tiny_model.query_tokens)
    tiny_model.query_tokens.grad = kept
    modes = [module.training for module in tiny_model.modules()]
    wanted = [parameter.requires_grad for parameter in tiny_model.parameters()]
    with around():
        inputs = [x.clone() for x in pairs]
        for _ in range(2):
            found = tiny_model.grad_cam(*inputs), tiny_model.cross_attention_maps(*inputs)
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(tiny_model.grad_cam(tiny_model.image_kv(inputs[0]), *inputs[1:]), expected[0])
        assert not any(x.requires_grad for maps in found for x in maps.values())
        assert torch.is_grad_enabled() == (around is torch.enable_grad)
    assert [module.training for module in tiny_model.modules()] == modes
    assert [parameter.requires_grad for parameter in tiny_model.parameters()] == wanted
    assert tiny_model.query_tokens.grad is kept and bool((kept == 1).all())
    assert all(p.grad is None for name, p in tiny_model.named_parameters() if name != "query_tokens")
    assert all(torch.equal(x, state[name]) for name, x in tiny_model.state_dict().items())


def test_the_backend_around_does_not_count(tiny_model, pairs):
    images, ids, mask = pairs
    tiny_model.float()
    expected = [f(images.float(), ids, mask) for f in (tiny_model.grad_cam, tiny_model.cross_attention_maps)]
    with use_backend("triton"):
        found = [f(images.float(), ids, mask) for f in (tiny_model.grad_cam, tiny_model.cross_attention_maps)]
        assert asked_for() == "triton"
    assert asked_for() is None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_sixteen_bit_models_give_fp32_maps(tiny_model, pairs):
    images, ids, mask = pairs
    expected = tiny_model.grad_cam(*pairs), tiny_model.cross_attention_maps(*pairs)
    tiny_model.bfloat16()
    found = (f(images.bfloat16(), ids, mask) for f in (tiny_model.grad_cam, tiny_model.cross_attention_maps))
    for maps, exact in zip(found, expected, strict=True):
        for layer, x in maps.items():
            assert x.dtype == torch.float32
            assert (x - exact[layer]).norm() <= 0.1 * exact[layer].norm()
    for x in maps.values():
        torch.testing.assert_close(x.sum(-1), torch.ones(3, 4, 8))


def test_autocast_does_not_change_grad_cam(tiny_model, pairs):
    images, ids, mask = pairs
    tiny_model.float()
    expected = tiny_model.grad_cam(images.float(), ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert_cams_close(tiny_model.grad_cam(images.float(), ids, mask), expected, 1e-6)
        for x in tiny_model.cross_attention_maps(images.float(), ids, mask).values():
            torch.testing.assert_close(x.sum(-1), torch.ones(3, 4, 8))


@pytest.mark.cuda
def test_a_gpu_gives_the_cpus_maps(tiny_model, pairs):
    expected = [f(*pairs) for f in (tiny_model.grad_cam, tiny_model.cross_attention_maps)]
    tiny_model.float().cuda()
    images, ids, mask = (x.cuda() for x in pairs)
    found = [f(images.float(), ids, mask) for f in (tiny_model.grad_cam, tiny_model.cross_attention_maps)]
    for maps, exact in zip(found, expected, strict=True):
        for layer, x in maps.items():
            assert x.is_cuda and (x.cpu() - exact[layer]).norm() <= 1e-3 * exact[layer].norm()


@pytest.mark.parametrize("additive", [False, True])
def test_hidden_tokens_have_no_part(tiny_model, pairs, additive):
    images, *text = pairs
    mask = torch.ones(3, 1, 5, dtype=torch.bool)
    mask[0, 0, 3:], mask[1] = False, False
    given = torch.zeros(3, 1, 5).double().masked_fill(~mask, -torch.inf) if additive else mask
    with torch.no_grad():
        image_kv = ImageKV(tiny_model.image_kv(images).buffer, given)
        shorter = ImageKV(image_kv.buffer[:1, :3])
    for maps in (tiny_model.cross_attention_maps, tiny_model.grad_cam):
        found, short = maps(image_kv, *text), maps(shorter, *(x[:1] for x in text))
        for layer, x in found.items():
            assert x.isfinite().all() and x[1].abs().max() == 0 and x[0, ..., 3:].abs().max() == 0
            torch.testing.assert_close(x[0, ..., :3], short[layer][0])
    torch.testing.assert_close(found[0][2], tiny_model.grad_cam(images, *text)[0][2])


def test_what_maps_refuse(tiny_model, pairs):
    images, ids, mask = pairs
    for maps in (tiny_model.cross_attention_maps, tiny_model.grad_cam):
        with pytest.raises(ValueError, match="image_index must name one image for each of 2 texts, got 3"):
            maps(images, ids[:2], mask[:2])
        with pytest.raises(ValueError, match=r"image_embeds must be \(images, tokens, 48\)"):
            maps(images[..., :40], ids, mask)


def test_the_formula_on_one_cross_attention(pairs):
    """By hand, with gradients by differences of what stands behind the probabilities of the only layer."""
    config = QFormerConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        encoder_hidden_size=48,
        num_query_tokens=2,
    )
    model = Blip2QFormer(config, embed_dim=8).double().eval()
    images, ids, mask = (x[:1] for x in pairs)
    layer = model.qformer.encoder.layer[0]
    seen = []
    handle = layer.crossattention.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0]))
    with torch.no_grad():
        probs = model.cross_attention_maps(images, ids, mask)[0]
    handle.remove()
    queries, tokens = seen[0], model.ln_vision(images)
    v = layer.crossattention.attention.value(tokens).unflatten(-1, (2, 8)).transpose(1, 2)

    @torch.no_grad()
    def score(probs):
        context = (probs @ v).transpose(1, 2).flatten(2)[0]
        out = layer.crossattention.output
        rows = out.LayerNorm(out.dense(context) + queries)
        wide = F.gelu(layer.intermediate_query.dense(rows))
        rows = layer.output_query.LayerNorm(layer.output_query.dense(wide) + rows)
        return float(model.itm_head(rows)[:, 1].mean())

    assert score(probs) == pytest.approx(float(model.match(images, ids, mask)[0, 1].detach()), abs=1e-10)
    step, gradient = 1e-5, torch.zeros_like(probs)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in probs.shape)).tolist():
        moved = torch.zeros_like(probs)
        moved[tuple(place)] = step
        gradient[tuple(place)] = (score(probs + moved) - score(probs - moved)) / (2 * step)
    expected = (probs * gradient.clamp_min(0)).mean(1)
    torch.testing.assert_close(model.grad_cam(images, ids, mask)[0], expected, rtol=1e-4, atol=1e-10)
