"""The lines that the Q-Former has to beat: what simple means make of the same features, or without any image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from qformer_fast.data.examples import Example
from qformer_fast.data.tokenizer import minilm_folder, tokenize
from qformer_fast.integrations.checkpoints import load_checkpoint

EMBED_DIM = 256
EPOCHS = 60
BATCH_SIZE = 256
LEARNING_RATE = 1e-3


@torch.no_grad()
def sentence_embeddings(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tensor:
    """MiniLM's sentence embeddings, the mean of its last hidden states: (captions, 384), L2-normalised."""
    weights = load_checkpoint(minilm_folder() / "model.safetensors")
    weights.pop("embeddings.position_ids", None)
    bert = BertModel(BertConfig.from_pretrained(minilm_folder()))
    bert.load_state_dict(weights)
    bert.eval().to(device)
    parts = []
    for start in range(0, len(captions), 256):
        ids, mask = (x.to(device) for x in tokenize(tokenizer, captions[start : start + 256]))
        hidden = bert(ids, attention_mask=mask).last_hidden_state * mask[..., None]
        parts.append(hidden.sum(1) / mask.sum(1, keepdim=True))
    return F.normalize(torch.cat(parts), dim=-1)


def bags_of_words(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tensor:
    """Word counts, (captions, vocabulary), L2-normalised: where no sentence encoder is at hand."""
    ids, mask = tokenize(tokenizer, captions)
    counts = torch.zeros(len(captions), len(tokenizer)).scatter_add_(1, ids, mask.float())
    return F.normalize(counts, dim=-1).to(device)


def train_linear_heads(images: Tensor, texts: Tensor, concepts: Tensor, *, seed: int) -> tuple[nn.Module, nn.Module]:
    """Two linear layers trained with InfoNCE, a trainable temperature and soft targets for pairs of one concept.

    Args:
        images (Tensor): (pairs, width), pooled image tokens.
        texts (Tensor): (pairs, text width).
        concepts (Tensor): (pairs,) int64; equal ones are no negatives of each other.
        seed (int): of weights and order.

    Returns:
        tuple: image head (images standardised first) and text head.
    """
    torch.manual_seed(seed)
    device = images.device
    spread = images.std(0) + 1e-6
    image_head = nn.Sequential(_Standardise(images.mean(0), spread), nn.Linear(images.shape[1], EMBED_DIM)).to(device)
    text_head = nn.Linear(texts.shape[1], EMBED_DIM).to(device)
    temp = nn.Parameter(torch.tensor(0.07, device=device))
    batch = min(BATCH_SIZE, len(images))
    steps = EPOCHS * (len(images) // batch)
    optimizer = torch.optim.AdamW([*image_head.parameters(), *text_head.parameters(), temp], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), device=device).split(batch)[: len(images) // batch]:
            similarity = cosine(image_head(images[chosen]), text_head(texts[chosen])) / temp
            same = (concepts[chosen][:, None] == concepts[chosen]).float()
            targets = same / same.sum(1, keepdim=True)
            loss = (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.T, targets)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return image_head, text_head


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(rows of a, rows of b)"""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def nearest(queries: Tensor, tokens: Tensor) -> Tensor:
    """Which picture's tokens, averaged, have the largest cosine with each query's: (queries,) int64.

    Args:
        queries, tokens (Tensor): (pictures, tokens, width), floating.
    """
    return cosine(queries.mean(1, dtype=torch.float32), tokens.mean(1, dtype=torch.float32)).argmax(1)


def majority_answer(examples: Sequence[Example]) -> str:
    """The most frequent text, the first of several."""
    [(answer, _)] = Counter(example.text for example in examples).most_common(1)
    return answer


def majority_answers(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """Of each test example the most frequent training answer to the same question, whatever the image shows; of a
    question that training had none of, the most frequent answer.
    """
    asked = defaultdict(list)
    for example in train:
        asked[example.prompt].append(example)
    answers = {prompt: majority_answer(examples) for prompt, examples in asked.items()}
    overall = majority_answer(train)
    return [answers.get(example.prompt, overall) for example in test]


class _Standardise(nn.Module):
    def __init__(self, mean: Tensor, spread: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.spread
