"""What a language model is trained to say of images: captions, or answers to questions."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer_fast.data.captions import clean_question, pairs_of, read_entries, read_pairs

PLACE = "{}"

QUESTION_FIELDS = {"image", "question", "answer"}


@dataclass(frozen=True)
class Example:
    """One text about one image.

    Args:
        image (str): the picture's key in a feature cache, and its path in a folder of images.
        text (str): what the language model is to say.
        prompt (str): what it is told before. Default: "", nothing.
        image_id (str, Optional): examples with the same one show the same image. Default: `None`, that of ``image``.
    """

    image: str
    text: str
    prompt: str = ""
    image_id: str | None = None


def read_examples(path: str | os.PathLike, prompt: str = "") -> list[Example]:
    """Captions or questions of a JSON list, or captions of a folder of pictures.

    Args:
        path (path): what :func:`qformer_fast.data.captions.read_pairs` reads; or a file with a list of {"image",
            "question", "answer", "image_id" (optional)}, the answer a string or the list of people's answers, of which
            the one that most gave is taken, the first of several (LAVIS's annotation files of VQA).
        prompt (str): before each caption; of questions a template with one "{}" where the question goes, cleaned by
            :func:`qformer_fast.data.captions.clean_question`. Default: "", none.

    Returns:
        list: one :class:`Example` a caption or question; images as of ``read_pairs``.

    Raises:
        FileNotFoundError: nothing there. ValueError: what ``read_pairs`` refuses, a missing field, a question without a
            word, no answer, a prompt without a place for the question, or with one for captions; the message names
            the entry.
    """
    path = Path(path)
    entries = read_entries(path) if path.is_file() else []
    if _are_questions(entries):
        if prompt.count(PLACE) != 1:
            raise ValueError(f'prompt must have one "{{}}" where the question goes, got {prompt!r}')
        return [_question(entry, prompt, where=f"{path}, entry {i}") for i, entry in enumerate(entries)]
    pairs = pairs_of(entries, path) if entries else read_pairs(path)
    if PLACE in prompt:
        raise ValueError(f'prompt must have no "{{}}", there is no question in {path}; got {prompt!r}')
    return [Example(pair.image, pair.caption, prompt, pair.image_id) for pair in pairs]


def read_images(path: str | os.PathLike) -> list[str]:
    """The images of :func:`read_examples`, each once, in the order in which they are first named."""
    path = Path(path)
    template = PLACE if path.is_file() and _are_questions(read_entries(path)) else ""
    return list(dict.fromkeys(example.image for example in read_examples(path, template)))


def _are_questions(entries: list[Any]) -> bool:
    return any(isinstance(entry, dict) and "question" in entry for entry in entries)


def _question(entry: Any, prompt: str, *, where: str) -> Example:
    if not isinstance(entry, dict) or not entry.keys() >= QUESTION_FIELDS:
        raise ValueError(f'pairs: {where} must have "image", "question" and "answer", got {entry!r}')
    question, image = entry["question"], str(entry["image"])
    cleaned = clean_question(question).strip() if isinstance(question, str) else ""
    if not cleaned:
        raise ValueError(f"pairs: {where} must have a question with a word in it, got {question!r}")
    answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
    said = Counter(answer.strip() for answer in answers if isinstance(answer, str) and answer.strip())
    if not said:
        raise ValueError(f"pairs: {where} must have an answer with a word in it, got {entry['answer']!r}")
    [(answer, _)] = said.most_common(1)
    return Example(image, answer, prompt.replace(PLACE, cleaned), str(entry.get("image_id", image)))
