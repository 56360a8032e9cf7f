"""Where the demo's pictures, words, features and weights come from: installed packages, or made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qformer_fast.config import QFormerConfig
from qformer_fast.data.tokenizer import load_tokenizer, minilm_folder
from qformer_fast.demo import baseline, emoji_pairs, synthetic
from qformer_fast.demo.features import EfficientNetTokens, RandomPatchTokens, TokenEncoder
from qformer_fast.demo.pictures import Picture
from qformer_fast.integrations.checkpoints import load_checkpoint
from qformer_fast.models.blip2_qformer import Blip2QFormer, init_from_bert


@dataclass(frozen=True)
class Source:
    """Where pictures, words and weights come from."""

    pictures: list[Picture]
    render: Callable[[Picture], Image.Image]
    tokenizer: PreTrainedTokenizerBase
    make_encoder: Callable[[torch.device], TokenEncoder]
    embed_captions: Callable[[list[str], PreTrainedTokenizerBase, torch.device], Tensor]
    build_model: Callable[[PreTrainedTokenizerBase, int], Blip2QFormer]
    credits: list[tuple[str, str, str, str]]
    features: str
    text_features: str


def emoji_source() -> Source:
    """Twemoji and OpenMoji drawings, EfficientNet-Lite0 tokens, MiniLM weights and words."""
    return Source(
        pictures=emoji_pairs.load_pictures(),
        render=emoji_pairs.render,
        tokenizer=load_tokenizer(),
        make_encoder=EfficientNetTokens,
        embed_captions=baseline.sentence_embeddings,
        build_model=_model_from_minilm,
        credits=emoji_pairs.CREDITS,
        features="frozen EfficientNet-Lite0 (ImageNet), 49 tokens of 1280",
        text_features="frozen MiniLM sentence embeddings",
    )


def synthetic_source() -> Source:
    """Coloured shapes, a fixed random layer over patches, a model from scratch."""
    pictures = synthetic.load_pictures()
    return Source(
        pictures=pictures,
        render=synthetic.render,
        tokenizer=synthetic.build_tokenizer([picture.caption for picture in pictures]),
        make_encoder=lambda _device: RandomPatchTokens(),
        embed_captions=baseline.bags_of_words,
        build_model=_small_model,
        credits=synthetic.CREDITS,
        features="a fixed random layer over colour patches, 49 tokens of 128",
        text_features="bags of words",
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
