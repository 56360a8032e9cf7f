"""Where the demo's pictures, words, features and weights come from: installed packages, or made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import OPTForCausalLM, PreTrainedTokenizerBase

from qformer_fast.config import QFormerConfig
from qformer_fast.data.tokenizer import load_tokenizer, minilm_folder
from qformer_fast.demo import baseline, easy_vqa, emoji_pairs, language, synthetic
from qformer_fast.demo.features import EfficientNetTokens, RandomPatchTokens, TokenEncoder
from qformer_fast.demo.pictures import Picture, Questions
from qformer_fast.integrations.checkpoints import load_checkpoint
from qformer_fast.models.blip2_qformer import Blip2QFormer, init_from_bert


@dataclass(frozen=True)
class Source:
    """Where pictures, questions, words and weights come from; questions only where they were asked for."""

    pictures: list[Picture]
    render: Callable[[Picture], Image.Image]
    questions: Questions | None
    tokenizer: PreTrainedTokenizerBase
    make_encoder: Callable[[torch.device], TokenEncoder]
    embed_captions: Callable[[list[str], PreTrainedTokenizerBase, torch.device], Tensor]
    build_model: Callable[[PreTrainedTokenizerBase, int], Blip2QFormer]
    build_language_model: Callable[[PreTrainedTokenizerBase], OPTForCausalLM]
    credits: list[tuple[str, str, str, str]]
    features: str
    text_features: str
    word_embeddings: str


def package_source(*, questions: bool) -> Source:
    """Twemoji and OpenMoji drawings, easy-vqa's questions, EfficientNet-Lite0 tokens, MiniLM weights and words.

    Raises:
        ModuleNotFoundError: a package is missing; the message says what to install.
    """
    return Source(
        pictures=emoji_pairs.load_pictures(),
        render=emoji_pairs.render,
        questions=easy_vqa.load_questions() if questions else None,
        tokenizer=load_tokenizer(),
        make_encoder=EfficientNetTokens,
        embed_captions=baseline.sentence_embeddings,
        build_model=_model_from_minilm,
        build_language_model=_language_model_from_minilm,
        credits=[*emoji_pairs.CREDITS, easy_vqa.CREDIT] if questions else emoji_pairs.CREDITS,
        features="frozen EfficientNet-Lite0 (ImageNet), 49 tokens of 1280",
        text_features="frozen MiniLM sentence embeddings",
        word_embeddings="its word embeddings MiniLM's to begin with",
    )


def synthetic_source() -> Source:
    """Coloured shapes, a fixed random layer over patches, a model from scratch."""
    pictures, questions = synthetic.load_pictures(), synthetic.load_questions()
    texts = [f"{example.prompt} {example.text}" for example in questions.train]
    return Source(
        pictures=pictures,
        render=synthetic.render,
        questions=questions,
        tokenizer=synthetic.build_tokenizer([*(picture.caption for picture in pictures), *texts]),
        make_encoder=lambda _device: RandomPatchTokens(),
        embed_captions=baseline.bags_of_words,
        build_model=_small_model,
        build_language_model=lambda tokenizer: language.build_model(tokenizer, hidden_size=64, num_layers=2),
        credits=synthetic.CREDITS,
        features="a fixed random layer over colour patches, 49 tokens of 128",
        text_features="bags of words",
        word_embeddings="all its weights random to begin with",
    )


def _model_from_minilm(tokenizer: PreTrainedTokenizerBase, width: int) -> Blip2QFormer:
    """MiniLM's size and weights; cross-attention in all six layers, which is as many as BLIP-2 has.

    The word embeddings stay as they are: three thousand names can't train thirty thousand words.
    """
    config = QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        encoder_hidden_size=width,
        cross_attention_frequency=1,
        num_query_tokens=4,
    )
    model = Blip2QFormer(config, local_gradients=False)
    init_from_bert(model, load_checkpoint(minilm_folder() / "model.safetensors"))
    model.qformer.embeddings.word_embeddings.requires_grad_(False)
    return model


def _language_model_from_minilm(tokenizer: PreTrainedTokenizerBase) -> OPTForCausalLM:
    weights = load_checkpoint(minilm_folder() / "model.safetensors")
    words = weights["embeddings.word_embeddings.weight"]
    return language.build_model(tokenizer, hidden_size=words.shape[1], num_layers=4, word_embeddings=words)


def _small_model(tokenizer: PreTrainedTokenizerBase, width: int) -> Blip2QFormer:
    config = QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        encoder_hidden_size=width,
        cross_attention_frequency=1,
        num_query_tokens=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    special = dict(dec_token_id=tokenizer.bos_token_id, sep_token_id=tokenizer.sep_token_id)
    return Blip2QFormer(config, embed_dim=64, local_gradients=False, **special)
