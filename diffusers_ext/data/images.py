"""How images become tensors in [-1, 1].

An image may be grey or RGB, with transparency, a palette or 16 bits. Errors of an image that cannot be decoded are
raised here as they come; `diffusers_ext.data.batches` then takes another image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# --- from an image to a tensor ----------------------------------------------------------------------------------------


def convert(image: Image.Image, channels: int) -> Image.Image:
    """Return an upright image in grey (1 channel) or RGB (3).

    Transparent images are laid on white; 16-bit grey values are scaled and not clipped.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Return the image as (channels, height, width), float32 in [-1, 1]."""
    pixels = np.atleast_3d(np.asarray(image, dtype=np.float32)).transpose(2, 0, 1)
    return torch.from_numpy(pixels / 127.5 - 1)


@dataclass(frozen=True)
class Transform:
    """Resizes the shorter side to `resolution`, crops to a square, mirrors at random if asked, scales to [-1, 1]."""

    resolution: int
    channels: int
    center_crop: bool = True
    random_flip: bool = False

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        image = convert(image, self.channels)
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale)) for side in image.size)
        size = (width, height)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        x, y, flip = torch.rand(3, generator=generator).tolist()
        if self.center_crop:
            x = y = 0.5
        left, top = (round(u * (side - self.resolution)) for u, side in zip((x, y), size, strict=True))
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if self.random_flip and flip < 0.5:
            image = ImageOps.mirror(image)
        return to_tensor(image)
