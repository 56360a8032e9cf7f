"""Karpathy splits from both kinds of file, and what is refused."""

from __future__ import annotations

import json

import pytest

from qformer_fast.evaluation.karpathy import read_karpathy

LAVIS = [
    {"image": "val2014/b.jpg", "caption": ["A dog (brown) runs.", "One dog; running!"]},
    {"image": "val2014/a.jpg", "caption": ["Two   cats", "cats: two", '"Cats"']},
    {"image": "val2014/c.jpg", "caption": "a single string"},
]


def picture(name: str, split: str, *sentences: str, **others) -> dict:
    return {
        "filename": name,
        "split": split,
        "sentences": [{"raw": text, "tokens": []} for text in sentences],
        **others,
    }


KARPATHY = {
    "dataset": "coco",
    "images": [
        picture("t.jpg", "train", "a train", filepath="train2014", cocoid=1),
        picture("b.jpg", "test", "A dog (brown) runs.", "One dog; running!", filepath="val2014", cocoid=2),
        picture("r.jpg", "restval", "a rest", filepath="val2014"),
        picture("a.jpg", "test", "Two   cats"),
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(content) -> str:
        path = tmp_path / "annotations.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_lavis_annotations(write):
    found = read_karpathy(write(LAVIS))
    assert found.images == ["val2014/b.jpg", "val2014/a.jpg", "val2014/c.jpg"]
    assert found.captions == ["a dog brown runs", "one dog running", "two cats", "cats two", "cats", "a single string"]
    assert found.image_index == [0, 0, 1, 1, 1, 2]
    assert found.relevant.int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]


def test_karpathys_own_file(write):
    path = write(KARPATHY)
    found = read_karpathy(path)
    assert found.images == ["val2014/b.jpg", "a.jpg"]
    assert found.captions == ["a dog brown runs", "one dog running", "two cats"]
    assert found.image_index == [0, 0, 1]
    assert read_karpathy(path, split="restval").images == ["val2014/r.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a.jpg"', "annotations.json is no JSON"),
        ({"annotations": []}, "must hold a list, or \"images\" with a list, got {'annotations'"),
        ("3", 'must hold a list, or "images" with a list, got 3'),
        ([], "annotations.json has no entry"),
        ({"images": []}, 'has no image of split "test"'),
        ({"images": [picture("a.jpg", "train", "a")]}, 'has no image of split "test"'),
        ([{"image": "a.jpg"}], 'entry 0 must have "image" and "caption", got {\'image\''),
        ([*LAVIS, "a.jpg"], 'entry 3 must have "image" and "caption", got \'a.jpg\''),
        ([*LAVIS, LAVIS[0]], "entry 3 names val2014/b.jpg again"),
        ([{"image": "a.jpg", "caption": []}], "entry 0 must have captions of a.jpg, got none"),
        ([{"image": "a.jpg", "caption": ["a", " .!"]}], "entry 0 must have captions with a word in them, got ' .!'"),
        ([{"image": "a.jpg", "caption": [7]}], "entry 0 must have captions with a word in them, got 7"),
        ({"images": [{"filename": "a.jpg", "split": "test"}]}, 'image 0 must have "filename", "split" and "sentences"'),
        ({"images": [{"filename": "a.jpg", "split": "test", "sentences": [{}]}]}, 'image 0 must have "raw" in each'),
        ({"images": [picture("a.jpg", "test")]}, "image 0 must have captions of a.jpg, got none"),
        ({"images": [picture("a.jpg", "test", "a"), picture("a.jpg", "test", "b")]}, "image 1 names a.jpg again"),
    ],
)
def test_what_is_wrong_is_named(write, content, message):
    with pytest.raises(ValueError) as error:
        read_karpathy(write(content))
    assert message in str(error.value) and str(error.value).startswith("annotations: ")


def test_another_split_and_a_missing_file_are_named(write, tmp_path):
    with pytest.raises(ValueError, match="split must be one of .*'restval'.*, got 'tets'"):
        read_karpathy(write(KARPATHY), split="tets")
    with pytest.raises(FileNotFoundError, match="annotations: no file at .*nowhere.json"):
        read_karpathy(tmp_path / "nowhere.json")
