"""Images in [-1, 1]: where they come from, and how they become tensors.

From a folder, a data set of the Hub, a parquet file or the embedded digits; grey, RGB, with transparency, palettes, 16
bits. An image that cannot be read raises whatever it raises here; `diffusers_ext.data.batches` takes another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# --- from an image to a tensor ----------------------------------------------------------------------------------------


def convert(image: Image.Image, channels: int) -> Image.Image:
    """Grey (1) or RGB (3), upright; transparency goes onto white, 16-bit grey is scaled and not clipped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """(channels, height, width), float32 in [-1, 1]."""
    pixels = np.atleast_3d(np.asarray(image, dtype=np.float32)).transpose(2, 0, 1)
    return torch.from_numpy(pixels / 127.5 - 1)


@dataclass(frozen=True)
class Transform:
    """Resize the shorter side to `resolution`, crop to a square, mirror, scale to [-1, 1]."""

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
