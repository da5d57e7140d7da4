"""Images as a network is trained on them: encoded where the pipeline has an autoencoder, with their labels."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from ..files import shown
from ..randomness import Seeds, Stream
from ..subjects import Subject
from .batches import Position, micro_batches
from .images import Transform
from .sources import DataArguments, HubStream, ImageSource


class EncodedImages:
    """What a network was trained on, batch by batch: (x0, {"class_labels": ...} where it takes them). The same, in the
    same order, whenever it is gone through.

    Args:
        args: the batch size, the seed, and how images are read.
        subject: encodes them, if it has an autoencoder.
        source, transform: the images.
        max_samples: so many, drawn at random without repeats; whole batches of them.

    Attributes:
        num_classes: of the labels; `None` where the network takes none.
        described: the data set and split, for people.

    Raises:
        InputError: they are fewer than a batch.
    """

    def __init__(
        self,
        args: DataArguments,
        subject: Subject,
        source: ImageSource | HubStream,
        transform: Transform,
        max_samples: int,
        device: torch.device,
    ) -> None:
        self.args, self.subject, self.source, self.transform, self.device = args, subject, source, transform, device
        n = min(sys.maxsize if isinstance(source, HubStream) else len(source), max_samples)
        n = n if args.max_train_samples is None else min(n, args.max_train_samples)
        self.count = n // args.train_batch_size
        if self.count == 0:
            raise InputError(f"{n} images are fewer than a batch of {args.train_batch_size}")
        self.described = f"{shown(args.dataset_name or args.train_data_dir or '')}, split {args.train_split}"
        self.num_classes = subject.num_classes

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        batches = micro_batches(self.args, self.source, self.transform, 0, 1, self.count, position=Position(0, 0))
        for i, batch in enumerate(batches):
            generator = Seeds(self.args.seed).generator(Stream.BRIDGE_LATENTS, i, device=self.device)
            x0 = self.subject.encode(batch.images.to(self.device, self.subject.pipeline.dtype), generator).float()
            yield x0, self.subject.conditions(batch) if self.num_classes else {}
