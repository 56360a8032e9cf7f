"""easy-vqa's data, and the lines that need no picture."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from qformer_fast.data.examples import Example
from qformer_fast.demo import baseline, easy_vqa, synthetic, vqa

needs_package = pytest.mark.skipif(find_spec("easy_vqa") is None, reason="not installed: easy-vqa")

COLOURS = {"red", "green", "blue", "yellow", "teal", "brown", "black", "gray"}
SHAPES = {"circle", "rectangle", "triangle"}


@pytest.fixture(scope="module")
def questions():
    return easy_vqa.load_questions()


@needs_package
def test_the_official_split(questions) -> None:
    """The counts that easy-vqa states of itself."""
    assert (len(questions.train), len(questions.test)) == (38575, 9673)
    train, test = ({example.image for example in part} for part in (questions.train, questions.test))
    assert (len(train), len(test)) == (4000, 1000)
    assert not train & test
    assert {picture.key for picture in questions.pictures} == train | test
    assert sum(example.text in ("yes", "no") for example in questions.train) == 28407
    assert sum(example.text in ("yes", "no") for example in questions.test) == 7136


@needs_package
def test_answers(questions) -> None:
    for part in (questions.train, questions.test):
        assert {example.text for example in part} == {"yes", "no"} | COLOURS | SHAPES
    assert len({example.prompt for example in questions.train}) == 107
    assert all(
        example.prompt.startswith("Question: ") and example.prompt.endswith("? Answer:") for example in questions.test
    )


@needs_package
def test_pictures_show_what_the_answers_say(questions) -> None:
    """A picture of a red shape holds red, in each split: keys name the right files."""
    rgb = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    pictures = {picture.key: picture for picture in questions.pictures}
    for part in (questions.train, questions.test):
        for colour, expected in rgb.items():
            example = next(e for e in part if e.text == colour)
            image = easy_vqa.render(pictures[example.image])
            assert image.size == (224, 224) and image.mode == "RGB"
            distance = np.abs(np.asarray(image, dtype=int) - expected).sum(-1)
            assert distance.min() < 150
            other = np.abs(np.asarray(image, dtype=int) - rgb["blue" if colour == "red" else "red"]).sum(-1)
            assert distance.min() < other.min()


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setattr(easy_vqa, "PACKAGE", "no_such_module")
    with pytest.raises(ModuleNotFoundError, match=r"easy-vqa is not installed.*qformer_fast\[demo\]"):
        easy_vqa.load_questions()


def example(prompt: str, text: str) -> Example:
    return Example("picture", text, prompt)


def test_majority_answers() -> None:
    train = [example("a", "no"), example("a", "no"), example("a", "yes"), example("b", "yes"), example("b", "yes"),
             example("b", "yes")]  # fmt: skip
    test = [example("b", "no"), example("a", "no"), example("unheard", "yes")]
    assert baseline.majority_answer(train) == "yes"
    assert baseline.majority_answers(train, test) == ["yes", "no", "yes"]


def test_nearest_is_the_largest_cosine_of_means() -> None:
    tokens = torch.zeros(3, 2, 4)
    tokens[0, :, 0] = torch.tensor([1.0, 3.0])
    tokens[1, :, 1] = 1.0
    tokens[2, 0, 2] = 100.0
    queries = torch.zeros(2, 2, 4, dtype=torch.float16)
    queries[0, 0] = torch.tensor([0.1, 0.0, 3.0, 0.0])
    queries[1] = torch.tensor([[4.0, -6.0, 0.0, 0.0], [4.0, 5.0, 0.0, 9.0]])
    assert baseline.nearest(queries, tokens).tolist() == [2, 0]


def test_accuracy_is_of_each_kind_of_answer() -> None:
    examples = [example("a", "yes"), example("a", "no"), example("b", "red"), example("b", "blue")]
    found = vqa.accuracy(["yes", "yes", "red", "red."], examples)
    assert found == {"all": 50.0, "yes or no": 50.0, "other": 50.0}
    assert vqa.accuracy(["", "no"], examples[:2]) == {"all": 50.0, "yes or no": 50.0}


def test_made_up_questions_are_answered_by_the_pictures() -> None:
    questions = synthetic.load_questions()
    pictures = {picture.key: picture for picture in questions.pictures}
    assert not {e.image for e in questions.train} & {e.image for e in questions.test}
    assert min(Counter(e.text for e in questions.train if e.text in vqa.YES_NO).values()) > 100
    for asked in (*questions.train, *questions.test):
        words = pictures[asked.image].caption.split()
        if asked.text in vqa.YES_NO:
            named = asked.prompt.split("is it ")[1].split()[0]
            assert asked.text == ("yes" if named in words else "no")
        else:
            assert asked.text in words
    assert isinstance(questions.render(questions.pictures[0]), Image.Image)
