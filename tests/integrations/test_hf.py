"""The swapped forward against Hugging Face's own, class by class."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2TextModelWithProjection,
    Blip2VisionModelWithProjection,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
)

from qformer_fast.integrations.hf import replace_qformer, restore_qformer

TINY = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, encoder_hidden_size=48)
FULL = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
WORDS = 120
QUERIES = 5
IMAGE_TOKEN = WORDS - 1


def vision_config(width: int, image_size: int) -> dict:
    return dict(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=image_size,
        patch_size=14,
    )


def whole_config(config_class, sizes: dict, text_input: bool):
    """A model with this Q-Former, one block of an image encoder and a small OPT."""
    full = sizes is FULL
    width, image_size = (1408, 224) if full else (TINY["encoder_hidden_size"], 28)
    qformer = dict(sizes, encoder_hidden_size=width, vocab_size=WORDS, **STILL)
    if config_class is Blip2Config:
        qformer["use_qformer_text_input"] = text_input
    opt = dict(
        model_type="opt",
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=WORDS,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        dropout=0.0,
    )
    token = "video_token_index" if config_class is InstructBlipVideoConfig else "image_token_index"
    return config_class(
        vision_config=vision_config(width, image_size),
        qformer_config=qformer,
        text_config=opt,
        num_query_tokens=32 if full else QUERIES,
        **{token: IMAGE_TOKEN},
    )


def spread(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def prompts(config, batch: int, per_query: int = 1) -> dict[str, torch.Tensor]:
    places = torch.full((batch, per_query * config.num_query_tokens), IMAGE_TOKEN)
    words = torch.randint(3, IMAGE_TOKEN, (batch, 4))
    input_ids = torch.cat([places, words], dim=1)
    return dict(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids)


def instruct(batch: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    return dict(qformer_input_ids=torch.randint(3, WORDS, (batch, 6)), qformer_attention_mask=mask)


def pixels(config, *leading: int) -> torch.Tensor:
    size = config.vision_config.image_size
    return torch.randn(*leading, 3, size, size)


def conditional_generation(sizes):
    model = Blip2ForConditionalGeneration(whole_config(Blip2Config, sizes, text_input=False))
    inputs = prompts(model.config, 2) | {"pixel_values": pixels(model.config, 2)}
    return model, lambda m: (lambda out: {"loss": out.loss, "logits": out.logits})(m(**inputs))


def base_model(sizes):
    model = Blip2Model(whole_config(Blip2Config, sizes, text_input=False))
    inputs = prompts(model.config, 2) | {"pixel_values": pixels(model.config, 2)}
    return model, lambda m: {"logits": m(**inputs).logits}


def retrieval(sizes):
    model = Blip2ForImageTextRetrieval(whole_config(Blip2Config, sizes, text_input=True))
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    given = dict(
        pixel_values=pixels(model.config, 2),
        input_ids=torch.randint(3, IMAGE_TOKEN, (2, 6)),
        attention_mask=mask,
    )

    def run(m):
        # placeholders of the queries come first in ids and mask of the matching head
        places = torch.full((2, m.config.num_query_tokens), IMAGE_TOKEN)
        matching = given | {
            "input_ids": torch.cat([places, given["input_ids"]], dim=1),
            "attention_mask": torch.cat([torch.ones_like(places), mask], dim=1),
        }
        matching_scores = m(**matching, use_image_text_matching_head=True).logits_per_image
        return {"itm": matching_scores, "itc": m(**matching).logits_per_image}

    return model, run


def text_projection(sizes):
    model = Blip2TextModelWithProjection(whole_config(Blip2Config, sizes, text_input=True))
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    ids = torch.randint(3, IMAGE_TOKEN, (2, 6))
    return model, lambda m: {"text": m(input_ids=ids, attention_mask=mask).text_embeds * mask[..., None]}


def vision_projection(sizes):
    model = Blip2VisionModelWithProjection(whole_config(Blip2Config, sizes, text_input=False))
    images = pixels(model.config, 2)
    return model, lambda m: {"image": m(pixel_values=images).image_embeds}


def instructblip(sizes):
    model = InstructBlipForConditionalGeneration(whole_config(InstructBlipConfig, sizes, text_input=True))
    inputs = prompts(model.config, 2) | instruct(2) | {"pixel_values": pixels(model.config, 2)}
    return model, lambda m: {"logits": m(**inputs).logits}


def instructblip_video(sizes):
    model = InstructBlipVideoForConditionalGeneration(whole_config(InstructBlipVideoConfig, sizes, text_input=True))
    inputs = prompts(model.config, 2, per_query=3) | instruct(2) | {"pixel_values": pixels(model.config, 2, 3)}
    return model, lambda m: {"logits": m(**inputs).logits}


def qformer_alone(sizes):
    width = 1408 if sizes is FULL else TINY["encoder_hidden_size"]
    config = Blip2QFormerConfig(**(dict(sizes) | {"encoder_hidden_size": width}), **STILL)
    model = Blip2QFormerModel(config)
    queries = nn.Parameter(torch.randn(1, 32 if sizes is FULL else QUERIES, config.hidden_size))
    images = torch.randn(3, 257 if sizes is FULL else 9, width)
    return model, lambda m: {
        "rows": m(query_embeds=queries.to(m.dtype), encoder_hidden_states=images.to(m.dtype)).last_hidden_state
    }


MODELS = [
    qformer_alone,
    conditional_generation,
    base_model,
    retrieval,
    text_projection,
    vision_projection,
    instructblip,
    instructblip_video,
]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of all parameters but the language model's, which is no part of what is swapped."""
    own = ((name, p) for name, p in model.named_parameters() if not name.startswith("language_model"))
    return {name: p.grad.clone() for name, p in own if p.grad is not None}


def scalar(out: dict[str, torch.Tensor]) -> torch.Tensor:
    """Depends on every output in its own way."""
    return sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() * (i + 1) for i, x in enumerate(out.values()))


@pytest.mark.parametrize("sizes", [TINY, FULL], ids=["tiny", "full"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_outputs_and_gradients_are_hugging_faces(make, sizes, assert_gradients_close):
    model, run = make(sizes)
    spread(model).eval()
    with torch.no_grad():
        expected = run(model)
    report = replace_qformer(model)
    assert len(report.replaced) == 1 and not report.kept
    with torch.no_grad():
        found = run(model)
        again = run(model)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=2e-4, atol=2e-5, msg=name)
        assert torch.equal(again[name], found[name])

    model.train()
    scalar(run(model)).backward()
    ours = gradients(model)
    assert restore_qformer(model) == report.replaced
    model.zero_grad(set_to_none=True)
    scalar(run(model)).backward()
    assert_gradients_close(ours, gradients(model), 1e-4)


@pytest.mark.parametrize("make", [conditional_generation, instructblip], ids=lambda make: make.__name__)
def test_state_dict_and_checkpoints_do_not_change(make, tmp_path):
    model, run = make(TINY)
    spread(model).eval()
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    replace_qformer(model)
    with torch.no_grad():
        patched = run(model)
    assert [name for name, _ in model.named_modules()] == names
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert restore_qformer(loaded) == []
    restore_qformer(model)
    for state in (model.state_dict(), loaded.state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], x) and state[name].dtype == x.dtype for name, x in before.items())
    with torch.no_grad():
        torch.testing.assert_close(run(loaded), patched, rtol=2e-4, atol=2e-5)


def tiny_qformer(**options) -> Blip2QFormerModel:
    torch.manual_seed(0)
    return spread(Blip2QFormerModel(Blip2QFormerConfig(**TINY, **(STILL | options)))).eval()


@pytest.fixture
def inputs():
    queries = nn.Parameter(torch.randn(1, QUERIES, TINY["hidden_size"]))
    return dict(query_embeds=queries, encoder_hidden_states=torch.randn(3, 9, TINY["encoder_hidden_size"]))


def test_one_row_of_queries_serves_all_images(inputs):
    model = tiny_qformer()
    expanded = inputs | {"query_embeds": inputs["query_embeds"].expand(3, -1, -1)}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        replace_qformer(model)
        for given in (inputs, expanded, expanded | {"query_embeds": expanded["query_embeds"].contiguous()}):
            out = model(**given)
            torch.testing.assert_close(out.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])


def test_what_the_images_masks_hide_is_not_seen(inputs):
    model = tiny_qformer()
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected = model(**inputs, encoder_attention_mask=mask).last_hidden_state
        plain = model(**inputs).last_hidden_state
        replace_qformer(model)
        found = model(**inputs, encoder_attention_mask=mask).last_hidden_state
        ones = model(**inputs, encoder_attention_mask=torch.ones_like(mask)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ones, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_attentions_and_hidden_states_come_from_hugging_faces_forward(asked, inputs, caplog):
    model = tiny_qformer(attn_implementation="eager")
    with torch.no_grad():
        expected = model(**inputs, **{asked: True})
        replace_qformer(model)
        with caplog.at_level(logging.WARNING, "qformer_fast.integrations.hf"):
            for _ in range(2):
                found = model(**inputs, **{asked: True})
        after = model(**inputs)
    names = ["attentions", "cross_attentions"] if asked == "output_attentions" else ["hidden_states"]
    for name in names:
        assert len(found[name]) == len(expected[name]) > 0
        torch.testing.assert_close(found[name], expected[name])
    assert [record.getMessage() for record in caplog.records if asked in record.getMessage()]
    assert len(caplog.records) == 1
    torch.testing.assert_close(after.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_tuple_where_return_dict_is_false(inputs):
    model = tiny_qformer()
    replace_qformer(model)
    out = model(**inputs, return_dict=False)
    assert isinstance(out, tuple) and len(out) == 2
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def count_calls(model, monkeypatch) -> list:
    """Of the swapped encoder, so that a call that ran as before shows."""
    qformer = model.__dict__["_qformer_fast"].qformer
    calls, encode_rows, encode_queries = [], qformer.encode_rows, qformer.query_encoder.encode
    monkeypatch.setattr(qformer, "encode_rows", lambda *a, **o: calls.append(1) or encode_rows(*a, **o))
    monkeypatch.setattr(qformer.query_encoder, "encode", lambda *a, **o: calls.append(1) or encode_queries(*a, **o))
    return calls


def constant_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.constant_(layer.weight, 0.01)
    nn.init.constant_(layer.bias, 0.1)
    return layer


def test_changes_of_parameters_are_seen_in_eval_mode(inputs):
    model, plain = tiny_qformer(), tiny_qformer()
    replace_qformer(model)

    def check():
        with torch.no_grad():
            found, expected = (m(**inputs).last_hidden_state for m in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return expected

    seen = [check()]
    for change in (
        lambda m: m.encoder.layer[2].crossattention.attention.value.weight.mul_(3),
        lambda m: m.layernorm.bias.add_(1),
        lambda m: m.encoder.layer[0].attention.output.LayerNorm.weight.mul_(2),
        lambda m: m.load_state_dict({name: x * 1.5 for name, x in m.state_dict().items()}),
        lambda m: setattr(
            m.encoder.layer[1].intermediate_query,
            "dense",
            constant_linear(64, 128),
        ),
        lambda m: setattr(m.encoder.layer[3].output_query.dense.weight, "data", torch.full((64, 128), 0.02)),
    ):
        with torch.no_grad():
            for m in (model, plain):
                change(m)
        seen.append(check())
    with torch.no_grad():
        inputs["query_embeds"].mul_(-1)
    seen.append(check())
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(seen, seen[1:], strict=False))


def test_a_copy_runs_on_its_own_parameters(inputs):
    model = tiny_qformer()
    replace_qformer(model)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        other = copy.deepcopy(model)
        other.encoder.layer[0].attention.output.dense.weight.mul_(-4)
        assert torch.equal(model(**inputs).last_hidden_state, before)
        changed = other(**inputs).last_hidden_state
        assert not torch.allclose(changed, before, atol=1e-3)
        restore_qformer(other)
        torch.testing.assert_close(other(**inputs).last_hidden_state, changed, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_keeps_dropout_and_gradients(inputs, assert_gradients_close, monkeypatch):
    found = {}
    for checkpointing in (False, True):
        model = tiny_qformer(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()
        replace_qformer(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = count_calls(model, monkeypatch)
        torch.manual_seed(1)
        scalar({"rows": model(**inputs).last_hidden_state}).backward()
        assert calls
        found[checkpointing] = gradients(model)
    assert_gradients_close(found[True], found[False], 1e-6)


def test_dropout_is_drawn_in_training_alone(inputs):
    model = tiny_qformer(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    replace_qformer(model)
    first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_that_differs_from_the_config_runs_as_before(inputs, caplog, monkeypatch):
    model = tiny_qformer(hidden_dropout_prob=0.3).train()
    replace_qformer(model)
    calls = count_calls(model, monkeypatch)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert torch.equal(first, second) and not calls
    assert "dropout" in caplog.text


def test_hooks_inside_are_called_by_hugging_faces_forward(inputs, caplog):
    model = tiny_qformer()
    replace_qformer(model)
    shapes = []
    handle = model.encoder.layer[1].register_forward_hook(lambda m, i, out: shapes.append(out.shape))
    model(**inputs)
    assert shapes == [(3, QUERIES, 64)] and "hooks" in caplog.text
    handle.remove()
    model(**inputs)
    assert len(shapes) == 1


def test_hooks_on_the_qformer_itself_are_called(inputs, monkeypatch):
    model = tiny_qformer()
    replace_qformer(model)
    calls, shapes = count_calls(model, monkeypatch), []
    model.register_forward_hook(lambda m, i, out: shapes.append(out.last_hidden_state.shape))
    model(**inputs)
    assert shapes == [(3, QUERIES, 64)] and calls


def test_what_has_no_place_here_is_kept_and_said_why():
    model = Blip2QFormerModel(Blip2QFormerConfig(**TINY, hidden_act="relu"))
    report = replace_qformer(model)
    assert report.replaced == [] and "hidden_act" in report.kept[""]
    assert "hidden_act" in str(report)
    assert str(replace_qformer(nn.Linear(2, 2))) == "no Q-Former found"


@pytest.mark.parametrize("gradients_on", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"encoder_hidden_states": None}, "encoder_hidden_states must be given"),
        (lambda x: x | {"query_embeds": x["query_embeds"].repeat(2, 1, 1)}, r"query_embeds must be \(1 or 3"),
        (lambda x: x | {"query_embeds": x["query_embeds"][..., :60]}, "query_embeds must be 64 wide"),
        (lambda x: x | {"encoder_hidden_states": torch.randn(3, 9, 40)}, "image_embeds must be"),
        (lambda x: x | {"encoder_attention_mask": torch.ones(3, 7)}, "encoder_attention_mask must have"),
    ],
)
def test_bad_input_is_named(change, message, gradients_on, inputs):
    model = tiny_qformer()
    replace_qformer(model)
    with torch.set_grad_enabled(gradients_on), pytest.raises(ValueError, match=message):
        model(**change(inputs))


def test_replacing_twice_is_replacing_once(inputs):
    model = tiny_qformer()
    forward = type(model).forward
    replace_qformer(model)
    replace_qformer(model)
    assert restore_qformer(model) == [""]
    assert "forward" not in model.__dict__ and model.forward.__func__ is forward
    assert restore_qformer(model) == []


def test_autocast_and_compute_dtype(inputs, assert_close):
    model = tiny_qformer()
    with torch.no_grad():
        high = copy.deepcopy(model).double()(**{name: x.double() for name, x in inputs.items()}).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            low = model(**inputs).last_hidden_state
        replace_qformer(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**inputs).last_hidden_state
        replace_qformer(model, compute_dtype=torch.bfloat16)
        computed = model(**inputs).last_hidden_state
    assert low.dtype == found.dtype == computed.dtype == torch.float32
    for x in (found, computed):
        assert_close({"rows": x}, {"rows": low}, {"rows": high}, factor=3)


def test_torch_compile_gives_the_same(inputs):
    model = tiny_qformer()
    expected = model(**inputs).last_hidden_state
    replace_qformer(model)
    found = torch.compile(model, backend="aot_eager")(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_accelerates_hooks_around_the_qformer_stay(inputs, monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks")
    seen = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(1)
            return args, kwargs

    for hook_first in (True, False):
        model = tiny_qformer()
        seen.clear()
        if hook_first:
            hooks.add_hook_to_module(model, Hook())
            replace_qformer(model)
        else:
            replace_qformer(model)
            hooks.add_hook_to_module(model, Hook())
        calls = count_calls(model, monkeypatch)
        model(**inputs)
        assert seen and calls


class TestLora:
    """peft's LoRA on the linear layers inside, put there before and after the swap."""

    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def lora(self, peft, model, **options):
        chosen = dict(r=4, lora_alpha=8, target_modules=["query", "key", "value"]) | options
        torch.manual_seed(2)
        peft.inject_adapter_in_model(peft.LoraConfig(**chosen), model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return model

    @pytest.mark.parametrize("swapped_first", [False, True])
    @pytest.mark.parametrize("targets", [["query", "key", "value"], ["value", "dense"]])
    def test_outputs_and_gradients(self, peft, swapped_first, targets, inputs, assert_gradients_close, monkeypatch):
        plain, model = tiny_qformer(), tiny_qformer()
        if swapped_first:
            replace_qformer(model)
        for m in (plain, model):
            self.lora(peft, m.train(), target_modules=targets)
        if not swapped_first:
            replace_qformer(model)
        calls, found = count_calls(model, monkeypatch), {}
        for name, m in (("plain", plain), ("ours", model)):
            out = m(**inputs).last_hidden_state
            scalar({"rows": out}).backward()
            found[name] = out.detach(), gradients(m)
        assert calls and all("lora_" in name for name in found["ours"][1])
        torch.testing.assert_close(found["ours"][0], found["plain"][0], rtol=1e-4, atol=1e-5)
        assert_gradients_close(found["ours"][1], found["plain"][1], 1e-4, zero=r"key.*lora")

    def test_in_eval_mode_adapters_may_change(self, peft, inputs):
        plain, model = (self.lora(peft, tiny_qformer()).eval() for _ in range(2))
        replace_qformer(model)
        layers = [m for m in (*plain.modules(), *model.modules()) if hasattr(m, "lora_A") and hasattr(m, "merge")]

        def check():
            with torch.no_grad():
                found, expected = (m(**inputs).last_hidden_state for m in (model, plain))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            return expected

        with_adapter = check()
        for layer in layers:
            layer.enable_adapters(False)
        without = check()
        assert not torch.allclose(with_adapter, without, atol=1e-3)
        for layer in layers:
            layer.enable_adapters(True)
            layer.merge()
        torch.testing.assert_close(check(), with_adapter, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("options", [dict(lora_dropout=0.2), dict(use_dora=True), dict(lora_bias=True)])
    def test_what_no_one_weight_says_runs_as_before(self, peft, options, inputs, caplog, monkeypatch):
        plain, model = (self.lora(peft, tiny_qformer().train(), **options) for _ in range(2))
        replace_qformer(model)
        calls = count_calls(model, monkeypatch)
        outs = []
        for m in (plain, model):
            torch.manual_seed(3)
            outs.append(m(**inputs).last_hidden_state)
        assert torch.equal(*outs) and not calls
        assert "runs as before" in caplog.text


def test_granite_speechs_projector_is_replaced():
    module = pytest.importorskip("transformers.models.granite_speech.modeling_granite_speech")
    from transformers import GraniteSpeechConfig

    config = GraniteSpeechConfig(
        text_config=dict(model_type="granite", hidden_size=32, num_hidden_layers=1, vocab_size=WORDS),
        projector_config=dict(
            model_type="blip_2_qformer",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=128,
            encoder_hidden_size=48,
            cross_attention_frequency=1,
        ),
        window_size=15,
        downsample_rate=5,
    )
    projector = spread(module.GraniteSpeechEncoderProjector(config)).eval()
    sound = torch.randn(2, 40, 48)
    with torch.no_grad():
        expected = projector(sound)
        assert replace_qformer(projector).replaced == ["qformer"]
        found = projector(sound)
    assert found.shape == (2, 9, 32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_granite_visions_windows_are_replaced():
    module = pytest.importorskip("transformers.models.granite4_vision.modeling_granite4_vision")
    from types import SimpleNamespace

    config = SimpleNamespace(
        text_config=SimpleNamespace(hidden_size=32),
        vision_config=SimpleNamespace(hidden_size=64, image_size=224, patch_size=14),
        projector_dropout=0.0,
        downsample_rate="4/8",
        qformer_config=Blip2QFormerConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=128,
            encoder_hidden_size=64,
            cross_attention_frequency=1,
        ),
    )
    sampler = module.Granite4VisionWindowQFormerDownsampler(config)
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter.normal_(std=0.1)
    sampler.eval()
    features = torch.randn(2, 256, 64)
    with torch.no_grad():
        expected = sampler(features)
        assert replace_qformer(sampler).replaced == ["qformer"]
        found = sampler(features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
class TestCuda:
    """The same on a GPU, where queries without text are CUDA graphs."""

    @pytest.fixture(autouse=True)
    def exact(self):
        torch.backends.cuda.matmul.allow_tf32 = False

    def given(self, batch: int, tokens: int = 9, dtype=torch.float32) -> dict[str, torch.Tensor]:
        queries = nn.Parameter(torch.randn(1, QUERIES, TINY["hidden_size"], device="cuda", dtype=dtype))
        images = torch.randn(batch, tokens, TINY["encoder_hidden_size"], device="cuda", dtype=dtype)
        return dict(query_embeds=queries, encoder_hidden_states=images)

    @pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
    def test_full_size_in_bf16_is_as_close_as_hugging_faces(self, make, assert_close):
        model, run = make(FULL)
        spread(model).cuda().eval()

        def call(m):
            with torch.no_grad(), torch.device("cuda"):
                return {name: x.float() for name, x in run_on_gpu(run, m).items()}

        high = call(model)
        low = call(model.bfloat16())
        replace_qformer(model)
        assert_close(call(model), low, high, factor=3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_graphs_of_any_batch(self, dtype, assert_close):
        plain = tiny_qformer().cuda()
        model = copy.deepcopy(plain).to(dtype)
        high = copy.deepcopy(plain).double()
        low = copy.deepcopy(model)
        replace_qformer(model)
        for batch, tokens in ((1, 9), (3, 9), (17, 9), (18, 9), (40, 5), (2, 30), (1, 9), (17, 9)):
            inputs = self.given(batch, tokens, dtype)
            with torch.no_grad():
                found = model(**inputs).last_hidden_state
                held = found.clone()
                assert_close(
                    {"rows": found},
                    {"rows": low(**inputs).last_hidden_state},
                    {"rows": high(**{name: x.double() for name, x in inputs.items()}).last_hidden_state},
                    factor=3,
                )
                model(**self.given(batch, tokens, dtype))
            assert torch.equal(found, held)

    def test_graphs_see_changed_parameters_and_queries(self):
        model, plain = tiny_qformer().cuda(), tiny_qformer().cuda()
        replace_qformer(model)
        inputs = self.given(3)
        for change in (
            lambda m: m.encoder.layer[1].output_query.dense.weight.mul_(2),
            lambda m: m.encoder.layer[0].crossattention.attention.value.bias.add_(1),
            lambda m: inputs["query_embeds"].mul_(-1),
        ):
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    found, expected = (m(**inputs).last_hidden_state for m in (model, plain))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                change(model)
                change(plain)

    def test_streams_do_not_share_what_graphs_write(self):
        model, plain = tiny_qformer().cuda(), tiny_qformer().cuda()
        replace_qformer(model)
        inputs = [self.given(4) for _ in range(2)]
        queries = inputs[0]["query_embeds"]
        streams = [torch.cuda.Stream() for _ in inputs]
        with torch.no_grad():
            expected = [plain(**(given | {"query_embeds": queries})).last_hidden_state for given in inputs]
            torch.cuda.synchronize()
            for _ in range(20):
                found = []
                for given, stream in zip(inputs, streams, strict=True):
                    with torch.cuda.stream(stream):
                        found.append(model(**(given | {"query_embeds": queries})).last_hidden_state)
                torch.cuda.synchronize()
                for x, y in zip(found, expected, strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

    def training_graphs(self, model):
        found = model.__dict__["_qformer_fast"].qformer._training_graphs
        return [graphs for of_kind in found.values() for graphs in of_kind._graphs]

    @pytest.mark.parametrize("lora", [False, True])
    def test_training_graphs_train_as_without(self, lora, assert_gradients_close):
        found = {}
        for name in ("plain", "graphs"):
            model = tiny_qformer().cuda().train()
            if lora:
                peft = pytest.importorskip("peft")
                torch.manual_seed(2)
                peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["query", "value"]), model)
            torch.manual_seed(3)
            inputs = [self.given(4) for _ in range(3)] + [self.given(2)]
            queries = inputs[0]["query_embeds"]
            if name == "graphs":
                replace_qformer(model)
            trained = [p for p in (queries, *model.parameters()) if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.05)
            losses = []
            for given in inputs * 2:
                for scale in (0.5, 1.0):  # accumulated
                    out = model(**(given | {"query_embeds": queries})).last_hidden_state
                    loss = scalar_on_gpu(out) * scale
                    loss.backward()
                losses.append(float(loss))
                kept = gradients(model) | {"queries": queries.grad.clone()}
                optimizer.step()
                optimizer.zero_grad()
            found[name] = losses, kept
            assert name == "plain" or self.training_graphs(model)
        torch.testing.assert_close(
            torch.tensor(found["graphs"][0]), torch.tensor(found["plain"][0]), rtol=1e-3, atol=1e-4
        )
        assert_gradients_close(found["graphs"][1], found["plain"][1], 1e-2, zero=r"(query|key)\..*lora|query.bias")

    def test_text_beside_queries_trains_as_cuda_graphs(self, assert_gradients_close):
        """InstructBLIP's: captions of other lengths in each step, within one padded width."""
        found = []
        for replaced in (True, False):
            torch.manual_seed(0)
            model, run = instructblip(TINY)
            qformer = spread(model).cuda().train().qformer
            if replaced:
                replace_qformer(model)
            losses = []
            for step in range(6):
                torch.manual_seed(step)
                queries = torch.randn(1, QUERIES, TINY["hidden_size"]).expand(3, -1, -1).cuda()
                images = torch.randn(3, 9, TINY["encoder_hidden_size"]).cuda()
                ids = torch.randint(1, 50, (3, 24)).cuda()
                seen = (torch.arange(24) < torch.randint(1, 24, (3, 1))).long().cuda()
                mask = torch.cat([torch.ones(3, QUERIES, dtype=torch.long, device="cuda"), seen], dim=1)
                qformer.zero_grad()
                out = qformer(ids, mask, query_embeds=queries, encoder_hidden_states=images).last_hidden_state
                loss = scalar_on_gpu(out[:, :QUERIES])
                loss.backward()
                losses.append(float(loss))
            found.append((losses, gradients(qformer)))
            if replaced:
                assert self.training_graphs(qformer)
        torch.testing.assert_close(*(torch.tensor(losses) for losses, _ in found), rtol=1e-3, atol=1e-4)
        assert_gradients_close(found[0][1], found[1][1], 1e-3)

    def test_a_forward_that_waits_is_not_written_over(self, assert_gradients_close):
        model, plain = tiny_qformer().cuda().train(), tiny_qformer().cuda().train()
        replace_qformer(model)
        first, second = self.given(4), self.given(4)
        for m in (model, plain):
            for _ in range(3):
                scalar_on_gpu(m(**first).last_hidden_state).backward()
            m.zero_grad()
            outs = [m(**given).last_hidden_state for given in (first, second)]
            (scalar_on_gpu(outs[0]) + 2 * scalar_on_gpu(outs[1])).backward()
        assert self.training_graphs(model)
        assert_gradients_close(gradients(model), gradients(plain), 1e-4)

    def test_backward_runs_once(self):
        model = tiny_qformer().cuda().train()
        replace_qformer(model)
        inputs = self.given(4)
        for _ in range(3):
            out = model(**inputs).last_hidden_state.sum()
            out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="cuda_graphs=False"):
            out.backward()

    def test_replays_draw_dropout_anew(self):
        model = tiny_qformer(hidden_dropout_prob=0.3).cuda().train()
        replace_qformer(model)
        inputs, outs = self.given(4), []
        for _ in range(5):
            out = model(**inputs).last_hidden_state
            out.sum().backward()
            outs.append(out.detach())
        assert self.training_graphs(model)
        assert all(not torch.equal(a, b) for a, b in zip(outs, outs[1:], strict=False))


def scalar_on_gpu(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape)).sum()


def run_on_gpu(run, model):
    """``run`` with the floating tensors that it closes over in the model's dtype and all of them on its device."""
    cells = [cell for cell in run.__closure__ or ()]

    def moved(x):
        if isinstance(x, dict):
            return {name: moved(value) for name, value in x.items()}
        if isinstance(x, nn.Parameter):
            return nn.Parameter(moved(x.detach()))
        if isinstance(x, torch.Tensor):
            return x.to("cuda", model.dtype if x.is_floating_point() else None)
        return x

    before = [cell.cell_contents for cell in cells]
    for cell, value in zip(cells, before, strict=True):
        cell.cell_contents = moved(value)
    try:
        return run(model)
    finally:
        for cell, value in zip(cells, before, strict=True):
            cell.cell_contents = value
