"""The stream of samples that training reads.

The stream has no end. Sample number s is image `permutation(seed, s // n)[s % n]` of n images, augmented by a generator
that is seeded with (seed, s); micro-batch m of b samples holds the samples m b, ..., m b + b - 1. The data of a
micro-batch are then a function of (seed, b, m) alone: any number of worker processes reads the same, a run may stop
anywhere and go on, and each of k devices takes every k-th micro-batch.

The rows of a data set that is streamed (`--streaming`) cannot be looked up by number. They come in the order that
`datasets` gives them, shuffled within a buffer, and each device reads its own share; the position in it is (epoch,
row). A run goes on exactly at that position: it reads the epoch's earlier rows again without decoding them.
"""

from __future__ import annotations

import itertools
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import STOP_SIGNALS, InputError
from ..randomness import Seeds, Stream
from .images import Transform
from .sources import DataArguments, HubStream, ImageSource

# After so many unreadable images in a row, reading ends with an error.
MAX_UNREADABLE_IN_A_ROW = 100


# --- the stream of samples --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One image (channels, height, width), its label (-1 if it has none), what could not be read in its stead, its
    caption, where it was cut from, see `Transform.placed`, its number in the source, and its noise, see `noise`."""

    image: Tensor
    label: int
    unreadable: list[str]
    caption: str | None = None
    place: tuple[int, int, int, int] = (0, 0, 0, 0)
    index: int = -1
    data_noise: float | None = None


class StreamDataset(Dataset[Sample]):
    """The stream of samples as a data set that is indexed by sample number; see the module's docstring.

    Raises:
        InputError: on `MAX_UNREADABLE_IN_A_ROW` unreadable images in a row.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, seeds: Seeds, limit: int | None = None, opens: bool = True
    ) -> None:
        self.source, self.transform, self.seeds, self.opens = source, transform, seeds, opens
        self.n = len(source) if limit is None else min(limit, len(source))
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))

    def index(self, s: int) -> int:
        """Return the index of the image that sample number `s` is made from."""
        epoch, position = divmod(s, self.n)
        if self._permutation[0] != epoch:
            generator = self.seeds.generator(Stream.ORDER, epoch)
            self._permutation = (epoch, torch.randperm(self.n, generator=generator))
        return int(self._permutation[1][position])

    def __getitem__(self, s: int) -> Sample:
        if not self.opens:
            return Sample(torch.empty(0), -1, [], index=self.index(s))
        generator = self.seeds.generator(Stream.AUGMENTATION, s)
        return read_image(self.source, self.index(s), self.n, self.transform, generator)


def read_image(source: ImageSource, index: int, n: int, transform: Transform, generator: torch.Generator) -> Sample:
    """Read image `index`, or, if it is unreadable, the next readable one, going round after `n` images.

    Raises:
        InputError: `MAX_UNREADABLE_IN_A_ROW` images in a row cannot be read, or all of them.
    """
    unreadable: list[str] = []
    while True:
        try:
            image, place = transform.placed(source.open(index), generator)
            label = -1 if source.labels is None else source.labels[index]
            caption = None if source.captions is None else source.captions[index]
            noise = None if source.data_noise is None else source.data_noise[index]
            return Sample(image, label, unreadable, caption, place, data_noise=noise)
        except Exception as error:  # Pillow raises whatever its decoders do
            unreadable.append(f"{source.name(index)}: {type(error).__name__}: {error}")
            if len(unreadable) >= min(n, MAX_UNREADABLE_IN_A_ROW):
                listed = "\n  ".join(unreadable[:5])
                message = f"{len(unreadable)} images in a row cannot be read, the first:\n  {listed}"
                raise InputError(message) from error
            index = (index + 1) % n


class MicroBatches(Sampler[list[int]]):
    """Yields the sample numbers of `count` micro-batches: first, first + stride, ..., each of `batch_size` samples."""

    def __init__(self, batch_size: int, first: int, stride: int, count: int) -> None:
        self.batch_size, self.first, self.stride, self.count = batch_size, first, stride, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for m in range(self.first, self.first + self.stride * self.count, self.stride):
            yield list(range(m * self.batch_size, (m + 1) * self.batch_size))


@dataclass(frozen=True)
class Images:
    """A micro-batch of images.

    Attributes:
        images: (B, C, H, W) in [-1, 1].
        labels: (B,), -1 where there is no label.
        unreadable: names of the images that could not be read, with the reasons.
        position: the row that follows the micro-batch in a stream; `None` for other data.
        captions: B texts, where the data have captions.
        places: (B, 4), where the images were cut from, see `Transform.placed`; `None` if that is not known.
        indices: (B,), the numbers of the images in their source; -1 in a stream.
        data_noise: (B,), the noise that the images have, see `noise`; `None` where they have none.
    """

    images: Tensor
    labels: Tensor
    unreadable: list[str]
    position: Position | None = None
    captions: Sequence[str] | None = None
    places: Tensor | None = None
    indices: Tensor | None = None
    data_noise: Tensor | None = None

    def pin_memory(self) -> Images:
        """Return a copy in page-locked memory, which a GPU reads without a wait; `DataLoader` calls this, too."""
        noise = None if self.data_noise is None else self.data_noise.pin_memory()
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), data_noise=noise)


def collate(samples: Sequence[Sample]) -> Images:
    images = torch.stack([s.image for s in samples])
    labels, places = torch.tensor([s.label for s in samples]), torch.tensor([s.place for s in samples])
    texts = [s.caption for s in samples if s.caption is not None]
    captions = texts if len(texts) == len(samples) else None
    unreadable, indices = [name for s in samples for name in s.unreadable], torch.tensor([s.index for s in samples])
    noise = [s.data_noise for s in samples if s.data_noise is not None]
    data_noise = torch.tensor(noise) if len(noise) == len(samples) else None
    return Images(images, labels, unreadable, captions=captions, places=places, indices=indices, data_noise=data_noise)


def first_images(source: ImageSource | HubStream, n: int, transform: Transform) -> Images:
    """Read the first `n` images and labels, cropped in the centre and not mirrored."""
    still = replace(transform, center_crop=True, random_flip=False)
    if isinstance(source, HubStream):
        stream = stream_samples(source, still, Seeds(0), Position(0, 0), endless=False)
        samples = [sample for sample, _ in itertools.islice(stream, n)]
    else:
        n = min(n, len(source))
        samples = [read_image(source, i, len(source), still, torch.Generator()) for i in range(n)]
    return collate(samples)


# --- streams ----------------------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """The next row of a stream."""

    epoch: int
    row: int


def stream_samples(
    source: HubStream, transform: Transform, seeds: Seeds, position: Position, threads: int = 0, endless: bool = True
) -> Iterator[tuple[Sample, Position]]:
    """Yield the samples of a stream from `position` on, each with the position of the row after it.

    `threads` threads decode the images. An unreadable image is replaced by the next readable one, so that the samples
    do not depend on the position where reading began.

    Raises:
        InputError: the stream is empty, or `MAX_UNREADABLE_IN_A_ROW` images in a row cannot be read.
    """

    def decode(where: Position, cell: dict[str, Any], label: int, name: str, caption: str | None) -> Sample | str:
        generator = seeds.generator(Stream.AUGMENTATION, *where)
        try:
            image, place = transform.placed(source.open(cell), generator)
            return Sample(image, label, [], caption, place)
        except Exception as error:  # Pillow raises whatever its decoders do
            return f"{name}: {type(error).__name__}: {error}"

    rows = ((Position(e, i), *row) for e in _epochs(position, endless) for i, row in _numbered(source, e, position))
    bad: list[tuple[Position, str]] = []
    for where, decoded in _ordered_map(decode, rows, threads):
        if isinstance(decoded, str):
            bad.append((where, decoded))
            if len(bad) >= MAX_UNREADABLE_IN_A_ROW:
                listed = "\n  ".join(name for _, name in bad[:5])
                raise InputError(f"{len(bad)} images in a row cannot be read, the first:\n  {listed}")
            continue
        for missed, name in bad:
            yield replace(decoded, unreadable=[name]), Position(missed.epoch, missed.row + 1)
        bad.clear()
        yield decoded, Position(where.epoch, where.row + 1)


def _epochs(position: Position, endless: bool) -> Iterator[int]:
    return itertools.count(position.epoch) if endless else iter([position.epoch])


def _numbered(
    source: HubStream, epoch: int, position: Position
) -> Iterator[tuple[int, tuple[dict[str, Any], int, str, str | None]]]:
    first = position.row if epoch == position.epoch else 0
    empty = True
    for numbered in enumerate(source.rows(epoch, first), first):
        empty = False
        yield numbered
    if empty and first == 0:
        raise InputError("the stream has no rows for this device")


def _ordered_map(
    function: Callable[..., Sample | str], rows: Iterator[tuple[Position, Any, int, str, str | None]], threads: int
) -> Iterator[tuple[Position, Sample | str]]:
    """Yield (position, function(*row)) in the order of the rows; threads compute the function ahead."""
    if threads == 0:
        for row in rows:
            yield row[0], function(*row)
        return
    waiting: deque[tuple[Position, Future[Sample | str]]] = deque()
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
    args: DataArguments,
    source: ImageSource | HubStream,
    transform: Transform,
    first: int,
    world: int,
    count: int,
    *,
    position: Position,
    seeds: Seeds | None = None,
    pin_memory: bool = False,
    opens: bool = True,
) -> Iterable[Images]:
    """Read the micro-batches first, first + world, ... of a run, `count` of them.

    Args:
        args: the batch size, the seed, and how images are read.
        first, world: the number of the first micro-batch, and of processes; this is process number first modulo world.
        position: where reading begins in a stream; other data ignore it.
        seeds: the seeds of order and augmentation; by default those of `args.seed`.
        pin_memory: return them in page-locked memory.
        opens: whether the images are opened; else only their numbers are returned.
    """
    seeds = seeds or Seeds(args.seed)
    if isinstance(source, HubStream):
        share = source.share(first % world, world)
        samples = stream_samples(share, transform, seeds, position, args.dataloader_num_workers)
        batches = itertools.islice(_batched(samples, args.train_batch_size), count)
        return (batch.pin_memory() for batch in batches) if pin_memory else batches
    return DataLoader(
        StreamDataset(source, transform, seeds, args.max_train_samples, opens),
        batch_sampler=MicroBatches(args.train_batch_size, first, world, count),
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
    )


def _batched(samples: Iterator[tuple[Sample, Position]], batch_size: int) -> Iterator[Images]:
    while True:
        batch = list(itertools.islice(samples, batch_size))
        yield replace(collate([sample for sample, _ in batch]), position=batch[-1][1])


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ignore the signals, which reach the whole process group: a worker that ended would end the run."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
