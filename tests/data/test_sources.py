"""Several data sets as one, and what is left out of them."""

import json
import tarfile

import pytest
import torch
from PIL import Image

from qformer_fast.data.bad import BadData
from qformer_fast.data.batches import PairDataset
from qformer_fast.data.captions import Pair, read_pairs
from qformer_fast.data.examples import read_examples
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.joined import JoinedCaches
from qformer_fast.data.sources import keep_known, keep_present, keep_readable, read_mixture
from qformer_fast.data.tokenizer import load_tokenizer

COCO = [
    {"image": "1.png", "caption": ["a cat", "one cat"], "image_id": "coco_1"},
    {"image": "2.png", "caption": "a dog", "image_id": "coco_2"},
    {"image": "3.png", "caption": "a hen"},
]
GENOME = [
    {"image": "1.png", "caption": "the bird"},
    {"image": "7.png", "caption": "a cat's ear", "image_id": "coco_1"},
]


@pytest.fixture
def write(tmp_path):
    def write(name, entries):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries))
        return str(path)

    return write


def mixture(paths, bad=None, image_root=None):
    return read_mixture(paths, lambda path: read_pairs(path, bad), image_root=image_root, bad=bad or BadData())


def test_one_source_is_itself(write):
    path = write("coco/list.json", COCO)
    mixed = mixture([path])
    assert mixed.rows == read_pairs(path) and mixed.prefixes == [""]


def test_given_ids_join_pictures_of_two_sources_and_names_do_not(write, tmp_path):
    """coco_1 is the same picture twice; 1.png of one and of the other are two."""
    mixed = mixture([write("coco/list.json", COCO), write("genome/list.json", GENOME)])
    assert mixed.root == tmp_path and mixed.prefixes == ["coco/", "genome/"]
    assert mixed.rows == [
        Pair("coco/1.png", "a cat", "coco_1"),
        Pair("coco/1.png", "one cat", "coco_1"),
        Pair("coco/2.png", "a dog", "coco_2"),
        Pair("coco/3.png", "a hen", "coco/3.png"),
        Pair("genome/1.png", "the bird", "genome/1.png"),
        Pair("genome/7.png", "a cat's ear", "coco_1"),
    ]
    cache = FeatureCache.create(tmp_path / "cache", list(mixed.members), [torch.zeros(5, 2, 3)], metadata={})
    dataset = PairDataset(mixed.rows, load_tokenizer(), cache=cache)
    batch = dataset[[5, 0, 4, 1]]
    assert (batch.image_ids[:, None] == batch.image_ids).tolist() == [
        [True, True, False, True],
        [True, True, False, True],
        [False, False, True, False],
        [True, True, False, True],
    ]


def test_two_lists_of_one_folder_name_the_same_pictures(write, tmp_path):
    first = write("coco/list.json", [{"image": "1.png", "caption": "a cat"}])
    second = write("coco/more.json", [{"image": "1.png", "caption": "a tom"}])
    mixed = mixture([first, second])
    assert [pair.image_id for pair in mixed.rows] == ["1.png", "1.png"] and mixed.root == tmp_path / "coco"
    elsewhere = write("else/where.json", [{"image": "1.png", "caption": "a tom"}])
    together = mixture([first, elsewhere], image_root=str(tmp_path / "coco"))
    assert [pair.image_id for pair in together.rows] == ["1.png", "1.png"]
    around = mixture([first, str(tmp_path / "else" / ".." / "coco" / "more.json")])
    assert [pair.image_id for pair in around.rows] == ["1.png", "1.png"]
    absolute = mixture([first, write("else/all.json", [{"image": str(tmp_path / "3.png"), "caption": "x"}])])
    assert absolute.rows[1].image == str(tmp_path / "3.png")
    below = mixture([write("list.json", [{"image": "coco/1.png", "caption": "x"}]), first])
    assert [pair.image_id for pair in below.rows] == ["coco/1.png", "coco/1.png"] and below.prefixes == ["", "coco/"]


def test_pictures_of_tars_are_in_them_wherever_the_others_are(write, tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name in ("a.png", "a.txt"):
            (tmp_path / name).write_text("ant")
            tar.add(tmp_path / name, name)
    paths = [write("lists/list.json", COCO[2:]), str(tmp_path / "tars" / "*.tar")]
    mixed = mixture(paths, image_root=str(tmp_path / "pictures"))
    assert [pair.image for pair in mixed.rows] == ["pictures/3.png", "tars/0.tar/a.png"] and mixed.root == tmp_path


def test_a_picture_with_two_ids_is_refused_or_its_second_one_skipped(write):
    """It would be its own negative."""
    first = write("coco/list.json", COCO)
    second = write("coco/more.json", [{"image": "1.png", "caption": "a tom", "image_id": "coco_9"}])
    with pytest.raises(ValueError, match=r"more.json must give 1.png the id 'coco_1' as before, got 'coco_9'"):
        mixture([first, second])
    bad = BadData("skip")
    assert mixture([first, second], bad).rows == read_pairs(first) and bad.counts == {"duplicate_id": 1}


def test_no_source_is_refused():
    with pytest.raises(ValueError, match="pairs must name at least one source"):
        mixture([])


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"image": "9.png"}, "missing_sample"),
        ({"caption": "a cat"}, "missing_sample"),
        ("9.png", "missing_sample"),
        ({"image": "9.png", "caption": "..."}, "empty_caption"),
        ({"image": "9.png", "caption": [""]}, "empty_caption"),
        ({"image": "9.png", "caption": None}, "empty_caption"),
    ],
)
def test_bad_entries_of_a_list_are_skipped_and_counted(write, entry, kind):
    bad = BadData("skip")
    pairs = read_pairs(write("list.json", [COCO[1], entry, COCO[2]]), bad)
    assert [pair.caption for pair in pairs] == ["a dog", "a hen"] and bad.counts == {kind: 1}
    assert "list.json, entry 1 must have" in bad.summary()


def test_bad_pictures_of_a_folder_are_skipped_and_counted(tmp_path):
    for name, caption in {"a": "an ant", "b": None, "c": "\n", "d": "a\n...\nb"}.items():
        (tmp_path / f"{name}.png").touch()
        if caption is not None:
            (tmp_path / f"{name}.txt").write_text(caption)
    (tmp_path / "e.png").touch()
    (tmp_path / "e.txt").write_bytes(b"caf\xe9")
    bad = BadData("skip")
    assert [pair.caption for pair in read_pairs(tmp_path, bad)] == ["an ant", "a", "b"]
    assert bad.counts == {"missing_sample": 2, "empty_caption": 2}
    problems = {
        "b": "b.png has no captions, expected b.txt beside it",
        "c": "c.txt must have a caption with a word in it, got ''",
        "d": r"d.txt must have a caption with a word in it, got '\.\.\.'",
        "e": "e.txt must have text that can be read",
    }
    for name, match in problems.items():
        with pytest.raises(ValueError, match=match):
            read_pairs(tmp_path)
        (tmp_path / f"{name}.png").unlink()


def test_an_id_that_is_null_is_none(write):
    """Pictures whose ids nobody knows are not one and the same."""
    entries = [{"image": f"{i}.png", "caption": "x", "image_id": None} for i in (1, 2)]
    assert [pair.image_id for pair in read_pairs(write("list.json", entries))] == ["1.png", "2.png"]
    questions = [{"question": "what?", "answer": "x", **entry} for entry in entries]
    assert [row.image_id for row in read_examples(write("vqa.json", questions), "{}")] == ["1.png", "2.png"]


def test_images_that_a_cache_lacks_are_refused_or_skipped_and_counted(write, tmp_path):
    mixed = mixture([write("list.json", COCO)])
    cache = FeatureCache.create(tmp_path / "cache", ["2.png"], [torch.zeros(1, 2, 3)], metadata={})
    with pytest.raises(ValueError, match=r"pairs name 2 images that the feature cache lacks: \['1.png', '3.png'\]"):
        keep_known(mixed, cache, BadData())
    bad = BadData("skip")
    assert [pair.image for pair in keep_known(mixed, cache, bad).rows] == ["2.png"]
    assert bad.counts == {"missing_sample": 2} and "the feature cache lacks 1.png" in bad.summary()


def test_pictures_that_are_missing_or_damaged_are_found_before_a_run(write, tmp_path):
    mixed = mixture([write("list.json", COCO)])
    Image.new("RGB", (90, 90)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"3.png is missing"):
        keep_present(mixed, BadData())
    bad = BadData("skip")
    present = keep_present(mixed, bad)
    assert [pair.image for pair in present.rows] == ["1.png", "1.png", "2.png"] and bad.counts == {"missing_sample": 1}
    with pytest.raises(ValueError, match=r"2.png is no readable picture"):
        keep_readable(present, BadData())
    for count, workers in ((1, 0), (2, 1)):
        assert [pair.image for pair in keep_readable(present, bad, workers).rows] == ["1.png", "1.png"]
        assert bad.counts == {"missing_sample": 1, "unreadable_picture": count}


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match=r"on_bad must be one of \('refuse', 'skip'\), got 'ignore'"):
        BadData("ignore")


def test_caches_of_two_sources_are_read_as_one(tmp_path):
    first, second = torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    caches = [
        FeatureCache.create(tmp_path / name, ["1.png", "2.png"], [tokens], metadata={}, dtype="float32")
        for name, tokens in (("a", first), ("b", second))
    ]
    joined = JoinedCaches(caches, ["coco/", "genome/"])
    assert "coco/1.png" in joined and "1.png" not in joined and "genome/3.png" not in joined
    found = joined.rows(["genome/2.png", "coco/1.png", "genome/1.png", "genome/2.png"])
    assert torch.equal(found, torch.stack([second[1], first[0], second[0], second[1]]))
    assert (joined.tokens, joined.width, joined.dtype) == (2, 3, torch.float32)
    small = FeatureCache.create(tmp_path / "small", ["3.png"], [torch.ones(1, 2, 3)], metadata={}, dtype="int8")
    half = FeatureCache.create(tmp_path / "half", ["1.png"], [first[:1]], metadata={}, dtype="float16")
    mixed = JoinedCaches([small, half], ["a/", "b/"])
    assert torch.equal(mixed.rows(["b/1.png", "a/3.png"]), torch.stack([first[0], torch.ones(2, 3)]).half())
    names = ["b/3.png", "a/3.png"]
    assert torch.equal(JoinedCaches([small, small], ["a/", "b/"]).rows(names), small.rows(["3.png"]).repeat(2, 1, 1))
    with pytest.raises(KeyError, match=r"none has features of \['coco/9.png'\]"):
        joined.rows(["coco/1.png", "coco/9.png"])
    changes = {
        "tokens": (torch.zeros(1, 4, 3), {}, {}),
        "width": (torch.zeros(1, 2, 4), {}, {}),
        "dtype": (torch.zeros(1, 2, 3), {}, {"dtype": "float16"}),
        "metadata": (torch.zeros(1, 2, 3), {"encoder": "other"}, {}),
    }
    for name, (tokens, metadata, options) in changes.items():
        options = {"metadata": metadata, "dtype": "float32", **options}
        other = FeatureCache.create(tmp_path / name, ["1.png"], [tokens], **options)
        with pytest.raises(ValueError, match=f"{name} must have {name} .* as .*a, got"):
            JoinedCaches([caches[0], other], ["a", "b"])
