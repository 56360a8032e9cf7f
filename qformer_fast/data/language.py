"""Text for a frozen language model: prompts, targets and labels, as stage 2 of the original makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from qformer_fast.data.files import check_folder_or_id
from qformer_fast.data.tokenizer import pad, token_ids

IGNORED = -100


@dataclass(frozen=True, eq=False)
class LanguageText:
    """What a language model is trained on, as :meth:`LanguageTokenizer.targets` makes it; all int64.

    Args:
        input_ids, attention_mask (Tensor): (batch, length), right-padded.
        labels (Tensor): (batch, length), or of an encoder-decoder (batch, target length); -100 is not predicted.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class LanguageTokenizer:
    """A language model's tokenizer, as LAVIS uses OPT's and T5's (506965b, blip2_opt.py:71-150, blip2_t5.py:95-150).

    Args:
        tokenizer (PreTrainedTokenizerBase): without a padding token it pads with its end token.
        encoder_decoder (bool): the model reads prompts in its encoder. Default: False.
        end (str): what a causal model's text ends with; its first token ends generation. Default: a new line.
        max_length (int): of a prompt with its text in tokens, and of an encoder-decoder's each. Default: 32.

    Raises:
        ValueError: a tokenizer that can't pad, a max_length below 1, an end without a token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder_decoder: bool = False,
        end: str = "\n",
        max_length: int = 32,
    ):
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise ValueError("tokenizer must have a pad_token or an eos_token, got neither")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.tokenizer, self.encoder_decoder, self.max_length = tokenizer, encoder_decoder, max_length
        self.end = "" if encoder_decoder else end
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token is not None else tokenizer.eos_token_id
        ends = self._tokens_of_end() if self.end else [tokenizer.eos_token_id]
        if not ends:
            raise ValueError(f"end must be text that the tokenizer has tokens for, got {end!r}")
        self.end_token_id: int = ends[0]

    @classmethod
    def from_pretrained(cls, name: str, *, max_length: int = 32) -> LanguageTokenizer:
        """Of a model in a folder or on the Hugging Face hub.

        Raises:
            OSError: nothing there.
        """
        check_folder_or_id(name, "language_model")
        encoder_decoder = AutoConfig.from_pretrained(name).is_encoder_decoder
        return cls(AutoTokenizer.from_pretrained(name), encoder_decoder=encoder_decoder, max_length=max_length)

    def targets(self, texts: Sequence[str], prompts: Sequence[str] | str = "") -> LanguageText:
        """Text to be predicted, after prompts that are not.

        A causal model reads "prompt text" and ``end`` and predicts what follows the prompt's own tokens; without a
        prompt that includes the tokenizer's first special token. An encoder-decoder reads the prompt and predicts the
        text.

        Args:
            texts (Sequence): (batch,) strings.
            prompts (Sequence or str): of each text, or of all. Default: "", none.

        Raises:
            ValueError: no text, another number of prompts, a prompt that leaves no room for text.
        """
        return self.pad(*self.target_rows(texts, prompts))

    def target_rows(
        self, texts: Sequence[str], prompts: Sequence[str] | str = ""
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The input ids and the labels of :meth:`targets`, which :meth:`pad` makes of them, without padding."""
        prompts = self._one_each(prompts, len(texts))
        if self.encoder_decoder:
            return self._encoded(prompts), self._encoded(texts)
        ids = self._encoded(
            [f"{prompt} {text}".lstrip() + self.end for prompt, text in zip(prompts, texts, strict=True)]
        )
        distinct = list(dict.fromkeys(prompts))
        lengths = dict(zip(distinct, map(len, token_ids(self.tokenizer, distinct)), strict=True)) | {"": 0}
        labels = []
        for row, prompt in zip(ids, prompts, strict=True):
            length = lengths[prompt]
            if length >= len(row):
                raise ValueError(f"prompts must leave room for text in {self.max_length} tokens, got {prompt!r}")
            labels.append([IGNORED] * length + row[length:])
        return ids, labels

    def pad(self, ids: Sequence[Sequence[int] | Tensor], labels: Sequence[Sequence[int] | Tensor]) -> LanguageText:
        """Rows of :meth:`target_rows`, right-padded to the longest."""
        return LanguageText(*pad(ids, self.pad_token_id), pad(labels, IGNORED)[0])

    def prompts(self, prompts: Sequence[str] | str = "", count: int | None = None) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask (batch, length) int64 to generate after, left-padded for a causal model.

        Args:
            prompts (Sequence or str): one each, or one of all ``count``.
            count (int, Optional): how many. Default: `None`, as many as there are prompts.
        """
        if count is None:
            if isinstance(prompts, str):
                raise ValueError(f"count must say how many prompts {prompts!r} stands for, got None")
            count = len(prompts)
        rows = self.tokenizer(self._one_each(prompts, count))["input_ids"]
        return pad(rows, self.pad_token_id, left=not self.encoder_decoder)

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of generated tokens (batch, length), stripped."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _tokens_of_end(self) -> list[int]:
        """Those of ``end`` after text; alone, tokenizers like Llama's put a blank before it."""
        word, whole = (self.tokenizer(x, add_special_tokens=False)["input_ids"] for x in ("a", "a" + self.end))
        return whole[len(word) :]

    def _one_each(self, prompts: Sequence[str] | str, count: int) -> list[str]:
        if count == 0:
            raise ValueError("texts must hold at least one, got none")
        prompts = [prompts] * count if isinstance(prompts, str) else list(prompts)
        if len(prompts) != count:
            raise ValueError(f"prompts must be one string or {count}, one each, got {len(prompts)}")
        return [prompt.strip() for prompt in prompts]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return token_ids(self.tokenizer, texts, truncation=True, max_length=self.max_length)
