"""The demo's pictures and the split that holds concepts out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from qformer_fast.demo import emoji_pairs, synthetic
from qformer_fast.demo.features import cached_tokens
from qformer_fast.demo.pictures import Picture, check_disjoint, mirrored, split_by_base

needs_packages = pytest.mark.skipif(
    bool(emoji_pairs.missing_packages()), reason=f"not installed: {emoji_pairs.missing_packages()}"
)


@pytest.fixture(scope="module")
def emoji_pictures():
    return emoji_pairs.load_pictures()


@pytest.mark.parametrize(
    "names, base",
    [
        (("1F44D", "1f44d-1f3fb", "1f44d-1f3ff"), "1f44d"),
        (("2764-fe0f", "2764"), "2764"),
        (("1f3cc-fe0f-200d-2640-fe0f", "1f3cc-1f3fd-200d-2642-fe0f", "1f3cc"), "1f3cc"),
        (("1f468-200d-1f3a4", "1f469-1f3fe-200d-1f3a4", "1f9d1-200d-1f3a4"), "1f9d1-1f3a4"),
        (("1f3c3-200d-27a1-fe0f", "1f3c3-200d-2640-fe0f-200d-27a1-fe0f"), "1f3c3"),
    ],
)
def test_variants_share_a_base_concept(names, base) -> None:
    assert {emoji_pairs.base_concept(emoji_pairs.code_points(name)) for name in names} == {base}


def test_code_points_do_not_depend_on_how_a_vendor_writes_them() -> None:
    assert emoji_pairs.code_points("0023-FE0F-20E3") == emoji_pairs.code_points("23-20e3") == (0x23, 0x20E3)


@needs_packages
def test_emoji_pictures(emoji_pictures) -> None:
    assert len(emoji_pictures) > 3500
    assert len({picture.key for picture in emoji_pictures}) == len(emoji_pictures)
    assert not any("skin tone" in picture.caption for picture in emoji_pictures)
    vendors = {}
    for picture in emoji_pictures:
        vendors.setdefault(picture.concept, set()).add(picture.vendor)
    assert set(map(frozenset, vendors.values())) == {frozenset({"openmoji", "twemoji"})}
    names = {picture.concept: picture.caption for picture in emoji_pictures}
    assert len(set(names.values())) == len(names)
    assert names["1f602"] == "face with tears of joy"
    tiger = next(picture for picture in emoji_pictures if picture.key == "twemoji/1f42f")
    assert tiger.caption == "tiger face"
    assert tiger.aliases == ("tiger",)


@needs_packages
def test_emoji_split_holds_out_a_fifth_of_the_concepts(emoji_pictures) -> None:
    train, test = split_by_base(emoji_pictures)
    bases = {picture.base for picture in train}, {picture.base for picture in test}
    assert not bases[0] & bases[1]
    assert 0.17 < len(bases[1]) / (len(bases[0]) + len(bases[1])) < 0.23
    assert len(train) + len(test) == len(emoji_pictures)


@needs_packages
@pytest.mark.parametrize("vendor", ["openmoji", "twemoji"])
def test_emoji_are_drawn_on_white(emoji_pictures, vendor) -> None:
    heart = next(p for p in emoji_pictures if p.key == f"{vendor}/2764")
    pixels = np.asarray(emoji_pairs.render(heart)).astype(int)
    assert pixels.shape == (224, 224, 3)
    assert (pixels[0, 0] == 255).all() and (pixels[-1, -1] == 255).all()
    red, green, blue = pixels[112, 112]
    assert red > 180 and red > green + 80 and red > blue + 80


def test_missing_packages_are_named(monkeypatch) -> None:
    monkeypatch.setattr(emoji_pairs, "find_spec", lambda module: None if module == "resvg_py" else object())
    with pytest.raises(ModuleNotFoundError, match=r"\['resvg-py'\] are not installed.*--synthetic"):
        emoji_pairs.load_pictures()


def test_split_depends_on_names_alone() -> None:
    pictures = synthetic.load_pictures()
    train, test = split_by_base(pictures)
    again = split_by_base(pictures[::-3])
    assert {p.key for p in again[1]} <= {p.key for p in test}
    assert {p.key for p in again[0]} <= {p.key for p in train}


def test_a_leaking_split_is_refused() -> None:
    first, *rest = synthetic.load_pictures()
    twin = dataclasses.replace(first, key="twin", caption="another name")
    with pytest.raises(ValueError, match="one base on both sides"):
        check_disjoint([first], [twin])
    with pytest.raises(ValueError, match="one caption on both sides"):
        check_disjoint([first], [dataclasses.replace(rest[-1], caption=first.caption)])
    with pytest.raises(ValueError, match="held_out = 0.2 leaves"):
        split_by_base([first])


def test_synthetic_pictures_all_look_different() -> None:
    pictures = synthetic.load_pictures()
    assert len({synthetic.render(picture).tobytes() for picture in pictures}) == len(pictures)


def test_synthetic_tokenizer() -> None:
    tokenizer = synthetic.build_tokenizer(["a small red circle on the left"])
    ids = tokenizer("a red circle")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "red", "circle", "[SEP]"]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.bos_token_id == len(tokenizer) - 1


def test_mirrored_leaves_out_names_that_speak_of_a_side():
    picture = Picture("a", "red cat", ("tomcat",), "c", "b", "vendor", "source")
    pictures = [
        picture,
        dataclasses.replace(picture, caption="left arrow"),
        dataclasses.replace(picture, aliases=("arrow right",)),
    ]
    assert mirrored(pictures) == [dataclasses.replace(picture, key="a/mirrored", mirrored=True)]


def test_a_mirrored_picture_is_extracted_in_mirror_image(tmp_path):
    """An encoder that gives the colour of the top left corner."""
    drawing = Image.new("RGB", (224, 224), "black")
    drawing.paste("white", (112, 0, 224, 224))

    class Corner:
        width, metadata = 1, {"encoder": "corner"}

        def __call__(self, pixels):
            return pixels[:, :1, :1, 0].repeat(1, 49, 1)

    picture = Picture("a", "half", (), "c", "b", "vendor", "source")
    both = [picture, *mirrored([picture])]
    cache, _ = cached_tokens(both, lambda _: drawing, Corner(), tmp_path)
    assert cache.rows(["a", "a/mirrored"])[:, 0, 0].tolist() == [-1.0, 1.0]
