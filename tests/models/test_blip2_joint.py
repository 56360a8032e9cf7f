"""Both stages at once v. each alone: losses, gradients, saving."""

import copy
import dataclasses

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from qformer_fast import Blip2OPT, Blip2QFormer
from qformer_fast.data.language import LanguageText
from qformer_fast.models.blip2_joint import Blip2Joint

BATCH = 4
SPECIAL = dict(vocab_size=40, pad_token_id=1, eos_token_id=2, bos_token_id=2)


def language_model(kind):
    if kind == "opt":
        sizes = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2)
        return OPTForCausalLM(OPTConfig(**SPECIAL, **sizes, max_position_embeddings=64))
    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**SPECIAL, **sizes, decoder_start_token_id=1))


@pytest.fixture
def build(tiny_config, spread_weights):
    """Without dropout, no weight at its initial value."""

    def make(kind="opt", **options):
        config = dataclasses.replace(tiny_config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        joint = Blip2Joint(config, language_model(kind), embed_dim=16, **options).train()
        spread_weights(joint)
        return joint

    return make


def batch(make_captions):
    """Images with their captions in both tokenizers' numbers, and negatives."""
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 4])[:, None]).long()
    ids = torch.randint(3, 40, mask.shape).masked_fill(mask == 0, 1)
    text = LanguageText(ids, mask, ids.masked_fill(mask == 0, -100))
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 1, 1])
    return torch.randn(BATCH, 5, 48), *make_captions([4, 7, 5, 3], 7), text, negatives


def stages(joint):
    """Each stage's own model with the joint one's weights."""
    options = {name: x for name, x in joint.init_options().items() if not name.startswith("language_model")}
    stage1 = Blip2QFormer(joint.config, **options).train()
    stage1.load_state_dict({name: joint.state_dict()[name] for name in stage1.state_dict()})
    stage2 = Blip2OPT.from_stage1(stage1, joint.language_projection.language_model).train()
    stage2.language_projection.load_state_dict(joint.language_projection.state_dict())
    return stage1, stage2


def gradients(model):
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_losses_and_gradients_are_the_sums_of_both_stages(build, make_captions, assert_gradients_close, kind):
    joint = build(kind)
    images, ids, mask, text, negatives = batch(make_captions)
    stage1, stage2 = stages(joint)
    out = joint(images, ids, mask, text, negatives=negatives)
    first = stage1(images, ids, mask, negatives=negatives)
    second = stage2(images, text.input_ids, text.attention_mask, text.labels)
    for name in ("loss_itc", "loss_itm", "loss_itg", "sim_i2t", "sim_t2i", "itm_logits"):
        torch.testing.assert_close(getattr(out, name), getattr(first, name), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss_lm, second.loss, atol=1e-5, rtol=1e-4)
    parts = [out.loss_itc, out.loss_itm, out.loss_itg, out.loss_lm]
    torch.testing.assert_close(out.loss, sum(parts))
    assert min(parts) > 0.1, "a part of nothing would not be missed"
    out.loss.backward()
    (first.loss + second.loss).backward()
    one, two = gradients(stage1), gradients(stage2)
    assert one.keys() & two.keys() >= {"query_tokens", "ln_vision.weight"}
    expected = {name: one.get(name, 0) + two.get(name, 0) for name in one.keys() | two.keys()}
    assert_gradients_close(gradients(joint), expected, 1e-4)
    assert all(x.grad is None for x in joint.language_projection.language_model.parameters())


def test_image_ids_reach_stage_1(build, make_captions):
    joint = build()
    images, ids, mask, text, negatives = batch(make_captions)
    names = ["a", "a", "b", "c"]
    out = joint(images, ids, mask, text, names, negatives)
    expected = stages(joint)[0](images, ids, mask, names, negatives)
    torch.testing.assert_close(out.loss_itc, expected.loss_itc, atol=1e-5, rtol=1e-4)
    assert abs(out.loss_itc - joint(images, ids, mask, text, negatives=negatives).loss_itc) > 1e-3


def test_the_language_model_stays_frozen(build):
    joint = build(language_model_dropout=True)
    held = joint.language_projection.language_model
    assert held.training and not joint.eval().language_projection.language_model.training
    assert not any(x.requires_grad for x in held.parameters())
    added = joint.state_dict().keys() - stages(joint)[0].state_dict().keys()
    assert added == {"language_projection.weight", "language_projection.bias"}


@pytest.mark.parametrize("by", ["folder", "object"])
def test_save_and_load(build, make_captions, tmp_path, by):
    held = language_model("opt").eval()
    held.save_pretrained(tmp_path / "language")
    config = build().config
    name = str(tmp_path / "language") if by == "folder" else held
    joint = Blip2Joint(config, name, language_model_dropout=True, embed_dim=16, local_gradients=False).eval()
    joint.save_pretrained(tmp_path / "model")
    options = {} if by == "folder" else {"language_model": held}
    loaded = Blip2Joint.from_pretrained(tmp_path / "model", **options)
    assert loaded.config == config and loaded.init_options() == joint.init_options() and not loaded.training
    assert loaded.language_projection.dropout and not loaded.local_gradients
    before, after = copy.deepcopy(joint.state_dict()), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[key]) for key, x in before.items())
    images, ids, mask, text, negatives = batch(make_captions)
    losses = [model(images, ids, mask, text, negatives=negatives) for model in (joint, loaded)]
    assert torch.equal(losses[0].loss, losses[1].loss) and torch.equal(losses[0].loss_lm, losses[1].loss_lm)


@pytest.mark.parametrize(("kind", "name"), [("opt", "opt_proj"), ("t5", "t5_proj")])
def test_lavis_names_of_the_projection(build, kind, name):
    joint = build(kind)
    weights = joint.to_lavis_state_dict()
    projection = {key for key in weights if "_proj." in key and not key.startswith(("vision_proj.", "text_proj."))}
    assert projection == {f"{name}.weight", f"{name}.bias"}
    assert torch.equal(weights[f"{name}.weight"], joint.language_projection.weight)
    assert not joint.load_lavis_state_dict(weights).missing
