"""Stage 2 and InstructBLIP v. Hugging Face's models, from the image encoder's tokens on: losses, gradients, text."""

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    T5Config,
)

from qformer_fast import Blip2OPT, convert

QUERIES, IMAGE_TOKEN, PAD, END = 4, 59, 1, 2
VARIANTS = [("blip-2", "opt"), ("blip-2", "t5"), ("instructblip", "opt"), ("instructblip", "t5")]


def text_config(kind):
    special = dict(vocab_size=60, pad_token_id=PAD, eos_token_id=END, bos_token_id=END)
    if kind == "opt":
        sizes = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2)
        return OPTConfig(**special, **sizes, max_position_embeddings=64)
    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=2)
    return T5Config(**special, **sizes, decoder_start_token_id=PAD, tie_word_embeddings=False)


@pytest.fixture(params=VARIANTS, ids="-".join)
def variant(request):
    return request.param


@pytest.fixture
def theirs(variant, spread_weights):
    """Their model with weights large enough for images and prompts to change what it says."""
    family, kind = variant
    qformer = dict(
        vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        encoder_hidden_size=48, max_position_embeddings=32,
    )  # fmt: skip
    # an eps that matters, so that another one than the config's is seen
    vision = dict(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14,
        layer_norm_eps=0.3,
    )  # fmt: skip
    config_class, model_class = {
        "blip-2": (Blip2Config, Blip2ForConditionalGeneration),
        "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
    }[family]
    config = config_class(
        vision_config=vision, qformer_config=qformer, text_config=text_config(kind).to_dict(),
        num_query_tokens=QUERIES, image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    model = model_class(config).eval()
    spread_weights(model, 0.2)
    with torch.no_grad():
        for name, x in model.language_model.named_parameters():
            if "EncDecAttention" in name:  # T5 would say much the same of all images
                x.mul_(3)
    return model


def rows(lengths, vocab, pad, *, left=False):
    """Random ids (batch, longest) and their mask, padded on one side."""
    width = max(lengths)
    place = torch.arange(width).flip(0) if left else torch.arange(width)
    mask = (place < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, vocab, mask.shape)
    return torch.where(mask.bool(), ids, pad), mask


def image_tokens(theirs, pixels):
    """The image encoder's hidden states without its last LayerNorm, which is our ln_vision."""
    tower = theirs.vision_model
    with torch.no_grad():
        return tower.encoder(tower.embeddings(pixels)).last_hidden_state


def question(family, lengths):
    """What only InstructBLIP's Q-Former reads."""
    if family == "blip-2":
        return {}
    ids, mask = rows(lengths, 100, 0)
    return {"qformer_input_ids": ids, "qformer_attention_mask": mask}


def with_placeholders(ids, mask):
    """Their text begins with a place for each query."""
    places = ids.new_full((len(ids), QUERIES), IMAGE_TOKEN)
    ones = torch.ones_like(places)
    return {"input_ids": torch.cat([places, ids], 1), "attention_mask": torch.cat([ones, mask], 1)}


def test_losses_and_gradients(theirs, variant, assert_gradients_close):
    family, kind = variant
    theirs.double()  # weights this large make gradients of fp32 good to three digits only
    ours = Blip2OPT.from_hf_model(theirs).double()
    pixels, read = torch.randn(3, 3, 28, 28).double(), question(family, [6, 2, 4])
    ids, mask = rows([5, 2, 7], IMAGE_TOKEN, PAD)
    if kind == "opt":
        labels = ids.masked_fill(mask == 0, -100)
        labels[2, :3] = -100  # a prompt
        their_labels = torch.cat([labels.new_full((3, QUERIES), -100), labels], 1)
    else:
        target, target_mask = rows([3, 6, 4], IMAGE_TOKEN, PAD)
        labels = their_labels = target.masked_fill(target_mask == 0, -100)
    expected = theirs(pixels, **with_placeholders(ids, mask), **read, labels=their_labels).loss
    actual = ours(image_tokens(theirs, pixels), ids, mask, labels, **read).loss
    torch.testing.assert_close(actual, expected, atol=0, rtol=1e-6, check_dtype=False)
    expected.backward()
    actual.backward()
    found = {name: x.grad for name, x in ours.named_parameters() if x.grad is not None}
    wanted = {name: x.grad for name, x in theirs.named_parameters() if x.grad is not None}
    wanted = {name: x for name, x in convert(wanted, "hf", "qformer_fast").items() if not name.startswith("vision_")}
    if family == "instructblip":  # the last layer's text rows are read by nothing: a zero or none
        unread = [name for name in found.keys() ^ wanted.keys() if not (found | wanted)[name].any()]
        found, wanted = ({name: x for name, x in side.items() if name not in unread} for side in (found, wanted))
    assert {"query_tokens", "ln_vision.weight", "language_projection.weight"} <= wanted.keys()
    assert_gradients_close(found, wanted, 1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens(theirs, variant, beams):
    family, kind = variant
    ours, images = Blip2OPT.from_hf_model(theirs), 8
    pixels, read = torch.randn(images, 3, 28, 28), question(family, [6, 2, 4, 5, 3, 6, 2, 7])
    options = dict(num_beams=beams, max_new_tokens=7, do_sample=False)
    ids, mask = rows([3, 1, 4, 2, 3, 4, 1, 2], IMAGE_TOKEN, PAD, left=kind == "opt")
    for prompt in ((ids, mask), None):
        if kind == "t5" and prompt is None:
            continue  # theirs begins with the text model's bos_token_id, which T5 has none of
        # theirs would read the left padding between the queries and the prompt as ours does
        text = {} if prompt is None else with_placeholders(*prompt)
        expected = theirs.generate(pixels, **text, **read, **options)
        if kind == "opt":
            expected = expected[:, QUERIES + (1 if prompt is None else ids.shape[1]) :]
        actual = ours.generate(image_tokens(theirs, pixels), *(prompt or ()), **read, **options)
        assert torch.equal(actual, expected)
        distinct = {tuple(row) for row in actual.tolist()}
        assert len(distinct) >= 4, f"the test's texts hardly differ: {distinct}"


def test_from_pretrained_of_a_saved_folder(theirs, variant, tmp_path):
    theirs.save_pretrained(tmp_path)
    loaded, ours = Blip2OPT.from_pretrained(tmp_path), Blip2OPT.from_hf_model(theirs)
    assert loaded.config == ours.config and loaded.ln_vision.eps == ours.ln_vision.eps == 0.3
    assert not loaded.training and type(loaded.language_model) is type(ours.language_model)
    for part, other in ((loaded, ours), (loaded.language_model, ours.language_model)):
        weights, others = part.state_dict(), other.state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(x, others[name]) for name, x in weights.items())
    images, read = torch.randn(2, 5, 48), question(variant[0], [3, 5])
    prompt = rows([3, 3], IMAGE_TOKEN, PAD)
    assert torch.equal(loaded.generate(images, *prompt, **read), ours.generate(images, *prompt, **read))
