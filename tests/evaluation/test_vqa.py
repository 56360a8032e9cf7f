"""VQA accuracy and GQA's exact match against the original's own code, and the official files."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import logging
import os
import random
import re
import warnings
from types import ModuleType, SimpleNamespace

import pytest

from qformer_fast.evaluation.vqa import (
    Question,
    gqa_accuracy,
    normalize_answer,
    read_annotations,
    read_answers,
    read_gqa,
    read_questions,
    vqa_accuracy,
    write_answers,
)

QUESTIONS = 2400
WORDS = re.findall(
    r"\S+",
    """
    yes no No 2 two Two 10 TEN none zero 1,000 3.5 .5 12:30 $5.00 1,2,3 2,b a A an the The cat red U.S. e.g. it's café ½
    ٣,٤ ... ?! <b> (x) [y] {z} \\ "q" _ ` @home + = - / ' ; : & black-and-white t-shirt p.m. y'all
    """,
)
JOINTS = (" ", " ", " ", "  ", ", ", ",", "-", " - ", "/", "\n", "\t", "\r\n", "; ", ". ", ".", "", " the ", "?")
EDGES = ("", "", "", " ", "\n", "\t ", ".", ",", "!", "'", "\r", "." * 40)


def load(original, name: str) -> ModuleType:
    """A file of lavis/common/vqa_tools, which imports nothing of LAVIS."""
    path = original.LAVIS / "lavis" / "common" / "vqa_tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_original_{name}", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vqa_eval(original) -> type:
    return load(original, "vqa_eval").VQAEval


@pytest.fixture(scope="module")
def theirs_normalized(vqa_eval):
    tool = vqa_eval()
    return lambda text: tool.processDigitArticle(tool.processPunctuation(text))


@pytest.fixture(scope="module")
def words(vqa_eval) -> list[str]:
    contractions = vqa_eval().contractions
    return [*WORDS * 4, *contractions, *contractions.values(), *map(str.upper, contractions)]


def make_text(rng: random.Random, words: list[str]) -> str:
    text = rng.choice(words)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        text += rng.choice(JOINTS) + rng.choice(words)
    return (
        rng.choice(EDGES) + text + rng.choice(EDGES) if rng.random() < 0.97 else rng.choice(("", " ", "\n", "a", "."))
    )


@pytest.fixture(scope="module")
def split(words, theirs_normalized) -> tuple[dict[int, str], dict, dict]:
    """Predictions, questions and annotations; people answer as predicted, nearly so, all alike, or in their own way."""
    rng = random.Random(0)
    predictions, annotations = {}, []
    for number in range(QUESTIONS):
        predicted = make_text(rng, words)
        near = theirs_normalized(predicted.replace("\n", " ").replace("\t", " ").strip())
        nearly = [near, near + ".", near + " ?", near.replace(" ", "-"), near.title(), predicted]
        likely = [*nearly, *(make_text(rng, words) for _ in range(rng.choice((1, 6, 30))))]
        answers = [near] * rng.choice((0, 0, 1, 2, 3, 4, 8))
        answers += [rng.choice(likely) for _ in range(10 - len(answers))]
        if rng.random() < 0.1:
            answers = [rng.choice(likely)] * 10
        rng.shuffle(answers)
        given = [{"answer": x, "answer_confidence": rng.choice(("yes", "maybe"))} for x in answers]
        if rng.random() < 0.9:
            given = [entry | {"answer_id": i} for i, entry in enumerate(given, 1)]
        question_id = 1000 + 7 * number
        kinds = dict(
            question_type=rng.choice(("what is", "how many", "is the")), answer_type=rng.choice(("other", "no"))
        )
        annotations.append({"question_id": question_id, "image_id": number, "answers": given, **kinds})
        predictions[question_id] = predicted
    asked = [{k: x[k] for k in ("question_id", "image_id")} | {"question": "What?"} for x in annotations]
    header = dict.fromkeys(("info", "task_type", "data_type", "data_subtype", "license"), "")
    return predictions, header | {"questions": asked}, header | {"annotations": annotations}


@pytest.fixture
def write(tmp_path):
    def write(content, name: str = "file.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@pytest.mark.parametrize("digits", [2, 12])
def test_accuracies_are_the_originals(original, vqa_eval, split, write, tmp_path, capsys, digits) -> None:
    predictions, asked, annotated = split
    question_file, annotation_file = write(asked, "questions.json"), write(annotated, "annotations.json")
    write_answers(tmp_path / "results.json", predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vqa = load(original, "vqa").VQA(annotation_file, question_file)
        theirs = vqa_eval(vqa, vqa.loadRes(str(tmp_path / "results.json"), question_file), n=digits)
    theirs.evaluate()
    annotations = read_annotations(annotation_file, questions=read_questions(question_file))
    ours = vqa_accuracy(read_answers(tmp_path / "results.json"), annotations).rounded(digits)
    assert ours.per_question == theirs.evalQA
    assert ours.overall == theirs.accuracy["overall"]
    assert ours.per_question_type == theirs.accuracy["perQuestionType"]
    assert ours.per_answer_type == theirs.accuracy["perAnswerType"]
    counts = [sum(accuracy == value for accuracy in theirs.evalQA.values()) for value in (0, 30, 60, 90, 100)]
    assert len(ours.per_question) == QUESTIONS and min(counts) >= 20


def test_normalization_is_the_originals(theirs_normalized, words) -> None:
    rng = random.Random(1)
    texts = {*words, *(make_text(rng, words) for _ in range(4000))}
    assert {text: normalize_answer(text) for text in texts} == {text: theirs_normalized(text) for text in texts}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Two cats.", "2 cats"),
        ("$1,000-2", "$10002"),
        ("black-white", "black white"),
        ("black - white-cat", "black whitecat"),
        ("3.5 p.m.", "3.5 pm"),
        ("dont  A", "don't"),
        ("." * 34, ".."),
    ],
)
def test_normalization_by_hand(text, expected) -> None:
    assert normalize_answer(text) == expected


def people(*answers: str, **others) -> dict:
    given = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
    return {"question_id": 1, "question_type": "how many", "answer_type": "number", "answers": given, **others}


@pytest.mark.parametrize(
    ("predicted", "answers", "expected"),
    [
        ("Two.", ["2"] * 3 + ["two"] * 7, 90.0),
        ("2", ["2"] * 10, 100.0),
        ("2", ["2"] * 2 + ["3"] * 8, 60.0),
        ("2", ["2"] + ["3"] * 9, 30.0),
        ("two", ["two"] * 10, 0.0),
        ("\n a red\tcar ", ["red, car"] * 9 + ["blue"], 100.0),
        ("red, car", ["red, car"] * 10, 0.0),
        ("red car", ["red car?"] * 9 + ["blue"], 0.0),
    ],
)
def test_accuracy_by_hand(predicted, answers, expected) -> None:
    annotations = [people(*answers), people("no", "yes", question_id="b", answer_type="yes/no")]
    before = copy.deepcopy(annotations)
    found = vqa_accuracy({1: predicted, "b": "neither"}, annotations)
    assert found.per_question == {1: pytest.approx(expected), "b": 0.0}
    assert found.per_answer_type == {"number": pytest.approx(expected), "yes/no": 0.0}
    assert found.overall == found.per_question_type["how many"] == pytest.approx(expected / 2)
    assert annotations == before


@pytest.mark.parametrize("inference_method", ["generate", "rank"])
def test_gqa_is_the_originals(original, vqa_eval, theirs_normalized, words, tmp_path, inference_method) -> None:
    source = ast.parse((original.LAVIS / "lavis" / "tasks" / "vqa.py").read_text())
    task = next(node for node in source.body if getattr(node, "name", "") == "GQATask")
    functions = [node for node in task.body if getattr(node, "name", "") == "_report_metrics"]
    names = dict(json=json, os=os, logging=logging, VQAEval=vqa_eval)
    names["registry"] = SimpleNamespace(get_path=lambda _: tmp_path)
    names["dist_utils"] = SimpleNamespace(main_process=lambda function: function)
    exec(compile(ast.Module(functions, []), "vqa.py", "exec"), names)
    rng = random.Random(2)
    predictions = {str(i): make_text(rng, words) for i in range(2000)}
    answers = {i: rng.choice((theirs_normalized(x), x, x.lower(), "cat")) for i, x in predictions.items()}
    results = [{"question_id": i, "pred_ans": x, "gt_ans": answers[i]} for i, x in predictions.items()]
    (tmp_path / "results.json").write_text(json.dumps(results))
    self = SimpleNamespace(inference_method=inference_method)
    expected = names["_report_metrics"](self, result_file=tmp_path / "results.json", split="val")
    found = gqa_accuracy(predictions, answers, normalize=inference_method == "generate")
    assert found.overall == expected["acc"] and 10 < found.overall < 90
    assert sum(found.per_question.values()) / 2000 == pytest.approx(found.overall)
    assert set(found.per_question.values()) == {0.0, 100.0} and found.per_question.keys() == predictions.keys()


def test_questions_as_the_files_hold_them(write, tmp_path) -> None:
    asked = [
        {"question_id": 5, "image_id": 7, "question": "Why?"},
        {"question_id": 2, "image_id": 7, "question": "Who?"},
    ]
    assert read_questions(write({"questions": asked})) == [Question(5, 7, "Why?"), Question(2, 7, "Who?")]
    gqa = {
        "12": {"question": "Is it?", "imageId": "n1", "answer": "no", "types": {}},
        "3": {"question": "?", "imageId": "2"},
    }
    assert read_gqa(write(gqa)) == [Question("12", "n1", "Is it?", "no"), Question("3", "2", "?")]
    write_answers(tmp_path / "results.json", {5: "a cat", "x": ""})
    results = [{"question_id": 5, "answer": "a cat"}, {"question_id": "x", "answer": ""}]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert read_answers(tmp_path / "results.json") == {5: "a cat", "x": ""}


QUESTION = {"question_id": 1, "image_id": 2, "question": "Why?"}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_questions, "[", "questions: {} is no JSON"),
        (read_questions, [], 'questions: {} must hold "questions" with a list, got []'),
        (read_questions, {"questions": {}}, 'questions: {} must hold "questions" with a list, got'),
        (read_questions, {"questions": []}, "questions: {} must have at least one entry, got none"),
        (read_questions, {"questions": [QUESTION, QUESTION]}, "questions: {}, entry 1 names 1 again"),
        (
            read_questions,
            {"questions": [QUESTION, {"question_id": 1}]},
            'questions: {}, entry 1 must have "question_id" (int or str), "image_id" (int or str), "question" (str), '
            "got {{'question_id': 1}}",
        ),
        (read_annotations, {"questions": []}, 'annotations: {} must hold "annotations" with a list, got'),
        (read_annotations, {"annotations": []}, "annotations: {} must have at least one entry, got none"),
        (read_annotations, {"annotations": [people("a"), people("a")]}, "annotations: {}, entry 1 names 1 again"),
        (
            read_annotations,
            {"annotations": [people()]},
            "annotations: {}, entry 0, answers must have at least one entry",
        ),
        (
            read_annotations,
            {"annotations": [people("a", answers=[{"answer": 3}])]},
            "annotations: {}, entry 0, answers, entry 0 must have \"answer\" (str), got {{'answer': 3}}",
        ),
        (
            read_annotations,
            {"annotations": [people("a", question_type=None)]},
            'entry 0 must have "question_id" (int or',
        ),
        (read_gqa, [], "questions: {} must hold an object of question ids, at least one, got []"),
        (read_gqa, {}, "questions: {} must hold an object of question ids, at least one, got {{}}"),
        (
            read_gqa,
            {"1": {"question": "?"}},
            'questions: {}, question \'1\' must have "question" (str), "imageId" (int',
        ),
        (
            read_gqa,
            {"1": {"question": "?", "imageId": 1, "answer": None}},
            "question '1' must have \"answer\" (str), got",
        ),
        (
            read_gqa,
            '{"1": {"question": "?", "imageId": 1}, "1": {"question": "?", "imageId": 1}}',
            "questions: {} is no JSON: the key '1' comes twice",
        ),
        (read_answers, {"1": "a"}, "predictions: {} must hold a list, got {{'1': 'a'}}"),
        (read_answers, [], "predictions: {} must have at least one entry, got none"),
        (
            read_answers,
            [{"question_id": 1}],
            'predictions: {}, entry 0 must have "question_id" (int or str), "answer" (str)',
        ),
        (read_answers, [{"question_id": 1, "answer": "a"}] * 2, "predictions: {}, entry 1 names 1 again"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(write, read, content, message) -> None:
    path = write(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert message.format(path) in str(error.value)


def test_a_missing_file_and_questions_without_annotations_are_named(write, tmp_path) -> None:
    for read in (read_questions, read_annotations, read_gqa, read_answers):
        with pytest.raises(FileNotFoundError, match="no file at .*nowhere.json"):
            read(tmp_path / "nowhere.json")
    path = write({"annotations": [people("a"), people("a", question_id=3)]})
    with pytest.raises(ValueError) as error:
        read_annotations(path, questions=[Question(1, 1, "?"), Question(2, 1, "?")])
    expected = f"annotations: {path} must have the 2 ids of questions, got 2: 1 are missing [2], 1 are unknown [3]"
    assert str(error.value) == expected


def test_bad_predictions_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"predictions must have the 1 ids of annotations, got 0: 1 are missing \[1\]"):
        vqa_accuracy({}, [people("a")])
    with pytest.raises(ValueError, match=r"0 are missing \[\], 6 are unknown \[2, 3, 4, 5, 6, ...\]"):
        vqa_accuracy(dict.fromkeys(range(1, 8), "a"), [people("a")])
    with pytest.raises(ValueError, match="predictions must be text, got None of 1"):
        vqa_accuracy({1: None}, [people("a")])
    with pytest.raises(ValueError, match="annotations must have at least one entry, got none"):
        vqa_accuracy({}, [])
    with pytest.raises(ValueError, match="annotations, entry 1 names 1 again"):
        vqa_accuracy({1: "a"}, [people("a"), people("b")])
    with pytest.raises(ValueError, match=r"predictions must have the 1 ids of answers, got 1: 1 are missing \['1'\]"):
        gqa_accuracy({1: "a"}, {"1": "a"})
    with pytest.raises(ValueError, match="answers must not be empty"):
        gqa_accuracy({}, {})
    with pytest.raises(ValueError, match="answers must be text, got None of '1'"):
        gqa_accuracy({"1": "a"}, {"1": None})
    with pytest.raises(ValueError, match="predictions must be text, got 3 of 1"):
        write_answers(tmp_path / "results.json", {1: 3})
