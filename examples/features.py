"""Pictures and captions as features: what ITC compares, and the queries' rows that a language model reads.

python examples/features.py --checkpoint blip2 --encoder ViT-L-14 --encoder-pretrained openai \
    --output features.safetensors a.jpg b.jpg --captions "a red fox" "two cups of tea"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from qformer_fast import Blip2QFormer, ImageEncoder
from qformer_fast.data.tokenizer import load_tokenizer, tokenize


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="picture files")
    parser.add_argument("--captions", nargs="*", default=[])
    parser.add_argument("--checkpoint", required=True, help="a folder of save_pretrained, or a name on the hub")
    parser.add_argument("--encoder", default="ViT-L-14", help="open_clip's name")
    parser.add_argument("--encoder-pretrained", help="an open_clip tag or the path of a checkpoint")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    model = Blip2QFormer.from_pretrained(options.checkpoint).to(options.device).eval()
    encoder = ImageEncoder(options.encoder, pretrained=options.encoder_pretrained).to(options.device)
    pixels = torch.stack([encoder.transform(Image.open(path).convert("RGB")) for path in options.images])
    autocast = torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=options.device != "cpu")
    with torch.no_grad(), autocast:
        tokens = encoder(pixels.to(options.device))
        found = {
            # (images, queries, embed_dim), L2-normalised
            "image_features": model.image_features(tokens),
            # (images, queries, hidden)
            "query_output": model.qformer.encode_queries(model.query_tokens, tokens, norm=model.ln_vision),
        }
        if options.captions:
            text = tokenize(load_tokenizer(), options.captions)
            found["text_features"] = model.text_features(*(x.to(options.device) for x in text))
    found = {name: x.float().cpu().contiguous() for name, x in found.items()}
    save_file(found, options.output)
    for name, x in found.items():
        print(name, tuple(x.shape))
    return found


if __name__ == "__main__":
    main()
