"""Captions by Hugging Face's BLIP-2 with its Q-Former swapped.

python examples/hf_captioning.py --model Salesforce/blip2-opt-2.7b photo.jpg another.jpg
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from qformer_fast import replace_qformer


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="picture files")
    parser.add_argument("--model", default="Salesforce/blip2-opt-2.7b", help="a folder or a name on the hub")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-beams", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=30)
    options = parser.parse_args(arguments)

    dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    processor = AutoProcessor.from_pretrained(options.model)
    model = Blip2ForConditionalGeneration.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    print(replace_qformer(model))  # the one line

    pictures = [Image.open(path).convert("RGB") for path in options.images]
    inputs = processor(images=pictures, text=[""] * len(pictures), padding=True, return_tensors="pt")
    inputs = inputs.to(options.device, dtype)
    ids = model.generate(**inputs, num_beams=options.num_beams, max_new_tokens=options.max_new_tokens)
    captions = [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]
    for path, caption in zip(options.images, captions, strict=True):
        print(f"{path}\t{caption}")
    return captions


if __name__ == "__main__":
    main()
