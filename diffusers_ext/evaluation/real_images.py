"""The real images that samples are compared with: the training images, and held-out ones in two halves.

A random half of the held-out images is the **reference**. The other half is the **floor**: it is measured as samples
are, and so shows what real images reach by the same measures. Where held-out images are few, the training images can be
the reference, as is common for FID; then all held-out images are the floor.

    RealImages.of(training, held_out)                                    # of tensors
    load_real_images(MeasureArguments(dataset_name="digits"), 1, 28)     # from the data that a script's arguments name
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..data.batches import Images, first_images
from ..data.columns import NONE
from ..data.held_out import load_validation_images
from ..data.images import Transform
from ..data.labelling import where_readable
from ..data.prepared import describe, make_transform
from ..data.sources import HeldOutArguments, HubStream, ImageSource, View, load_images
from ..errors import InputError
from ..fields import arg
from ..files import shown
from ..randomness import Seeds, Stream

GROUPS = 10  # of the jackknife
MIN_IMAGES = 2 * GROUPS


@dataclass
class MeasureArguments(HeldOutArguments):
    """Arguments that say which real images the samples are compared with."""

    reference: Literal["held_out", "train"] = arg(
        "held_out",
        "Compare with half of the held-out images (the other half is the floor), or with the training images.",
    )
    max_validation_samples: int = arg(10_000, "Use only the first so many held-out images.", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            raise InputError("--streaming: an evaluation compares with the same images each time; leave it out")


@dataclass(frozen=True)
class RealImages:
    """Images in [-1, 1], (n, C, H, W), and their labels, in random order.

    Attributes:
        training: the images that samples may be copies of; without held-out images the half that is the reference.
        reference: the images that samples are compared with.
        floor: real images that are measured as samples are.
        held_out: all held-out images; `None` where there are none.
        described: the reference, in words.
        name: the data set's name, for people.
    """

    training: Images
    reference: Images
    floor: Images
    held_out: Images | None
    described: str
    name: str = ""

    @property
    def unseen(self) -> Images:
        """The images for the likelihood: the held-out ones, or, where there are none, the floor."""
        return self.floor if self.held_out is None else self.held_out

    @classmethod
    def of(
        cls,
        training: Tensor,
        held_out: Tensor | None = None,
        *,
        training_labels: Tensor | None = None,
        held_out_labels: Tensor | None = None,
        reference: Literal["held_out", "train"] = "held_out",
        name: str = "",
        seed: int = 0,
    ) -> RealImages:
        """Make them of tensors.

        Args:
            training, held_out: images (n, C, H, W) in [-1, 1], in any order: it is made random. They are rounded to 8
                bits, as samples are.
            training_labels, held_out_labels: integers (n,); by default the images have none.
            reference: "held_out" takes half of the held-out images, "train" all training images. Without held-out
                images it must be "train", and takes half of these.
            name: the data set's name, for people.
            seed: the seed of the order.

        Raises:
            InputError: the images are too few, not of one shape or not in [-1, 1], or "held_out" is asked for without
                any.
        """
        if held_out is not None and held_out.shape[1:] != training.shape[1:]:
            shapes = tuple(held_out.shape[1:]), tuple(training.shape[1:])
            raise InputError(f"held-out images of shape {shapes[0]} do not fit training images of shape {shapes[1]}")
        unseen = None if held_out is None else _shuffled(held_out, held_out_labels, seed)
        return _compared(_shuffled(training, training_labels, seed), unseen, reference, name)


def load_real_images(
    args: MeasureArguments, channels: int, resolution: int, say: Callable[[str], None] = print
) -> RealImages:
    """Load the images that the arguments name, and divide them by `--reference`; `say` is told what was found.

    Raises:
        InputError: there are none or too few, or they are a stream.
    """
    everything = replace(args, max_train_samples=None)
    source, unseen = load_images(everything, args.train_split), load_validation_images(everything)
    assert not isinstance(source, HubStream)
    transform = make_transform(args, source, channels, resolution, still=True)
    own, names = where_readable(source, f"split {args.train_split}")
    n = len(own) if args.max_train_samples is None else args.max_train_samples
    held_out = None
    if unseen is not None and not isinstance(unseen[0], HubStream):
        others, _ = where_readable(unseen[0], f"split {unseen[1]}", names)
        held_out = _read(others, args.max_validation_samples, transform, args.seed)
    name = shown(args.dataset_name or args.train_data_dir or "")
    real = _compared(_read(own, n, transform, args.seed), held_out, args.reference, name)
    say(f"{describe(args, source, transform)}; samples are compared with {real.described}")
    return real


def _compared(
    training: Images, held_out: Images | None, reference: Literal["held_out", "train"], name: str
) -> RealImages:
    """Choose the reference and the floor; the images are in random order."""
    left_out = 0
    if held_out is not None:
        n = len(held_out.images)
        held_out, left_out = _without(held_out, training)
        if left_out == n:
            raise InputError(
                f"all {n} held-out images are training images: --train_split names what the model was trained on, and "
                f"--validation_split what it has not seen ({NONE!r} where it has seen everything)"
            )
    if reference == "held_out":
        if held_out is None:
            raise InputError("the data have no held-out split: name it with --validation_split, or --reference train")
        chosen, floor = _halves(held_out)
    elif held_out is not None:
        chosen, floor = training, held_out
    else:
        chosen, floor = _halves(training)
        training = chosen
    for images, what in ((chosen, "reference"), (floor, "floor")):
        if len(images.images) < MIN_IMAGES:
            raise InputError(
                f"the {what} has {len(images.images)} images, and an interval needs {MIN_IMAGES}: use more data, or "
                f"--reference train"
            )
    described = f"{len(chosen.images)} {'training' if chosen is training else 'held-out'} images"
    if left_out:
        described += f" ({left_out} of the held-out split are training images, and are left out)"
    return RealImages(training, chosen, floor, held_out, described, name)


def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=Seeds(seed).generator(Stream.SPLIT))


def _read(source: ImageSource, n: int, transform: Transform, seed: int) -> Images:
    """Read a random choice of images in random order: stored images are often sorted by class."""
    order = _order(len(source), seed)[:n].tolist()
    return first_images(View(source, source.labels, source.class_names, order), n, transform)


def _without(images: Images, training: Images) -> tuple[Images, int]:
    """Leave out the images that are training images; return the others, and how many were left out."""
    known = set(_digests(training.images))
    kept = torch.tensor([digest not in known for digest in _digests(images.images)])
    if bool(kept.all()):
        return images, 0
    return Images(images.images[kept], images.labels[kept], images.unreadable), int((~kept).sum())


def _digests(images: Tensor) -> Iterator[bytes]:
    """Yield a digest of the 8-bit values of each image."""
    for image in images:
        yield hashlib.sha256(((image + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()).digest()


def _shuffled(images: Tensor, labels: Tensor | None, seed: int) -> Images:
    if not bool((images.abs() <= 1 + 1e-3).all()):
        raise InputError(f"images must be in [-1, 1], got {images.min().item():.4g} to {images.max().item():.4g}")
    order = _order(len(images), seed)
    images = ((images.cpu().float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    labels = torch.full((len(images),), -1) if labels is None else labels.cpu()
    return Images(images[order], labels[order], [])


def _halves(images: Images) -> tuple[Images, Images]:
    half = len(images.images) // 2
    return rows_of(images, 0, half), rows_of(images, half, 2 * half)


def rows_of(images: Images, first: int, last: int) -> Images:
    """Return the rows first, ..., last - 1."""
    of_rows = ("images", "labels", "captions", "places", "indices", "data_noise")
    return replace(images, **{n: v[first:last] for n in of_rows if (v := getattr(images, n)) is not None})
