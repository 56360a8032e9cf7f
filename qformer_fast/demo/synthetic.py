"""Made-up pictures for machines without the data packages: coloured shapes, their descriptions and their few words."""

from __future__ import annotations

import itertools
import math
import random

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qformer_fast.data.examples import Example
from qformer_fast.demo.easy_vqa import PROMPT
from qformer_fast.demo.pictures import IMAGE_SIZE, Picture, Questions, split_by_base

COLOURS = {
    "red": "#d62828", "green": "#2a9d3f", "blue": "#2563eb", "yellow": "#facc15", "orange": "#f97316",
    "purple": "#7e22ce", "pink": "#f472b6", "brown": "#78350f", "black": "#111111", "grey": "#9ca3af",
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "bar", "star")
SIZES = {"small": 0.22, "large": 0.42}
PLACES = {"left": 0.3, "right": 0.7}
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
CREDITS = [("Pictures and captions", "made up by the demo", "no licence needed", "")]


def load_pictures() -> list[Picture]:
    """Every colour, shape, size and place: 320 pictures; a colour and a shape together are one base concept."""
    pictures = []
    for colour, shape, size, place in itertools.product(COLOURS, SHAPES, SIZES, PLACES):
        caption = f"a {size} {colour} {shape} on the {place}"
        pictures.append(
            Picture(
                key=caption.replace(" ", "-"),
                caption=caption,
                aliases=(),
                concept=caption,
                base=f"{colour} {shape}",
                vendor="synthetic",
                source=f"{colour},{shape},{size},{place}",
            )
        )
    return pictures


def load_questions() -> Questions:
    """Four questions about each of the pictures, which are split as the demo's drawings are; two are yes or no."""
    pictures, chance = load_pictures(), random.Random(0)

    def ask(picture: Picture) -> list[Example]:
        colour, shape, _, _ = picture.source.split(",")
        asked = [("what colour is the shape?", colour), ("what shape is it?", shape)]
        for word, words in ((colour, [*COLOURS]), (shape, SHAPES)):
            named = chance.choice([word, chance.choice(words)])
            asked.append((f"is it {named} ?", "yes" if named == word else "no"))
        return [Example(picture.key, answer, PROMPT.format(question)) for question, answer in asked]

    train, test = ([example for picture in part for example in ask(picture)] for part in split_by_base(pictures))
    return Questions(pictures, render, train, test, about="questions that the demo made up about its shapes")


def render(picture: Picture) -> Image.Image:
    """The picture at 224 x 224, RGB on white."""
    colour, shape, size, place = picture.source.split(",")
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    draw = ImageDraw.Draw(image)
    x, y, r = PLACES[place] * IMAGE_SIZE, 0.5 * IMAGE_SIZE, SIZES[size] * IMAGE_SIZE / 2
    box, fill = (x - r, y - r, x + r, y + r), COLOURS[colour]
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(3, int(r / 3)))
    elif shape == "bar":
        draw.rectangle((x - r, y - r / 4, x + r, y + r / 4), fill=fill)
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 4, x + r, y + r / 4), fill=fill)
        draw.rectangle((x - r / 4, y - r, x + r / 4, y + r), fill=fill)
    else:
        corners, inner = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (10, 0.45)}[shape]
        angles = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
        radii = [r if i % 2 == 0 or inner == 1.0 else inner * r for i in range(corners)]
        points = [(x + d * math.cos(a), y + d * math.sin(a)) for a, d in zip(angles, radii, strict=True)]
        draw.polygon(points, fill=fill)
    return image


def build_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of these captions: [CLS] caption [SEP], [DEC] as the last word, [PAD] = 0."""
    words = [*SPECIAL, *sorted({word for caption in captions for word in caption.split()}), "[DEC]"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[DEC]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
