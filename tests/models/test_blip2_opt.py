"""Stage 2 written out: text chosen token by token, one image, a frozen Q-Former, what generating leaves behind."""

import copy
import dataclasses

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qformer_fast import Blip2OPT

PAD, START, VOCAB = 1, 2, 24
SPECIAL = dict(
    vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=START, bos_token_id=START, tie_word_embeddings=False
)  # fmt: skip
OPT_SIZES = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2)
BUILD = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**SPECIAL, **OPT_SIZES, max_position_embeddings=64, dropout=0.5)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SPECIAL, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            **SPECIAL, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=2,
            decoder_start_token_id=PAD, dropout_rate=0.5,
        )
    ),
}  # fmt: skip
PROMPTS = [4, 1, 2, 6, 3, 1]


@pytest.fixture
def build(tiny_config, spread_weights):
    """Without dropout in the Q-Former unless asked for, weights large enough for images to decide what is said."""

    def make(name="opt", *, language_model_dropout=False, **changes):
        rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config = dataclasses.replace(tiny_config, use_qformer_text_input=False, **(rates | changes))
        language_model = BUILD[name]()
        spread_weights(language_model, 0.3)
        with torch.no_grad():
            for parameter in (x for key, x in language_model.named_parameters() if "EncDecAttention" in key):
                parameter.mul_(3)  # T5 would say much the same of all images
        model = Blip2OPT(config, language_model, language_model_dropout=language_model_dropout)
        spread_weights(model, 0.15)
        return model.eval()

    return make


def rows(lengths, *, left=False):
    """Random ids (batch, longest) that begin with START, their mask, and the ids as labels."""
    width = max(lengths)
    place = torch.arange(width).flip(0) if left else torch.arange(width)
    mask = (place < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(6, VOCAB, mask.shape).masked_fill(mask == 0, PAD)
    ids[torch.arange(len(ids)), mask.argmax(1)] = START
    return ids, mask, ids.masked_fill(mask == 0, -100)


def best_tokens(language_model, inputs, end=None, at_least=0, at_most=8):
    """The likeliest token again and again after inputs (1, length, width), the whole text anew for each."""
    tokens = [PAD] if language_model.config.is_encoder_decoder else []
    words = language_model.get_input_embeddings()
    for number in range(at_most):
        if language_model.config.is_encoder_decoder:
            logits = language_model(inputs_embeds=inputs, decoder_input_ids=torch.tensor([tokens])).logits
        else:
            so_far = words(torch.tensor([tokens], dtype=torch.int64))
            logits = language_model(inputs_embeds=torch.cat([inputs, so_far], dim=1)).logits
        chances = logits[0, -1].clone()
        if number < at_least:
            chances[end] = -torch.inf
        tokens.append(int(chances.argmax()))
        if tokens[-1] == end:
            break
    return tokens


@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_greedy_text_is_the_likeliest_token_again_and_again(build, name):
    """Of all images at once, behind padded prompts, v. one by one without padding, cache or transformers' generate."""
    model = build(name)
    images = 3 * torch.randn(len(PROMPTS), 5, 48)
    ids, mask, _ = rows(PROMPTS, left=name != "t5")
    inputs = []
    for image, row, kept in zip(images, ids, mask.bool(), strict=True):
        prompt = model.language_model.get_input_embeddings()(row[None, kept])
        inputs.append(torch.cat([model.language_projection(model.encode_images(image[None])), prompt], dim=1))
    end = best_tokens(model.language_model, inputs[0])[3]  # so that some end early
    expected = [best_tokens(model.language_model, x, end, at_least=2) for x in inputs]
    lengths = set(map(len, expected))
    longest = max(lengths)
    expected = [tokens + [PAD] * (longest - len(tokens)) for tokens in expected]
    limits = dict(min_new_tokens=2, max_new_tokens=8, eos_token_id=end, pad_token_id=PAD)
    assert model.generate(images, ids, mask, do_sample=False, **limits).tolist() == expected
    assert len(set(map(tuple, expected))) >= 4, f"the texts hardly differ: {expected}"
    assert len(lengths) >= 2, f"no text ends before another: {expected}"


@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_one_image_and_its_gradient(build, original, assert_gradients_close, name, queries):
    """v. the original's Qformer.py; tokens that want a gradient, as of an image encoder that is trained too."""
    model = build(name, num_query_tokens=queries)
    theirs = original.build_stage2(model, tokenizer=None)
    image, (ids, mask, labels) = torch.randn(1, 5, 48), rows([4])
    gradients = {}
    for side in ("ours", "theirs"):
        tokens = image.clone().requires_grad_()
        if side == "ours":
            loss = model(tokens, ids, mask, labels).loss
        else:
            query_output = theirs.Qformer.bert(
                query_embeds=theirs.query_tokens,
                encoder_hidden_states=theirs.ln_vision(tokens),
                encoder_attention_mask=torch.ones(1, 5),
                return_dict=True,
            ).last_hidden_state
            prefix = getattr(theirs, f"{name}_proj")(query_output)
            words = model.language_model.get_input_embeddings()(ids)
            behind = [] if name == "t5" else [labels.new_full((1, queries), -100)]
            loss = model.language_model(
                inputs_embeds=torch.cat([prefix, words], dim=1), labels=torch.cat([*behind, labels], dim=1)
            ).loss
        loss.backward()
        queries_of = (model if side == "ours" else theirs).query_tokens
        gradients[side] = {"loss": loss.detach(), "image_embeds": tokens.grad, "query_tokens": queries_of.grad}
    assert_gradients_close(gradients["ours"], gradients["theirs"], 1e-4)
    assert model.generate(image, num_beams=3, max_new_tokens=4).shape[0] == 1


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_the_projection_learns_beside_a_frozen_q_former(build, name):
    model = build(name).train()
    images, text = torch.randn(3, 5, 48), rows([4, 2, 6])
    model(images, *text).loss.backward()
    expected = model.language_projection.weight.grad.clone()
    model.zero_grad()
    for part in (model.qformer, model.ln_vision, model.query_tokens):
        part.requires_grad_(False)
    model(images, *text).loss.backward()
    torch.testing.assert_close(model.language_projection.weight.grad, expected)
    learned = {name for name, x in model.named_parameters() if x.grad is not None}
    assert learned == {"language_projection.weight", "language_projection.bias"}


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_generating_is_without_dropout_and_leaves_the_modes(build, name):
    model = build(name, language_model_dropout=True, hidden_dropout_prob=0.5)
    images, options = 3 * torch.randn(4, 5, 48), dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(images, **options)
    assert len(expected.unique(dim=0)) >= 3, f"the texts hardly differ: {expected}"
    model.train()
    model.ln_vision.eval()
    parts = [*model.modules(), *model.language_model.modules()]
    before = [part.training for part in parts]
    assert model.language_model.training and model.qformer.training and not model.ln_vision.training
    assert torch.equal(model.generate(images, **options), expected)
    assert [part.training for part in parts] == before
    with pytest.raises(ValueError, match=r"input_ids must be \(4, length\), got \(3, 2\)"):
        model.generate(images, torch.full((3, 2), 7))
    assert [part.training for part in parts] == before


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_inference_mode_and_training_after_it(build, name):
    """Weights that were packed in inference mode are none that training could not use, or would not renew."""
    model, twin = build(name), None
    images, text = 3 * torch.randn(3, 5, 48), rows([4, 2, 6])
    expected, twin = model.generate(images, max_new_tokens=6), copy.deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(model.generate(images, max_new_tokens=6), expected)
        loss = model(images, *text).loss
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        each(images, *text).loss.backward()
        optimizer.step()
    with torch.inference_mode():
        changed = model(images, *text).loss
        torch.testing.assert_close(changed, twin(images, *text).loss)
        assert abs(changed - loss) > 1e-3
        assert torch.equal(model.generate(images, max_new_tokens=6), twin.generate(images, max_new_tokens=6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_text_of_a_narrow_language_model_under_autocast(build, dtype):
    """It runs in its own dtype whatever autocast's; the state of autocast is as it was after it."""
    model = build("opt")
    model.language_model.to(dtype)
    images, seen = 3 * torch.randn(4, 5, 48), []
    layer = model.language_model.model.decoder.layers[0].fc1
    hook = layer.register_forward_hook(lambda _layer, _inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = model.generate(images, max_new_tokens=5)
        assert torch.is_autocast_enabled("cpu")
    hook.remove()
    assert set(seen) == {dtype} and len(found) == 4
    # the first token is the likeliest of the plain model too, but where two are as good as one another
    ids, wide = torch.full((4, 1), START), copy.deepcopy(model.language_model).float()
    with torch.no_grad():
        prefix = model.language_projection(model.encode_images(images))
        inputs = torch.cat([prefix, wide.get_input_embeddings()(ids)], dim=1)
        logits = wide(inputs_embeds=inputs).logits[:, -1]
    assert (logits.amax(-1) - logits.gather(1, found[:, :1]).squeeze(1)).max() < 0.1 * logits.std()
