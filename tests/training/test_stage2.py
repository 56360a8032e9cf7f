"""Training with a frozen language model: stage 2 and both stages at once, by the loop and by the command."""

import dataclasses
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from qformer_fast import Blip2QFormer, QFormerConfig, cli
from qformer_fast.assemble import build_dataset, build_model
from qformer_fast.data.batches import LanguageDataset, PairDataset, ShuffledBatches
from qformer_fast.data.captions import Pair
from qformer_fast.data.examples import Example
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.models.blip2_joint import Blip2Joint
from qformer_fast.models.blip2_opt import Blip2OPT
from qformer_fast.training.checkpoint import list_checkpoints
from qformer_fast.training.config import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from qformer_fast.training.loop import train

ANIMALS = ["cat", "dog", "bird", "fish", "horse", "cow", "pig", "bee"]
WORDS = [*ANIMALS, "a", "photo", "of", "one", "small", "what", "is", "it?"]
FAST = OptimizerConfig(lr=2e-3, warmup_steps=2, max_grad_norm=1.0)
SIZES = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    encoder_hidden_size=48,
    num_query_tokens=4,
)


def word_tokenizer():
    """Words and "\\n" are tokens; text begins with </s>, as OPT's does."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\S+"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    special = dict(bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build_opt(dropout=0.0):
    torch.manual_seed(11)
    sizes = dict(vocab_size=24, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, max_position_embeddings=64)
    layers = dict(num_hidden_layers=2, num_attention_heads=4, dropout=dropout, attention_dropout=dropout, init_std=0.2)
    return OPTForCausalLM(OPTConfig(**sizes, **layers)).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("data") / "cache"
    return FeatureCache.create(folder, ANIMALS, [torch.randn(8, 4, 48)], metadata={}, dtype="float32")


@pytest.fixture(scope="module")
def dataset(cache):
    """Half of the examples after a prompt, texts of two lengths."""
    examples = [Example(animal, f"one {animal}", "a photo of") for animal in ANIMALS[::2]]
    examples += [Example(animal, f"a small {animal}") for animal in ANIMALS[1::2]]
    return LanguageDataset(examples, LanguageTokenizer(word_tokenizer()), cache=cache)


@pytest.fixture(scope="module")
def joint_dataset(dataset, cache):
    return LanguageDataset(dataset.examples, dataset.language, cache=cache, captions_tokenizer=load_tokenizer())


def build(dropout=0.1, language_model=None, text=False, **options):
    model = build_opt() if language_model is None else language_model
    torch.manual_seed(7)
    dropouts = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return Blip2OPT(QFormerConfig(**SIZES, **dropouts, use_qformer_text_input=text), model, **options)


def run_config(folder, **options):
    defaults = dict(steps=5, batch_size=3, precision="fp32", device="cpu", log_every=1, save_every=2)
    return RunConfig(output_dir=str(folder), **{**defaults, **options})


def without_times(entries):
    return [{name: value for name, value in entry.items() if name != "samples_per_second"} for entry in entries]


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


class Interrupt(Exception):
    pass


def interrupt_at(step):
    def interrupt(entry):
        if entry["step"] == step:
            raise Interrupt

    return interrupt


def test_the_loss_falls_and_the_language_model_keeps_every_bit(dataset, tmp_path):
    model = build(dropout=0.0)
    before = {name: x.clone() for name, x in model.language_model.state_dict().items()}
    entries = train(model, dataset, run_config(tmp_path, steps=30, batch_size=8, save_every=100), FAST)
    assert entries[-1]["loss"] < 0.6 * entries[0]["loss"]
    assert entries[0].keys() == {"step", "epoch", "lr", "loss", "grad_norm", "samples_per_second"}
    assert all(torch.equal(before[name], x) for name, x in model.language_model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.language_model.parameters())


def test_the_loss_is_transformers_own_and_accumulates_as_a_mean(dataset, tmp_path):
    """Against the language model's own loss of embeddings and labels, each example alone and unpadded."""
    (entry,) = train(build(dropout=0.0), dataset, run_config(tmp_path, steps=1, accumulation=2), FAST)
    model = build(dropout=0.0)
    losses = []
    for _, numbers in zip(range(2), ShuffledBatches(8, 3, seed=0), strict=False):
        total, count = 0.0, 0
        for i in numbers:
            example = dataset.examples[i]
            ids = word_tokenizer()(f"{example.prompt} {example.text}".strip() + "\n", return_tensors="pt")["input_ids"]
            told = len(example.prompt.split()) + 1 if example.prompt else 0
            with torch.no_grad():
                queries = model.language_projection(model.encode_images(dataset.cache.rows([example.image])))
                embeds = torch.cat([queries, model.language_model.get_input_embeddings()(ids)], dim=1)
            labels = torch.cat([torch.full((1, 4 + told), -100), ids[:, told:]], dim=1)
            said = ids.shape[1] - told
            total, count = (
                total + said * model.language_model(inputs_embeds=embeds, labels=labels).loss.item(),
                count + said,
            )
        losses.append(total / count)
    assert entry["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_resumed_run_has_bit_identical_losses_and_weights(dataset, tmp_path):
    """Dropout of the Q-Former and of the language model on; the interruption comes between two checkpoints."""

    def build_one():
        return build(language_model=build_opt(dropout=0.1), language_model_dropout=True)

    options = dict(accumulation=2, save_every=2)
    whole_model, resumed_model = build_one(), build_one()
    whole = train(whole_model, dataset, run_config(tmp_path / "whole", **options), FAST)
    with pytest.raises(Interrupt):
        train(build_one(), dataset, run_config(tmp_path / "parts", **options), FAST, on_log=interrupt_at(4))
    torch.rand(3)
    resumed = train(resumed_model, dataset, run_config(tmp_path / "parts", resume=True, **options), FAST, num_workers=1)
    assert without_times(resumed) == without_times(whole) and len({entry["loss"] for entry in whole}) == 5
    assert same_weights(whole_model, resumed_model)
    saved = list_checkpoints(tmp_path / "parts")[-1]
    weights = load_file(saved / "model.safetensors")
    assert weights.keys() == whole_model.state_dict().keys() and not any("language_model" in name for name in weights)
    loaded = Blip2OPT.from_pretrained(saved, language_model=build_opt())
    assert same_weights(loaded, whole_model) and loaded.language_projection.dropout


@pytest.mark.parametrize("kind", ["stage2", "joint"])
def test_a_run_goes_on_with_its_language_model_and_its_examples_alone(dataset, cache, tmp_path, kind):
    def build_one(language_model=None):
        if kind == "stage2":
            return build(language_model=language_model)
        return Blip2Joint(QFormerConfig(**SIZES), language_model or build_opt(), embed_dim=16)

    def data(examples):
        bert = load_tokenizer() if kind == "joint" else None
        return LanguageDataset(examples, dataset.language, cache=cache, captions_tokenizer=bert)

    other = build_opt()
    with torch.no_grad():
        other.model.decoder.layers[1].fc1.weight[0, 0] += 1
    examples = dataset.examples
    other_prompts = [dataclasses.replace(x, prompt="a small") if x.prompt else x for x in examples]
    other_images = [dataclasses.replace(x, image=y.image) for x, y in zip(examples, examples[::-1], strict=True)]
    train(build_one(), data(examples), run_config(tmp_path, steps=2), FAST)
    resumed = run_config(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"run.resume: language_weights must be \d+ as in .*, got \d+"):
        train(build_one(other), data(examples), resumed, FAST)
    for changed in (other_prompts, other_images):
        with pytest.raises(ValueError, match=r"run.resume: examples must be \d+ as in .*, got \d+"):
            train(build_one(), data(changed), resumed, FAST)
    assert train(build_one(), data(examples), resumed, FAST)[-1]["step"] == 5


def test_prompts_train_the_text_branch(dataset, cache, tmp_path):
    """Without prompts the branch is carried along unchanged, and such a run resumes too."""
    model, start = build(text=True), build(text=True)
    train(model, dataset, run_config(tmp_path / "carried", steps=3, save_every=2), FAST)
    text = [name for name, _ in start.named_parameters() if "embeddings" in name or "layer.0.intermediate." in name]
    assert len(text) == 4 and all(torch.equal(start.get_parameter(name), model.get_parameter(name)) for name in text)
    train(model, dataset, run_config(tmp_path / "carried", resume=True), FAST)
    examples = [dataclasses.replace(example, prompt="what is it?") for example in dataset.examples]
    told = LanguageDataset(examples, dataset.language, cache=cache, qformer_tokenizer=load_tokenizer())
    train(model, told, run_config(tmp_path / "told"), FAST)
    assert not any(torch.equal(start.get_parameter(name), model.get_parameter(name)) for name in text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_16_bit_language_model_trains_in_any_precision(dataset, tmp_path, precision, dtype):
    """Where gradients pass through fp16 the loss is scaled."""
    exact = train(build(), dataset, run_config(tmp_path / "exact", steps=2), FAST)
    model = build(language_model=build_opt().to(dtype))
    low = train(model, dataset, run_config(tmp_path / "low", steps=2, precision=precision), FAST)
    for a, b in zip(exact, low, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.03)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = json.loads((list_checkpoints(tmp_path / "low")[-1] / "state.json").read_text())
    assert ("scale" in state["scaler"]) == (torch.float16 in (dtype, {"fp16": torch.float16}.get(precision)))


def test_an_encoder_decoder_trains(dataset, cache, tmp_path):
    torch.manual_seed(11)
    sizes = dict(vocab_size=24, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0)
    t5 = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1))
    language = LanguageTokenizer(word_tokenizer(), encoder_decoder=True)
    examples = LanguageDataset(dataset.examples, language, cache=cache)
    model = build(dropout=0.0, language_model=t5)
    entries = train(model, examples, run_config(tmp_path, steps=15, batch_size=8, save_every=100), FAST)
    assert entries[-1]["loss"] < 0.9 * entries[0]["loss"]


def test_joint_training_logs_four_losses_whose_sum_is_the_loss(joint_dataset, tmp_path):
    def build_joint():
        opt = build_opt()
        torch.manual_seed(7)
        return Blip2Joint(QFormerConfig(**SIZES), opt, embed_dim=16)

    whole_model, model = build_joint(), build_joint()
    entries = train(whole_model, joint_dataset, run_config(tmp_path / "whole"), FAST)
    parts = ["loss_itc", "loss_itm", "loss_itg", "loss_lm"]
    metrics = ["step", "epoch", "lr", "loss", *parts, "r1_i2t", "r1_t2i", "itm_accuracy", "grad_norm", "temp"]
    assert entries[0].keys() == {*metrics, "samples_per_second"}
    for entry in entries:
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in parts), rel=1e-5)
        assert all(entry[name] > 0 for name in parts)
    with pytest.raises(Interrupt):
        train(build_joint(), joint_dataset, run_config(tmp_path / "parts"), FAST, on_log=interrupt_at(3))
    resumed = train(model, joint_dataset, run_config(tmp_path / "parts", resume=True), FAST)
    assert without_times(resumed) == without_times(entries) and same_weights(model, whole_model)
    assert not any(
        "language_model" in name for name in load_file(list_checkpoints(tmp_path / "parts")[-1] / "model.safetensors")
    )


def test_nan_stops_the_run_and_names_the_loss(dataset, tmp_path):
    model = build()
    with torch.no_grad():
        model.language_projection.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss is nan at step 1; .*no checkpoint was written yet"):
        train(model, dataset, run_config(tmp_path), FAST)


def test_wrong_pairings_are_named(dataset, cache, tmp_path):
    pairs = PairDataset([Pair(animal, animal, animal) for animal in ANIMALS], load_tokenizer(), cache=cache)
    told = [Example(animal, animal, "what is it?") for animal in ANIMALS]
    told = LanguageDataset(told, dataset.language, cache=cache, qformer_tokenizer=load_tokenizer())
    stage1, stage2 = Blip2QFormer(QFormerConfig(**SIZES), embed_dim=16), build()
    joint = Blip2Joint(QFormerConfig(**SIZES), build_opt())
    graphs = dict(cuda_graphs=True)
    for model, examples, options, message in [
        (stage1, dataset, {}, "dataset must be a PairDataset for a Blip2QFormer, got a LanguageDataset"),
        (stage2, pairs, {}, "dataset must be a LanguageDataset for a Blip2OPT, got a PairDataset"),
        (joint, pairs, {}, "dataset must be a LanguageDataset for a Blip2Joint, got a PairDataset"),
        (joint, dataset, {}, "dataset must be given a captions_tokenizer for a Blip2Joint"),
        (stage2, told, {}, "dataset must have no prompts for the Q-Former of a model without a text branch"),
        (stage2, dataset, graphs, "run.cuda_graphs must be False for a Blip2OPT"),
        (joint, dataset, graphs, "run.cuda_graphs must be False for a Blip2Joint"),
        (torch.nn.Linear(2, 2), dataset, {}, "model must be a Blip2QFormer, Blip2OPT or Blip2Joint, got a Linear"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(model, examples, run_config(tmp_path, **options), FAST)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def opt_folder(tmp_path):
    build_opt().save_pretrained(tmp_path / "opt")
    word_tokenizer().save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


@pytest.fixture
def stage1(spread_weights):
    model = Blip2QFormer(QFormerConfig(**SIZES), embed_dim=16, ln_vision_eps=1e-6)
    spread_weights(model)
    return model


def shared_weights(model, other):
    """Names that both have, all of them equal."""
    ours, theirs = model.state_dict(), other.state_dict()
    names = ours.keys() & theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    return names


def test_models_start_from_any_stage(stage1, opt_folder, tmp_path, spread_weights):
    """From folders and LAVIS files of stage 1, of stage 2 and of both; what both have is copied."""
    language = LanguageConfig(opt_folder, dropout=True)
    stage2 = Blip2OPT.from_stage1(stage1, opt_folder, keep_text=True)
    joint = Blip2Joint(stage1.config, opt_folder, **stage1.init_options())
    for name, model in {"stage1": stage1, "stage2": stage2, "joint": joint}.items():
        spread_weights(model)
        model.save_pretrained(tmp_path / name)
    torch.save({"model": stage1.to_lavis_state_dict()}, tmp_path / "stage1.pth")
    torch.save({"model": stage2.to_lavis_state_dict()}, tmp_path / "stage2.pth")
    starts = {"stage1": stage1, "stage2": stage2, "joint": joint, "stage1.pth": stage1, "stage2.pth": stage2}
    for name, start in starts.items():
        config = ModelConfig(QFormerConfig(**SIZES), embed_dim=16, checkpoint=str(tmp_path / name))
        for keep_text in (False, True):
            model = build_model(config, dataclasses.replace(language, keep_text=keep_text))
            lacking = model.state_dict().keys() - shared_weights(model, start)
            assert lacking == ({"language_projection.weight", "language_projection.bias"} if start is stage1 else set())
            assert model.config.use_qformer_text_input == keep_text and model.language_projection.dropout
        if start is not stage2:
            model = build_model(config, dataclasses.replace(language, joint=True))
            lacking = model.state_dict().keys() - shared_weights(model, start)
            assert isinstance(model, Blip2Joint)
            assert lacking == ({"language_projection.weight", "language_projection.bias"} if start is stage1 else set())
        if name.endswith("1"):
            assert model.ln_vision.eps == 1e-6
    assert isinstance(build_model(ModelConfig(QFormerConfig(**SIZES)), language), Blip2OPT)


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_training_starts_from_a_hugging_face_folder(opt_folder, tmp_path, kind):
    torch.manual_seed(3)
    vision = dict(hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    qformer = {name: x for name, x in SIZES.items() if name != "num_query_tokens"}
    parts = dict(vision_config=vision, qformer_config=qformer, text_config=build_opt().config.to_dict())
    if kind == "blip2":
        hf = Blip2ForConditionalGeneration(Blip2Config(**parts, num_query_tokens=4))
    else:
        hf = InstructBlipForConditionalGeneration(InstructBlipConfig(**parts, num_query_tokens=4))
    with torch.no_grad():
        hf.query_tokens.normal_()
    hf.save_pretrained(tmp_path / "hf")
    config = ModelConfig(checkpoint=str(tmp_path / "hf"))
    with pytest.raises(ValueError, match="checkpoint must be of stage 1, got .*hf, a .*ForConditionalGeneration"):
        build_model(config)
    keep_text = kind == "instructblip"
    language = LanguageConfig(opt_folder, prompt="{}", keep_text=keep_text)
    model = build_model(config, language)
    assert model.language_model.name_or_path == opt_folder and model.config.use_qformer_text_input == keep_text
    assert torch.equal(model.language_projection.weight, hf.language_projection.weight)
    assert torch.equal(model.query_tokens, hf.query_tokens)
    expected = Blip2OPT.from_hf_model(hf).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    assert model.state_dict().keys() == expected.keys()
    with pytest.raises(ValueError, match="language.joint must be False, .*hf has no heads of stage 1"):
        build_model(config, LanguageConfig(opt_folder, joint=True))


def test_a_checkpoint_says_how_it_was_trained(dataset, cache, tmp_path):
    """Whether the Q-Former read the prompts, and what the texts ended with, whatever the model was made with."""
    examples = [dataclasses.replace(x, prompt="what") for x in dataset.examples]
    language = LanguageTokenizer(word_tokenizer(), end="")
    for number, (tokenizer, text, given) in enumerate(
        [(load_tokenizer(), True, False), (None, True, True), (None, False, None)]
    ):
        data = LanguageDataset(examples, language, cache=cache, qformer_tokenizer=tokenizer)
        model = build(text=text, qformer_prompts=given)
        train(model, data, run_config(tmp_path / str(number), steps=1), FAST)
        saved = list_checkpoints(tmp_path / str(number))[-1]
        loaded = Blip2OPT.from_pretrained(saved, language_model=build_opt())
        assert loaded.qformer_prompts == (tokenizer is not None) and loaded.text_end == ""


def test_checkpoints_that_lack_what_is_asked_for_are_named(stage1, opt_folder, tmp_path):
    Blip2OPT.from_stage1(stage1, opt_folder).save_pretrained(tmp_path / "stage2")
    config, language = ModelConfig(checkpoint=str(tmp_path / "stage2")), LanguageConfig(opt_folder)
    with pytest.raises(ValueError, match="language.keep_text must be False, .*stage2 has no text branch"):
        build_model(config, dataclasses.replace(language, keep_text=True))
    with pytest.raises(ValueError, match="language.joint must be False, .*stage2 has no heads of stage 1"):
        build_model(config, dataclasses.replace(language, joint=True))
    with pytest.raises(ValueError, match="must hold a Blip2QFormer"):
        build_model(config)
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere.pth"):
        build_model(ModelConfig(checkpoint="nowhere.pth"), language)


def test_the_data_are_those_that_the_language_model_needs(cache, opt_folder, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"image": "cat", "question": "What is it?", "answer": ["a cat"]}]))
    data = DataConfig(str(tmp_path / "data.json"), feature_cache=str(cache.folder))
    for options, has_prompts, has_captions in [
        ({}, False, False), (dict(keep_text=True), True, False), (dict(joint=True), False, True)
    ]:  # fmt: skip
        found = build_dataset(data, None, LanguageConfig(opt_folder, prompt="{}", **options))
        assert (found.has_prompts, found.has_captions) == (has_prompts, has_captions)
        assert found.examples == [Example("cat", "a cat", "what is it?", "cat")]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "cat", "caption": "A cat"}]))
    assert not build_dataset(data, None, LanguageConfig(opt_folder, keep_text=True)).has_prompts


@pytest.fixture
def command(cache, opt_folder, tmp_path):
    """Runs ``train`` on a file of these entries with an option file and flags."""

    def command(entries, output, *flags, **language):
        (tmp_path / "data.json").write_text(json.dumps(entries))
        options = {
            "data": {"pairs": str(tmp_path / "data.json"), "feature_cache": str(cache.folder)},
            "run": {"steps": 2, "batch_size": 4, "log_every": 1, "precision": "fp32", "device": "cpu"},
            "optimizer": {"warmup_steps": 2},
            "model": {"qformer": SIZES, "embed_dim": 16},
        }
        options["run"]["output_dir"] = str(tmp_path / output)
        if language:
            options["language"] = language
        (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
        return cli.main(["train", "--config", str(tmp_path / "options.yaml"), *map(str, flags)])

    return command


def test_the_command_goes_from_stage_1_over_stage_2_to_questions(command, stage1, opt_folder, tmp_path):
    stage1.save_pretrained(tmp_path / "stage1")
    captions = [{"image": animal, "caption": f"A small {animal}."} for animal in ANIMALS]
    flags = ["--language.model", opt_folder, "--language.keep_text", "true", "--model.checkpoint", tmp_path / "stage1"]
    assert command(captions, "stage2", *flags) == 0
    (folder,) = list_checkpoints(tmp_path / "stage2")
    model = Blip2OPT.from_pretrained(folder)
    assert model.language_model.name_or_path == opt_folder
    start = stage1.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith("language_projection."):
            # two warm-up steps of AdamW move no weight by more than about its learning rate
            torch.testing.assert_close(tensor, start[name], rtol=1e-4, atol=1e-4)
    kept = yaml.safe_load((tmp_path / "stage2" / "config.yaml").read_text())
    assert kept["language"]["model"] == opt_folder and kept["language"]["dtype"] == "auto"

    questions = [{"image": animal, "question": "What is it?", "answer": [animal, "x", animal]} for animal in ANIMALS]
    asked = dict(model=opt_folder, prompt="{}", keep_text=True)
    assert command(questions, "vqa", "--model.checkpoint", folder, **asked) == 0
    tuned = Blip2OPT.from_pretrained(list_checkpoints(tmp_path / "vqa")[-1])
    branch = "qformer.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[branch], start[branch])
    assert not torch.equal(tuned.state_dict()[branch], start[branch])
    torch.testing.assert_close(tuned.language_projection.weight, model.language_projection.weight, rtol=1e-4, atol=1e-4)

    assert command(captions, "both", "--model.checkpoint", tmp_path / "stage1", model=opt_folder, joint=True) == 0
    logged = json.loads((tmp_path / "both" / "log.jsonl").read_text().splitlines()[0])
    assert {"loss_itc", "loss_lm"} <= logged.keys()


def test_bad_language_options_are_named(command, opt_folder, tmp_path, capsys):
    captions = [{"image": animal, "caption": animal} for animal in ANIMALS]
    questions = [{"image": "cat", "question": "what?", "answer": "cat"}] * 4
    for entries, language, flags, message in [
        (captions, dict(joint=True, keep_text=True), [], "language.keep_text must be False with language.joint"),
        (captions, dict(max_length=0), [], "max_length must be at least 1, got 0"),
        (captions, {}, ["--run.cuda_graphs", "true"], "run.cuda_graphs must be False for a Blip2OPT"),
        (questions, dict(prompt="what"), [], 'prompt must have one "{}" where the question goes'),
        (captions, dict(model=str(tmp_path / "nowhere")), [], "language_model: no folder at"),
        (captions, dict(prompt="{}"), [], 'prompt must have no "{}", there is no question in'),
        (captions, {}, ["--model.checkpoint", tmp_path / "nowhere"], "checkpoint: no folder at"),
        (captions, {}, ["--run.output_dir", tmp_path / "data.json"], "run.output_dir must be a folder, got"),
    ]:
        assert command(entries, "out", *flags, **(dict(model=opt_folder) | language)) == 1
        assert message in capsys.readouterr().err
        assert not list_checkpoints(tmp_path / "out")


def test_a_configuration_is_refused_as_a_whole(tmp_path):
    with pytest.raises(ValueError, match="language.keep_text must be False with language.joint"):
        TrainConfig(DataConfig("x"), run_config(tmp_path), language=LanguageConfig("x", keep_text=True, joint=True))
