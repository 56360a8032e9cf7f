"""A frozen language model behind the Q-Former v. transformers' own labels path; what is saved, frozen and refused."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.activations import ACT2FN

from qformer_fast import Blip2OPT, Blip2QFormer, ops
from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.models.language import LanguageProjection, load_language_model

HIDDEN, QUERIES, VOCAB = 24, 3, 40
SPECIAL = dict(vocab_size=VOCAB, pad_token_id=1, eos_token_id=2, bos_token_id=2)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def t5(tied):
    config = T5Config(
        **SPECIAL, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def opt():
    """Its rows narrower outside than inside, as OPT-350m's."""
    sizes = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    return OPTForCausalLM(OPTConfig(**SPECIAL, **sizes, word_embed_proj_dim=16, do_layer_norm_before=False))


BUILD = {
    "gpt2-tied": lambda: GPT2LMHeadModel(GPT2Config(**SPECIAL, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
    "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(**SPECIAL, **SIZES, tie_word_embeddings=False)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SPECIAL, **SIZES)),
    "opt": opt,
    "t5-tied": lambda: t5(True),
    "t5-untied": lambda: t5(False),
}
CAUSAL = [name for name in BUILD if not name.startswith("t5")]


@pytest.fixture
def build(spread_weights):
    """A projection to a tiny random language model, its weights large enough to matter."""

    def make(name="opt", **options):
        language_model = BUILD[name]()
        spread_weights(language_model, 0.1)
        return LanguageProjection(HIDDEN, language_model, **options)

    return make


def padded(lengths, *, left=False):
    """Random ids (batch, longest), their mask, and the ids as labels."""
    width = max(lengths)
    place = torch.arange(width).flip(0) if left else torch.arange(width)
    mask = (place < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, VOCAB, mask.shape).masked_fill(mask == 0, 1)
    return ids, mask, ids.masked_fill(mask == 0, -100)


def batch_for(projection):
    ids, mask, labels = padded([5, 2, 7])
    if projection.encoder_decoder:
        return ids, mask, padded([3, 6, 4])[2]
    labels[2, :3] = -100  # a prompt
    return ids, mask, labels


def own_loss(projection, query_output, ids, mask, labels, autocast=False):
    """transformers' loss of [queries | text] with labels; of a narrow model outside autocast."""
    model = projection.language_model
    words = model.get_input_embeddings()(ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prefix = projection(query_output).to(words.dtype)
    inputs = torch.cat([prefix, words], dim=1)
    mask = torch.cat([mask.new_ones(query_output.shape[:2]), mask], dim=1)
    if not projection.encoder_decoder:
        labels = torch.cat([labels.new_full(query_output.shape[:2], -100), labels], dim=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and words.dtype == torch.float32):
        return model(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss


def loss_and_gradients(loss, projection, query_output):
    gradients = torch.autograd.grad(loss, [query_output, projection.weight, projection.bias])
    return dict(zip(["loss", "queries", "weight", "bias"], [loss.detach(), *gradients], strict=True))


@pytest.mark.parametrize("name", BUILD)
def test_loss_and_gradients_are_transformers_own(build, name):
    projection, queries = build(name), torch.randn(3, QUERIES, HIDDEN, requires_grad=True)
    text = batch_for(projection)
    expected = loss_and_gradients(own_loss(projection, queries, *text), projection, queries)
    actual = loss_and_gradients(projection.loss(queries, *text), projection, queries)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    by_bool = projection.loss(queries, text[0], text[1].bool(), text[2])
    torch.testing.assert_close(by_bool, expected["loss"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_left_padding_is_seen(build, name):
    """As transformers has it; positions of OPT follow the mask, so that there padding on either side is the same."""
    projection, queries = build(name), torch.randn(3, QUERIES, HIDDEN)
    ids, mask, labels = padded([5, 2, 7], left=True)
    labels[torch.arange(3), mask.argmax(1)] = -100  # which padding would predict
    actual = projection.loss(queries, ids, mask, labels)
    torch.testing.assert_close(actual, own_loss(projection, queries, ids, mask, labels), atol=1e-5, rtol=1e-4)
    blind = projection.loss(queries, ids, torch.ones_like(mask), labels)
    assert abs(blind - actual) > 1e-3, "the padding would not be missed"
    if name == "opt":
        shift = [row.roll(-int(row.argmax())) for row in mask]
        right = [
            torch.stack([x.roll(-int(m.argmax())) for x, m in zip(rows, mask, strict=True)]) for rows in (ids, labels)
        ]
        same = projection.loss(queries, right[0], torch.stack(shift), right[1])
        torch.testing.assert_close(actual, same, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["opt", "t5-tied"])
def test_only_rows_with_a_label_reach_the_head(build, name, monkeypatch):
    projection, queries = build(name), torch.randn(3, QUERIES, HIDDEN)
    text, given, plain, logits = batch_for(projection), [], ops.linear_cross_entropy, []

    def count(rows, *others, **options):
        given.append(len(rows))
        return plain(rows, *others, **options)

    monkeypatch.setattr(ops, "linear_cross_entropy", count)
    head = projection.language_model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _head, _args, out: logits.append(out.shape[:2].numel()))
    projection.loss(queries, *text)
    hook.remove()
    assert given == [int((text[2] != -100).sum())]
    assert sum(logits) == 0
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("name", ["opt", "t5-tied"])
def test_one_image_one_query_one_token(build, name):
    projection, queries = build(name), torch.randn(1, 1, HIDDEN)
    text = padded([1])
    torch.testing.assert_close(projection.loss(queries, *text), own_loss(projection, queries, *text))


def test_the_language_model_is_frozen_and_not_registered(build):
    projection = build()
    language_model = projection.language_model
    assert projection.train().training and not language_model.training
    assert not any(x.requires_grad for x in language_model.parameters())
    assert dict(projection.named_parameters()).keys() == projection.state_dict().keys() == {"weight", "bias"}
    assert list(projection.modules()) == [projection]
    before = {name: x.clone() for name, x in language_model.state_dict().items()}
    optimizer = torch.optim.SGD(projection.parameters(), lr=1.0)
    projection.loss(torch.randn(3, QUERIES, HIDDEN), *batch_for(projection)).backward()
    optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in language_model.state_dict().items())
    assert all(x.grad is None for x in language_model.parameters())
    projection.to(torch.bfloat16)
    assert {x.dtype for x in [*language_model.parameters(), *projection.parameters()]} == {torch.bfloat16}
    projection.to("meta")
    assert {x.device.type for x in language_model.parameters()} == {"meta"}


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_a_choice(build, dropout):
    projection, queries = build(dropout=dropout), torch.randn(3, QUERIES, HIDDEN)
    text = batch_for(projection)
    losses = {projection.train().loss(queries, *text).item() for _ in range(3)}
    assert len(losses) == (3 if dropout else 1)
    assert projection.language_model.training == dropout
    losses = {projection.eval().loss(queries, *text).item() for _ in range(3)}
    assert len(losses) == 1 and not projection.language_model.training


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["opt", "t5-tied"])
def test_a_narrow_language_model_behind_fp32_queries(build, name, dtype, autocast):
    projection, queries = build(name), torch.randn(3, QUERIES, HIDDEN, requires_grad=True)
    text = batch_for(projection)
    expected = loss_and_gradients(projection.loss(queries, *text), projection, queries)
    projection.language_model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = projection.loss(queries, *text)
    actual = loss_and_gradients(loss, projection, queries)
    plain = loss_and_gradients(own_loss(projection, queries, *text, autocast), projection, queries)
    assert {x.dtype for x in actual.values()} == {torch.float32}
    torch.testing.assert_close(actual["loss"], expected["loss"], atol=0, rtol=1e-2)
    for key in ("queries", "weight", "bias"):
        error, allowed = ((x[key] - expected[key]).norm() / expected[key].norm() for x in (actual, plain))
        assert error < 2 * allowed + 1e-3, f"{key} is {error:.3f} off, transformers' own {allowed:.3f}"


def test_no_prompt_is_the_first_token_or_an_encoders_end(build, spread_weights):
    for name, other in (("opt", "eos_token_id"), ("t5-untied", "bos_token_id")):
        projection, queries = build(name), torch.randn(6, QUERIES, HIDDEN) * 3
        model = projection.eval().language_model
        setattr(model.config, other, 7)
        spread_weights(model, 0.3)
        inputs = [projection(queries), model.get_input_embeddings()(torch.full((6, 1), 2))]
        expected = model.generate(
            inputs_embeds=torch.cat(inputs, dim=1), attention_mask=torch.ones(6, QUERIES + 1), max_new_tokens=5
        )
        assert torch.equal(projection.generate(queries, None, None, max_new_tokens=5), expected)
        assert len(expected.unique(dim=0)) > 1


def test_no_prompt_is_nothing_without_a_first_token(build, spread_weights):
    projection, queries = build("llama-untied"), torch.randn(6, QUERIES, HIDDEN) * 3
    model = projection.eval().language_model
    spread_weights(model, 0.3)
    model.config.bos_token_id = None
    expected = model.generate(inputs_embeds=projection(queries), max_new_tokens=5)
    assert torch.equal(projection.generate(queries, None, None, max_new_tokens=5), expected)
    assert len(expected.unique(dim=0)) > 1


@pytest.mark.parametrize(("saved", "activation"), [("gated-gelu", "gelu"), ("gated-silu", "silu"), ("relu", "relu")])
def test_flan_t5_gets_the_originals_activation(tmp_path, saved, activation):
    """LAVIS's blip2_t5.py:88-91; Hugging Face's converted checkpoints say so in their config."""
    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, feed_forward_proj=saved)
    model = T5ForConditionalGeneration(T5Config(**SPECIAL, **sizes)).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))
    activations = {type(x) for name, x in loaded.named_modules() if name.endswith("DenseReluDense.act")}
    assert activations == {type(ACT2FN[activation])} and loaded.config.dense_act_fn == activation
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.shared.weight, model.shared.weight)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(labels=torch.full((3, 7), -100)), "labels must have at least one that is not -100, got none"),
        (dict(labels=torch.zeros(3, 6).long()), r"labels must be \(3, 7\), got \(3, 6\)"),
        (dict(labels=torch.zeros(2, 7).long()), r"labels must be \(3, 7\), got \(2, 7\)"),
        (dict(labels=torch.zeros(3).long()), r"labels must be \(3, 7\), got \(3,\)"),
        (dict(attention_mask=torch.ones(3, 6).long()), r"attention_mask must be \(3, 7\), got \(3, 6\)"),
        (
            dict(input_ids=torch.zeros(2, 7).long(), attention_mask=torch.ones(2, 7).long()),
            r"input_ids must be \(3, length\), got \(2, 7\)",
        ),
    ],
)
def test_shapes_are_named(build, change, match):
    ids, mask, labels = padded([5, 2, 7])
    arguments = dict(input_ids=ids, attention_mask=mask, labels=labels) | change
    with pytest.raises(ValueError, match=match):
        build().loss(torch.randn(3, QUERIES, HIDDEN), **arguments)


@pytest.mark.parametrize("name", ["opt", "t5-tied"])
def test_positions_that_the_language_model_lacks_are_named(build, name):
    """OPT has a place each for so many tokens; T5's are relative and have no end."""
    projection = build(name)
    positions = getattr(projection.language_model.config, "max_position_embeddings", None)
    longest = (positions or 600) - QUERIES
    queries = torch.randn(1, QUERIES, HIDDEN)
    ids = torch.full((1, longest + 1), 5)
    mask, fitting = torch.ones_like(ids), ids[:, :-1]
    labels = ids if name == "opt" else ids[:, :3]
    assert projection.loss(queries, fitting, mask[:, :-1], labels[:, :longest]).isfinite()
    assert projection.generate(queries, ids[:, :-3], None, max_new_tokens=2).shape[1] > 0
    if positions is None:
        assert projection.loss(queries, ids, mask, labels).isfinite()
        return
    with pytest.raises(ValueError, match=f"{positions} positions for {QUERIES} queries and 0 new tokens, got"):
        projection.loss(queries, ids, mask, labels)
    with pytest.raises(ValueError, match=f"{positions} positions for {QUERIES} queries and 3 new tokens, got"):
        projection.generate(queries, ids[:, :-3], None, max_new_tokens=3)


@pytest.mark.parametrize("name", ["/nowhere/opt", "./opt", "a/b/c", ""])
def test_a_folder_that_is_not_there_is_no_id(name):
    with pytest.raises(FileNotFoundError, match=f"language_model: no folder at {name!r}"):
        load_language_model(name)
    with pytest.raises(FileNotFoundError, match=f"language_model: no folder at {name!r}"):
        LanguageTokenizer.from_pretrained(name)


def test_an_encoder_decoders_labels_are_one_row_an_image(build):
    ids, mask, _ = padded([5, 2, 7])
    with pytest.raises(ValueError, match=r"labels must be \(3, 4\), got \(2, 4\)"):
        build("t5-tied").loss(torch.randn(3, QUERIES, HIDDEN), ids, mask, torch.zeros(2, 4).long())


def test_models_whose_logits_are_not_their_heads_product_are_refused():
    capped = Gemma2ForCausalLM(Gemma2Config(**SPECIAL, **SIZES, head_dim=16, num_key_value_heads=2))
    with pytest.raises(ValueError, match=r"head's product, got config.final_logit_softcapping = 30"):
        LanguageProjection(HIDDEN, capped)
    recurrent = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SPECIAL, **SIZES, lru_width=32))
    with pytest.raises(ValueError, match=r"head's product, got config.logits_soft_cap = 30"):
        LanguageProjection(HIDDEN, recurrent)
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    biased = BartForConditionalGeneration(BartConfig(**SPECIAL, **sizes, encoder_ffn_dim=48, decoder_ffn_dim=48))
    LanguageProjection(HIDDEN, biased)
    biased.final_logits_bias[0, 3] = 0.5
    with pytest.raises(ValueError, match="head's product, got a final_logits_bias"):
        LanguageProjection(HIDDEN, biased)
    with pytest.raises(ValueError, match="language_model must have a linear LM head, got NoneType"):
        LanguageProjection(HIDDEN, OPTModel(opt().config))
    with pytest.raises(ValueError, match="language_model must be a model of transformers, got NoneType"):
        LanguageProjection(HIDDEN, None)


@pytest.fixture
def plain_config(tiny_config):
    """Without dropout."""
    return dataclasses.replace(tiny_config, vocab_size=200, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def without_text(config):
    return dataclasses.replace(config, use_qformer_text_input=False)


def gradients_of(model, images, text, read):
    model.zero_grad()
    loss = model(images, *text, **read).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def kept_for_backward(model, images, read):
    """Numbers that the Q-Former's forward saves, weights left out."""
    weights, sizes = {x.data_ptr() for x in model.parameters()}, []

    def count(x):
        sizes.append(0 if x.data_ptr() in weights else x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model.encode_images(images, **read)
    return sum(sizes)


def question():
    mask = (torch.arange(6) < torch.tensor([6, 2, 4])[:, None]).long()
    return dict(qformer_input_ids=torch.randint(3, 200, (3, 6)) * mask, qformer_attention_mask=mask)


@pytest.mark.parametrize("level", ["feed_forward", "layer"])
@pytest.mark.parametrize("keep_text", [False, True])
def test_checkpointing_gives_the_same_gradients(plain_config, assert_gradients_close, level, keep_text):
    config = plain_config if keep_text else without_text(plain_config)
    model = Blip2OPT(config, opt()).train()
    images, text, read = torch.randn(3, 5, 48), padded([5, 2, 7]), question() if keep_text else {}
    loss, expected = gradients_of(model, images, text, read)
    kept = kept_for_backward(model, images, read)
    model.gradient_checkpointing_enable(level)
    again, actual = gradients_of(model, images, text, read)
    torch.testing.assert_close(again, loss)
    assert_gradients_close(actual, expected, 1e-5)
    assert kept_for_backward(model, images, read) < 0.9 * kept
    model.gradient_checkpointing_disable()
    assert kept_for_backward(model, images, read) == kept


def test_text_and_the_text_branch(plain_config):
    model, images = Blip2OPT(plain_config, opt()).eval(), torch.randn(3, 5, 48)
    with torch.no_grad():
        alone, led = model.encode_images(images), model.encode_images(images, **question())
    assert alone.shape == led.shape == (3, 8, 64) and (alone - led).abs().max() > 1e-3
    bare = Blip2OPT(without_text(plain_config), opt()).eval()
    bare.load_state_dict({name: model.state_dict()[name] for name in bare.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(bare.encode_images(images), alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="need a text branch"):
        bare(images, *padded([5, 2, 7]), **question())
    with pytest.raises(ValueError, match="need a text branch"):
        bare.generate(images, **question())
    with pytest.raises(ValueError, match="qformer_input_ids must have batch size 2 as image_embeds, got 3"):
        model(images[:2], *(x[:2] for x in padded([5, 2, 7])), **question())


@pytest.mark.parametrize("keep_text", [False, True])
def test_stage_1_gives_its_weights_and_keeps_them(plain_config, spread_weights, keep_text):
    stage1 = Blip2QFormer(plain_config, embed_dim=16, dec_token_id=199, ln_vision_eps=1e-3)
    spread_weights(stage1)
    before = copy.deepcopy(stage1.state_dict())
    model = Blip2OPT.from_stage1(stage1, opt(), keep_text=keep_text)
    assert model.ln_vision.eps == 1e-3 and model.config.use_qformer_text_input == keep_text
    copied = {name: x for name, x in model.state_dict().items() if not name.startswith("language_projection.")}
    shared = {name for name in before if name.startswith(("qformer.", "ln_vision.", "query_tokens"))}
    left_out = shared - copied.keys()
    assert copied.keys() <= shared and all(torch.equal(x, before[name]) for name, x in copied.items())
    is_text = {name for name in shared if ".embeddings." in name or ".intermediate." in name or ".output." in name}
    is_text = {name for name in is_text if "attention" not in name}
    assert left_out == (set() if keep_text else is_text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(x, before[name]) for name, x in stage1.state_dict().items())
    assert all(x.requires_grad for x in stage1.parameters())


def test_a_copy_is_another_model(plain_config):
    model = Blip2OPT(plain_config, opt()).train()
    twin, images, text = copy.deepcopy(model), torch.randn(3, 5, 48), padded([5, 2, 7])
    assert twin.language_model is not model.language_model
    loss, expected = gradients_of(model, images, text, {})
    again, actual = gradients_of(twin, images, text, {})
    assert torch.equal(again, loss) and all(torch.equal(actual[name], x) for name, x in expected.items())
    torch.nn.init.zeros_(twin.language_projection.weight)
    twin.language_model.get_input_embeddings().weight.zero_()
    assert torch.equal(model(images, *text).loss, loss)


@pytest.mark.parametrize("by", ["folder", "object"])
@pytest.mark.parametrize("name", ["opt", "t5-untied"])
def test_save_and_load(plain_config, tmp_path, name, by):
    language_model = BUILD[name]().eval()
    language_model.save_pretrained(tmp_path / "language")
    held = str(tmp_path / "language") if by == "folder" else language_model
    model = Blip2OPT(without_text(plain_config), held, language_model_dropout=True, ln_vision_eps=1e-3).eval()
    model.save_pretrained(tmp_path / "model")
    if by == "object":
        with pytest.raises(ValueError, match="language_model must be a model of transformers, got NoneType"):
            Blip2OPT.from_pretrained(tmp_path / "model")
    options = {} if by == "folder" else {"language_model": language_model}
    loaded = Blip2OPT.from_pretrained(tmp_path / "model", **options)
    assert loaded.config == model.config and loaded.init_options() == model.init_options()
    assert loaded.language_projection.dropout and loaded.ln_vision.eps == 1e-3 and not loaded.training
    assert (loaded.language_model is language_model) == (by == "object")
    images, (ids, mask, labels) = torch.randn(3, 5, 48), padded([5, 2, 7])
    assert torch.equal(loaded(images, ids, mask, labels).loss, model(images, ids, mask, labels).loss)
    assert torch.equal(loaded.generate(images, max_new_tokens=4), model.generate(images, max_new_tokens=4))


def test_whether_the_q_former_reads_prompts_is_saved(plain_config, tmp_path):
    """A text branch that is only carried along, as in stage 2, must not be given prompts later."""
    for text, given, expected in [(True, None, True), (False, None, False), (True, False, False), (True, True, True)]:
        config = dataclasses.replace(plain_config, use_qformer_text_input=text)
        model = Blip2OPT(config, opt(), qformer_prompts=given)
        model.save_pretrained(tmp_path)
        assert Blip2OPT.from_pretrained(tmp_path, language_model=opt()).qformer_prompts == expected
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["qformer_prompts"]  # as earlier versions wrote it
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert Blip2OPT.from_pretrained(tmp_path, language_model=opt()).qformer_prompts
    Blip2OPT(plain_config, opt(), text_end="").save_pretrained(tmp_path)
    assert Blip2OPT.from_pretrained(tmp_path, language_model=opt()).text_end == "" != model.text_end
    with pytest.raises(ValueError, match="qformer_prompts must be False without config.use_qformer_text_input"):
        Blip2OPT(without_text(plain_config), opt(), qformer_prompts=True)
