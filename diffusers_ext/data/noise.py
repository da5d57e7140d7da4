r"""Images that have noise themselves: how much, and whether that can be true.

x_n = x0 + s_n n, one copy of each image, in the units of images in [-1, 1] (`--data_noise`, or a column of the data
with s_n of each image, 0 for a clean one). Trained on by `losses.ambient_loss`. Two things spoil such data unseen:

    8 bits        end at black and white, where they cut the noise off
    resizing      averages it away

So values are taken as they are stored (`images.ExactTransform`), an image that would be resized is refused, and the
noise is looked for: the diagonal detail of a square of 2 x 2 pixels, (a - b - c + d)/2, has the variance of the noise
and that of the image's own detail. Less than s_n^2 means that the noise is not what was said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import InputError
from ..fields import Ranged, arg

TOLERATED = 0.9
"""Of the variance that the noise must have in the details of the images."""


@dataclass
class NoisyDataArguments(Ranged):
    """Arguments of a script that trains on images with noise."""

    data_noise: float | None = arg(
        None,
        "Standard deviation of the noise that the images have, where black is -1 and white 1; it is not added. The "
        "model is one of clean images, and the sampler stops at this noise level with its estimate of the clean image.",
        above=0,
    )
    data_noise_column: str | None = arg(None, "Column with this number for each image, 0 for clean ones.")
    below_noise: Literal["stop", "rollout"] = arg(
        "stop",
        "rollout: after three tenths of the training half of the batch trains below the noise, on images that the "
        "model has denoised itself (--data_noise alone); the sampler then goes on to the end.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_noise is not None and self.data_noise_column is not None:
            raise InputError("--data_noise and --data_noise_column both say how noisy the images are: give one of them")
        if self.below_noise == "rollout" and self.data_noise is None:
            raise InputError("--below_noise rollout is for images that all have noise: --data_noise says how much")


def has_noise(args: Any) -> bool:
    """Return whether the arguments of a script say that the images have noise."""
    return getattr(args, "data_noise", None) is not None or getattr(args, "data_noise_column", None) is not None


def read_noise(rows: Any, column: str) -> Sequence[float]:
    """Read the column of noise of a data set of `datasets`.

    Raises:
        InputError: there is no such column, or a value is no number, or below 0.
    """
    if column not in rows.features:
        raise InputError(f"--data_noise_column {column}: the data have the columns {', '.join(rows.features)}")
    try:
        values = np.asarray(rows[column][:], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"--data_noise_column {column} must hold numbers: {error}") from error
    if not (wrong := np.flatnonzero(~((values >= 0) & (values < np.inf)))).size == 0:
        raise InputError(f"--data_noise_column {column}: row {wrong[0]} has {values[wrong[0]]}; it must be 0 or above")
    return values.tolist()


def require_noise(images: Tensor, data_noise: Tensor) -> None:
    """Check that images can have this noise, see the module's docstring.

    Args:
        images: (B, C, H, W).
        data_noise: (B,).

    Raises:
        InputError: they have less.
    """
    height, width = (side - side % 2 for side in images.shape[-2:])
    a, b, c, d = (images[..., i:height:2, j:width:2].double() for i in (0, 1) for j in (0, 1))
    found, said = ((a - b) - (c - d)).square().mean() / 4, data_noise.double().square().mean()
    if not found >= TOLERATED * said:
        raise InputError(
            f"the images have less noise than --data_noise says: their finest details have a standard deviation of "
            f"{found**0.5:.3g}, noise alone of {said**0.5:.3g} (where black is -1 and white 1). Images of 8 bits cut "
            f"noise off, resizing averages it away, and a wrong --value_range changes its size"
        )
