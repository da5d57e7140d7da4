"""Images in the form in which a network is trained on them: latents where it has an autoencoder, and labels."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from ..randomness import Seeds, Stream
from ..subjects import Subject
from .batches import Position, micro_batches
from .images import Transform
from .labelling import with_labels
from .sources import DataArguments, HubStream, ImageSource


class EncodedImages:
    """Yields the data of a network in batches (x0, condition); each iteration gives the same batches in the same order.

    The condition is {"class_labels": ...} where the network takes labels, else empty.

    Args:
        args: the batch size, the seed, and how images are read.
        subject: encodes the images, if it has an autoencoder.
        source, transform: where the images come from, and how they become tensors.
        max_samples: how many images are drawn at most, at random without repeats; they are cut to whole batches.

    Attributes:
        num_classes: the number of classes; `None` where the network takes no labels.
        described: the data set and split, for people.

    Raises:
        InputError: the images are fewer than a batch.
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
        self.args, self.subject, self.transform, self.device = args, subject, transform, device
        self.source = with_labels(source, subject.num_classes, "the data")
        n = min(sys.maxsize if isinstance(source, HubStream) else len(source), max_samples)
        n = n if args.max_train_samples is None else min(n, args.max_train_samples)
        self.count = n // args.train_batch_size
        if self.count == 0:
            raise InputError(f"{n} images are fewer than a batch of {args.train_batch_size}")
        self.described = args.described
        self.num_classes = subject.num_classes

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        batches = micro_batches(self.args, self.source, self.transform, 0, 1, self.count, position=Position(0, 0))
        for i, batch in enumerate(batches):
            generator = Seeds(self.args.seed).generator(Stream.BRIDGE_LATENTS, i, device=self.device)
            x0 = self.subject.encode(batch.images.to(self.device, self.subject.pipeline.dtype), generator).float()
            yield x0, self.subject.conditions(batch) if self.num_classes else {}
