"""The best captions of each picture and the best pictures of each caption: ITC finds candidates, ITM orders them.

python examples/retrieval.py --checkpoint blip2 --encoder ViT-L-14 --encoder-pretrained openai \
    a.jpg b.jpg --captions "a red fox" "two cups of tea"
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from torch import Tensor

from qformer_fast import Blip2QFormer, ImageEncoder
from qformer_fast.data.tokenizer import load_tokenizer, tokenize


def main(arguments: list[str] | None = None) -> tuple[Tensor, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="picture files")
    parser.add_argument("--captions", nargs="+", required=True)
    parser.add_argument("--checkpoint", required=True, help="a folder of save_pretrained, or a name on the hub")
    parser.add_argument("--encoder", default="ViT-L-14", help="open_clip's name")
    parser.add_argument("--encoder-pretrained", help="an open_clip tag or the path of a checkpoint")
    parser.add_argument("--k", type=int, default=16, help="candidates")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    model = Blip2QFormer.from_pretrained(options.checkpoint).to(options.device).eval()
    encoder = ImageEncoder(options.encoder, pretrained=options.encoder_pretrained).to(options.device)
    pixels = torch.stack([encoder.transform(Image.open(path).convert("RGB")) for path in options.images])
    autocast = torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=options.device != "cpu")
    with autocast:
        tokens = encoder(pixels.to(options.device))
        ranked = model.rank(tokens, *tokenize(load_tokenizer(), options.captions), k=options.k)
    best = []
    for names, others, scores in (
        (options.images, options.captions, ranked.image_to_text),
        (options.captions, options.images, ranked.text_to_image),
    ):
        order = scores.argsort(dim=1, descending=True, stable=True).cpu()
        for name, row in zip(names, order, strict=True):
            print(f"{name}\t{others[row[0]]}")
        best.append(order)
    return best[0], best[1]


if __name__ == "__main__":
    main()
