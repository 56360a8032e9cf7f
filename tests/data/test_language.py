"""Prompts, targets and labels of a language model against ones written by hand."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import OPTConfig, PreTrainedTokenizerFast, T5Config

from qformer_fast.data.language import LanguageTokenizer

START, PAD, UNKNOWN, LINE = 0, 1, 2, 3
WORDS = ["</s>", "<pad>", "<unk>", "\n", "a", "photo", "of", "cat", "dog", "red", "Question:", "what?", "Answer:"]
A, PHOTO, OF, CAT, DOG, RED, QUESTION, WHAT, ANSWER = range(4, 13)
X = -100


def word_tokenizer(template="</s> $A", **special):
    """One token a word and one a new line; by default text begins with </s>, as OPT's does."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s]+"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", START)])
    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>") | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{key: x for key, x in special.items() if x})


@pytest.fixture
def causal():
    return LanguageTokenizer(word_tokenizer())


@pytest.fixture
def encoder_decoder():
    return LanguageTokenizer(word_tokenizer("$A </s>"), encoder_decoder=True)


def check(text, ids, mask, labels):
    assert text.input_ids.tolist() == ids
    assert text.attention_mask.tolist() == mask
    assert text.labels.tolist() == labels
    assert {x.dtype for x in vars(text).values()} == {torch.int64}


def test_without_a_prompt_the_first_token_is_predicted(causal):
    """LAVIS's stage-2 pre-training: the last query predicts </s> (blip2_opt.py:128-147)."""
    check(
        causal.targets(["a red cat", "dog"]),
        [[START, A, RED, CAT, LINE], [START, DOG, LINE, PAD, PAD]],
        [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        [[START, A, RED, CAT, LINE], [START, DOG, LINE, X, X]],
    )


def test_one_prompt_for_all_is_not_predicted(causal):
    """Neither is the token before it; blanks around a prompt do not count."""
    check(
        causal.targets(["cat", "red dog"], " a photo of "),
        [[START, A, PHOTO, OF, CAT, LINE, PAD], [START, A, PHOTO, OF, RED, DOG, LINE]],
        [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]],
        [[X, X, X, X, CAT, LINE, X], [X, X, X, X, RED, DOG, LINE]],
    )


def test_a_prompt_for_each(causal):
    check(
        causal.targets(["dog", "cat", "red cat"], ["Question: what? Answer:", "", "a"]),
        [
            [START, QUESTION, WHAT, ANSWER, DOG, LINE],
            [START, CAT, LINE, PAD, PAD, PAD],
            [START, A, RED, CAT, LINE, PAD],
        ],
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
        [[X, X, X, X, DOG, LINE], [START, CAT, LINE, X, X, X], [X, X, RED, CAT, LINE, X]],
    )


def test_truncation_cuts_the_text_and_its_end():
    tokenizer = LanguageTokenizer(word_tokenizer(), max_length=5)
    check(
        tokenizer.targets(["red cat dog", "dog"], "a photo"),
        [[START, A, PHOTO, RED, CAT], [START, A, PHOTO, DOG, LINE]],
        [[1] * 5] * 2,
        [[X, X, X, RED, CAT], [X, X, X, DOG, LINE]],
    )
    with pytest.raises(ValueError, match="prompts must leave room for text in 5 tokens, got 'a photo of a'"):
        tokenizer.targets(["cat", "dog"], ["a", "a photo of a"])


def test_an_end_of_ones_own(causal):
    tokenizer = LanguageTokenizer(word_tokenizer(), end=" of dog")
    check(tokenizer.targets(["cat"]), [[START, CAT, OF, DOG]], [[1] * 4], [[START, CAT, OF, DOG]])
    assert (causal.end_token_id, tokenizer.end_token_id) == (LINE, OF)


def blank_tokenizer():
    """As Llama's: a blank is part of the word after it, text begins with one, a new line is a byte."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "▁a", "▁photo", "▁of", "▁cat"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_end_is_what_follows_text():
    """Alone this tokenizer begins it with a blank, which never comes where text ends."""
    tokenizer = LanguageTokenizer(blank_tokenizer())
    assert blank_tokenizer()("\n", add_special_tokens=False)["input_ids"] == [4, 3]
    assert tokenizer.end_token_id == 3
    check(tokenizer.targets(["cat"], "a photo of"), [[1, 5, 6, 7, 8, 3]], [[1] * 6], [[X, X, X, X, 8, 3]])
    check(tokenizer.targets(["a cat"]), [[1, 5, 8, 3]], [[1] * 4], [[1, 5, 8, 3]])


def test_no_blank_before_text_without_a_prompt():
    """GPT-2's and OPT's words with a blank before them are others."""
    words = ["</s>", "Ċ", "cat", "Ġcat", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    language = LanguageTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    check(language.targets(["cat"]), [[2, 1]], [[1] * 2], [[2, 1]])
    check(language.targets(["cat"], "a "), [[4, 3, 1]], [[1] * 3], [[X, 3, 1]])
    assert language.prompts(["a "])[0].tolist() == [[4]] and language.end_token_id == 1


def test_a_tokenizer_without_a_first_token():
    """As GPT-2's: without a prompt the queries alone come before the text."""
    tokenizer = LanguageTokenizer(word_tokenizer("$A"))
    check(tokenizer.targets(["cat"], "a"), [[A, CAT, LINE]], [[1] * 3], [[X, CAT, LINE]])
    check(
        tokenizer.targets(["red cat", "dog"], ["", "a photo"]),
        [[RED, CAT, LINE, PAD], [A, PHOTO, DOG, LINE]],
        [[1, 1, 1, 0], [1] * 4],
        [[RED, CAT, LINE, X], [X, X, DOG, LINE]],
    )
    ids, mask = tokenizer.prompts(["", "a photo"])
    assert ids.tolist() == [[PAD, PAD], [A, PHOTO]] and mask.tolist() == [[0, 0], [1, 1]]
    assert [x.shape for x in tokenizer.prompts("", 2)] == [(2, 0), (2, 0)]


def test_encoder_decoder_targets(encoder_decoder):
    """The prompt alone is read, the text alone predicted, each with its end; their lengths have nothing in common."""
    check(
        encoder_decoder.targets(["red cat", "dog"], ["a photo of", "a"]),
        [[A, PHOTO, OF, START], [A, START, PAD, PAD]],
        [[1, 1, 1, 1], [1, 1, 0, 0]],
        [[RED, CAT, START], [DOG, START, X]],
    )
    check(encoder_decoder.targets(["cat", "dog"]), [[START]] * 2, [[1]] * 2, [[CAT, START], [DOG, START]])
    assert encoder_decoder.end_token_id == START
    short = LanguageTokenizer(word_tokenizer("$A </s>"), encoder_decoder=True, max_length=3)
    check(short.targets(["a red cat"], "a photo of"), [[A, PHOTO, START]], [[1] * 3], [[A, RED, START]])


def test_prompts_are_padded_on_the_side_that_is_read_first(causal, encoder_decoder):
    ids, mask = causal.prompts(["a photo of", "Question: what? Answer: red", ""])
    assert ids.tolist() == [
        [PAD, START, A, PHOTO, OF],
        [START, QUESTION, WHAT, ANSWER, RED],
        [PAD, PAD, PAD, PAD, START],
    ]
    assert mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64
    ids, mask = encoder_decoder.prompts(["a photo of", "a"])
    assert ids.tolist() == [[A, PHOTO, OF, START], [A, START, PAD, PAD]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_one_prompt_of_a_count(causal):
    ids, mask = causal.prompts("a photo of ", 2)
    assert ids.tolist() == [[START, A, PHOTO, OF]] * 2 and mask.tolist() == [[1] * 4] * 2
    with pytest.raises(ValueError, match="count must say how many prompts 'a' stands for"):
        causal.prompts("a")


def test_decode_drops_special_tokens_and_blanks(causal):
    ids = torch.tensor([[START, RED, CAT, LINE], [DOG, PAD, PAD, PAD]])
    assert causal.decode(ids) == ["red cat", "dog"]


def test_padding_is_the_end_where_there_is_none():
    tokenizer = LanguageTokenizer(word_tokenizer(pad_token=None))
    check(
        tokenizer.targets(["red cat", "dog"]),
        [[START, RED, CAT, LINE], [START, DOG, LINE, START]],
        [[1, 1, 1, 1], [1, 1, 1, 0]],
        [[START, RED, CAT, LINE], [START, DOG, LINE, X]],
    )


def test_rows_from_elsewhere_are_padded_alike(causal):
    """What a data set keeps: tensors without padding."""
    rows, labels = causal.target_rows(["red cat", "dog"], "a")
    assert rows == [[START, A, RED, CAT, LINE], [START, A, DOG, LINE]]
    assert labels == [[X, X, RED, CAT, LINE], [X, X, DOG, LINE]]
    again = causal.pad([torch.tensor(x) for x in rows], [torch.tensor(x, dtype=torch.int32) for x in labels])
    expected = causal.targets(["red cat", "dog"], "a")
    assert all(torch.equal(x, y) for x, y in zip(vars(again).values(), vars(expected).values(), strict=True))


@pytest.mark.parametrize(("config", "kind"), [(OPTConfig, False), (T5Config, True)])
def test_from_pretrained_tells_the_kind_by_the_config(tmp_path, config, kind):
    word_tokenizer().save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    tokenizer = LanguageTokenizer.from_pretrained(str(tmp_path), max_length=3)
    assert tokenizer.encoder_decoder == kind and tokenizer.max_length == 3
    assert tokenizer.prompts(["red cat"])[0].tolist() == [[START, RED, CAT]]


def test_errors(causal):
    with pytest.raises(ValueError, match="texts must hold at least one, got none"):
        causal.targets([])
    with pytest.raises(ValueError, match="prompts must be one string or 2, one each, got 3"):
        causal.targets(["cat", "dog"], ["a", "a", "a"])
    with pytest.raises(ValueError, match="prompts must be one string or 3, one each, got 1"):
        causal.prompts(["a"], 3)
    with pytest.raises(ValueError, match="tokenizer must have a pad_token or an eos_token"):
        LanguageTokenizer(word_tokenizer(eos_token=None, pad_token=None))
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        LanguageTokenizer(word_tokenizer(), max_length=0)
    with pytest.raises(ValueError, match="end must be text that the tokenizer has tokens for, got ' '"):
        LanguageTokenizer(word_tokenizer(), end=" ")
