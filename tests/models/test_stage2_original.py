"""Stage 2 v. the original's own blip2_opt.py and blip2_t5.py: losses, gradients, generated tokens."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from qformer_fast import Blip2OPT, QFormerConfig
from qformer_fast.data.language import LanguageTokenizer

WORDS = [
    "</s>", "<pad>", "<unk>", "\n", "a", "photo", "of", "the", "red", "blue", "fox", "cat", "dog", "in", "on", "snow",
    "grass", "sleeps", "runs", "what", "is",
]  # fmt: skip
LONG = " ".join(["the dog runs on grass and"] * 8)  # is cut off before its end
CAPTIONS = ["a red fox in the snow", "the cat sleeps", "a dog runs on grass in the snow", LONG]
PROMPTS = ["what is on the grass", "a photo of", "what is"]
KINDS = ("opt", "t5")


def build_tokenizer(kind):
    """Words and new lines; </s> before OPT's text and after T5's."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s]+"), behavior="removed", invert=True)
    template = {"opt": "</s> $A", "t5": "$A </s>"}[kind]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )


def build_language_model(kind):
    special = dict(vocab_size=len(WORDS), pad_token_id=1, eos_token_id=0, bos_token_id=0)
    if kind == "opt":
        sizes = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2)
        model = OPTForCausalLM(OPTConfig(**special, **sizes, max_position_embeddings=64))
    else:
        sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=2)
        model = T5ForConditionalGeneration(T5Config(**special, **sizes, decoder_start_token_id=1))
    return model.eval()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def language(kind):
    return LanguageTokenizer(build_tokenizer(kind), encoder_decoder=kind == "t5")


@pytest.fixture
def model(kind, spread_weights):
    """No dropout; weights large enough for images to change what is said."""
    config = QFormerConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, encoder_hidden_size=48,
        num_query_tokens=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, use_qformer_text_input=False,
    )  # fmt: skip
    model = Blip2OPT(config, build_language_model(kind))
    spread_weights(model, 0.15)
    spread_weights(model.language_model, 0.2)
    return model


def samples_of(language, images, captions, prompt):
    """What the original's forward takes."""
    if language.encoder_decoder:
        return {"image": images, "text_input": [prompt] * len(captions), "text_output": captions}
    return {"image": images, "text_input": [f"{prompt} {caption}".strip() for caption in captions]}


def losses_and_gradients(model, theirs, language, images, captions, prompt):
    """Ours and the original's, by our names."""
    text = language.targets(captions, prompt)
    ours = model(images, text.input_ids, text.attention_mask, text.labels).loss
    ours.backward()
    loss = theirs(samples_of(language, images, captions, prompt))["loss"]
    loss.backward()
    names = dict(zip(model.to_lavis_state_dict(), model.state_dict(), strict=True))
    expected = {names[name]: x.grad for name, x in theirs.named_parameters() if name in names}
    return ours, loss, {name: x.grad for name, x in model.named_parameters()}, expected


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_loss_and_all_gradients(model, language, original, assert_gradients_close, prompt):
    theirs = original.build_stage2(model, language.tokenizer, prompt)
    images = torch.randn(len(CAPTIONS), 7, 48)
    ours, loss, gradients, expected = losses_and_gradients(model, theirs, language, images, CAPTIONS, prompt)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_gradients_close(gradients, expected, 1e-4)


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@torch.no_grad()
def test_text_is_what_the_originals_forward_gives_its_language_model(model, language, original, prompt):
    theirs = original.build_stage2(model, language.tokenizer, prompt)
    seen = []
    hook = model.language_model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    theirs(samples_of(language, torch.randn(len(CAPTIONS), 7, 48), CAPTIONS, prompt))
    hook.remove()
    (given,) = seen
    text, queries = language.targets(CAPTIONS, prompt), model.config.num_query_tokens
    labels = given["labels"]
    if not language.encoder_decoder:
        assert (labels[:, :queries] == -100).all()
        labels = labels[:, queries:]
    assert torch.equal(text.labels, labels)
    assert torch.equal(text.attention_mask, given["attention_mask"][:, queries:])
    embeds = model.language_model.get_input_embeddings()(text.input_ids)
    assert torch.equal(embeds, given["inputs_embeds"][:, queries:])


def test_loss_and_gradients_at_full_width(original, spread_weights, assert_gradients_close):
    torch.manual_seed(1)
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = Blip2OPT(QFormerConfig(**rates, use_qformer_text_input=False), build_language_model("opt"))
    spread_weights(model, 0.01)
    language = LanguageTokenizer(build_tokenizer("opt"))
    theirs = original.build_stage2(model, language.tokenizer)
    found = losses_and_gradients(model, theirs, language, torch.randn(2, 257, 1408), CAPTIONS[:2], "")
    ours, loss, gradients, expected = found
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_gradients_close(gradients, expected, 1e-4)


DECODINGS = {
    "greedy": {},
    "beams": {"num_beams": 3, "min_new_tokens": 4, "length_penalty": -1.0},
    "several": {"num_beams": 4, "num_return_sequences": 2},
    "nucleus": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
}


def queries_of(theirs, images):
    """The original's query outputs, by the lines of its forward and its generate."""
    return theirs.Qformer.bert(
        query_embeds=theirs.query_tokens.expand(len(images), -1, -1),
        encoder_hidden_states=theirs.ln_vision(images),
        encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long),
        return_dict=True,
    ).last_hidden_state


def generate_as_the_original(model, theirs, images, prompt_ids, prompt_mask, **options):
    """From the original's query outputs on: the prefix before the prompt's embeddings into transformers' generate."""
    language_model = model.language_model
    kind = "t5" if language_model.config.is_encoder_decoder else "opt"
    prefix = getattr(theirs, f"{kind}_proj")(queries_of(theirs, images))
    embeds = torch.cat([prefix, language_model.get_input_embeddings()(prompt_ids)], dim=1)
    mask = torch.cat([torch.ones(prefix.shape[:2], dtype=torch.long), prompt_mask], dim=1)
    return language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)


@pytest.mark.parametrize("decoding", DECODINGS)
@torch.no_grad()
def test_generated_tokens(model, language, original, decoding):
    model.eval()
    for name, x in model.language_model.named_parameters():
        if "EncDecAttention" in name:  # T5 would say much the same of all images
            x.mul_(3)
    # what is said most ends texts instead
    head, often = model.language_model.get_output_embeddings().weight, [language.end_token_id, WORDS.index("on")]
    head[often] = head[often[::-1]]
    theirs = original.build_stage2(model, language.tokenizer)
    images = 3 * torch.randn(6, 7, 48)
    inputs = language.prompts(PROMPTS * 2)
    ends = dict(eos_token_id=language.end_token_id, pad_token_id=language.pad_token_id)
    options = dict(max_new_tokens=8, **ends, **DECODINGS[decoding])
    torch.manual_seed(3)
    found = model.generate(images, *inputs, **options)
    torch.manual_seed(3)
    assert torch.equal(found, generate_as_the_original(model, theirs, images, *inputs, **options))
    assert len(found) == len(images) * options.get("num_return_sequences", 1)
    lengths = (found != language.pad_token_id).sum(1)
    assert (found == language.end_token_id).any() and len(lengths.unique()) > 1, "some texts must end early"
    texts = found.view(len(images), -1)
    assert (texts[:3] != texts[3:]).any(1).sum() >= 2, "texts of different images after one prompt must differ"


@torch.no_grad()
def test_prompts_of_different_lengths_beside_each_other(model, language):
    model.eval()
    images = 3 * torch.randn(3, 7, 48)
    ends = dict(eos_token_id=language.end_token_id, pad_token_id=language.pad_token_id)
    options = dict(max_new_tokens=6, min_new_tokens=6, num_beams=3, **ends)
    together = model.generate(images, *language.prompts(PROMPTS), **options)
    for number, prompt in enumerate(PROMPTS):
        alone = model.generate(images[number : number + 1], *language.prompts([prompt]), **options)
        assert torch.equal(together[number], alone[0])
    assert len(together.unique(dim=0)) > 1, "texts of different images must differ"


@torch.no_grad()
def test_t5_generates_as_the_originals_own_generate(original, spread_weights):
    torch.manual_seed(5)
    config = QFormerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, encoder_hidden_size=48,
        num_query_tokens=8, use_qformer_text_input=False,
    )  # fmt: skip
    model = Blip2OPT(config, build_language_model("t5")).eval()
    spread_weights(model, 0.15)
    spread_weights(model.language_model, 0.2)
    language = LanguageTokenizer(build_tokenizer("t5"), encoder_decoder=True)
    theirs = original.build_stage2(model, language.tokenizer)
    images = 3 * torch.randn(3, 7, 48)
    expected = theirs.generate({"image": images, "prompt": PROMPTS}, num_beams=3, max_length=8)
    ours = model.generate(images, *language.prompts(PROMPTS), num_beams=3, max_new_tokens=8, min_length=1, top_p=0.9)
    assert language.decode(ours) == [text.strip() for text in expected]
    assert len(set(expected)) > 1, "texts of different images must differ"


@torch.no_grad()
def test_state_dicts_go_both_ways(model, original, language, kind, spread_weights):
    theirs = original.build_stage2(model, language.tokenizer)
    spread_weights(theirs)
    weights = theirs.state_dict()
    assert any(name.startswith(f"{kind}_proj.") for name in weights)
    ours = Blip2OPT(model.config, build_language_model(kind))
    report = ours.load_lavis_state_dict(weights)
    assert not report.missing and not report.unexpected and report.frozen
    back = ours.to_lavis_state_dict()
    unread = {name for name in weights if name.startswith(f"{kind}_model.") or name.endswith("position_ids")}
    assert back.keys() == weights.keys() - unread
    assert all(torch.equal(x, weights[name]) for name, x in back.items())
    images = torch.randn(3, 7, 48)
    assert torch.allclose(ours.encode_images(images), queries_of(theirs, images), atol=1e-5)
