"""Texts about many images, batch by batch, in a file from which an interrupted run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qformer_fast.data.language import LanguageTokenizer
from qformer_fast.data.tokenizer import tokenize
from qformer_fast.evaluation._json import Id
from qformer_fast.evaluation.journal import Journal
from qformer_fast.models.blip2_opt import Blip2OPT
from qformer_fast.models.blip2_qformer import Blip2QFormer

# of the names of images their tokens, (images, tokens, encoder_hidden)
ReadTokens = Callable[[Sequence[str]], Tensor]
# of image tokens (batch, tokens, encoder_hidden) and a prompt each the texts
Generate = Callable[[Tensor, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Request:
    """A text to generate: its id, the image's name and the prompt."""

    id: Id
    image: str
    prompt: str = ""


def generate_after_prompts(
    model: Blip2OPT,
    language: LanguageTokenizer,
    image_embeds: Tensor,
    prompts: Sequence[str],
    *,
    qformer_tokenizer: PreTrainedTokenizerBase | None = None,
    qformer_max_length: int = 128,
    **options,
) -> list[str]:
    """Texts of a frozen language model after images and prompts.

    Args:
        model (Blip2OPT): of stage 2.
        language (LanguageTokenizer): of its language model.
        image_embeds (Tensor): (batch, tokens, encoder_hidden), on any device, of any floating dtype.
        prompts (Sequence): (batch,) strings.
        qformer_tokenizer (PreTrainedTokenizerBase, Optional): of :func:`qformer_fast.data.tokenizer.load_tokenizer`,
            which gives the prompts to the Q-Former too, as InstructBLIP's. Default: `None`, it sees images alone.
        qformer_max_length (int): of these prompts in BERT's tokens; longer ones lose their beginning. Default: 128, as
            in InstructBLIP.
        options: of :meth:`Blip2OPT.generate`.

    Raises:
        ValueError: another number of prompts; one without a word for the Q-Former.
    """
    input_ids, attention_mask = language.prompts(prompts)
    text = {}
    if qformer_tokenizer is not None:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("prompts must each have a word for a Q-Former that reads them, got an empty one")
        ids, mask = tokenize(qformer_tokenizer, prompts, max_length=qformer_max_length, truncation_side="left")
        text = {"qformer_input_ids": ids, "qformer_attention_mask": mask}
    ids = model.generate(
        _on_device(image_embeds, model.query_tokens),
        input_ids,
        attention_mask,
        **text,
        eos_token_id=language.end_token_id,
        pad_token_id=language.pad_token_id,
        **options,
    )
    return language.decode(ids)


def generate_captions(
    model: Blip2QFormer, tokenizer: PreTrainedTokenizerBase, image_embeds: Tensor, **options
) -> list[str]:
    """Captions of stage 1's own text branch.

    Args:
        model (Blip2QFormer): of stage 1.
        tokenizer: from :func:`qformer_fast.data.tokenizer.load_tokenizer`.
        image_embeds (Tensor): (batch, tokens, encoder_hidden), on any device, of any floating dtype.
        options: of :meth:`Blip2QFormer.generate`.
    """
    ids = model.generate(_on_device(image_embeds, model.query_tokens), **options)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def generate_all(
    generate: Generate,
    read_tokens: ReadTokens,
    requests: Sequence[Request],
    *,
    batch_size: int,
    path: str | os.PathLike | None = None,
    identity: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[Id, str]:
    """The text of each request, in their order; no more images than a batch's are held.

    With ``path`` each batch is kept there as soon as it is done. Called again it goes on after the last whole batch, so
    that the texts are those of a run that was not interrupted.

    Args:
        generate (callable): say :func:`generate_after_prompts` with its first arguments bound.
        read_tokens (callable): gives tokens by the images' names; each is read once a batch.
        requests (Sequence): at least one, ids all different.
        batch_size (int): texts at once.
        path (path, Optional): a :class:`Journal`'s file with {"id", "text"} of each text. Default: `None`, kept in
            memory only.
        identity (Mapping, Optional): JSON values that decide about the texts; a file of another identity is refused.
        seed (int, Optional): seeds torch's generators for each batch, together with its place, so that sampled texts
            are the same after an interruption. Default: `None`, the generators go on as they are.

    Raises:
        ValueError: no request, an id twice, a file of another run.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not requests or len({request.id for request in requests}) < len(requests):
        raise ValueError("requests must have different ids, at least one")
    journal = None if path is None else Journal(path, identity or {}, ("id", "text"))
    texts = [] if journal is None else _whole_batches(journal, requests, batch_size)
    with tqdm(total=len(requests), initial=len(texts), unit="text", disable=None) as progress:
        for first in range(len(texts), len(requests), batch_size):
            batch = requests[first : first + batch_size]
            names = list(dict.fromkeys(request.image for request in batch))
            rows = [names.index(request.image) for request in batch]
            tokens = read_tokens(names)
            if seed is not None:
                torch.manual_seed(seed + first)
            new = generate(tokens[rows], [request.prompt for request in batch])
            texts += new
            if journal is not None:
                journal.append({"id": request.id, "text": text} for request, text in zip(batch, new, strict=True))
            progress.update(len(batch))
    return {request.id: text for request, text in zip(requests, texts, strict=True)}


def _whole_batches(journal: Journal, requests: Sequence[Request], batch_size: int) -> list[str]:
    """The journal's texts of whole batches, to which it is cut."""
    found = journal.entries
    if [entry["id"] for entry in found] != [request.id for request in requests[: len(found)]]:
        raise ValueError(
            f"output: {journal.path} must have the ids of the requests; remove it or choose another folder"
        )
    journal.cut(len(found) if len(found) == len(requests) else len(found) // batch_size * batch_size)
    return [entry["text"] for entry in journal.entries]


def _on_device(image_embeds: Tensor, like: Tensor) -> Tensor:
    """Tokens as the model takes them; the device casts, since what is stored may be half as wide."""
    if like.is_cuda and not image_embeds.is_cuda:
        image_embeds = image_embeds.pin_memory()
    return image_embeds.to(like.device, non_blocking=True).to(like.dtype)
