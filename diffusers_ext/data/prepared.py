"""The images of a run: what is trained on, what is measured on, and one line that says what was found."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from .batches import Images, first_images
from .contents import mark_of
from .held_out import held_out_images
from .images import ExactTransform, Transform, find_value_range, is_wide, parse_value_range
from .labelling import with_labels
from .noise import has_noise, require_noise
from .sources import DataArguments, HeldOutArguments, HubStream, ImageSource

_LOOKED_AT = 64, 8
"""How many images, or rows of a stream, are opened to find the range of their values."""


@dataclass(frozen=True)
class RunData:
    """The data of a training run.

    Attributes:
        source: the images that are trained on.
        transform: makes tensors of them.
        validation: the images that are measured on.
        validation_name: what a report calls these.
        mark: what tells these data from others, see `mark_of`.
        described: what was found, for people.
    """

    source: ImageSource | HubStream
    transform: Transform
    validation: Images
    validation_name: str
    mark: dict[str, Any]
    described: str


def prepare_data(
    args: HeldOutArguments,
    source: ImageSource | HubStream,
    num_classes: int | None,
    image_format: tuple[int, int],
    max_validation_samples: int,
) -> RunData:
    """Prepare the images of a run.

    Args:
        args: how images are read.
        source: the split that is trained on.
        num_classes: how many classes the network knows; `None` if it takes no labels.
        image_format: channels and resolution.
        max_validation_samples: how many images are measured on.

    Raises:
        InputError: the labels do not fit the network, or the values of the images are not clear.
    """
    transform = make_transform(args, source, *image_format)
    own = with_labels(source, num_classes, f"split {args.train_split}")
    held_out, name = held_out_images(args, source, num_classes, max_validation_samples)
    validation = first_images(held_out or own, max_validation_samples, transform)
    if validation.data_noise is not None:
        require_noise(validation.images, validation.data_noise)
    classes = own.class_names if num_classes is not None else None
    described = f"{describe(args, source, transform)}; {'no' if classes is None else len(classes)} classes"
    described += f"; measured on {len(validation.images):,} {name}"
    return RunData(own, transform, validation, name, mark_of(source, classes), described)


def make_transform(
    args: DataArguments, source: ImageSource | HubStream, channels: int, resolution: int, still: bool = False
) -> Transform:
    """Return what makes tensors of the images; `still` neither crops nor mirrors them at random.

    Raises:
        InputError: the range of their values is not clear.
    """
    if has_noise(args) and args.value_range is None and is_wide(next(_openers(source))()):
        raise InputError(
            "noise goes beyond black and white, so these cannot be found in the images: say them, e.g. "
            "--value_range=0,1"
        )
    found = find_value_range(_openers(source)) if args.value_range is None else parse_value_range(args.value_range)
    kind = ExactTransform if has_noise(args) else Transform
    return kind(resolution, channels, still or args.center_crop, args.random_flip and not still, found)


def describe(args: DataArguments, source: ImageSource | HubStream, transform: Transform) -> str:
    """Say which images there are, and how they are read."""
    first, captions = "", args.caption_column
    try:
        image = next(_openers(source))()
        first = f", the first is {image.width} x {image.height} {image.mode}"
    except Exception:  # an unreadable image is reported when it is used
        pass
    n = "a stream of images" if isinstance(source, HubStream) else f"{len(source):,} images"
    low, high = (0.0, 255.0) if transform.value_range is None else transform.value_range
    taken = f"{transform.resolution} x {transform.resolution}, {'grey' if transform.channels == 1 else 'RGB'}"
    said = f"data: {n} of {args.described}{first}; taken as {taken}; values from {low:g} (black) to {high:g} (white)"
    if captions is None:
        return said
    missing = 0 if isinstance(source, HubStream) or source.captions is None else source.captions.count("")
    return f"{said}; captions in column {captions}" + (f", {missing:,} of them empty" if missing else "")


def _openers(source: ImageSource | HubStream) -> Iterator[Callable[[], Image.Image]]:
    if isinstance(source, HubStream):
        for cell, *_ in itertools.islice(source.rows(0, 0), _LOOKED_AT[1]):
            yield functools.partial(source.open, cell)
    else:
        places = np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT[0])).round().astype(int)
        for i in np.unique(places).tolist():
            yield functools.partial(source.open, i)
