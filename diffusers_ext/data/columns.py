"""The columns of a data set: which hold images and labels, and what is in them.

Labels are read by Arrow, all at once, and only where they are used. A column of labels holds

    ClassLabel      integers with names; null or -1 is an image without a label
    integers        0, 1, 2, ... without names
    texts           the names of the classes, which are numbered in alphabetical order

An image is in an undecoded cell {"bytes": ..., "path": ...} of `datasets`: its encoded bytes, or else a file, which
must lie inside the data set: a cell of somebody else's parquet file opens no other file of this machine.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import InputError

NONE = "none"
"""As the name of a column or split: none at all."""
MAX_CLASSES = 100_000

# --- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The columns of images and of labels; `label` is `None` where there are no labels or they are not wanted."""

    image: str
    label: str | None


def find_columns(features: Any, image_column: str | None, label_column: str | None) -> Columns:
    """Return the columns that the user has named or, by default, the only ones of their kind.

    Raises:
        InputError: there is no such column, or which one holds the images is not clear.
    """
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    image = _column("image", image_column, images, features)
    if not isinstance(features[image], ImageFeature):
        raise InputError(
            f"--image_column {image}: its feature is {features[image]}, and images are in a column of the feature "
            f"Image; those here: {', '.join(images) or 'none'}"
        )
    if label_column == NONE:
        return Columns(image, None)
    labels = [n for n, f in features.items() if isinstance(f, ClassLabel)] or [
        n for n in ("label", "labels") if isinstance(features.get(n), Value)
    ]
    if label_column is None and len(labels) != 1:
        return Columns(image, None)
    return Columns(image, _column("label", label_column, labels, features))


def _column(kind: str, asked: str | None, found: Sequence[str], features: Any) -> str:
    if asked is not None:
        if asked not in features:
            raise InputError(f"the data set has no column {asked!r}; its columns: {', '.join(features)}")
        return asked
    if len(found) != 1:
        what = f"several {kind} columns ({', '.join(found)})" if found else f"no column of {kind}s"
        raise InputError(f"the data set has {what}; its columns: {', '.join(features)}; name one with --{kind}_column")
    return found[0]


# --- labels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The labels of all rows.

    Attributes:
        numbers: (n,) integers, -1 where a row has none.
        names: the names of the classes 0, 1, 2, ...
    """

    numbers: np.ndarray
    names: Sequence[str]

    def under(self, names: Sequence[str], what: str) -> Labels:
        """Return the same labels numbered as in other names of classes.

        Args:
            names: the names of the classes of the training images.
            what: how a message calls these rows.

        Raises:
            InputError: rows are of classes that have no such name.
        """
        place = {name: k for k, name in enumerate(names)}
        table = np.array([place.get(name, len(names)) for name in self.names] + [-1])
        numbers = table[self.numbers]
        if unknown := sorted({self.names[k] for k in np.unique(self.numbers[numbers == len(names)])}):
            raise InputError(
                f"{what} has {int((numbers == len(names)).sum())} images of classes that are not trained on: "
                f"{', '.join(unknown[:5])}"
            )
        return Labels(numbers, names)


def read_labels(rows: Any, column: str) -> Labels:
    """Read the labels of a data set of `datasets`.

    Raises:
        InputError: the column holds no labels; the message says how to go on without.
    """
    import pyarrow as pa

    feature = rows.features[column]
    values = rows.select_columns([column]).with_format("arrow")[:].column(0)
    without = f"; to go on without labels: --label_column {NONE}"
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        names = sorted(name for name in values.unique().to_pylist() if name is not None)
        place = {name: k for k, name in enumerate(names)} | {None: -1}
        encoded = values.dictionary_encode().combine_chunks()
        table = np.array([place[name] for name in encoded.dictionary.to_pylist()] + [-1])
        return Labels(table[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)], names)
    if not (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        raise InputError(f"the labels in column {column!r} must be integers or texts, they are {values.type}{without}")
    try:
        numbers = values.cast(pa.int64()).fill_null(-1).combine_chunks().to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise InputError(f"the labels in column {column!r} are no numbers of classes: {error}{without}") from error
    return Labels(numbers, _names_of(numbers, getattr(feature, "names", None), column, without))


def _names_of(numbers: np.ndarray, names: Sequence[str] | None, column: str, without: str) -> Sequence[str]:
    """Check the numbers of classes and return the names of these; those without names are called by their numbers."""
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, -1)
    most = MAX_CLASSES if names is None else len(names)
    if low < -1 or high >= most:
        raise InputError(
            f"the labels in column {column!r} go from {low} to {high}, and classes are 0 to {most - 1}{without}"
        )
    return [str(k) for k in range(high + 1)] if names is None else names


# --- images -----------------------------------------------------------------------------------------------------------


def require_column(column: str, names: Iterable[str]) -> None:
    """Refuse a column of captions that the data do not have.

    Raises:
        InputError: the message names the columns that there are.
    """
    if column not in (names := list(names)):
        raise InputError(f"--caption_column: the data have no column {column!r}: {', '.join(names)}")


def read_captions(rows: Any, column: str) -> list[str]:
    """Read the captions of a data set of `datasets`; where one is missing it is empty.

    Raises:
        InputError: there is no such column, or a cell holds no text.
    """
    require_column(column, rows.column_names)
    return [caption_of(cell, f"row {i}") for i, cell in enumerate(rows[column])]


def caption_of(cell: Any, name: str) -> str:
    """Return the caption in a cell; a missing one is empty.

    Raises:
        InputError: the cell holds something else than a text.
    """
    if cell is not None and not isinstance(cell, str):
        raise InputError(f"--caption_column must hold one text for each image, {name} has {cell!r:.80}")
    return cell or ""


def open_cell(cell: Any, places: Sequence[str]) -> Image.Image:
    """Return the image in an undecoded cell; errors of decoding are raised as they come.

    Args:
        cell: {"bytes": ..., "path": ...}, or `None`.
        places: the folders, and the address on the Hub, where the files of the data set lie.

    Raises:
        ValueError: the cell is empty, or its file lies elsewhere.
    """
    content = io.BytesIO(encoded(cell, places))
    try:
        return Image.open(content)
    except UnidentifiedImageError:  # its message would be another one each time
        raise UnidentifiedImageError("this is no image that Pillow knows") from None


def encoded(cell: Any, places: Sequence[str]) -> bytes:
    """Return the encoded image of a cell, see `open_cell`; one of a stream may lie in an archive or on the Hub."""
    if cell is not None and cell["bytes"] is not None:
        return cell["bytes"]
    path = _inside(cell, places)
    if "://" not in path:
        return Path(path).read_bytes()
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def _inside(cell: Any, places: Sequence[str]) -> str:
    if cell is None or not cell["path"]:
        raise ValueError("the cell is empty")
    path: str = cell["path"]
    outermost = path.split("::")[-1]  # zip://1.png::/data/faces.zip is a file in an archive
    if "://" in outermost:
        inside = any(outermost.startswith((f"{place}/", f"{place}@")) for place in places) and "/.." not in outermost
    else:
        absolute = os.path.normpath(os.path.abspath(outermost))
        inside = any(absolute.startswith(place.rstrip(os.sep) + os.sep) for place in places)
        path = path.removesuffix(outermost) + absolute
    if not inside:
        raise ValueError("the cell names a file outside of the data set, which is not opened")
    return path


def name_of(split: str, index: int, cell: Any) -> str:
    """Return how a message calls the image of a row; this cannot fail."""
    path = cell.get("path") if isinstance(cell, dict) else None
    return f"{split}[{index}]" + (f" ({path})" if path else "")
