"""How images become tensors in [-1, 1].

An image may be grey or RGB, with transparency or a palette. One of more than 8 bits, or of floating point numbers, does
not say what its black and white are: 4095 is white in an image of 12 bits. `find_value_range` reads it from some images
of the data set: the smallest of the usual ranges that holds their values. Errors of an image that cannot be decoded are
raised here as they come; `diffusers_ext.data.batches` then takes another image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError

ValueRange = tuple[float, float]
"""The values that are black and white."""
WHOLE_RANGES: tuple[ValueRange, ...] = tuple((0.0, 2.0**bits - 1) for bits in (8, 10, 12, 14, 16))
REAL_RANGES: tuple[ValueRange, ...] = ((0.0, 1.0), (-1.0, 1.0), *WHOLE_RANGES)

# --- the range of values ----------------------------------------------------------------------------------------------


def is_wide(image: Image.Image) -> bool:
    """Return whether the values of an image have more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def find_value_range(openers: Iterable[Callable[[], Image.Image]]) -> ValueRange | None:
    """Return the usual range that holds the values of images of more than 8 bits; `None` where there are no such ones.

    Args:
        openers: functions that open one image each; one that fails is left out.

    Raises:
        InputError: their values are in no usual range.
    """
    low, high, real = np.inf, -np.inf, False
    for opener in openers:
        try:
            image = opener()
            values = np.asarray(image, dtype=np.float64) if is_wide(image) else np.array([np.nan])
        except Exception:  # an unreadable image is reported when it is trained on
            continue
        if np.isfinite(values).all():
            low, high, real = min(low, values.min()), max(high, values.max()), real or image.mode == "F"
    if low > high:
        return None
    for black, white in REAL_RANGES if real else WHOLE_RANGES:
        if black <= low and high <= white:
            return black, white
    raise InputError(
        f"the images have values from {low:g} to {high:g}, which is no usual range: say what is black and white, e.g. "
        f"--value_range={low:g},{high:g}"
    )


def parse_value_range(text: str) -> ValueRange:
    """Return the two numbers of "LOW,HIGH".

    Raises:
        InputError: these are not two numbers, the first one below the second.
    """
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise InputError(f"--value_range must be two numbers with a comma, got {text!r}") from error
    if not -np.inf < low < high < np.inf:
        raise InputError(f"--value_range must be two numbers, the first one below the second, got {text!r}")
    return low, high


# --- from an image to a tensor ----------------------------------------------------------------------------------------


def convert(image: Image.Image, channels: int, value_range: ValueRange | None = None) -> Image.Image:
    """Return an upright image in grey (1 channel) or RGB (3), of 8 bits.

    Transparent images are laid on white.

    Args:
        image: any image.
        channels: 1 or 3.
        value_range: black and white of images of more than 8 bits; by default 0 and 65535, of floating point 0 and 255.

    Raises:
        ValueError: such an image has values outside of this range.
    """
    image = ImageOps.exif_transpose(image)
    if is_wide(image):
        image = _of_eight_bits(image, value_range or WHOLE_RANGES[0 if image.mode == "F" else -1])
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def _of_eight_bits(image: Image.Image, value_range: ValueRange) -> Image.Image:
    values, (black, white) = np.asarray(image, dtype=np.float64), value_range
    if not (values.min() >= black and values.max() <= white):
        raise ValueError(
            f"values from {values.min():g} to {values.max():g} are outside of {black:g} to {white:g}, which other "
            f"images have: see --value_range"
        )
    return Image.fromarray(((values - black) / (white - black) * 255).round().astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """Return the image as (channels, height, width), float32 in [-1, 1]."""
    pixels = np.atleast_3d(np.asarray(image, dtype=np.float32)).transpose(2, 0, 1)
    return torch.from_numpy(pixels / 127.5 - 1)


def exact_tensor(image: Image.Image, channels: int, value_range: ValueRange | None = None) -> Tensor:
    """Return an upright image as (channels, height, width), float32, with black at -1 and white at 1, and its values
    beyond these as they are.

    Args:
        image, channels, value_range: as in `convert`.

    Raises:
        ValueError: a value is not finite.
    """
    if not is_wide(image):
        return to_tensor(convert(image, channels))
    black, white = value_range or WHOLE_RANGES[0 if image.mode == "F" else -1]
    values = np.asarray(ImageOps.exif_transpose(image), dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some values are not finite")
    pixels = torch.from_numpy(((values - black) / (white - black) * 2 - 1).astype(np.float32))
    return pixels.expand(channels, *pixels.shape).contiguous()


@dataclass(frozen=True)
class Transform:
    """Resizes the shorter side to `resolution`, crops to a square, mirrors at random if asked, scales to [-1, 1]."""

    resolution: int
    channels: int
    center_crop: bool = True
    random_flip: bool = False
    value_range: ValueRange | None = None

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        return self.placed(image, generator)[0]

    def placed(self, image: Image.Image, generator: torch.Generator) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Return the tensor, and the height and width of the upright image, and the top and left of the crop in what it
        was resized to, as Stable Diffusion XL is told them; of a mirrored image, in the mirrored one."""
        image = convert(image, self.channels, self.value_range)
        own = image.height, image.width
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale)) for side in image.size)
        left, top, mirrored = self._drawn(width, height, generator)
        image = _square(image, (width, height), (left, top), self.resolution)
        if mirrored:
            image, left = ImageOps.mirror(image), width - self.resolution - left
        return to_tensor(image), (*own, top, left)

    def _drawn(self, width: int, height: int, generator: torch.Generator) -> tuple[int, int, bool]:
        """Return left and top of the crop of an image of this size, and whether it is mirrored."""
        x, y, flip = torch.rand(3, generator=generator).tolist()
        if self.center_crop:
            x = y = 0.5
        left, top = (round(u * (side - self.resolution)) for u, side in zip((x, y), (width, height), strict=True))
        return left, top, self.random_flip and flip < 0.5


@dataclass(frozen=True)
class ExactTransform(Transform):
    """The same of images whose noise matters: values are neither rounded to 8 bits nor cut off at black and white, and
    an image that would have to be resized is refused, as its noise would change: ValueError."""

    def placed(self, image: Image.Image, generator: torch.Generator) -> tuple[Tensor, tuple[int, int, int, int]]:
        pixels, side = exact_tensor(image, self.channels, self.value_range), self.resolution
        height, width = pixels.shape[1:]
        if min(height, width) != side:
            raise ValueError(
                f"{width} x {height} would be resized to {side}, which changes the noise: see --data_noise"
            )
        left, top, mirrored = self._drawn(width, height, generator)
        pixels = pixels[:, top : top + side, left : left + side]
        left, pixels = (width - side - left, pixels.flip(-1)) if mirrored else (left, pixels)
        return pixels.contiguous(), (height, width, top, left)


def _square(image: Image.Image, size: tuple[int, int], corner: tuple[int, int], side: int) -> Image.Image:
    """Resize an image to `size` and return its square at `corner`. What is enlarged is cropped first: a narrow image
    would become very large."""
    (width, height), (left, top) = size, corner
    if width > image.width:
        x, y = image.width / width, image.height / height
        right, bottom = min(image.width, (left + side) * x), min(image.height, (top + side) * y)
        box = (left * x, top * y, right, bottom)
        return image.resize((side, side), Image.Resampling.LANCZOS, box=box)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image.crop((left, top, left + side, top + side))
