"""easy-vqa: questions about plain coloured shapes with its authors' split into training and test images."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from qformer_fast.data.examples import Example
from qformer_fast.demo.pictures import IMAGE_SIZE, Picture, Questions

PACKAGE = "easy_vqa"
CREDIT = ("easy-VQA", "Victor Zhou", "MIT", "https://github.com/vzhou842/easy-VQA")
PROMPT = "Question: {} Answer:"


def load_questions() -> Questions:
    """All 5,000 images of 64 x 64 and 48,248 questions of the installed package.

    Its data files are read where they lie: the package itself is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError("easy-vqa is not installed: pip install 'qformer_fast[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    pictures: list[Picture] = []
    examples: dict[str, list[Example]] = {}
    for split in ("train", "test"):
        questions = json.loads((folder / split / "questions.json").read_text(encoding="utf-8"))
        examples[split] = [
            Example(f"easy-vqa/{split}/{number}", answer, PROMPT.format(question))
            for question, answer, number in questions
        ]
        pictures += [
            picture_of(key, folder / split / "images" / f"{key.rpartition('/')[2]}.png")
            for key in dict.fromkeys(example.image for example in examples[split])
        ]
    return Questions(pictures, render, **examples, about="easy-vqa 1.0, its own training and test images")


def picture_of(key: str, path: Path) -> Picture:
    return Picture(key, caption="", aliases=(), concept=key, base=key, vendor=PACKAGE, source=str(path))


def render(picture: Picture) -> Image.Image:
    """The image enlarged to 224 x 224, RGB."""
    with Image.open(picture.source) as image:
        return image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
