"""Tar shards: written by webdataset, or by tarfile where they are to be bad; read by offset."""

import io
import itertools
import multiprocessing
import os
import signal
import tarfile
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image

from qformer_fast.data.bad import BadData
from qformer_fast.data.captions import Pair, image_folder, read_pairs
from qformer_fast.data.examples import Example, read_any, read_examples
from qformer_fast.data.pictures import read_pixels
from qformer_fast.data.tars import find_tars


def picture(number, format="png"):
    """One whose colour says which it is."""
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 255 - number, 7)).save(file, format)
    return file.getvalue()


def colour(image):
    return image.getpixel((0, 0))


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Four samples in two shards, as webdataset writes them."""
    webdataset = pytest.importorskip("webdataset")
    samples = [
        {"__key__": "0000", "png": picture(0), "txt": "A red fox."},
        {"__key__": "0001", "jpg": picture(50, "jpeg"), "json": b'{"caption": "snow", "image_id": 17}'},
        {"__key__": "0002", "webp": picture(100, "webp"), "txt": "tea", "json": b'{"image_id": "17", "width": 6}'},
        {
            "__key__": "0003",
            "png": picture(150),
            "json": b'{"caption": ["a cup", "two cups"], "image_id": null}',
            "cls": b"7",
        },
    ]
    for number in (0, 1):
        with webdataset.TarWriter(str(tmp_path / f"cc-{number:03d}.tar")) as writer:
            for sample in samples[2 * number : 2 * number + 2]:
                writer.write(sample)
    return tmp_path


EXPECTED = [
    ("cc-000.tar/0000.png", "a red fox", "cc-000.tar/0000.png"),
    ("cc-000.tar/0001.jpg", "snow", "17"),
    ("cc-001.tar/0002.webp", "tea", "17"),
    ("cc-001.tar/0003.png", "a cup", "cc-001.tar/0003.png"),
    ("cc-001.tar/0003.png", "two cups", "cc-001.tar/0003.png"),
]


@pytest.mark.parametrize("pattern", ["", "cc-{000..001}.tar", "cc-*.tar", "c[c]-00{0..1}.tar"])
def test_samples_are_webdatasets(shards, pattern):
    pairs = read_pairs(shards / pattern)
    assert [(pair.image, pair.caption, pair.image_id) for pair in pairs] == EXPECTED
    assert read_pairs(shards / pattern, num_workers=2) == pairs and image_folder(shards / pattern) == shards
    examples = read_examples(shards / pattern, "a photo of")
    assert examples == [Example(x.image, x.caption, "a photo of", x.image_id, x.member) for x in pairs]
    assert [example.image for example in read_any(shards / pattern)] == [image for image, _, _ in EXPECTED]


def test_pictures_are_read_where_they_lie(shards):
    """Against webdataset's own reader."""
    import webdataset

    urls = [str(path) for path in find_tars(shards)]
    expected = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        (image,) = (sample[x] for x in ("png", "jpg", "webp") if x in sample)
        expected[sample["__key__"]] = np.asarray(image)
    pairs = read_pairs(shards)
    for pair in reversed(pairs):
        found = read_pixels(shards / pair.image, np.asarray, pair.member)
        assert np.array_equal(found, expected[pair.image.split("/")[1].split(".")[0]])
    assert len(expected) == 4


@pytest.mark.parametrize(
    ("pattern", "match"), [("x-{00..03}.tar", "x-00.tar is missing"), ("x-*.tar", "no tar at"), ("x.tar", "is missing")]
)
def test_shards_that_are_not_there_are_named(tmp_path, pattern, match):
    with pytest.raises((ValueError, FileNotFoundError), match=f"pairs: .*{match}"):
        read_pairs(tmp_path / pattern)


def test_patterns_are_filled_up_with_zeros(tmp_path):
    found = find_tars(tmp_path / "{8..11}" / "x-{009..010}.tar")
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == [f"{folder}/x-{number}.tar" for folder in (8, 9, 10, 11) for number in ("009", "010")]
    assert image_folder(tmp_path / "{8..11}" / "x-{009..010}.tar") == tmp_path


GOOD = [("a.png", picture(1)), ("a.txt", b"an ant")]


@pytest.mark.parametrize(
    ("files", "kind", "match"),
    [
        ([("b.png", picture(2))], "missing_sample", "key b has no .txt, and no .json with a caption"),
        ([("b.png", picture(2)), ("b.json", b"{}")], "missing_sample", "key b has no .txt, and no .json"),
        ([("b.txt", b"a bee")], "missing_sample", "key b has no picture"),
        ([("b.png", picture(2)), ("b.json", b"[")], "missing_sample", "key b must have text that can be read"),
        ([("b.png", picture(2)), ("b.txt", b"\xff")], "missing_sample", "key b must have text that can be read"),
        ([("b.png", picture(2)), ("b.json", b"[1]")], "missing_sample", "the JSON must be an object, got list"),
        ([("b.png", picture(2)), ("b.txt", b" .\n")], "empty_caption", "key b must have a caption with a word"),
        ([("b.png", picture(2)), ("b.txt", b"")], "empty_caption", "key b must have a caption with a word"),
        ([("b.png", picture(2)), ("b.txt", "\u200d".encode())], "empty_caption", "key b must have a caption"),
        ([("a.png", picture(3))], "duplicate_id", "must have one picture and text a key, got another a.png of a"),
        ([("a.jpg", picture(3))], "duplicate_id", "must have one picture and text a key, got another a.jpg of a"),
        ([("a.txt", b"an elk")], "duplicate_id", "must have one picture and text a key, got another a.txt of a"),
    ],
)
def test_a_bad_sample_is_refused_or_skipped_and_counted(tmp_path, files, kind, match):
    write_tar(tmp_path / "bad.tar", [*GOOD, *files, ("c.png", picture(9)), ("c.txt", b"a cat")])
    with pytest.raises(ValueError, match=f"pairs: .*bad.tar.* {match}"):
        read_pairs(tmp_path)
    bad = BadData("skip")
    assert [(pair.image, pair.caption) for pair in read_pairs(tmp_path, bad)] == [
        ("bad.tar/a.png", "an ant"),
        ("bad.tar/c.png", "a cat"),
    ]
    assert bad.counts == {kind: 1} and f"skipped 1 {kind}, the first: pairs: " in bad.summary()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_key_in_two_shards_is_refused_or_its_second_sample_skipped(tmp_path, workers):
    write_tar(tmp_path / "0.tar", GOOD)
    files = [("a.png", picture(2)), ("a.txt", b"an ape"), ("b.png", picture(3)), ("b.txt", b"bee")]
    write_tar(tmp_path / "1.tar", files)
    with pytest.raises(ValueError, match=r"1.tar must have no key of .*0.tar again, got a"):
        read_pairs(tmp_path)
    bad = BadData("skip")
    assert [pair.caption for pair in read_pairs(tmp_path, bad, workers)] == ["an ant", "bee"]
    assert bad.counts == {"duplicate_id": 1}
    write_tar(tmp_path / "2.tar", [("c.txt", b"no picture")])
    (tmp_path / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"2.tar, key c has no picture"):
        read_pairs(tmp_path, num_workers=workers)


def test_a_damaged_shard_is_refused_or_skipped_and_counted(tmp_path):
    """Cut anywhere, at a member's end too, a header overwritten, or two shards in one file: tarfile alone takes some of
    these for whole.
    """
    good = [(f"{key}.{suffix}", content) for key in "abc" for suffix, content in (("png", picture(1)), ("txt", b"x"))]
    write_tar(tmp_path / "1.tar", good)
    whole = (tmp_path / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        offsets = [info.offset for info in tar] + [tar.offset]
    write_tar(tmp_path / "2.tar", [("z.png", picture(2)), ("z.txt", b"zebra")])
    cuts = [*offsets, *(offset + 100 for offset in offsets[:-1]), *(offset + 600 for offset in offsets[:-1])]
    damaged = [whole[:cut] for cut in cuts]
    for filling in (b"\xff", b"\0"):
        damaged += [whole[:at] + filling * 512 + whole[at + 512 :] for at in offsets[:-1]]
    damaged += [b"", b"no tar at all", whole + whole]
    for content in damaged:
        (tmp_path / "1.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"1.tar is missing, corrupted or truncated: "):
            read_pairs(tmp_path)
        bad = BadData("skip")
        assert read_pairs(tmp_path, bad) == read_pairs(tmp_path / "2.tar")
        assert bad.counts == {"corrupt_shard": 1}
    (tmp_path / "1.tar").write_bytes(whole)
    assert len(read_pairs(tmp_path)) == 4


def test_a_folder_with_pictures_beside_shards_is_refused(tmp_path):
    """Which of the two are meant is not guessed."""
    write_tar(tmp_path / "0.tar", GOOD)
    (tmp_path / "b.png").write_bytes(picture(2))
    with pytest.raises(ValueError, match="must hold tar shards or pictures, got both, .*b.png among them"):
        read_pairs(tmp_path)
    assert len(read_pairs(tmp_path / "*.tar")) == 1


def kill_this_process(*_arguments, **_options):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="a worker must be a copy of this process")
def test_a_worker_that_is_killed_ends_the_reading(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", GOOD)
    monkeypatch.setattr("qformer_fast.data.captions.read_tar", kill_this_process)
    with pytest.raises(BrokenProcessPool):
        read_pairs(tmp_path, num_workers=1)


def test_nothing_left_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", picture(1))])
    with pytest.raises(ValueError, match="pairs must hold at least one image-caption pair, found none in"):
        read_pairs(tmp_path, BadData("skip"))


def test_pictures_may_lie_in_folders_of_a_tar(tmp_path):
    names = ["./a", "part/b", "../c", "/d"]
    files = [((f"{name}.png", picture(i)), (f"{name}.txt", b"x")) for i, name in enumerate(names)]
    write_tar(tmp_path / "0.tar", itertools.chain.from_iterable(files))
    pairs = read_pairs(tmp_path)
    assert [pair.image for pair in pairs] == [f"0.tar/{x}.png" for x in names]
    assert [read_pixels(tmp_path / x.image, colour, x.member) for x in pairs] == [(i, 255 - i, 7) for i in range(4)]


def test_a_picture_that_is_damaged_in_its_tar_is_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", picture(1)[:40]), ("a.txt", b"ant")])
    (pair,) = read_pairs(tmp_path)
    assert isinstance(pair, Pair)
    with pytest.raises(ValueError, match="0.tar/a.png is no readable picture"):
        read_pixels(tmp_path / pair.image, colour, pair.member)
