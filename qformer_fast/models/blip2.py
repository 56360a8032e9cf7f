"""The frozen image encoder in front of the Q-Former."""

from __future__ import annotations

import functools
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """A frozen open_clip vision transformer that gives the tokens of its last block but one.

    BLIP-2 takes CLIP ViT-L/14 without its last block and without its final LayerNorm (LAVIS clip_vit.py:200-257), which
    open_clip calls the penultimate intermediate; ``ln_vision`` of the model normalises them. Parameters never train and
    the module stays in eval mode.

    Args:
        name (str): an open_clip model with a transformer image tower, say "ViT-L-14" or "EVA02-L-14".
        pretrained (str, Optional): an open_clip tag or the path of a checkpoint. Default: `None`, random weights.
        image_size (int, Optional): rows and columns of the pixels, position embeddings interpolated to it, as BLIP-2 is
            fine-tuned on larger pictures. Default: `None`, the model's own.

    Raises:
        ValueError: a name that open_clip does not know, or an image tower without transformer tokens.
    """

    def __init__(self, name: str, *, pretrained: str | None = None, image_size: int | None = None):
        super().__init__()
        if name not in open_clip.list_models():
            raise ValueError(f"name must be one of open_clip's models (open_clip.list_models()), got {name!r}")
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, force_image_size=image_size
        )
        self.name, self.pretrained = name, pretrained
        self.visual = model.visual
        self.transform: Callable = transform
        self.requires_grad_(False)
        self.train()
        size = self.visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        try:
            self.width: int = self(torch.zeros(1, 3, *self.image_size)).shape[-1]
        except (AssertionError, AttributeError, TypeError) as error:
            raise ValueError(f"name must be a model whose image tower gives tokens, got {name!r}") from error

    def train(self, mode: bool = True) -> ImageEncoder:
        return super().train(False)

    # not inference mode, whose tensors neither torch.compile nor a caller's backward can take
    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Image tokens, class token first, in the dtype of the parameters; it can be compiled.

        Args:
            pixels (Tensor): (batch, 3, height, width), as ``transform`` makes them.

        Returns:
            Tensor: (batch, tokens, width), e.g. (batch, 257, 1024) of ViT-L/14 at 224.

        Raises:
            ValueError: pixels of another shape.
        """
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *self.image_size):
            height, width = self.image_size
            raise ValueError(f"pixels must be (batch, 3, {height}, {width}), got {tuple(pixels.shape)}")
        out = self._intermediates(pixels, "NLC")
        patches = out["image_intermediates"][0]
        prefix = out.get("image_intermediates_prefix")
        return patches if prefix is None else torch.cat([prefix[0], patches], dim=1)

    def _intermediates(self, pixels: Tensor, output_fmt: str) -> dict[str, list[Tensor]]:
        return self.visual.forward_intermediates(
            pixels.to(next(self.parameters()).dtype),
            indices=[-2],
            stop_early=True,
            normalize_intermediates=False,
            intermediates_only=True,
            output_fmt=output_fmt,
            output_extra_tokens=True,
        )

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; their tokens, row by row, come last."""
        device = next(self.parameters()).device
        with torch.no_grad():
            out = self._intermediates(torch.zeros(1, 3, *self.image_size, device=device), "NCHW")
        return tuple(out["image_intermediates"][0].shape[-2:])

    def picture(self, pixels: Tensor) -> Tensor:
        """What the encoder sees, resized and cropped: (3, height, width) of ``transform`` -> the same in [0, 1]."""
        mean, std = (pixels.new_tensor(self.visual.preprocess_cfg[name])[:, None, None] for name in ("mean", "std"))
        return (pixels * std + mean).clamp(0, 1)
