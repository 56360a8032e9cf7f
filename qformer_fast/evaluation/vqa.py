"""VQA accuracy (VQAv2, OK-VQA) and exact match (GQA), as LAVIS measures them."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer_fast.data.files import read_json, write_text
from qformer_fast.evaluation._json import (
    ID,
    Id,
    add_new,
    check_fields,
    check_same_ids,
    entries,
    member,
    shown,
)

PUNCTUATION = frozenset(r""";/[]"{}()=+\_-><@`,?!""")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
# the original passes re.UNICODE, which is 32, where re.sub takes the number of replacements
MOST_PERIODS = 32

ARTICLES = ("a", "an", "the")
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
CONTRACTIONS = dict(
    re.findall(
        r"(\S+):(\S+)",
        """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
    I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
    mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
    neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
    somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
    someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
    """,
    )
)


@dataclass(frozen=True)
class Question:
    """One question about an image; ``answer`` is GQA's, where the split has answers."""

    question_id: Id
    image_id: Id
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class VQAResult:
    """Accuracies in percent, unrounded.

    Args:
        overall (float): mean over the questions.
        per_question_type, per_answer_type (dict): mean over the questions of each type.
        per_question (dict): of each question id.
    """

    overall: float
    per_question_type: dict[str, float]
    per_answer_type: dict[str, float]
    per_question: dict[Id, float]

    def rounded(self, digits: int = 2) -> VQAResult:
        """The same rounded, to the 2 decimals that the official evaluation reports unless said otherwise."""
        return VQAResult(
            round(self.overall, digits),
            *(
                {key: round(accuracy, digits) for key, accuracy in accuracies.items()}
                for accuracies in (self.per_question_type, self.per_answer_type, self.per_question)
            ),
        )


@dataclass(frozen=True)
class GQAResult:
    """Exact match in percent: over all questions, and of each question id (0 or 100)."""

    overall: float
    per_question: dict[Id, float]


def normalize_answer(text: str) -> str:
    """The official normalisation of an answer: punctuation, then lower case, digits, articles and contractions.

    Source: ``processPunctuation`` and ``processDigitArticle`` of LAVIS common/vqa_tools/vqa_eval.py.
    """
    words = [NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(predictions: dict[Id, str], annotations: list[dict[str, Any]]) -> VQAResult:
    """Official VQA accuracy: min(n / 3, 1), n people who gave the predicted answer, mean over leaving out each person.

    The prediction is normalised by :func:`normalize_answer`; people's answers only lose their punctuation, and only
    where they differ. An answer is left out together with those that equal it in every field: ten answers must differ
    in "answer_id", as in the official files.

    Args:
        predictions (dict): answer of each question id, of all annotated questions and of no others.
        annotations (list): {"question_id", "question_type", "answer_type", "answers": [{"answer", ...}]} of each
            question, as :func:`read_annotations` gives them; not changed.

    Raises:
        ValueError: no annotation, one without a field or without answers, a question twice, predictions of other
            questions than the annotated ones, a prediction that is no text.

    Source: ``VQAEval.evaluate`` of LAVIS common/vqa_tools/vqa_eval.py.
    """
    check_same_ids(predictions, _annotated_ids(annotations, "annotations"), "predictions", "annotations")
    _check_texts(predictions, "predictions")
    per_question: dict[Id, float] = {}
    accuracies: list[float] = []
    question_types, answer_types = defaultdict(list), defaultdict(list)
    for annotation in annotations:
        question_id = annotation["question_id"]
        accuracy = _accuracy(predictions[question_id], annotation["answers"])
        per_question[question_id] = 100 * accuracy
        accuracies.append(accuracy)
        question_types[annotation["question_type"]].append(accuracy)
        answer_types[annotation["answer_type"]].append(accuracy)
    return VQAResult(
        _percent(accuracies),
        {kind: _percent(group) for kind, group in question_types.items()},
        {kind: _percent(group) for kind, group in answer_types.items()},
        per_question,
    )


def gqa_accuracy(predictions: dict[Id, str], answers: dict[Id, str], *, normalize: bool = True) -> GQAResult:
    """GQA's exact match: the share of questions whose one answer is the prediction.

    Args:
        predictions (dict): answer of each question id, of all of ``answers`` and of no others.
        answers (dict): the right answer of each question id, compared as it is.
        normalize (bool): apply :func:`normalize_answer` to the predictions, as the original does to generated ones; it
            leaves those that it ranked out of a list of answers as they are. Default: True.

    Raises:
        ValueError: no answers, predictions of other questions, a prediction or an answer that is no text.

    Source: ``GQATask._report_metrics`` of LAVIS tasks/vqa.py.
    """
    check_same_ids(predictions, answers, "predictions", "answers")
    _check_texts(predictions, "predictions")
    _check_texts(answers, "answers")
    per_question = {}
    for question_id, answer in answers.items():
        prediction = predictions[question_id]
        per_question[question_id] = 100.0 * ((normalize_answer(prediction) if normalize else prediction) == answer)
    correct = sum(accuracy == 100.0 for accuracy in per_question.values())
    return GQAResult(correct / len(answers) * 100, per_question)


def read_questions(path: str | os.PathLike) -> list[Question]:
    """Questions of VQAv2 or OK-VQA: {"questions": [{"question_id", "image_id", "question"}]}, in the file's order.

    Raises:
        FileNotFoundError: nothing there. ValueError: no such file, no question, a missing field, a question id twice;
            the message names the entry.
    """
    where = f"questions: {path}"
    questions: dict[Id, Question] = {}
    listed = member(read_json(path, "questions"), "questions", where)
    for place, entry in entries(listed, where, question_id=ID, image_id=ID, question=str):
        question = Question(entry["question_id"], entry["image_id"], entry["question"])
        add_new(questions, question.question_id, question, place)
    return list(questions.values())


def read_annotations(path: str | os.PathLike, *, questions: Iterable[Question] | None = None) -> list[dict[str, Any]]:
    """Annotations of VQAv2 or OK-VQA, in the file's order.

    Args:
        path (path): of {"annotations": [{"question_id", "question_type", "answer_type", "answers": [{"answer",
            "answer_confidence", "answer_id"}]}]}.
        questions (iterable, Optional): of :func:`read_questions`; each must be annotated and no other. Default: `None`,
            not compared.

    Raises:
        FileNotFoundError: nothing there. ValueError: no such file, no annotation, a missing field, a question id twice,
            other questions than ``questions``; the message names the entry.
    """
    where = f"annotations: {path}"
    annotations = member(read_json(path, "annotations"), "annotations", where)
    annotated = _annotated_ids(annotations, where)
    if questions is not None:
        check_same_ids(annotated, {question.question_id: question for question in questions}, where, "questions")
    return annotations


def read_gqa(path: str | os.PathLike) -> list[Question]:
    """Questions of GQA: {id: {"question", "imageId", "answer" (unless the split has none)}}, in the file's order.

    Raises:
        FileNotFoundError: nothing there. ValueError: no such file, no question, a missing field, a question id twice;
            the message names the entry.
    """
    where = f"questions: {path}"
    content = read_json(path, "questions", unique_keys=True)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where} must hold an object of question ids, at least one, got {shown(content)}")
    questions = []
    for question_id, entry in content.items():
        check_fields(entry, f"{where}, question {question_id!r}", question=str, imageId=ID)
        if "answer" in entry:
            check_fields(entry, f"{where}, question {question_id!r}", answer=str)
        questions.append(Question(question_id, entry["imageId"], entry["question"], entry.get("answer")))
    return questions


def read_answers(path: str | os.PathLike) -> dict[Id, str]:
    """Predictions in the official format of results, [{"question_id", "answer"}].

    Raises:
        FileNotFoundError: nothing there. ValueError: no such file, no answer, a missing field, a question id twice; the
            message names the entry.
    """
    where = f"predictions: {path}"
    predictions: dict[Id, str] = {}
    for place, entry in entries(read_json(path, "predictions"), where, question_id=ID, answer=str):
        add_new(predictions, entry["question_id"], entry["answer"], place)
    return predictions


def write_answers(path: str | os.PathLike, predictions: dict[Id, str]) -> None:
    """Writes what :func:`read_answers` reads and evaluation servers take."""
    _write(path, predictions, "question_id", "answer")


def write_gqa(path: str | os.PathLike, predictions: dict[Id, str]) -> None:
    """Writes GQA's official format of results, [{"questionId", "prediction"}]."""
    _write(path, predictions, "questionId", "prediction")


def _write(path: str | os.PathLike, predictions: dict[Id, str], id_name: str, text_name: str) -> None:
    _check_texts(predictions, "predictions")
    answers = [{id_name: key, text_name: answer} for key, answer in predictions.items()]
    write_text(Path(path), json.dumps(answers))


def _without_punctuation(text: str) -> str:
    joined = COMMA_IN_NUMBER.search(text) is not None
    replacements = {
        ord(mark): "" if joined or mark + " " in text or " " + mark in text else " "
        for mark in PUNCTUATION.intersection(text)
    }
    return PERIOD.sub("", text.translate(replacements), count=MOST_PERIODS)


def _accuracy(prediction: str, answers: list[dict[str, Any]]) -> float:
    predicted = normalize_answer(prediction.replace("\n", " ").replace("\t", " ").strip())
    if len({given["answer"] for given in answers}) > 1:
        answers = [given | {"answer": _without_punctuation(given["answer"])} for given in answers]
    matching = [given for given in answers if given["answer"] == predicted]
    counts = [sum(given != left_out for given in matching) for left_out in answers]
    return sum(min(1.0, count / 3) for count in counts) / len(answers)


def _percent(accuracies: list[float]) -> float:
    return 100 * sum(accuracies) / len(accuracies)


def _annotated_ids(annotations: list[dict[str, Any]], where: str) -> dict[Id, str]:
    """The question ids of annotations, each with the words that name its entry."""
    found: dict[Id, str] = {}
    fields = dict(question_id=ID, question_type=str, answer_type=str, answers=list)
    for place, annotation in entries(annotations, where, **fields):
        add_new(found, annotation["question_id"], place, place)
        for _ in entries(annotation["answers"], f"{place}, answers", answer=str):
            pass
    return found


def _check_texts(texts: dict[Id, str], name: str) -> None:
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, got {text!r} of {key!r}")
