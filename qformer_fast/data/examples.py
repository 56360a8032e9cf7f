"""What a language model is trained to say of images: captions, or answers to questions."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer_fast.data.bad import BadData
from qformer_fast.data.captions import clean_question, id_of, pairs_of, read_entries, read_pairs
from qformer_fast.data.pictures import Member
from qformer_fast.data.tars import are_tars

PLACE = "{}"

QUESTION_FIELDS = {"image", "question", "answer"}


@dataclass(frozen=True, slots=True)
class Example:
    """One text about one image.

    Args:
        image (str): the picture's key in a feature cache, and its path in a folder of images.
        text (str): what the language model is to say.
        prompt (str): what it is told before. Default: "", nothing.
        image_id (str, Optional): examples with the same one show the same image. Default: `None`, that of ``image``.
        member (tuple, Optional): where in a tar the picture is. Default: `None`, in no tar.
    """

    image: str
    text: str
    prompt: str = ""
    image_id: str | None = None
    member: Member | None = None


def read_examples(
    path: str | os.PathLike, prompt: str = "", bad: BadData | None = None, num_workers: int = 0
) -> list[Example]:
    """Captions or questions of a JSON list, or captions of a folder of pictures or of tar shards.

    Args:
        path (path): what :func:`qformer_fast.data.captions.read_pairs` reads; or a file with a list of {"image",
            "question", "answer", "image_id" (optional)}, the answer a string or the list of people's answers, of which
            the one that most gave is taken, the first of several (LAVIS's annotation files of VQA).
        prompt (str): before each caption; of questions a template with one "{}" where the question goes, cleaned by
            :func:`qformer_fast.data.captions.clean_question`. Default: "", none.
        bad (BadData, Optional): what is done with what ``read_pairs`` calls bad, and with questions and answers that
            are missing or have no word. Default: `None`, they are refused.
        num_workers (int): processes that read tar shards. Default: 0, this one.

    Returns:
        list: one :class:`Example` a caption or question; images as of ``read_pairs``.

    Raises:
        FileNotFoundError: nothing there. ValueError: what is bad and refused, no example at all, a prompt without a
            place for the question, or with one for captions; the message names the entry.
    """
    bad, entries = bad or BadData(), _entries(path)
    if _are_questions(entries):
        if prompt.count(PLACE) != 1:
            raise ValueError(f'prompt must have one "{{}}" where the question goes, got {prompt!r}')
        found = [_question(entry, prompt, bad, where=f"{path}, entry {i}") for i, entry in enumerate(entries)]
        if examples := [example for example in found if example is not None]:
            return examples
        raise ValueError(f"pairs must hold at least one question, found none in {path}")
    pairs = pairs_of(entries, Path(path), bad) if entries else read_pairs(path, bad, num_workers)
    if not pairs:
        raise ValueError(f"pairs must hold at least one image-caption pair, found none in {path}")
    if PLACE in prompt:
        raise ValueError(f'prompt must have no "{{}}", there is no question in {path}; got {prompt!r}')
    return [Example(pair.image, pair.caption, prompt, pair.image_id, pair.member) for pair in pairs]


def read_any(path: str | os.PathLike, bad: BadData | None = None, num_workers: int = 0) -> list[Example]:
    """:func:`read_examples` for who wants the images alone."""
    return read_examples(path, PLACE if _are_questions(_entries(path)) else "", bad, num_workers)


def _entries(path: str | os.PathLike) -> list[Any]:
    """Those of a JSON list; none of anything else."""
    return read_entries(Path(path)) if Path(path).is_file() and not are_tars(path) else []


def _are_questions(entries: list[Any]) -> bool:
    return any(isinstance(entry, dict) and "question" in entry for entry in entries)


def _question(entry: Any, prompt: str, bad: BadData, *, where: str) -> Example | None:
    """`None` where it is bad and skipped."""
    if not isinstance(entry, dict) or not entry.keys() >= QUESTION_FIELDS:
        bad.found("missing_sample", f'pairs: {where} must have "image", "question" and "answer", got {entry!r}')
        return None
    question, image = entry["question"], str(entry["image"])
    cleaned = clean_question(question).strip() if isinstance(question, str) else ""
    if not cleaned:
        bad.found("empty_caption", f"pairs: {where} must have a question with a word in it, got {question!r}")
        return None
    answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
    said = Counter(answer.strip() for answer in answers if isinstance(answer, str) and answer.strip())
    if not said:
        bad.found("empty_caption", f"pairs: {where} must have an answer with a word in it, got {entry['answer']!r}")
        return None
    [(answer, _)] = said.most_common(1)
    return Example(image, answer, prompt.replace(PLACE, cleaned), id_of(entry, image))
