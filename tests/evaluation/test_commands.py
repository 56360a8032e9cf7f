"""``evaluate captioning`` and ``evaluate vqa`` end to end, on tiny random models."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
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

from qformer_fast import Blip2QFormer, QFormerConfig, cli, use_backend
from qformer_fast.assemble import load_encoder
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import load_tokenizer
from qformer_fast.evaluation import captioning, commands
from qformer_fast.evaluation.captioning import by_domain, caption_metrics, read_captions, read_references
from qformer_fast.evaluation.vqa import gqa_accuracy, normalize_answer, read_answers, vqa_accuracy
from qformer_fast.models.blip2_joint import Blip2Joint
from qformer_fast.models.blip2_opt import Blip2OPT

SIZES = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    encoder_hidden_size=48,
    num_query_tokens=4,
)
WORDS = ["red", "blue", "small", "large", "circle", "square", "photo", "of", "on", "left", "right", "what", "is", "it?"]
SPECIAL = ["<unk>", "<pad>", "</s>"]
NEW_LINE = len(SPECIAL)
IMAGES = [f"val/COCO_val2014_{number:012d}.jpg" for number in (9, 42, 7, 100, 5)]
COMMON = dict(num_beams=1, batch_size=2, max_new_tokens=5, precision="fp32", device="cpu")


def build_tokenizer(encoder_decoder: bool) -> PreTrainedTokenizerFast:
    """Words and the new line; OPT's begins with </s>, T5's ends with it."""
    words = [*SPECIAL, "\n", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\S+"), "removed", invert=True)
    single = "$A </s>" if encoder_decoder else "</s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 2)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(autouse=True)
def _formulas():
    """Plain PyTorch: kernels under Triton's interpreter take most of the time, and other tests look at them."""
    with use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def language_models(tmp_path_factory) -> dict[str, Path]:
    """Folders of a tiny OPT and a tiny T5 with their tokenizers."""
    vocab, folder = NEW_LINE + 1 + len(WORDS), tmp_path_factory.mktemp("language")
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2)
    opt = OPTForCausalLM(OPTConfig(vocab_size=vocab, max_position_embeddings=64, init_std=0.5, **sizes))
    sizes = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, tie_word_embeddings=False)
    ends = dict(pad_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=vocab, initializer_factor=3.0, **sizes, **ends))
    for name, model in {"opt": opt, "t5": t5}.items():
        model.save_pretrained(folder / name)
        build_tokenizer(name == "t5").save_pretrained(folder / name)
    return {"opt": folder / "opt", "t5": folder / "t5"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, language_models, request) -> dict[str, Path]:
    """Folders of stage 1, of stage 2 with OPT and with T5, one whose Q-Former reads text, and both stages'."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(2)
    config, no_text = QFormerConfig(**SIZES), QFormerConfig(**SIZES, use_qformer_text_input=False)
    built = {
        "stage1": Blip2QFormer(config, embed_dim=16),
        "opt": Blip2OPT(no_text, str(language_models["opt"])),
        "t5": Blip2OPT(no_text, str(language_models["t5"])),
        "text": Blip2OPT(config, str(language_models["opt"])),
        "joint": Blip2Joint(config, str(language_models["opt"]), embed_dim=16),
    }
    for name, model in built.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in built}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> FeatureCache:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("cache") / "cache"
    tokens = torch.randn(len(IMAGES), 5, 48) * 2
    return FeatureCache.create(folder, IMAGES, [tokens], metadata={}, dtype="float32")


@pytest.fixture
def no_java(monkeypatch) -> None:
    """Caption metrics without starting Java; only what pycocoevalcap gives is tested elsewhere."""
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap: pip install 'qformer_fast[captioning]'")
    monkeypatch.setattr(captioning.shutil, "which", lambda _: None)


@pytest.fixture
def karpathy(tmp_path) -> Path:
    """Five test images of two captions each, and one of another split."""
    images = []
    for number, image in enumerate([*IMAGES, "val/COCO_val2014_000000000001.jpg"]):
        folder, name = image.split("/")
        sentences = [{"raw": f"A {WORDS[number]} circle on the left."}, {"raw": f"small {WORDS[-number]} square"}]
        images.append({"filename": name, "filepath": folder, "split": "test", "sentences": sentences})
    images[-1]["split"] = "train"
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images}))
    return tmp_path / "karpathy.json"


@pytest.fixture
def nocaps(tmp_path) -> Path:
    domains = ["in-domain", "near-domain", "out-domain", "near-domain", "in-domain"]
    images = [
        {"id": number, "file_name": image, "domain": domain}
        for number, (image, domain) in enumerate(zip(IMAGES, domains, strict=True))
    ]
    annotations = [{"image_id": i, "caption": f"{WORDS[i]} {word}"} for i in range(5) for word in ("circle", "square")]
    (tmp_path / "nocaps.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path / "nocaps.json"


@pytest.fixture
def questions(tmp_path) -> Path:
    """Questions to two images in turn, so that a batch has an image twice."""
    asked = ["What is it?", "Is it RED; or (blue)?", "what is on left?", "Is it small?", "what"]
    entries = [
        {"question_id": 1000 + i, "image_id": 42 if i in (0, 2, 3) else 7, "question": question}
        for i, question in enumerate(asked)
    ]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": entries}))
    return tmp_path / "questions.json"


@pytest.fixture
def options(tmp_path, checkpoints, cache):
    """Options of a task with the cache, changed; of ``None`` what is left to the task."""

    def options(task, **changes):
        found = {"checkpoint": checkpoints["opt"], "output": tmp_path / "out", "feature_cache": cache.folder}
        found |= COMMON | ({"min_new_tokens": 2} if task == "captioning" else {}) | changes
        return {name: str(x) if isinstance(x, Path) else x for name, x in found.items() if x is not None}

    return options


@pytest.fixture
def evaluate(options):
    """Runs ``evaluate`` and gives its status."""

    def evaluate(task, **changes):
        arguments = [part for name, x in options(task, **changes).items() for part in (f"--{name}", str(x))]
        return cli.main(["evaluate", task, *arguments])

    return evaluate


@pytest.fixture
def assert_refuses(options):
    """Asserts what a task's function raises."""

    def assert_refuses(task, message, **changes):
        config, run, _ = commands.EVALUATIONS[task]
        with pytest.raises((ValueError, OSError), match=re.escape(message)):
            run(config(**options(task, **changes)))

    return assert_refuses


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def count_generate(monkeypatch):
    """Counts batches that go through a language model; ``fail_at`` of them is the one that fails."""

    class Count:
        batches, fail_at = 0, None

    plain = Blip2OPT.generate

    def generate(self, *args, **options):
        if Count.batches == Count.fail_at:
            raise KeyboardInterrupt
        Count.batches += 1
        return plain(self, *args, **options)

    monkeypatch.setattr(Blip2OPT, "generate", generate)
    return Count


def texts_by_hand(folder: Path, tokens: torch.Tensor, prompts: list[str], **options) -> list[str]:
    """One image at a time, greedily or by beams, with embeddings put together here."""
    model = Blip2OPT.from_pretrained(folder)
    language_model = model.language_model
    tokenizer = build_tokenizer(language_model.config.is_encoder_decoder)
    end = 2 if language_model.config.is_encoder_decoder else NEW_LINE
    texts = []
    for x, prompt in zip(tokens, prompts, strict=True):
        with torch.no_grad():
            queries = model.language_projection(model.encode_images(x[None]))
            words = language_model.get_input_embeddings()(torch.tensor([tokenizer(prompt)["input_ids"]]))
            embeds = torch.cat([queries, words], dim=1)
            ids = language_model.generate(
                inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), eos_token_id=end, **options
            )
        texts.append(" ".join(WORDS[i - NEW_LINE - 1] for i in ids[0].tolist() if i > NEW_LINE))
    return texts


def test_captions_of_a_karpathy_split(evaluate, checkpoints, cache, karpathy, no_java, tmp_path, capsys) -> None:
    assert evaluate("captioning", annotations=karpathy, num_beams=2, length_penalty=0.5) == 0
    table = capsys.readouterr().out
    out = tmp_path / "out"
    captions = json.loads((out / "captions.json").read_text())
    # LAVIS's image ids of Karpathy's file are the numbers of the files
    assert [caption["image_id"] for caption in captions] == [9, 42, 7, 100, 5]
    options = dict(num_beams=2, length_penalty=0.5, max_new_tokens=5, min_new_tokens=2)
    expected = texts_by_hand(checkpoints["opt"], cache.rows(IMAGES), ["a photo of"] * 5, **options)
    assert [caption["caption"] for caption in captions] == expected
    assert len(set(expected)) > 1
    references = {
        i: content["sentences"]
        for i, content in zip([9, 42, 7, 100, 5], json.loads(karpathy.read_text())["images"], strict=False)
    }
    references = {i: [sentence["raw"] for sentence in sentences] for i, sentences in references.items()}
    direct = caption_metrics({c["image_id"]: c["caption"] for c in captions}, references)
    found = json.loads((out / "metrics.json").read_text())
    assert found["metrics"] == {"overall": direct.scores} and direct.scores["Bleu_1"] > 0
    assert found["images"] == 5 and found["tokenizer"] == "regex"
    assert any("no java on the PATH" in notice for notice in found["notices"]) and found["notices"][0] in table
    assert f"{100 * direct.scores['CIDEr']:.2f}" in table
    settings = found["settings"]
    assert (settings["prompt"], settings["num_beams"], settings["min_new_tokens"]) == ("a photo of", 2, 2)
    for line, image, caption in zip(read_lines(out / "per_image.jsonl"), IMAGES, captions, strict=True):
        scores = direct.per_image[caption["image_id"]]
        assert line == {"image_id": caption["image_id"], "image": image, "caption": caption["caption"], **scores}


def test_captions_of_nocaps_by_domain(evaluate, nocaps, no_java, tmp_path, capsys) -> None:
    assert evaluate("captioning", annotations=nocaps, prompt="") == 0
    table = capsys.readouterr().out
    split, captions = read_references(nocaps), read_captions(tmp_path / "out" / "captions.json")
    assert list(captions) == [0, 1, 2, 3, 4]
    direct = by_domain(captions, split.references, split.domains)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["metrics"] == {name: group.scores for name, group in direct.items()}
    assert list(found["metrics"]) == ["in-domain", "near-domain", "out-domain", "overall"]
    for name, group in direct.items():
        assert re.search(rf"^{name} .*{100 * group.scores['ROUGE_L']:.2f}", table, re.MULTILINE)
    lines = read_lines(tmp_path / "out" / "per_image.jsonl")
    assert Counter(line["domain"] for line in lines) == {"in-domain": 2, "near-domain": 2, "out-domain": 1}
    assert lines[2]["CIDEr"] == direct["overall"].per_image[2]["CIDEr"]


def test_sampled_captions_go_on_after_an_interruption(
    evaluate, karpathy, no_java, count_generate, tmp_path, capsys
) -> None:
    options = {"annotations": karpathy, "do_sample": "true", "top_p": 0.95}
    assert evaluate("captioning", **options, output=tmp_path / "whole") == 0
    assert count_generate.batches == 3
    count_generate.batches, count_generate.fail_at = 0, 2
    with pytest.raises(KeyboardInterrupt):
        evaluate("captioning", **options)
    assert list(files_in(tmp_path / "out")) == ["texts.jsonl"]
    with (tmp_path / "out" / "texts.jsonl").open("a") as file:
        file.write('{"id": 5, "tex')
    count_generate.batches, count_generate.fail_at = 0, None
    assert evaluate("captioning", **options) == 0
    assert count_generate.batches == 1
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    texts = {line["caption"] for line in read_lines(tmp_path / "out" / "per_image.jsonl")}
    assert evaluate("captioning", **options, seed=1, output=tmp_path / "other") == 0
    assert texts != {line["caption"] for line in read_lines(tmp_path / "other" / "per_image.jsonl")}
    before = files_in(tmp_path / "out")
    capsys.readouterr()
    assert evaluate("captioning", **options, prompt="a") == 1
    error = capsys.readouterr().err
    assert "texts.jsonl is of another run" in error and "prompt 'a photo of' now 'a'" in error
    assert files_in(tmp_path / "out") == before


def test_stage_1_captions_with_its_own_head(evaluate, checkpoints, cache, nocaps, no_java, tmp_path, capsys) -> None:
    assert evaluate("captioning", checkpoint=checkpoints["stage1"], annotations=nocaps) == 0
    model, tokenizer = Blip2QFormer.from_pretrained(checkpoints["stage1"]), load_tokenizer()
    expected = []
    for x in cache.rows(IMAGES):
        ids = model.generate(x[None], num_beams=1, max_new_tokens=5, min_new_tokens=2)[0].tolist()
        words = [i for i in ids if i not in (30522, 102, 0)]
        expected.append(tokenizer.decode(words, skip_special_tokens=True).strip())
    assert list(read_captions(tmp_path / "out" / "captions.json").values()) == expected
    capsys.readouterr()
    assert evaluate("captioning", checkpoint=checkpoints["stage1"], annotations=nocaps, prompt="a") == 1
    assert "qformer-fast evaluate captioning: prompt must be left out for" in capsys.readouterr().err


def test_other_checkpoints_caption_as_the_folders_do(
    evaluate, checkpoints, language_models, cache, nocaps, no_java, tmp_path
) -> None:
    lavis = Blip2OPT.from_pretrained(checkpoints["opt"]).to_lavis_state_dict()
    torch.save({"model": lavis}, tmp_path / "stage2.pth")
    torch.save(Blip2QFormer.from_pretrained(checkpoints["stage1"]).to_lavis_state_dict(), tmp_path / "stage1.pth")
    joint = Blip2Joint.from_pretrained(checkpoints["joint"])
    Blip2OPT.from_stage1(joint, joint.language_projection.language_model).save_pretrained(tmp_path / "queries")
    sizes = {f"qformer.{name}": x for name, x in SIZES.items()}
    runs = {
        "opt": {"checkpoint": checkpoints["opt"]},
        "opt from LAVIS": {
            "checkpoint": tmp_path / "stage2.pth", "language_model": language_models["opt"], **sizes
        },
        "joint": {"checkpoint": checkpoints["joint"]},
        "t5": {"checkpoint": checkpoints["t5"]},
    }  # fmt: skip
    found = {}
    for name, options in runs.items():
        assert evaluate("captioning", annotations=nocaps, output=tmp_path / name, batch_size=5, **options) == 0
        found[name] = list(read_captions(tmp_path / name / "captions.json").values())
    assert found["opt from LAVIS"] == found["opt"]
    options = dict(num_beams=1, max_new_tokens=5, min_new_tokens=2)
    tokens, prompts = cache.rows(IMAGES), ["a photo of"] * 5
    assert found["joint"] == texts_by_hand(tmp_path / "queries", tokens, prompts, **options) != found["opt"]
    assert found["t5"] == texts_by_hand(checkpoints["t5"], tokens, prompts, **options)


@pytest.fixture
def hf_folder(language_models, tmp_path):
    """Writes ``tmp_path / "hf"``: Hugging Face's BLIP-2 or InstructBLIP around the tiny OPT, with its tokenizer."""

    def hf_folder(kind):
        torch.manual_seed(4)
        vision = dict(hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        vision |= dict(image_size=28, patch_size=14)
        qformer = {name: x for name, x in SIZES.items() if name != "num_query_tokens"}
        text = OPTForCausalLM.from_pretrained(language_models["opt"])
        parts = dict(vision_config=vision, qformer_config=qformer, text_config=text.config.to_dict())
        if kind == "blip2":
            hf = Blip2ForConditionalGeneration(Blip2Config(**parts, num_query_tokens=4))
        else:
            hf = InstructBlipForConditionalGeneration(InstructBlipConfig(**parts, num_query_tokens=4))
        hf.language_model.load_state_dict(text.state_dict())
        with torch.no_grad():
            hf.query_tokens.normal_()
            hf.language_projection.weight.normal_()
        hf.save_pretrained(tmp_path / "hf")
        build_tokenizer(False).save_pretrained(tmp_path / "hf")
        return hf

    return hf_folder


def test_a_hugging_face_folder_brings_its_tokenizer(evaluate, hf_folder, cache, nocaps, no_java, tmp_path) -> None:
    hf = hf_folder("blip2")
    assert evaluate("captioning", checkpoint=tmp_path / "hf", annotations=nocaps) == 0
    ours = Blip2OPT.from_hf_model(hf)
    tokenizer = build_tokenizer(False)
    prompt = torch.tensor([tokenizer("a photo of")["input_ids"]])
    options = dict(num_beams=1, max_new_tokens=5, min_new_tokens=2, eos_token_id=NEW_LINE)
    expected = [
        tokenizer.decode(ours.generate(x[None], prompt, **options)[0], skip_special_tokens=True).strip()
        for x in cache.rows(IMAGES)
    ]
    assert list(read_captions(tmp_path / "out" / "captions.json").values()) == expected


def test_texts_of_another_language_model_or_vocabulary_are_refused(
    evaluate, assert_refuses, checkpoints, language_models, nocaps, no_java, tmp_path
) -> None:
    """The same names, other content."""
    folder = tmp_path / "language"
    shutil.copytree(language_models["opt"], folder)
    options = {"annotations": nocaps, "language_model": folder}
    assert evaluate("captioning", **options) == 0
    texts = (tmp_path / "out" / "texts.jsonl").read_bytes()
    model = OPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[0, 0] += 1
    model.save_pretrained(folder)
    assert_refuses("captioning", "is of another run, choose another folder; what differs: language_weights", **options)
    shutil.copytree(language_models["opt"], folder, dirs_exist_ok=True)
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    assert_refuses("captioning", "is of another run, choose another folder; what differs: vocabulary", **options)
    assert (tmp_path / "out" / "texts.jsonl").read_bytes() == texts


@pytest.mark.parametrize(("kind", "expected"), [("blip2", "\n"), ("instructblip", "")])
def test_an_instruct_blips_texts_end_as_its_language_models(
    evaluate, hf_folder, questions, tmp_path, monkeypatch, kind, expected
) -> None:
    ends, generate = [], Blip2OPT.generate

    def watched(self, *args, eos_token_id, **options):
        ends.append(eos_token_id)
        return generate(self, *args, eos_token_id=eos_token_id, **options)

    monkeypatch.setattr(Blip2OPT, "generate", watched)
    hf = hf_folder(kind)
    options = {"questions": questions, "image_pattern": "val/COCO_val2014_{:012d}.jpg", "checkpoint": tmp_path / "hf"}
    assert evaluate("vqa", **options) == 0
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert settings["end"] == expected and settings["qformer_prompts"] == (kind == "instructblip")
    assert set(ends) == {NEW_LINE if expected else 2}
    ours = Blip2OPT.from_hf_model(hf)
    ours.save_pretrained(tmp_path / "ours")
    weights = ours.to_lavis_state_dict()
    if not expected:
        weights = {name.replace("opt_proj", "llm_proj"): x for name, x in weights.items()}
    torch.save({"model": weights}, tmp_path / "x.pth")
    hf.language_model.save_pretrained(tmp_path / "hf")
    options["language_model"] = tmp_path / "hf"
    sizes = {f"qformer.{name}": x for name, x in (SIZES | {"vocab_size": ours.config.vocab_size}).items()}
    for name, given in [("ours", {}), ("x.pth", sizes)]:
        ends.clear()
        assert (
            evaluate("vqa", **options | {"checkpoint": tmp_path / name, "output": tmp_path / f"of {name}"}, **given)
            == 0
        )
        assert set(ends) == {NEW_LINE if expected else 2}
    ends.clear()
    assert evaluate("vqa", **options | {"checkpoint": tmp_path / "ours"}, end="", output=tmp_path / "3") == 0
    assert set(ends) == {2}


def test_a_language_model_may_be_given_beside_a_hugging_face_folder(
    evaluate, hf_folder, language_models, nocaps, no_java, tmp_path
) -> None:
    hf = hf_folder("blip2")
    other = OPTForCausalLM.from_pretrained(language_models["opt"])
    with torch.no_grad():
        for parameter in other.model.decoder.layers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    other.save_pretrained(tmp_path / "other")
    build_tokenizer(False).save_pretrained(tmp_path / "other")
    assert evaluate("captioning", checkpoint=tmp_path / "hf", annotations=nocaps) == 0
    options = {"annotations": nocaps, "language_model": tmp_path / "other", "output": tmp_path / "given"}
    assert evaluate("captioning", checkpoint=tmp_path / "hf", **options) == 0
    found = [list(read_captions(tmp_path / name / "captions.json").values()) for name in ("out", "given")]
    hf.language_model.load_state_dict(other.state_dict())
    hf.save_pretrained(tmp_path / "hf")
    assert evaluate("captioning", checkpoint=tmp_path / "hf", annotations=nocaps, output=tmp_path / "inside") == 0
    assert list(read_captions(tmp_path / "inside" / "captions.json").values()) == found[1] != found[0]


def test_a_q_former_that_reads_text_is_given_the_prompts(
    evaluate, checkpoints, cache, questions, count_generate, tmp_path, monkeypatch, capsys
) -> None:
    seen = []
    plain = Blip2OPT.encode_images

    def encode_images(self, image_embeds, ids=None, mask=None):
        seen.extend(load_tokenizer().batch_decode(ids, skip_special_tokens=True))
        return plain(self, image_embeds, ids, mask)

    monkeypatch.setattr(Blip2OPT, "encode_images", encode_images)
    options = {"checkpoint": checkpoints["text"], "image_pattern": "val/COCO_val2014_{:012d}.jpg"}
    assert evaluate("vqa", questions=questions, **options) == 0
    asked = ["what is it?", "is it red or blue?", "what is on left?", "is it small?", "what"]
    told = [f"question:{x}shortanswer:".replace(" ", "") for x in asked]
    assert [text.replace(" ", "") for text in seen] == told
    seen.clear()
    assert evaluate("vqa", questions=questions, **options, qformer_max_length=7, output=tmp_path / "short") == 0
    assert seen[0] == "it? short answer :"
    monkeypatch.setattr(Blip2OPT, "encode_images", plain)
    saved = Blip2OPT.from_pretrained(checkpoints["text"])
    saved.qformer_prompts = False
    saved.save_pretrained(tmp_path / "untold")
    options["checkpoint"] = tmp_path / "untold"
    assert evaluate("vqa", questions=questions, **options, output=tmp_path / "2") == 0
    options["checkpoint"] = checkpoints["text"]
    assert evaluate("vqa", questions=questions, **options, qformer_prompts="false", output=tmp_path / "3") == 0
    texts = [read_answers(tmp_path / name / "answers.json") for name in ("out", "2", "3")]
    assert texts[0] != texts[1] == texts[2]
    settings = [json.loads((tmp_path / name / "metrics.json").read_text())["settings"] for name in ("out", "2")]
    assert [x["qformer_prompts"] for x in settings] == [True, False]


def test_answers_to_questions(evaluate, checkpoints, cache, questions, count_generate, tmp_path, capsys) -> None:
    options = {"questions": questions, "image_pattern": "val/COCO_val2014_{:012d}.jpg", "min_new_tokens": 2}
    assert evaluate("vqa", **options) == 0
    out = tmp_path / "out"
    assert "nothing was measured" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["metrics"] is None
    answers = json.loads((out / "answers.json").read_text())
    assert [answer["question_id"] for answer in answers] == [1000, 1001, 1002, 1003, 1004]
    asked = ["what is it?", "is it red or blue?", "what is on left?", "is it small?", "what"]
    prompts = [f"Question: {question} Short answer:" for question in asked]
    images = cache.rows([IMAGES[i] for i in (1, 2, 1, 1, 2)])
    limits = dict(max_new_tokens=5, min_new_tokens=2)
    assert [x["answer"] for x in answers] == texts_by_hand(checkpoints["opt"], images, prompts, **limits)

    # so many of ten people gave the model's answer
    agree, annotations = [10, 2, 0, 3, 1], []
    for answer, count in zip(answers, agree, strict=True):
        own = normalize_answer(answer["answer"])
        people = [{"answer": own if i < count else "nothing", "answer_id": i} for i in range(10)]
        kinds = {"question_type": "what" if count > 2 else "is it", "answer_type": "other" if count else "yes/no"}
        annotations.append({"question_id": answer["question_id"], "answers": people, **kinds})
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    count_generate.batches = 0
    assert evaluate("vqa", **options, annotations=tmp_path / "annotations.json") == 0
    assert count_generate.batches == 0  # the texts were there
    found = json.loads((out / "metrics.json").read_text())["metrics"]
    # n agree: n people have n - 1 others who agree, 10 - n have n
    expected = [10 * (n * min((n - 1) / 3, 1) + (10 - n) * min(n / 3, 1)) for n in map(float, agree)]
    lines = read_lines(out / "per_question.jsonl")
    assert [line["accuracy"] for line in lines] == pytest.approx(expected)
    assert found["overall"] == pytest.approx(sum(expected) / 5)
    assert found["per_question_type"] == pytest.approx(
        {"what": (expected[0] + expected[3]) / 2, "is it": (expected[1] + expected[2] + expected[4]) / 3}
    )
    assert lines[1] | {"accuracy": 0} == {
        "question_id": 1001,
        "image_id": 7,
        "question": "Is it RED; or (blue)?",
        "answer": answers[1]["answer"],
        "accuracy": 0,
    }
    direct = vqa_accuracy(read_answers(out / "answers.json"), annotations)
    assert found["per_answer_type"] == direct.per_answer_type
    assert re.search(rf"^yes/no +{direct.per_answer_type['yes/no']:.2f}$", capsys.readouterr().out, re.MULTILINE)


def test_gqa_and_an_interruption(evaluate, assert_refuses, count_generate, tmp_path, checkpoints) -> None:
    content = {
        f"0{i}": {"question": f"Is it {WORDS[i]}?", "imageId": f"COCO_val2014_{i:012d}"} for i in (9, 42 % 10, 7, 5)
    }
    content["02"]["imageId"] = "COCO_val2014_000000000042"
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps(content))
    options = {"questions": path, "format": "gqa", "image_pattern": "val/{}.jpg"}
    options |= {"checkpoint": checkpoints["t5"], "min_new_tokens": 2}
    assert evaluate("vqa", **options, output=tmp_path / "whole") == 0
    written = json.loads((tmp_path / "whole" / "answers.json").read_text())
    assert [entry.keys() for entry in written] == [{"questionId", "prediction"}] * 4
    answers = {entry["questionId"]: entry["prediction"] for entry in written}
    assert list(answers) == ["09", "02", "07", "05"]
    for key, entry in content.items():
        entry["answer"] = normalize_answer(answers[key]) if key in ("02", "05") else "nothing"
    path.write_text(json.dumps(content))
    assert evaluate("vqa", **options, output=tmp_path / "whole") == 0
    found = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    right = [normalize_answer(answers[key]) == entry["answer"] for key, entry in content.items()]
    assert found["metrics"] == {"overall": 25.0 * sum(right)} and 2 <= sum(right) < 4
    assert found["metrics"]["overall"] == gqa_accuracy(answers, {k: x["answer"] for k, x in content.items()}).overall
    count_generate.batches, count_generate.fail_at = 0, 1
    with pytest.raises(KeyboardInterrupt):
        evaluate("vqa", **options)
    count_generate.batches, count_generate.fail_at = 0, None
    assert evaluate("vqa", **options) == 0
    assert count_generate.batches == 1
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    del content["02"]["answer"]
    path.write_text(json.dumps(content))
    assert_refuses("vqa", "must have answers to all or to none, not to 1", **options)


def test_pictures_are_encoded_as_they_come(evaluate, assert_refuses, checkpoints, questions, tmp_path) -> None:
    vision = {"image_size": 32, "layers": 3, "width": 48, "head_width": 24, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-48.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-48.json")
    options = {"questions": questions, "feature_cache": None, "encoder": "tiny-48", "random_encoder": "true"}
    options |= {"image_root": tmp_path / "pictures", "min_new_tokens": 2}
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures" / "COCO_val2014_000000000042.jpg")
    missing = f"images that are not in {tmp_path / 'pictures'}: ['COCO_val2014_000000000007.jpg']"
    assert_refuses("vqa", missing, **options)
    assert not (tmp_path / "out").exists()
    Image.new("RGB", (30, 40), "blue").save(tmp_path / "pictures" / "COCO_val2014_000000000007.jpg")
    assert evaluate("vqa", **options) == 0
    torch.manual_seed(0)
    encoder = load_encoder("tiny-48", None, random=True)
    tokens = []
    for number in (42, 7, 42, 42, 7):
        with Image.open(tmp_path / "pictures" / f"COCO_val2014_{number:012d}.jpg") as picture:
            tokens.append(encoder(encoder.transform(picture)[None])[0])
    asked = ["what is it?", "is it red or blue?", "what is on left?", "is it small?", "what"]
    prompts = [f"Question: {question} Short answer:" for question in asked]
    limits = dict(max_new_tokens=5, min_new_tokens=2)
    expected = texts_by_hand(checkpoints["opt"], torch.stack(tokens), prompts, **limits)
    assert list(read_answers(tmp_path / "out" / "answers.json").values()) == expected


def coco(*image_ids: int) -> str:
    """COCO's annotations of these images, the first of which has a caption."""
    images = [{"id": image_id} for image_id in image_ids]
    return json.dumps({"images": images, "annotations": [{"image_id": image_ids[0], "caption": "a"}]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": "nowhere.json"}, "annotations: no file at nowhere.json"),
        ({"annotations": "{"}, "is no JSON"),
        ({"annotations": '{"images": []}'}, 'has no image of split "test"'),
        ({"annotations": coco(1, 1)}, "names 1 again"),
        ({"annotations": coco(1, 2)}, "image 2 must have a list of captions, at least one, got []"),
        ({"annotations": coco(1)}, 'must have each image\'s "file_name", not of [1]'),
        ({"split": "tets"}, "split must be one of"),
        ({"split": "train"}, "1 images that the feature cache lacks: ['val/COCO_val2014_000000000001.jpg']"),
        ({"split": "val"}, 'has no image of split "val"'),
        ({"feature_cache": "nowhere"}, "feature_cache: no feature cache in nowhere"),
        ({"feature_cache": None}, "images that are not in"),
        ({"checkpoint": "stage1", "language_model": "x"}, "language_model must be left out"),
        ({"checkpoint": "lavis.pth"}, "language_model must be given"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"min_new_tokens": 7}, "min_new_tokens must be at most 5, got 7"),
        ({"top_p": 0}, "top_p must lie in (0, 1], got 0"),
        ({"output": __file__}, f"output must be a folder, got {__file__}, a file"),
        ({"checkpoint": "t5", "precision": "fp16"}, 'precision must be "bf16" or "fp32" for a T5'),
        ({"qformer_prompts": True}, "qformer_prompts must be False, "),
        ({"max_new_tokens": 60}, "leave room in the language model's 64 positions for 4 queries and 60 new tokens"),
        ({"language_model": "/nowhere"}, "language_model: no folder at '/nowhere'"),
        ({"checkpoint": "text", "prompt": ""}, "prompts must each have a word for a Q-Former that reads them"),
    ],
)  # fmt: skip
def test_what_captioning_refuses_is_named(assert_refuses, checkpoints, karpathy, tmp_path, changes, message) -> None:
    torch.save({"opt_proj.weight": torch.ones(1)}, tmp_path / "lavis.pth")
    changes = {"annotations": karpathy, "checkpoint": "opt", **changes}
    if str(changes["annotations"]).startswith("{"):
        (tmp_path / "changed.json").write_text(changes["annotations"])
        changes["annotations"] = tmp_path / "changed.json"
    checkpoint = checkpoints.get(changes.pop("checkpoint"), tmp_path / "lavis.pth")
    assert_refuses("captioning", message, checkpoint=checkpoint, **changes)
    assert not (tmp_path / "out" / "captions.json").exists()


ENTRY = {"question_id": 1, "image_id": 42, "question": "what?"}
ANSWERED = {"question_id": 1, "question_type": "what", "answer_type": "other", "answers": [{"answer": "a"}]}


@pytest.mark.parametrize(
    ("questions", "annotations", "changes", "message"),
    [
        ([], None, {}, "must have at least one entry, got none"),
        ([ENTRY, ENTRY], None, {}, "names 1 again"),
        ([{"question_id": 1}], None, {}, 'must have "question_id" (int or str), "image_id"'),
        ([ENTRY], [{**ANSWERED, "question_id": 2}], {}, "1 are missing [1], 1 are unknown [2]"),
        ([ENTRY], [{**ANSWERED, "answers": []}], {}, "answers must have at least one entry, got none"),
        ([ENTRY], None, {}, "1 images that the feature cache lacks: ['COCO_val2014_000000000042.jpg']"),
        ([ENTRY], None, {"image_pattern": "a.jpg"}, "image_pattern must have a format field"),
        ([{**ENTRY, "image_id": "x"}], None, {"image_pattern": "{:012d}.jpg"}, "image_pattern must fit image ids"),
        ([ENTRY], None, {"prompt": "Answer:"}, 'prompt must have "{}" where the question goes'),
        ([ENTRY], [ANSWERED], {"format": "gqa"}, "annotations must be left out with GQA's format"),
        ([ENTRY], None, {"format": "gqa"}, "question 'questions' must have"),
        ([ENTRY], None, {"checkpoint": "stage1"}, "checkpoint must be of a model with a language model"),
    ],
)
def test_what_vqa_refuses_is_named(
    assert_refuses, checkpoints, tmp_path, questions, annotations, changes, message
) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    if "checkpoint" in changes:
        changes = {"checkpoint": checkpoints["stage1"], "image_pattern": "val/COCO_val2014_{:012d}.jpg"}
    given = None if annotations is None else tmp_path / "a.json"
    assert_refuses("vqa", message, questions=tmp_path / "q.json", annotations=given, **changes)
    assert not (tmp_path / "out").exists()


PRESETS = sorted(path.stem for path in (Path(cli.__file__).parent / "presets").glob("evaluate_*.yaml"))


def test_there_is_a_preset_of_each_benchmark() -> None:
    tasks = ["caption_coco", "nocaps_zeroshot", "retrieval_coco", "retrieval_flickr", "gqa_zeroshot_flant5"]
    tasks += ["vqav2_zeroshot_opt", "vqav2_zeroshot_flant5", "okvqa_zeroshot_flant5"]
    assert {f"evaluate_{task}" for task in tasks} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_the_published_settings(preset, monkeypatch) -> None:
    task = "vqa" if "vqa" in preset or "gqa" in preset else "retrieval" if "retrieval" in preset else "captioning"
    kind, _, about = commands.EVALUATIONS[task]
    got = []
    monkeypatch.setitem(commands.EVALUATIONS, task, (kind, got.append, about))
    file = Path(cli.__file__).parent / "presets" / f"{preset}.yaml"
    given = {"vqa": ["--questions", "q.json"]}.get(task, ["--annotations", "a.json"])
    arguments = ["--config", str(file), "--checkpoint", "model", "--output", "out", *given]
    assert cli.main(["evaluate", task, *arguments]) == 0
    (config,) = got
    assert isinstance(config, kind)
    if task == "retrieval":
        assert (config.k, config.max_length, config.image_size, config.split) == (128, 35, 364, "test")
        return
    assert config.num_beams == 5 and not config.do_sample
    if task == "captioning":
        assert (config.prompt, config.max_new_tokens, config.min_new_tokens) == ("a photo of", 30, 8)
        assert (config.length_penalty, config.image_size, config.batch_size) == (1.0, 364, 16)
        return
    answer = "Answer:" if preset.endswith("opt") else "Short answer:"
    assert config.prompt == f"Question: {{}} {answer}"
    assert (config.max_new_tokens, config.length_penalty, config.image_size) == (10, -1.0, None)
    assert config.format == ("gqa" if "gqa" in preset else "vqa")
