"""A small language model for stage 2, pre-trained here on text alone, since no package ships one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

MAX_POSITIONS = 512
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training of the demo's language model.

    Args:
        steps (int): 0 leaves its weights random.
        batch_size, length (int): sequences a step, and their length in tokens.
        lr (float): peak of the learning rate, after a tenth of the steps.
    """

    steps: int = 500
    batch_size: int = 32
    length: int = 128
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        if not 2 <= self.length <= MAX_POSITIONS:
            raise ValueError(f"length must lie in [2, {MAX_POSITIONS}], got {self.length}")


def build_tokenizer(bert: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The words of a BERT tokenizer as a causal model reads them: [CLS] text, without [SEP] and with a word for "\\n".

    OPT's has both too: text begins with a token of its own, and stage 2's ends with a new line.
    """
    tokenizer = Tokenizer.from_str(bert.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    start = (bert.cls_token, bert.cls_token_id)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bert.cls_token,
        sep_token=bert.sep_token,
        eos_token=AddedToken("\n", normalized=False, special=True),
        pad_token=bert.pad_token,
        unk_token=bert.unk_token,
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase, *, hidden_size: int, num_layers: int, word_embeddings: Tensor | None = None
) -> OPTForCausalLM:
    """OPT's architecture with random weights, four times as wide in its feed-forward layers, heads of 64.

    Args:
        tokenizer (PreTrainedTokenizerBase): from :func:`build_tokenizer`.
        hidden_size, num_layers (int): sizes.
        word_embeddings (Tensor, Optional): (words, hidden_size), where the first words' embeddings start; the LM head
            is tied to them. Default: `None`, random.
    """
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        word_embed_proj_dim=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 64),
        ffn_dim=4 * hidden_size,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = OPTForCausalLM(config)
    if word_embeddings is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight[: len(word_embeddings)] = word_embeddings
    return model


def pretrain(
    model: OPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[str]],
    config: PretrainConfig,
    *,
    device: torch.device,
    seed: int,
) -> list[float]:
    """Trains a language model on text in place, to predict each next token.

    What it reads is documents in a random order, cut into sequences of one length; a document is its texts in a random
    order, each [CLS] text "\\n", and a [SEP]. So it learns to say what fits what was said before, which in stage 2 the
    queries do, at any position.

    Args:
        model, tokenizer: from :func:`build_model` and :func:`build_tokenizer`.
        documents (Sequence): of texts about one thing.
        config (PretrainConfig): how long.
        device (torch.device): where; the model stays there. bf16 autocast on a GPU.
        seed (int): of order and dropout.

    Returns:
        list: the loss of each step, nats.

    Raises:
        ValueError: no text.
    """
    if not any(map(len, documents)):
        raise ValueError("documents must hold at least one text, got none")
    torch.manual_seed(seed)
    model.to(device).train()
    batches = _batches(tokenizer, documents, config, random.Random(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY, fused=True)
    warmup = max(1, config.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (config.steps - step) / max(1, config.steps - warmup))
    )
    losses = []
    for _ in tqdm(range(config.steps), desc="language model", unit="step", disable=None):
        ids = next(batches).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    return torch.stack(losses).tolist() if losses else []


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes both where :class:`Blip2OPT` and :meth:`LanguageTokenizer.from_pretrained` find them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _batches(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[str]],
    config: PretrainConfig,
    order: random.Random,
) -> Iterator[Tensor]:
    """(batch_size, length) token ids, without end."""
    texts = list(dict.fromkeys(text for document in documents for text in document))
    rows = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]
    encoded = dict(zip(texts, rows, strict=True))
    stream: list[int] = []
    needed = config.batch_size * config.length
    while True:
        for document in order.sample(documents, len(documents)):
            for text in order.sample(document, len(document)):
                stream += encoded[text]
            stream.append(tokenizer.sep_token_id)
            while len(stream) >= needed:
                yield torch.tensor(stream[:needed]).view(config.batch_size, config.length)
                stream = stream[needed:]
