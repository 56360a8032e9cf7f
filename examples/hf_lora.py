"""LoRA on the Q-Former of Hugging Face's BLIP-2 with its forward swapped; the rest of the model is frozen.

python examples/hf_lora.py --model Salesforce/blip2-opt-2.7b --pairs pairs.json --output adapter

``pairs.json`` is a list of {"image": "a.jpg", "caption": "..."}, images relative to it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import peft
import torch
from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from qformer_fast import replace_qformer


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the adapter")
    parser.add_argument("--model", default="Salesforce/blip2-opt-2.7b", help="a folder or a name on the hub")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    processor = AutoProcessor.from_pretrained(options.model)
    model = Blip2ForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).to(options.device)
    # dropout of adapters is no product with one weight: with lora_dropout the Q-Former would run as before
    lora = peft.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=r".*qformer.*\.(query|key|value)",
        lora_dropout=0.0,
    )
    model = peft.get_peft_model(model, lora).train()
    model.print_trainable_parameters()
    print(replace_qformer(model))  # the one line; before or after peft's

    pairs = json.loads(options.pairs.read_text())
    order = torch.Generator().manual_seed(0)
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr)
    autocast = torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=options.device != "cpu")
    losses = []
    for step in range(options.steps):
        chosen = [pairs[i] for i in torch.randint(len(pairs), (options.batch_size,), generator=order)]
        pictures = [Image.open(options.pairs.parent / pair["image"]).convert("RGB") for pair in chosen]
        captions = [pair["caption"] for pair in chosen]
        inputs = processor(images=pictures, text=captions, padding=True, return_tensors="pt").to(options.device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels = labels.masked_fill(labels == model.config.image_token_index, -100)
        with autocast:
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            print(f"step {step} loss {losses[-1]:.3f}")
    model.save_pretrained(options.output)
    return losses


if __name__ == "__main__":
    main()
