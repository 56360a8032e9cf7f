"""Contrast and captioning of BLIP-2's stage 1 written as LAVIS writes it, on the drop-in for its Q-Former class.

python examples/lavis_stage1.py --bert bert-base-uncased --features features.safetensors --captions captions.json

The first import is the line that changes; :func:`init_qformer` and the calls are those of LAVIS's blip2.py and
blip2_qformer.py. ``features.safetensors`` holds ``image_embeds`` (images, tokens, width) of a frozen encoder,
``captions.json`` a list of as many strings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, PreTrainedTokenizerBase

from qformer_fast.integrations.lavis import BertConfig, BertLMHeadModel


def init_qformer(bert: str, num_query_token: int, vision_width: int) -> tuple[BertLMHeadModel, nn.Parameter]:
    """BERT's weights, and queries drawn from a normal distribution."""
    config = BertConfig.from_pretrained(bert)
    config.encoder_width = vision_width
    config.add_cross_attention = True
    config.cross_attention_freq = 2
    config.query_length = num_query_token
    qformer = BertLMHeadModel.from_pretrained(bert, config=config)
    queries = torch.empty(1, num_query_token, config.hidden_size).normal_(std=config.initializer_range)
    return qformer, nn.Parameter(queries)


class Stage1(nn.Module):
    def __init__(self, bert: str, num_query_token: int, vision_width: int, embed_dim: int = 256):
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = BertTokenizer.from_pretrained(bert)
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self.ln_vision = nn.LayerNorm(vision_width)
        self.Qformer, self.query_tokens = init_qformer(bert, num_query_token, vision_width)
        self.Qformer.resize_token_embeddings(len(self.tokenizer))
        state_dict = self.Qformer.state_dict()
        for name, parameter in self.Qformer.named_parameters():
            if "_query" in name:
                parameter.data.copy_(state_dict[name.replace("_query", "")])
        hidden = self.Qformer.config.hidden_size
        self.vision_proj, self.text_proj = nn.Linear(hidden, embed_dim), nn.Linear(hidden, embed_dim)
        self.temp = nn.Parameter(0.07 * torch.ones([]))

    def forward(self, image_embeds: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Losses of ITC and of ITG."""
        image_embeds = self.ln_vision(image_embeds)
        query_tokens = self.query_tokens.expand(len(image_embeds), -1, -1)
        query_output = self.Qformer.bert(
            query_embeds=query_tokens, encoder_hidden_states=image_embeds, use_cache=True, return_dict=True
        )
        text = self.tokenizer(captions, padding=True, truncation=True, max_length=32, return_tensors="pt")
        text = text.to(image_embeds.device)
        text_output = self.Qformer.bert(text.input_ids, attention_mask=text.attention_mask, return_dict=True)

        image_feats = F.normalize(self.vision_proj(query_output.last_hidden_state), dim=-1)
        text_feat = F.normalize(self.text_proj(text_output.last_hidden_state[:, 0]), dim=-1)
        sims = torch.einsum("iqd,td->itq", image_feats, text_feat).amax(-1) / self.temp
        targets = torch.arange(len(sims), device=sims.device)
        loss_itc = sum(F.cross_entropy(x, targets, label_smoothing=0.1) for x in (sims, sims.T)) / 2

        decoder_input_ids = text.input_ids.clone()
        decoder_input_ids[:, 0] = self.tokenizer.bos_token_id
        labels = decoder_input_ids.masked_fill(text.attention_mask == 0, -100)
        query_atts = torch.ones(query_tokens.shape[:2], dtype=torch.long, device=image_embeds.device)
        lm_output = self.Qformer(
            decoder_input_ids,
            attention_mask=torch.cat([query_atts, text.attention_mask], dim=1),
            past_key_values=query_output.past_key_values,
            return_dict=True,
            labels=labels,
        )
        return loss_itc, lm_output.loss


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--bert", default="bert-base-uncased", help="a folder or a name on the hub")
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    images, captions = load_file(options.features)["image_embeds"], json.loads(options.captions.read_text())
    if len(images) != len(captions):
        parser.error(f"--captions must hold {len(images)} strings as --features holds images, got {len(captions)}")
    torch.manual_seed(0)
    model = Stage1(options.bert, options.queries, images.shape[-1]).to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    autocast = torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=options.device != "cpu")
    losses = []
    for step in range(options.steps):
        chosen = torch.randperm(len(images))[: options.batch_size]
        with autocast:
            loss_itc, loss_itg = model(images[chosen].to(options.device), [captions[i] for i in chosen])
        (loss_itc + loss_itg).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float((loss_itc + loss_itg).detach()))
        if step % 50 == 0:
            print(f"step {step} itc {float(loss_itc.detach()):.3f} itg {float(loss_itg.detach()):.3f}")
    return losses


if __name__ == "__main__":
    main()
