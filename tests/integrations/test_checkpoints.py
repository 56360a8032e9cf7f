import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qformer_fast import Blip2OPT, Blip2QFormer, QFormer, QFormerConfig, convert, load_checkpoint
from qformer_fast.integrations.checkpoints import LoadReport


def bitwise_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def random_like(state):
    return {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in state.items()}


@pytest.fixture
def lavis_state(original, tiny_config):
    """A whole checkpoint of the original's own modules, with an EVA-style image encoder of one block."""
    theirs = random_like(original.build_stage1(Blip2QFormer(tiny_config, embed_dim=32)).state_dict())
    word = theirs["Qformer.bert.embeddings.word_embeddings.weight"]
    theirs["Qformer.cls.predictions.decoder.weight"] = word
    theirs["Qformer.cls.predictions.decoder.bias"] = theirs["Qformer.cls.predictions.bias"]
    width = 24
    encoder = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        "blocks.0.norm1.weight": (width,),
        "blocks.0.norm2.bias": (width,),
        "blocks.0.attn.q_bias": (width,),
        "blocks.0.attn.v_bias": (width,),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.attn.proj.weight": (width, width),
        "blocks.0.mlp.fc1.weight": (48, width),
        "blocks.0.mlp.fc2.bias": (width,),
    }
    return theirs | {f"visual_encoder.{name}": torch.randn(shape) for name, shape in encoder.items()}


def test_lavis_to_ours_to_hf_to_ours_to_lavis_is_bit_equal(lavis_state):
    ours = convert(lavis_state, "lavis", "qformer_fast")
    hf = convert(ours, "qformer_fast", "hf")
    bitwise_equal(convert(convert(hf, "hf", "qformer_fast"), "qformer_fast", "lavis"), lavis_state)
    assert {"temp", "lm_head.bias", "lm_head.transform.dense.weight"} <= hf.keys()
    assert hf["vision_model.encoder.layers.0.self_attn.qkv.bias"][24:48].abs().max() == 0


def test_the_round_trip_through_models_is_bit_equal(lavis_state, tiny_config):
    lavis_state = {name: x for name, x in lavis_state.items() if not name.startswith("visual_encoder.")}
    first, second = (Blip2QFormer(tiny_config, embed_dim=32) for _ in range(2))
    assert str(first.load_lavis_state_dict(lavis_state)) == "every tensor found its place"
    second.load_hf_state_dict(first.to_hf_state_dict())
    bitwise_equal(second.to_lavis_state_dict(), lavis_state)


def test_instructblip_names_and_back(tiny_config):
    state = Blip2QFormer(tiny_config, embed_dim=32).state_dict()
    theirs = convert(state, "qformer_fast", "instructblip")
    assert "qformer.embeddings.layernorm.weight" in theirs and "qformer.layernorm.weight" not in theirs
    bitwise_equal(convert(theirs, "hf", "qformer_fast"), state)


STAGE2_NAMES = {
    "query_tokens": ("query_tokens", "query_tokens"),
    "ln_vision.weight": ("ln_vision.weight", "vision_model.post_layernorm.weight"),
    "Qformer.bert.embeddings.LayerNorm.bias": ("qformer.layernorm.bias", "qformer.layernorm.bias"),
    "Qformer.bert.encoder.layer.0.crossattention.self.key.weight": (
        "qformer.encoder.layer.0.crossattention.attention.key.weight",
        "qformer.encoder.layer.0.crossattention.attention.key.weight",
    ),
    "Qformer.bert.encoder.layer.1.output_query.dense.bias": (
        "qformer.encoder.layer.1.output_query.dense.bias",
        "qformer.encoder.layer.1.output_query.dense.bias",
    ),
    "opt_proj.weight": ("language_projection.weight", "language_projection.weight"),
    "opt_proj.bias": ("language_projection.bias", "language_projection.bias"),
    "opt_model.model.decoder.embed_tokens.weight": (
        "language_model.model.decoder.embed_tokens.weight",
        "language_model.model.decoder.embed_tokens.weight",
    ),
    "opt_model.lm_head.weight": ("language_model.lm_head.weight", "language_model.lm_head.weight"),
}
"""Stage 2's names: the original's to ours and Hugging Face's."""


@pytest.mark.parametrize("kind", ["opt", "t5", "llm"])
def test_stage_2_names(kind):
    """Blip2OPT's, Blip2T5's and InstructBLIP's; out of ours they are Blip2OPT's."""
    lavis = {name.replace("opt_", f"{kind}_"): torch.randn(2) for name in STAGE2_NAMES}
    ours, theirs = (
        {names[side]: x for names, x in zip(STAGE2_NAMES.values(), lavis.values(), strict=True)} for side in (0, 1)
    )
    bitwise_equal(convert(lavis, "lavis", "qformer_fast"), ours)
    bitwise_equal(convert(lavis, "lavis", "hf"), theirs)
    bitwise_equal(convert(theirs, "hf", "qformer_fast"), ours)
    as_opt = dict(zip(STAGE2_NAMES, lavis.values(), strict=True))
    bitwise_equal(convert(ours, "qformer_fast", "lavis"), as_opt)
    bitwise_equal(convert(theirs, "hf", "lavis"), as_opt)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_stage_2_checkpoint_round_trips_through_models(tiny_config, kind):
    config = dataclasses.replace(tiny_config, use_qformer_text_input=False)
    if kind == "opt":
        sizes = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
        held = OPTForCausalLM(OPTConfig(vocab_size=40, **sizes))
    else:
        held = T5ForConditionalGeneration(
            T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        )
    first, second, third = (Blip2OPT(config, held) for _ in range(3))
    lavis = random_like(first.to_lavis_state_dict())
    assert {name for name in lavis if "_proj." in name} == {f"{kind}_proj.weight", f"{kind}_proj.bias"}
    whole = lavis | {f"{kind}_model.{name}": x for name, x in held.state_dict().items()}
    report = first.load_lavis_state_dict(whole)
    assert report == LoadReport(frozen=sorted(f"language_model.{name}" for name in held.state_dict()))
    assert torch.equal(first.language_projection.bias, lavis[f"{kind}_proj.bias"])
    theirs = first.to_hf_state_dict()
    assert {"vision_model.post_layernorm.weight", "language_projection.weight"} <= theirs.keys()
    assert str(second.load_hf_state_dict(theirs)) == "every tensor found its place"
    bitwise_equal(second.to_lavis_state_dict(), lavis)
    # stage 2 of the original starts from stage 1's file, of which the text branch and the heads have no place
    stage1 = Blip2QFormer(tiny_config, embed_dim=16)
    report = third.load_lavis_state_dict(stage1.to_lavis_state_dict(), strict=False)
    assert report.missing == ["language_projection.bias", "language_projection.weight"]
    assert {"temp", "itm_head.bias", "qformer.embeddings.word_embeddings.weight"} <= set(report.unexpected)
    assert torch.equal(third.query_tokens, stage1.query_tokens)


@pytest.fixture
def hf_model(tiny_config):
    """Hugging Face's retrieval model at tiny size, its queries not the zeros that it is built with."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "encoder_hidden_size")
    qformer = Blip2QFormerConfig(
        **{name: getattr(tiny_config, name) for name in names}, vocab_size=30523, use_qformer_text_input=True
    )
    vision = Blip2VisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = Blip2Config(
        vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), num_query_tokens=8, image_text_hidden_size=32
    )
    config.image_token_index = None
    model = Blip2ForImageTextRetrieval(config).eval()
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    return model


def test_hf_retrieval_model_has_these_names(hf_model, tiny_config):
    model = Blip2QFormer(tiny_config, embed_dim=32)
    report = model.load_hf_state_dict(hf_model.state_dict(), strict=False)
    assert report.unexpected == []
    assert set(report.missing) == {"temp", *(name for name in model.state_dict() if name.startswith("lm_head."))}
    assert report.frozen and all(name.startswith("vision_model.") for name in report.frozen)


def test_from_pretrained_reads_a_hugging_face_folder_and_computes_the_same(hf_model, tmp_path, make_captions):
    hf_model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="missing, left randomly initialised: .*lm_head"):
        model = Blip2QFormer.from_pretrained(tmp_path)
    assert model.embed_dim == 32 and model.config.num_query_tokens == 8 and not model.training
    pixels, (ids, mask) = torch.randn(2, 3, 28, 28), make_captions([4, 6], 6)
    # the image encoder without its last LayerNorm, which is our ln_vision
    hidden = hf_model.vision_model.encoder(hf_model.vision_model.embeddings(pixels)).last_hidden_state
    with torch.no_grad():
        itm = hf_model(pixels, ids, mask, use_image_text_matching_head=True).logits_per_image
        itc = hf_model(pixels, ids, mask, use_image_text_matching_head=False).logits_per_image
        torch.testing.assert_close(model.match(hidden, ids, mask), itm, atol=1e-5, rtol=1e-4)
        image, text = model.image_features(hidden), model.text_features(ids, mask)
        torch.testing.assert_close(torch.einsum("iqd,td->itq", image, text).amax(-1), itc, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [Blip2QFormer, QFormer])
def test_save_and_load(cls, tiny_config, tmp_path):
    options = dict(embed_dim=16, local_gradients=False) if cls is Blip2QFormer else {}
    model = cls(tiny_config, **options)
    model.save_pretrained(tmp_path / "model")
    loaded = cls.from_pretrained(tmp_path / "model")
    assert loaded.config == tiny_config and loaded.init_options() == model.init_options()
    bitwise_equal(loaded.state_dict(), model.state_dict())
    files = sorted((tmp_path / "model").iterdir())
    assert [path.name for path in files] == ["config.json", "model.safetensors"]
    assert files[0].stat().st_mode == files[1].stat().st_mode


def test_another_class_is_refused(tiny_config, tmp_path):
    QFormer(tiny_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a Blip2QFormer"):
        Blip2QFormer.from_pretrained(tmp_path)


def test_strict_loading_names_what_is_missing_and_extra(tiny_config):
    model = Blip2QFormer(tiny_config, embed_dim=32)
    state = model.to_lavis_state_dict()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    del state["itm_head.weight"]
    state["surprise"] = torch.zeros(1)
    state["query_tokens"] = torch.randn_like(state["query_tokens"])
    with pytest.raises(
        ValueError, match="1 missing, left randomly initialised: itm_head.weight; 1 unexpected: surprise"
    ):
        model.load_lavis_state_dict(state)
    bitwise_equal(model.state_dict(), before)
    report = model.load_lavis_state_dict(state, strict=False)
    assert report == LoadReport(missing=["itm_head.weight"], unexpected=["surprise"])
    assert torch.equal(model.query_tokens, state["query_tokens"])


def test_shapes_are_named(tiny_config):
    model = Blip2QFormer(tiny_config, embed_dim=32)
    state = model.to_lavis_state_dict() | {"vision_proj.weight": torch.zeros(16, 64)}
    with pytest.raises(ValueError, match=r"state_dict\['vision_proj.weight'\] must be \(32, 64\), got \(16, 64\)"):
        model.load_lavis_state_dict(state, strict=False)


def test_an_untied_decoder_is_refused(tiny_config):
    state = Blip2QFormer(tiny_config).to_lavis_state_dict()
    state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.cls.predictions.decoder.weight"] + 1
    with pytest.raises(ValueError, match="lm_head.decoder.weight must equal qformer.embeddings.word_embeddings.weight"):
        convert(state, "lavis", "qformer_fast")


def test_a_key_bias_has_no_place_in_lavis():
    state = {"vision_model.encoder.layers.3.self_attn.qkv.bias": torch.ones(6)}
    with pytest.raises(ValueError, match="visual_encoder.blocks.3.attn.qkv.bias has a key bias"):
        convert(state, "qformer_fast", "lavis")


def test_unknown_formats():
    with pytest.raises(ValueError, match="source must be one of"):
        convert({}, "timm", "hf")
    with pytest.raises(ValueError, match="target must be one of"):
        convert({}, "hf", "timm")


def test_load_checkpoint_unwraps_and_names_broken_files(tmp_path):
    state = {"a": torch.randn(3), "b": torch.randn(200)}
    torch.save({"model": state}, tmp_path / "lavis.pth")
    bitwise_equal(load_checkpoint(tmp_path / "lavis.pth"), state)
    save_file(state, tmp_path / "ours.safetensors")
    bitwise_equal(load_checkpoint(tmp_path / "ours.safetensors"), state)
    bitwise_equal(load_checkpoint(tmp_path), state)
    for name in ("lavis.pth", "ours.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name} is truncated or no checkpoint"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nothing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_checkpoint(tmp_path / "list.pth")


def test_a_failed_save_leaves_the_old_model(tiny_config, tmp_path, monkeypatch):
    model = Blip2QFormer(tiny_config, embed_dim=16)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("qformer_fast.integrations.checkpoints.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(hidden_size=0), "hidden_size must be at least 1, got 0"),
        (dict(num_attention_heads=5), "hidden_size must be a multiple of num_attention_heads"),
        (dict(num_query_tokens=257), "num_query_tokens must be 1 to 256, got 257"),
        (dict(hidden_dropout_prob=1.0), r"hidden_dropout_prob must lie in \[0, 1\)"),
        (dict(hidden_act="relu"), "hidden_act must be"),
    ],
)
def test_config_names_bad_sizes(change, match):
    with pytest.raises(ValueError, match=match):
        QFormerConfig(**change)


def test_config_json_is_readable(tiny_config, tmp_path):
    Blip2QFormer(tiny_config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["qformer"] == tiny_config.to_dict()
