"""Captions and questions for a language model, and their batches."""

import importlib.util
import json
import sys
import types

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qformer_fast.data.bad import BadData
from qformer_fast.data.batches import LanguageDataset, ShuffledBatches, batch_loader
from qformer_fast.data.examples import Example, read_any, read_examples
from qformer_fast.data.features import FeatureCache
from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.data.sources import read_mixture
from qformer_fast.data.tokenizer import load_tokenizer

WORDS = ["a", "photo", "of", "red", "green", "small", "thing", "question:", "what", "colour", "is", "it?", "answer:"]
BOS, PAD, END = 2, 1, 4


def word_tokenizer():
    """Words and "\\n" are tokens; text begins with </s>, as OPT's does."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\S+"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    special = dict(bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def ids_of(*words):
    return [END if word == "\n" else 5 + WORDS.index(word) for word in words]


@pytest.fixture
def write(tmp_path):
    def write(entries):
        path = tmp_path / "examples.json"
        path.write_text(json.dumps(entries))
        return path

    return write


@pytest.fixture
def cache(tmp_path):
    keys = [f"image{i}" for i in range(4)]
    tokens = torch.arange(4 * 2 * 3).view(4, 2, 3).float()
    return FeatureCache.create(tmp_path / "cache", keys, [tokens], metadata={})


def test_captions_are_those_of_pairs(write, tmp_path):
    path = write(
        [{"image": "a.png", "caption": ["One Cat.", "a cat"], "image_id": 7}, {"image": "b", "caption": "A dog"}]
    )
    told = "a photo of"
    first, second = Example("a.png", "one cat", told, "7"), Example("a.png", "a cat", told, "7")
    assert read_examples(path, told) == [first, second, Example("b", "a dog", told, "b")]
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "c.png")
    (folder / "c.txt").write_text("A fish!\n")
    assert read_examples(folder) == [Example("c.png", "a fish", "", "c.png")]


def test_questions_take_the_majority_answer(write):
    answers = [
        (["no", "yes", "yes", "no", "maybe"], "no"),  # the first of two that two people gave
        (["maybe", "yes", "no", "yes"], "yes"),
        ([" 2 ", "2", "two", ""], "2"),
        ("on the left", "on the left"),
    ]
    entries = [{"image": "a.png", "question": "What is it?", "answer": given} for given, _ in answers]
    read = read_examples(write(entries), "Question: {} Answer:")
    assert [example.text for example in read] == [expected for _, expected in answers]
    assert {example.prompt for example in read} == {"Question: what is it? Answer:"}
    assert {example.image_id for example in read} == {"a.png"}


def test_questions_are_cleaned_as_the_original_does(write, original, monkeypatch):
    """Against BlipQuestionProcessor itself, its imports replaced."""
    registry = types.SimpleNamespace(registry=types.SimpleNamespace(register_processor=lambda _name: lambda cls: cls))
    stubs = {
        "lavis.common.registry": registry,
        "lavis.processors.base_processor": types.SimpleNamespace(BaseProcessor=object),
        "lavis.processors.randaugment": types.SimpleNamespace(RandomAugment=None),
        "omegaconf": types.SimpleNamespace(OmegaConf=None),
    }
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    path = original.FOLDER.parents[1] / "processors" / "blip_processors.py"
    if not path.exists():
        pytest.skip(f"{path} is not unpacked")
    spec = importlib.util.spec_from_file_location("blip_processors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    questions = ['Is this a "Red" car?', "Who's #1 (left)?", "What; is: this * ~ . ", "Really?! " + "word " * 60]
    entries = [{"image": "a", "question": question, "answer": "x"} for question in questions]
    expected = [module.BlipQuestionProcessor().pre_question(question).strip() for question in questions]
    assert [example.prompt for example in read_examples(write(entries), "{}")] == expected


@pytest.mark.parametrize(
    ("entry", "prompt", "match"),
    [
        ({"question": "what?", "answer": "x"}, "{}", 'entry 1 must have "image", "question" and "answer"'),
        ({"image": "a", "question": "what?"}, "{}", 'entry 1 must have "image", "question" and "answer"'),
        ({"image": "a", "caption": "a cat"}, "{}", 'entry 1 must have "image", "question" and "answer"'),
        (
            {"image": "a", "question": "...", "answer": "x"},
            "{}",
            r"entry 1 must have a question with a word .*'\.\.\.'",
        ),
        ({"image": "a", "question": 3, "answer": "x"}, "{}", "entry 1 must have a question with a word in it, got 3"),
        (
            {"image": "a", "question": "what?", "answer": []},
            "{}",
            r"entry 1 must have an answer with a word .*got \[\]",
        ),
        (
            {"image": "a", "question": "what?", "answer": 3},
            "{}",
            "entry 1 must have an answer with a word in it, got 3",
        ),
        ({"image": "a", "question": "what?", "answer": "x"}, "Question:", "prompt must have one .* got 'Question:'"),
        ({"image": "a", "question": "what?", "answer": "x"}, "{} {}", "prompt must have one"),
    ],
)
def test_malformed_questions_are_named(write, entry, prompt, match):
    good = {"image": "a", "question": "what?", "answer": "x"}
    with pytest.raises(ValueError, match=match):
        read_examples(write([good, entry]), prompt)


def test_captions_have_no_place_for_a_question(write):
    with pytest.raises(ValueError, match=r'prompt must have no "\{\}", there is no question in .*; got "?.*a \{\}'):
        read_examples(write([{"image": "a", "caption": "a cat"}]), "a {}")
    with pytest.raises(FileNotFoundError, match="pairs: no file or folder at nowhere.json"):
        read_examples("nowhere.json", "a {}")
    with pytest.raises(ValueError, match="must hold at least one image-caption pair"):
        read_examples(write([]), "a {}")


def images_of(path):
    return read_mixture([path], read_any, image_root=None, bad=BadData()).members


def test_images_of_captions_and_of_questions(write, tmp_path):
    assert list(images_of(write([{"image": x, "caption": "a cat"} for x in "bab"]))) == ["b", "a"]
    assert list(images_of(write([{"image": x, "question": "what?", "answer": "x"} for x in "bab"]))) == ["b", "a"]
    (tmp_path / "folder").mkdir()
    for name in ("b", "a"):
        (tmp_path / "folder" / f"{name}.png").touch()
        (tmp_path / "folder" / f"{name}.txt").write_text("a cat\nthe cat")
    assert list(images_of(tmp_path / "folder")) == ["a.png", "b.png"]


@pytest.mark.parametrize("content", [[], [{"image": "a"}], {}])
def test_files_without_captions_are_named(write, content):
    with pytest.raises(ValueError, match="examples.json"):
        read_examples(write(content))


EXAMPLES = [
    Example("image0", "red", "a photo of", "x"),
    Example("image1", "green thing", "question: what colour is it? answer:"),
    Example("image2", "a small red thing"),
    Example("image3", "thing", "a photo of", "x"),
]


def test_labels_leave_out_each_prompt_of_its_own(cache):
    batch = LanguageDataset(EXAMPLES, LanguageTokenizer(word_tokenizer()), cache=cache)[[1, 0, 2]]
    question = [BOS, *ids_of("question:", "what", "colour", "is", "it?", "answer:")]
    rows = [
        (question, ids_of("green", "thing", "\n")),
        ([BOS, *ids_of("a", "photo", "of")], ids_of("red", "\n")),
        ([], [BOS, *ids_of("a", "small", "red", "thing", "\n")]),
    ]
    width = len(question) + 3
    for row, (told, said) in enumerate(rows):
        padding = width - len(told) - len(said)
        assert batch.input_ids[row].tolist() == told + said + [PAD] * padding
        assert batch.attention_mask[row].tolist() == [1] * (width - padding) + [0] * padding
        assert batch.labels[row].tolist() == [-100] * len(told) + said + [-100] * padding
    assert torch.equal(batch.images, cache.rows(["image1", "image0", "image2"]))
    assert batch.qformer_input_ids is batch.caption_input_ids is None
    whole = LanguageDataset(EXAMPLES, LanguageTokenizer(word_tokenizer()), cache=cache)
    assert whole[[0, 3]].input_ids.shape == (2, 6)  # as long as its own longest row
    assert whole.image_ids[0] == whole.image_ids[3] and len(whole.image_ids.unique()) == 3


def test_an_encoder_decoder_reads_the_prompt_and_says_the_text(cache):
    language = LanguageTokenizer(word_tokenizer(), encoder_decoder=True)
    batch = LanguageDataset(EXAMPLES, language, cache=cache)[[1, 0]]
    assert batch.input_ids[1].tolist() == [BOS, *ids_of("a", "photo", "of"), PAD, PAD, PAD]
    assert batch.labels.tolist() == [[BOS, *ids_of("green", "thing")], [BOS, *ids_of("red"), -100]]


def test_prompts_and_captions_in_berts_tokens(cache):
    bert = load_tokenizer()
    options = dict(qformer_tokenizer=bert, captions_tokenizer=bert)
    batch = LanguageDataset([EXAMPLES[0], EXAMPLES[1]], LanguageTokenizer(word_tokenizer()), cache=cache, **options)[
        [0, 1]
    ]
    prompts = ["[CLS] a photo of [SEP]", "[CLS] question : what colour is it ? answer : [SEP]"]
    for row, (prompt, caption) in enumerate(zip(prompts, ["[CLS] red [SEP]", "[CLS] green thing [SEP]"], strict=True)):
        ids = batch.qformer_input_ids[row][batch.qformer_attention_mask[row].bool()]
        assert bert.convert_ids_to_tokens(ids.tolist()) == prompt.split()
        ids = batch.caption_input_ids[row][batch.caption_attention_mask[row].bool()]
        assert bert.convert_ids_to_tokens(ids.tolist()) == caption.split()


def test_a_prompt_too_long_for_the_q_former_loses_its_beginning(cache):
    bert, language = load_tokenizer(), LanguageTokenizer(word_tokenizer(), max_length=64)
    examples = [Example("image0", "red", " ".join(["green", *["thing"] * 30, "is", "it"])), EXAMPLES[0]]
    dataset = LanguageDataset(examples, language, cache=cache, qformer_tokenizer=bert, qformer_max_length=8)
    long, short = dataset[[0, 1]].qformer_input_ids
    assert bert.decode(long.tolist()) == "[CLS] thing thing thing thing is it [SEP]"
    assert bert.decode(short.tolist()) == "[CLS] a photo of [SEP] [PAD] [PAD] [PAD]"


def test_batches_are_the_same_with_workers(cache):
    dataset = LanguageDataset(EXAMPLES, LanguageTokenizer(word_tokenizer()), cache=cache)
    loaders = [
        batch_loader(dataset, ShuffledBatches(4, 3, seed=1), num_workers=workers, pin_memory=False)
        for workers in (0, 1)
    ]
    for _, ours, theirs in zip(range(2), *loaders, strict=False):
        for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True):
            assert (a is b is None) or torch.equal(a, b)


@pytest.mark.cuda
def test_batches_are_pinned(cache):
    dataset = LanguageDataset(EXAMPLES, LanguageTokenizer(word_tokenizer()), cache=cache)
    loader = batch_loader(dataset, ShuffledBatches(4, 3, seed=1), num_workers=0, pin_memory=True)
    batch = next(iter(loader))
    assert batch.images.is_pinned() and batch.labels.is_pinned() and batch.qformer_input_ids is None


@pytest.mark.parametrize(
    ("example", "options", "match"),
    [
        (Example("image9", "red"), {}, r"examples name 1 images that the feature cache lacks: \['image9'\]"),
        (Example("image1", " "), {}, r"examples must each have a text, none in 1 of them: \[1\]"),
        (
            Example("image1", "red", "thing " * 40),
            {},
            "prompts must leave room for text in 32 tokens, got 'thing thing",
        ),
        (Example("image1", "red"), {"qformer_tokenizer": True}, r"a prompt for the Q-Former, none in 1 of them: \[1\]"),
        (Example("image1", "\u200d"), {"captions_tokenizer": True}, r"captions must each have a word, .* rows \[1\]"),
    ],
)
def test_bad_examples_are_named(cache, example, options, match):
    language = LanguageTokenizer(word_tokenizer())
    options = dict.fromkeys(options, load_tokenizer())
    with pytest.raises(ValueError, match=match):
        LanguageDataset([EXAMPLES[0], example], language, cache=cache, **options)


def test_bad_datasets_are_named(cache):
    language = LanguageTokenizer(word_tokenizer())
    with pytest.raises(ValueError, match="examples must hold at least one"):
        LanguageDataset([], language, cache=cache)
    with pytest.raises(ValueError, match="cache or transform must be given"):
        LanguageDataset(EXAMPLES, language)
