"""Labels that fit a network: checked for all images before the work, and left alone where the network takes none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from .columns import NONE
from .sources import HubImages, HubStream, ImageSource, View


def number_of_classes(source: ImageSource | HubStream) -> int | None:
    """Return how many classes the data have; `None` if they have no labels."""
    return None if source.class_names is None else len(source.class_names)


def with_labels(
    source: ImageSource | HubStream,
    num_classes: int | None,
    what: str,
    class_names: Sequence[str] | None = None,
) -> ImageSource | HubStream:
    """Return the source with the labels that a network is given; those of a stream are checked as they come.

    Args:
        source: the images.
        num_classes: how many classes the network knows; `None` if it takes no labels.
        what: how a message calls the images.
        class_names: the names of the classes of the training images; by default those of `source`.

    Raises:
        InputError: images have no label, or that of a class which the network does not know.
    """
    if isinstance(source, HubStream):
        _require_classes(number_of_classes(source), num_classes)
        return source.labelled_for(num_classes)
    if num_classes is None:
        return View(source, None)
    if isinstance(source, HubImages) and class_names is not None and source.labelled is not None:
        labels, names = source.labelled.under(class_names, what).numbers, class_names
    else:
        labels, names = np.array(source.labels or []), source.class_names or []
    _require_classes(number_of_classes(source), num_classes)
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= num_classes))):
        first = int(wrong[0])
        raise InputError(
            f"{what}: {len(wrong)} of {len(labels)} images have no label of the model's {num_classes} classes; the "
            f"first is {source.name(first)} with {'none' if labels[first] < 0 else labels[first]}. Leave these images "
            f"out of the data, or train a model without labels"
        )
    return View(source, labels.tolist(), names)


def _require_classes(have: int | None, num_classes: int | None) -> None:
    if num_classes is not None and (have is None or have > num_classes):
        found = "no labels" if have is None else f"{have} classes"
        raise InputError(
            f"the model takes labels of {num_classes} classes, the data have {found}: see --label_column (not {NONE!r})"
        )


def where_readable(
    source: ImageSource, what: str, class_names: Sequence[str] | None = None
) -> tuple[View, Sequence[str] | None]:
    """Return the source with its labels, or, where these cannot be used, without; that is printed.

    Args:
        source, what, class_names: as in `with_labels`.

    Returns:
        The source, and the names of its classes.
    """
    try:
        names = source.class_names
        if names is None:
            return View(source, None), None
        labelled = with_labels(source, len(class_names or names), what, class_names)
        assert isinstance(labelled, View)
        return labelled, labelled.class_names
    except InputError as error:
        print(f"the labels are not used: {error}")
        return View(source, None), None
