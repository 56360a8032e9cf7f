"""Captions, tokens and batches."""

import json
import threading

import pytest
import torch
from PIL import Image

from qformer_fast.data.batches import PairDataset, ShuffledBatches, batch_loader
from qformer_fast.data.captions import Pair, clean_caption, clean_question, image_folder, read_pairs
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.tokenizer import encode, load_tokenizer, tokenize


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_tokenizer_is_berts_with_dec(tokenizer):
    assert len(tokenizer) == 30523 and tokenizer.bos_token_id == 30522 and tokenizer.bos_token == "[DEC]"
    ids, mask = tokenize(tokenizer, ["a cat", "a cat sleeping"])
    assert ids.tolist() == [[101, 1037, 4937, 102, 0], [101, 1037, 4937, 5777, 102]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1] * 5]


def test_long_captions_are_cut_before_sep(tokenizer):
    ids, mask = tokenize(tokenizer, ["cat " * 600], max_length=512)
    assert ids.shape == (1, 512) and ids[0, -1] == 102 and mask.all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_captions_are_those_of_one_call_however_many_go_in_at_once(tokenizer, monkeypatch, side) -> None:
    captions = [f"{'cat ' * i}{i}" for i in range(1, 8)]
    expected = encode(tokenizer, captions, max_length=6, truncation_side=side)
    monkeypatch.setattr("qformer_fast.data.tokenizer.TEXTS_AT_ONCE", 3)
    given = []

    def counting(texts, **options):
        given.append(len(texts))
        return tokenizer(texts, **options)

    assert encode(counting, captions, max_length=6, truncation_side=side) == expected and given == [3, 3, 1]


def test_captions_lose_their_end_whatever_the_folder_says(tmp_path) -> None:
    other = load_tokenizer()
    other.truncation_side = "left"
    other.save_pretrained(tmp_path)
    ids, _ = tokenize(load_tokenizer(tmp_path), ["one two three four"], max_length=4)
    assert other.decode(ids[0].tolist()) == "[CLS] one two [SEP]"


@pytest.mark.parametrize("max_length", [3, 6, 8, 9, 32])
def test_what_is_cut_on_the_left_loses_its_beginning(tokenizer, max_length) -> None:
    captions = ["one two three four five six seven", "cat"]
    ids, mask = tokenize(tokenizer, captions, max_length=max_length, truncation_side="left")
    left = load_tokenizer()
    left.truncation_side = "left"
    expected = left(captions, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"])


@pytest.mark.parametrize(
    ("captions", "max_length", "match"),
    [
        ([], 32, "captions must hold at least one caption"),
        (["cat", "  "], 32, r"captions must each have a word, none in 1 of them: rows \[1\]"),
        (["cat"], 513, r"max_length must lie in \(2, 512\]"),
    ],
)
def test_bad_captions_are_named(tokenizer, captions, max_length, match):
    with pytest.raises(ValueError, match=match):
        tokenize(tokenizer, captions, max_length=max_length)


def test_no_vocabulary_says_how_to_get_one(tmp_path):
    with pytest.raises(OSError, match=r"path_or_name: no BERT vocabulary at .*qformer_fast\[demo\]"):
        load_tokenizer(tmp_path)


def test_another_vocabulary_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]))
    with pytest.raises(ValueError, match=r"path_or_name: the vocabulary must be bert-base-uncased's 30522 words"):
        load_tokenizer(tmp_path)


def test_clean_caption_is_the_originals():
    assert clean_caption('A "Cat"; sleeps (well)! #nap *  ~ on: it.') == "a cat sleeps well nap on it"
    assert clean_caption("word " * 60).split() == ["word"] * 50
    assert clean_caption("it's 3-fold, isn't it?") == "it's 3-fold, isn't it?"


def test_clean_question_is_the_originals():
    # unlike a caption's, the signs leave no space and spaces inside stay
    assert clean_question("What's the dog's (pet's) NAME; #1:  Rex?!  ") == "what's the dog's pet's name 1  rex?"
    assert clean_question("what.is*it") == "whatisit"
    assert clean_question("word " * 60).split(" ") == ["word"] * 50


def test_pairs_of_a_json_list(tmp_path):
    entries = [
        {"image": "a.png", "caption": ["One Cat.", "a cat"], "image_id": "coco_1"},
        {"image": "b.png", "caption": "A dog"},
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    a, b = "a.png", "b.png"
    expected = [Pair(a, "one cat", "coco_1"), Pair(a, "a cat", "coco_1"), Pair(b, "a dog", b)]
    assert read_pairs(tmp_path / "pairs.json") == expected
    assert image_folder(tmp_path / "pairs.json") == tmp_path


def test_pairs_of_a_folder(tmp_path):
    (tmp_path / "c").mkdir()
    for name in ("c/b.png", "a.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("A cat\n\nOne cat.\n")
    (tmp_path / "c" / "b.txt").write_text("dog")
    a, b = "a.jpg", "c/b.png"
    assert image_folder(tmp_path) == tmp_path
    assert read_pairs(tmp_path) == [Pair(a, "a cat", a), Pair(a, "one cat", a), Pair(b, "dog", b)]
    (tmp_path / "c" / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b.png has no captions, expected b.txt beside it"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[", "is no JSON"),
        ("{}", "must hold a list, got dict"),
        ("[]", "pairs must hold at least one image-caption pair"),
        ('[{"image": "a.png"}]', 'entry 0 must have "image" and "caption"'),
        ('[{"image": "a.png", "caption": "..."}]', "entry 0 must have a caption with a word in it"),
        ('[{"image": "a.png", "caption": 3}]', "entry 0 must have a caption with a word in it, got 3"),
    ],
)
def test_bad_pairs_are_named(tmp_path, content, match):
    (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        read_pairs(tmp_path / "pairs.json")


def test_missing_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match="pairs: no file or folder"):
        read_pairs(tmp_path / "none.json")


def test_epochs_are_permutations_and_positions_are_enough():
    order = ShuffledBatches(10, 3, seed=5)
    batches = [batch for batch, _ in zip(order, range(9), strict=False)]
    epochs = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 and set(epoch) <= set(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for start in range(9):
        later = ShuffledBatches(10, 3, seed=5, start=start)
        assert [batch for batch, _ in zip(later, range(9 - start), strict=False)] == batches[start:]
    other = ShuffledBatches(10, 3, seed=6)
    assert [batch for batch, _ in zip(other, range(3), strict=False)] != batches[:3]
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, 10\]"):
        ShuffledBatches(10, 11, seed=0)


@pytest.fixture
def cache(tmp_path):
    keys = [f"image{i}" for i in range(6)]
    batches = torch.arange(6 * 2 * 3).view(3, 2, 2, 3).float().unbind(0)
    return FeatureCache.create(tmp_path / "cache", keys, batches, metadata={"encoder": "test"})


def test_batches_are_the_same_with_workers(cache, tokenizer):
    pairs = [Pair(f"image{i}", f"dog {'cat ' * (i + 1)}", f"id{i // 2}") for i in range(6)]
    dataset = PairDataset(pairs, tokenizer, cache=cache)
    seen = []
    for workers in (0, 2):
        state = torch.get_rng_state()
        loader = batch_loader(dataset, ShuffledBatches(6, 4, seed=1), num_workers=workers, pin_memory=False)
        seen.append([batch for batch, _ in zip(loader, range(3), strict=False)])
        assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(*seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))
    batch, indices = seen[0][0], next(iter(ShuffledBatches(6, 4, seed=1)))
    ids, mask = tokenize(tokenizer, [pairs[i].caption for i in indices])
    assert torch.equal(batch.input_ids, ids) and torch.equal(batch.attention_mask, mask)
    assert torch.equal(dataset.unpack(batch.images), cache.rows([pairs[i].image for i in indices]))
    assert batch.image_ids.tolist() == [i // 2 for i in indices]
    assert batch.attention_mask.sum(1).tolist() == [i + 4 for i in indices]


def test_threads_end_with_their_loader_and_say_what_they_found(cache, tokenizer):
    dataset = PairDataset([Pair(f"image{i}", "dog", f"id{i}") for i in range(6)], tokenizer, cache=cache)
    before = threading.active_count()
    loader = iter(batch_loader(dataset, ShuffledBatches(6, 2, seed=1), num_workers=2, pin_memory=False))
    next(loader)
    assert threading.active_count() == before + 2
    loader.close()
    assert threading.active_count() == before
    (cache.folder / "shard-00000" / "features.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match="features.bin must have .* bytes, it was cut since the cache was opened"):
        next(iter(batch_loader(dataset, ShuffledBatches(6, 2, seed=1), num_workers=2, pin_memory=False)))


def test_pixels_come_through_the_transform(tmp_path, tokenizer):
    Image.new("L", (2, 2), 255).save(tmp_path / "a.png")

    def transform(picture):
        assert picture.mode == "RGB"
        return torch.full((3, 4, 4), float(picture.getpixel((0, 0))[0]))

    dataset = PairDataset([Pair("a.png", "white", "a")], tokenizer, transform=transform, image_root=tmp_path)
    assert torch.equal(dataset[[0, 0]].images, torch.full((2, 3, 4, 4), 255.0))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png is no readable picture"):
        dataset[[0]]


def test_bad_datasets_are_named(cache, tokenizer):
    pair = Pair("image0", "cat", "0")
    with pytest.raises(ValueError, match="pairs must hold at least one"):
        PairDataset([], tokenizer, cache=cache)
    with pytest.raises(ValueError, match="cache or transform must be given"):
        PairDataset([pair], tokenizer)
    with pytest.raises(ValueError, match=r"1 images that the feature cache lacks: \['image9'\]"):
        PairDataset([pair, Pair("image9", "cat", "9")], tokenizer, cache=cache)
    with pytest.raises(ValueError, match=r"captions must each have a word, none in 1 of them: rows \[1\]"):
        PairDataset([pair, Pair("image1", "\u200d", "1")], tokenizer, cache=cache)
    with pytest.raises(ValueError, match="max_length must lie in"):
        PairDataset([pair], tokenizer, cache=cache, max_length=600)
