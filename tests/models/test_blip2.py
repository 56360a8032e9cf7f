"""The frozen image encoder; open_clip's own blocks, random weights."""

import pytest
import torch
from PIL import Image

from qformer_fast import ImageEncoder


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return ImageEncoder("ViT-B-32")


def test_gives_the_tokens_before_the_last_block(encoder):
    pixels = torch.randn(2, 3, 224, 224)
    visual = encoder.visual
    with torch.no_grad():
        hidden = visual._embeds(pixels)
        for block in visual.transformer.resblocks[:-1]:
            hidden = block(hidden)
    tokens = encoder(pixels)
    assert tokens.shape == (2, 50, 768) and encoder.width == 768
    torch.testing.assert_close(tokens, hidden)


def test_is_frozen_and_stays_in_eval_mode(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 224, 224)).requires_grad


def test_tokens_take_part_in_autograd(encoder):
    """As what a layer behind the encoder keeps for its backward."""
    tokens = encoder(torch.randn(1, 3, 224, 224))
    weight = torch.ones(768, requires_grad=True)
    (tokens * weight).sum().backward()
    torch.testing.assert_close(weight.grad, tokens.sum((0, 1)))


def test_half_precision_parameters_take_pixels_of_any_dtype():
    torch.manual_seed(0)
    encoder = ImageEncoder("ViT-B-32")
    pixels = torch.randn(2, 3, 224, 224)
    exact = encoder(pixels)
    tokens = encoder.to(torch.bfloat16)(pixels)
    assert tokens.dtype == torch.bfloat16
    assert float((tokens - exact).norm() / exact.norm()) < 0.03


def test_transform_makes_what_forward_takes(encoder):
    pixels = encoder.transform(Image.new("RGB", (300, 200), "red"))
    assert encoder(pixels[None]).shape == (1, 50, 768)
    with pytest.raises(ValueError, match=r"pixels must be \(batch, 3, 224, 224\), got \(1, 3, 200, 224\)"):
        encoder(torch.zeros(1, 3, 200, 224))


def test_the_originals_smaller_encoder_gives_257_tokens():
    encoder = ImageEncoder("ViT-L-14")
    assert encoder(torch.randn(1, 3, 224, 224)).shape == (1, 257, 1024)


def test_unknown_names_and_towers_without_tokens():
    with pytest.raises(ValueError, match="name must be one of open_clip's models"):
        ImageEncoder("ViT-Z-99")
    with pytest.raises(ValueError, match="whose image tower gives tokens"):
        ImageEncoder("RN50")
