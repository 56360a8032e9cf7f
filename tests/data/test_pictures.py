"""Pictures that can be read, and those that can't."""

import io
import zlib

import pytest
from PIL import Image, PngImagePlugin

from qformer_fast.data.pictures import PictureBatches, read_pixels


def png(*, text=b""):
    """A red picture whose compressed text chunk, if any, unpacks to this."""
    about = PngImagePlugin.PngInfo()
    if text:
        about.add(b"zTXt", b"Comment\0\0" + zlib.compress(text))
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(file, "png", pnginfo=about)
    return file.getvalue()


def reads(picture):
    raise ValueError(f"got {picture.mode}")


@pytest.mark.parametrize("content", [b"", b"no picture", png()[:-20], png(text=bytes(2 << 20))])
def test_a_picture_that_cant_be_read_is_named(tmp_path, content):
    """Pillow has errors of several kinds, for a chunk of text that is too long a ValueError."""
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png is no readable picture: "):
        read_pixels(tmp_path / "a.png", reads)


def test_an_error_of_the_transform_is_not_the_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(ValueError, match="^got RGB"):
        PictureBatches(tmp_path, reads)[["a.png"]]
