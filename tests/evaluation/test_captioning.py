"""Caption metrics against pycocoevalcap called directly, and the files of captions."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from qformer_fast.evaluation import captioning
from qformer_fast.evaluation.captioning import (
    BLEU,
    by_domain,
    caption_metrics,
    read_captions,
    read_references,
    write_captions,
)

JAVA = shutil.which("java")
needs_java = pytest.mark.skipif(JAVA is None, reason="PTBTokenizer and METEOR need Java, there is none on the PATH")
pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap: pip install 'qformer_fast[captioning]'")

REFERENCES = {
    7: ["A man's dog (brown) runs, isn't it?", 'One "dog" runs -- fast...', "a brown dog running on the grass"],
    3: ["Two cats sleep on a couch in the U.S.", "A couple of cats; a couch."],
    "x1": ["A plate with 1,000 beans costs $3.50", "a plate of food on a wooden table", "food on a table", "A plate."],
    12: ["A café's naïve waiter [smiling] at 5:30 p.m.", "a waiter smiles in a café"],
    5: ["A black-and-white cow stands in a field\n", "cow in a green field", "the cow is in the field of grass"],
    9: ["a man riding a wave on top of a surfboard", "A surfer rides a large wave", "a man surfs!"],
}
CANDIDATES = {
    3: "two cats laying on a couch in the U.S.",
    7: "A dog runs on the grass, isn't it.",
    "x1": "a plate of 1,000 beans on a table",
    9: "a man riding a wave on a surfboard",
    5: "",
    12: "A waiter at a café",
}
DOMAINS = {7: "in-domain", 3: "out-domain", "x1": "in-domain", 12: "in-domain", 5: "out-domain", 9: "out-domain"}

PLAIN_REFERENCES = {"b": ["A dog runs, fast!", 'the "dog" (brown)\nruns'], "a": ["Two t-shirts: 3.5 euros.", "Shirts"]}
PLAIN_CANDIDATES = {"a": "two T-SHIRTS...", "b": "A brown dog runs"}
PLAIN_TOKENS = {
    "b": (["a dog runs fast", "the dog brown runs"], "a brown dog runs"),
    "a": (["two t-shirts 3.5 euros", "shirts"], "two t-shirts"),
}


def directly(references: dict[int, list[str]], candidates: dict[int, list[str]], meteor=None) -> tuple[dict, dict]:
    """Metrics of tokens by pycocoevalcap's own classes: of all, and a list of each metric's values by image."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    totals, columns = Bleu(4).compute_score(references, candidates, verbose=0)
    scores, per_image = dict(zip(BLEU, totals, strict=True)), dict(zip(BLEU, columns, strict=True))
    others = {"ROUGE_L": Rouge(), "CIDEr": Cider()} | ({"METEOR": meteor} if meteor else {})
    for name, scorer in others.items():
        scores[name], per_image[name] = scorer.compute_score(references, candidates)
    return scores, per_image


def assert_same(found, references: dict, candidates: dict, meteor=None) -> None:
    """``found`` are the metrics of these tokens, whose keys are the image ids."""
    scores, columns = directly(references, candidates, meteor)
    assert found.scores == scores
    assert list(found.per_image) == list(references)
    for place, values in enumerate(found.per_image.values()):
        assert values == {name: column[place] for name, column in columns.items()}


@pytest.fixture(scope="module")
def meteor():
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


@pytest.fixture(scope="module")
def ptb_tokens() -> tuple[dict, dict]:
    """The captions above, split by pycocoevalcap's own tokenizer."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    split = PTBTokenizer().tokenize
    references = split({i: [{"caption": caption} for caption in captions] for i, captions in REFERENCES.items()})
    return references, split({i: [{"caption": CANDIDATES[i]}] for i in REFERENCES})


@pytest.fixture
def java(monkeypatch, tmp_path):
    """Puts this shell script in the place of Java, or nothing."""

    def replace(script: str | None) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        if script is not None:
            (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
            (folder / "java").chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", str(folder))

    return replace


@pytest.fixture
def no_java(java) -> None:
    java(None)


@pytest.fixture
def no_spice(monkeypatch) -> None:
    monkeypatch.setattr(captioning, "SPICE_JARS", ("nowhere.jar",))


@pytest.fixture
def write(tmp_path):
    def write(content) -> str:
        path = tmp_path / "file.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@needs_java
def test_metrics_are_pycocoevalcaps(ptb_tokens, meteor, no_spice) -> None:
    found = caption_metrics(CANDIDATES, REFERENCES)
    assert_same(found, *ptb_tokens, meteor)
    assert found.tokenizer == "ptb" and min(found.scores.values()) > 0.05
    spice, empty = found.notices
    assert spice.startswith("SPICE is left out: ") and spice.endswith("lib has no nowhere.jar")
    assert empty == "1 of 6 candidates have no word in them and match nothing"


@needs_java
def test_each_domain_is_a_corpus_of_its_own(ptb_tokens, meteor, no_spice) -> None:
    found = by_domain(CANDIDATES, REFERENCES, DOMAINS)
    assert list(found) == ["in-domain", "out-domain", "overall"]
    assert_same(found["overall"], *ptb_tokens, meteor)
    for domain in ("in-domain", "out-domain"):
        chosen = [{i: x for i, x in tokens.items() if DOMAINS[i] == domain} for tokens in ptb_tokens]
        assert_same(found[domain], *chosen, meteor)
        assert len(found[domain].per_image) == 3
    assert [len(found[domain].notices) for domain in found] == [1, 2, 2]


@needs_java
def test_line_separators_shift_no_caption_and_nothing_is_written_beside_the_jar() -> None:
    from pycocoevalcap.tokenizer import ptbtokenizer

    captions = ["a\rdog", "two\u2028cats", "", "a cow\r\n", "\x0b\x0ca\x85wave\x1d on it", "\n", "café"]
    folder = Path(ptbtokenizer.__file__).parent
    before = folder.stat().st_mtime_ns
    assert captioning._split_ptb(captions) == ["a dog", "two cats", "", "a cow", "a wave on it", "", "café"]
    assert captioning._split_ptb([""]) == [""]
    assert folder.stat().st_mtime_ns == before
    plain = [{"caption": " ".join(caption.split())} for caption in captions]
    assert ptbtokenizer.PTBTokenizer().tokenize({0: plain})[0] == captioning._split_ptb(captions)


def test_without_java_the_same_classes_score_tokens_of_a_regex(no_java) -> None:
    found = caption_metrics(PLAIN_CANDIDATES, PLAIN_REFERENCES)
    references = {i: captions for i, (captions, _) in PLAIN_TOKENS.items()}
    assert_same(found, references, {i: [caption] for i, (_, caption) in PLAIN_TOKENS.items()})
    assert found.tokenizer == "regex"
    why = "there is no java on the PATH"
    assert found.notices == [
        f"captions were split by a regex, not by PTBTokenizer ({why}): not comparable with papers",
        f"METEOR is left out: {why}",
        f"SPICE is left out: {why}",
    ]


def test_domains_without_java(no_java) -> None:
    found = by_domain(PLAIN_CANDIDATES, PLAIN_REFERENCES, {"a": "near-domain", "b": "in-domain"})
    assert list(found) == ["in-domain", "near-domain", "overall"]
    for domain, image in (("in-domain", "b"), ("near-domain", "a")):
        captions, caption = PLAIN_TOKENS[image]
        assert_same(found[domain], {image: captions}, {image: [caption]})
    assert found["overall"].scores["CIDEr"] > 0 == found["in-domain"].scores["CIDEr"]


@needs_java
def test_the_regex_splits_plain_captions_as_ptb_does() -> None:
    captions = [
        "A man, riding a wave; on a surfboard!", "two black-and-white cows: in a field...", "The cat (grey) sleeps?",
        'a "stop" sign - with 2 birds & 10% off', "A café", "1,000 people at 5:30", "3.5 metres",
    ]  # fmt: skip
    expected = [" ".join(x for x in line.split() if x[0] + x[-1] != "--") for line in captioning._split_ptb(captions)]
    assert captioning._split_regex(captions) == expected


def test_java_that_does_not_run_is_no_java(java) -> None:
    java('echo "no runtime" >&2; exit 1')
    found = caption_metrics(PLAIN_CANDIDATES, PLAIN_REFERENCES)
    assert found.tokenizer == "regex"
    assert "METEOR is left out: `java -version` fails: no runtime" in found.notices
    with pytest.raises(RuntimeError, match='tokenizer="ptb" can\'t run: `java -version` fails: no runtime'):
        caption_metrics(PLAIN_CANDIDATES, PLAIN_REFERENCES, tokenizer="ptb")


def test_a_failing_tokenizer_says_why(java) -> None:
    java('[ "$1" = -version ] && exit 0; echo "no memory" >&2; exit 1')
    with pytest.raises(RuntimeError, match="PTBTokenizer failed: no memory"):
        caption_metrics(PLAIN_CANDIDATES, PLAIN_REFERENCES)
    java_lines = SimpleNamespace(returncode=0, stdout=b"a dog\n\nruns\n", stderr=b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioning.subprocess, "run", lambda *_, **__: java_lines)
        with pytest.raises(RuntimeError, match="PTBTokenizer gave 4 lines for 2 captions"):
            captioning._split_ptb(["a dog", "runs"])


def test_a_failing_meteor_is_left_out_of_every_domain(java) -> None:
    java('[ "$1" = -version ] && exit 0; echo "no memory" >&2; exit 1')
    domains = {"a": "near-domain", "b": "in-domain"}
    found = by_domain(PLAIN_CANDIDATES, PLAIN_REFERENCES, domains, tokenizer="regex")
    for metrics in found.values():
        assert "METEOR" not in metrics.scores and metrics.scores["ROUGE_L"] > 0
        assert any(notice.startswith("METEOR is left out: its Java process failed: ") for notice in metrics.notices)
    assert "METEOR is left out: its Java process failed: no memory" in found["in-domain"].notices
    assert found["in-domain"].notices[0].endswith("not by PTBTokenizer: not comparable with papers")


def test_spice_is_the_f_score_of_all_tuples_where_its_jars_are(monkeypatch, no_java) -> None:
    from pycocoevalcap.spice import spice

    class Spice:
        def compute_score(self, references, candidates):
            assert candidates == {0: ["a brown dog runs"], 1: ["two t-shirts"]}
            assert references == {0: PLAIN_TOKENS["b"][0], 1: PLAIN_TOKENS["a"][0]}
            return 0.5, [{"All": {"f": 0.25}, "Color": {"f": 1.0}}, {"All": {"f": 0.75}}]

    monkeypatch.setattr(captioning, "_why_no_java", lambda: None)
    monkeypatch.setattr(captioning, "_why_no_spice", lambda: None)
    monkeypatch.setattr(captioning, "_Meteor", lambda: captioning._rouge)
    monkeypatch.setattr(spice, "Spice", Spice)
    found = caption_metrics(PLAIN_CANDIDATES, PLAIN_REFERENCES, tokenizer="regex")
    assert tuple(found.scores) == captioning.METRICS and found.scores["SPICE"] == 0.5
    assert {i: values["SPICE"] for i, values in found.per_image.items()} == {"b": 0.25, "a": 0.75}

    def fail(*_) -> None:
        raise subprocess.CalledProcessError(1, "java")

    monkeypatch.setattr(Spice, "compute_score", fail)
    found = caption_metrics(PLAIN_CANDIDATES, PLAIN_REFERENCES, tokenizer="regex")
    assert tuple(found.scores) == captioning.METRICS[:-1]
    assert found.notices[-1].startswith("SPICE is left out: its Java process failed: Command 'java' returned non-zero")


def test_where_spice_looks_for_its_jars(monkeypatch, tmp_path) -> None:
    from pycocoevalcap.spice import spice

    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    lib = tmp_path / "lib"
    lib.mkdir()
    for jar in captioning.SPICE_JARS:
        assert captioning._why_no_spice().startswith(f"{lib} has no ") and jar in captioning._why_no_spice()
        (lib / jar).touch()
    assert captioning._why_no_spice() is None
    monkeypatch.setattr(captioning.os, "access", lambda *_: False)
    assert captioning._why_no_spice() == f"it writes into {tmp_path}, which is read-only"


COCO = {
    "info": {},
    "images": [{"id": 4, "file_name": "b.jpg"}, {"id": 2, "file_name": "a.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 2, "caption": "A Dog (brown)."},
        {"id": 2, "image_id": 4, "caption": "two cats"},
        {"id": 3, "image_id": 2, "caption": " a dog\n"},
    ],
}


def test_coco_and_nocaps_files(write) -> None:
    path = write(COCO)
    found = read_references(path)
    assert found.references == {4: ["two cats"], 2: ["A Dog (brown).", " a dog\n"]}
    assert found.file_names == {4: "b.jpg", 2: "a.jpg"} and found.domains == {}
    coco = pytest.importorskip("pycocotools.coco").COCO(path)
    assert found.references == {i: [x["caption"] for x in coco.imgToAnns[i]] for i in coco.getImgIds()}
    bare = COCO | {"images": [{"id": 4, "domain": "near-domain"}, {"id": 2, "domain": "in-domain"}]}
    found = read_references(write(bare))
    assert found.domains == {4: "near-domain", 2: "in-domain"} and found.file_names == {}


def test_karpathy_files_by_the_numbers_of_their_names(write) -> None:
    lavis = [
        {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["A man (old).", "a man"]},
        {"image": "flickr30k-images/1007129816.jpg", "caption": "one"},
        {"image": "x/img2.jpg", "caption": ["A cat!"]},
    ]
    found = read_references(write(lavis))
    assert found.references == {391895: ["A man (old).", "a man"], 1007129816: ["one"], "x/img2.jpg": ["A cat!"]}
    assert found.file_names == {
        391895: "val2014/COCO_val2014_000000391895.jpg",
        1007129816: "flickr30k-images/1007129816.jpg",
        "x/img2.jpg": "x/img2.jpg",
    }
    pictures = [
        {
            "filename": f"COCO_val2014_{i:012}.jpg",
            "filepath": "val2014",
            "split": split,
            "sentences": [{"raw": f"No. {i}"}],
        }
        for i, split in enumerate(("train", "test", "val", "test"))
    ]
    path = write({"images": pictures, "dataset": "coco"})
    assert read_references(path).references == {1: ["No. 1"], 3: ["No. 3"]}
    assert read_references(path, split="val").references == {2: ["No. 2"]}


def test_results_there_and_back(tmp_path) -> None:
    path = tmp_path / "results.json"
    write_captions(path, {4: "a cat", "x": ""})
    assert json.loads(path.read_text()) == [{"image_id": 4, "caption": "a cat"}, {"image_id": "x", "caption": ""}]
    assert read_captions(path) == {4: "a cat", "x": ""}


def changed(**fields) -> dict:
    return COCO | fields


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_references, "{", "annotations: {} is no JSON"),
        (read_references, "3", 'annotations: {} must hold a list, or "images" with a list, got 3'),
        (read_references, [], "annotations: {} has no image"),
        (read_references, {"images": []}, 'annotations: {} has no image of split "test"'),
        (read_references, {"annotations": []}, 'annotations: {} must hold "images" with a list, got'),
        (read_references, changed(images=[]), "annotations: {}, images must have at least one entry, got none"),
        (
            read_references,
            changed(annotations=[]),
            "annotations: {}, annotations must have at least one entry, got none",
        ),
        (read_references, changed(images=[{"file_name": "a"}]), '{}, images, entry 0 must have "id" (int or str), got'),
        (read_references, changed(images=[{"id": 4}, {"id": 4}]), "{}, images, entry 1 names 4 again"),
        (
            read_references,
            changed(images=[{"id": 4, "file_name": 1}]),
            '{}, images, entry 0 must have "file_name" (str), got',
        ),
        (
            read_references,
            changed(images=[{"id": 4, "domain": "near"}]),
            "{}, images, entry 0 must have a domain in ('in-domain', 'near-domain', 'out-domain'), got 'near'",
        ),
        (
            read_references,
            changed(images=[{"id": 4, "domain": "in-domain"}, {"id": 2}]),
            'annotations: {} must have "domain" of all 2 images or of none, got it of 1',
        ),
        (
            read_references,
            changed(images=[{"id": 2}]),
            'annotations: {}, annotations, entry 1 must have an "image_id" of "images", got 4',
        ),
        (
            read_references,
            changed(images=[*COCO["images"], {"id": 9}]),
            "annotations: {}, image 9 must have a list of captions, at least one, got []",
        ),
        (
            read_references,
            changed(annotations=[{"image_id": 4}]),
            '{}, annotations, entry 0 must have "image_id" (int or str), "caption" (str), got',
        ),
        (
            read_references,
            [{"image": "a_1.jpg", "caption": []}],
            "{}, image 1 must have a list of captions, at least one",
        ),
        (
            read_references,
            [{"image": "a_1.jpg", "caption": [3]}],
            "{}, image 1 must have a list of captions, at least one",
        ),
        (read_references, [{"image": "a_1.jpg", "caption": "a"}] * 2, "annotations: {}, entry 1 names 1 again"),
        (read_references, [{"image": "a_1.jpg"}], 'annotations: {}, entry 0 must have "image" and "caption"'),
        (read_captions, {"image_id": 4}, "candidates: {} must hold a list, got {{'image_id': 4}}"),
        (read_captions, [], "candidates: {} must have at least one entry, got none"),
        (
            read_captions,
            [{"image_id": 4}],
            'candidates: {}, entry 0 must have "image_id" (int or str), "caption" (str)',
        ),
        (read_captions, [{"image_id": 4, "caption": "a"}] * 2, "candidates: {}, entry 1 names 4 again"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(write, read, content, message) -> None:
    path = write(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert message.format(path) in str(error.value)


def test_bad_arguments_are_named(tmp_path, monkeypatch, no_java) -> None:
    for read in (read_references, read_captions):
        with pytest.raises(FileNotFoundError, match="no file at .*nowhere.json"):
            read(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="split must be one of .*'restval'.*, got 'tets'"):
        read_references(tmp_path / "nowhere.json", split="tets")
    with pytest.raises(ValueError, match="references must not be empty"):
        caption_metrics({}, {})
    with pytest.raises(ValueError, match=r"candidates must have the 1 ids of references, got 1: 1 are missing \['1'\]"):
        caption_metrics({1: "a"}, {"1": ["a"]})
    with pytest.raises(ValueError, match="candidates must be text, got None of 1"):
        caption_metrics({1: None}, {1: ["a"]})
    with pytest.raises(ValueError, match="references, image 1 must have a list of captions, at least one, got 'a dog'"):
        caption_metrics({1: "a"}, {1: "a dog"})
    with pytest.raises(ValueError, match=r"references, image 1 must have a word in them, got \[' \.'\]"):
        caption_metrics({1: "a"}, {1: [" ."]})
    with pytest.raises(ValueError, match="tokenizer must be one of .* or None, got 'bert'"):
        caption_metrics({1: "a"}, {1: ["a"]}, tokenizer="bert")
    with pytest.raises(ValueError, match=r"domains must have the 1 ids of references, got 0: 1 are missing \[1\]"):
        by_domain({1: "a"}, {1: ["a"]}, {})
    with pytest.raises(ValueError, match="domains, image 1 must have a domain in .*, got 'overall'"):
        by_domain({1: "a"}, {1: ["a"]}, {1: "overall"})
    with pytest.raises(ValueError, match="candidates must be text, got 3 of 1"):
        write_captions(tmp_path / "results.json", {1: 3})
    monkeypatch.setattr(captioning, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'qformer_fast\[captioning\]'"):
        caption_metrics({1: "a"}, {1: ["a"]})
