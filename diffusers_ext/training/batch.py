"""What the loop hands out: a micro-batch of samples, their conditions, and the source of its random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..data.batches import Images
from ..randomness import seed_for
from ..subjects.models import classes_of, encode, null_class_of
from .arguments import TrainingArguments

# Streams of `seed_for(seed, stream, ...)`; data.py uses 0 and 1, results.py 4, best.py 5.
_NOISE, _DROPOUT = 2, 3


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device."""

    x0: Tensor
    """Clean samples (B, C, H, W): images in [-1, 1], or latents where the pipeline has an autoencoder."""
    cond: dict[str, Tensor]
    """Conditions for every evaluation of the network: class labels, some replaced by the null class; or nothing."""
    generator: torch.Generator
    """The source of every random number of this micro-batch."""


def make_batch(
    pipeline: DiffusionPipeline, args: TrainingArguments, m: int, images: Images, device: torch.device
) -> Batch:
    """Micro-batch number m of a run; sets the global random state, for dropout."""
    generator = torch.Generator(device).manual_seed(seed_for(args.seed, _NOISE, m))
    torch.manual_seed(seed_for(args.seed, _DROPOUT, m))
    pixels = images.images.to(device, non_blocking=True)
    if args.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    x0 = encode(pipeline, pixels, generator)
    if classes_of(pipeline) is None:
        return Batch(x0, {}, generator)
    labels = images.labels.to(device, non_blocking=True)
    if (null_class := null_class_of(pipeline)) is not None:
        dropped = torch.rand(labels.shape, generator=generator, device=device) < args.label_drop
        labels = torch.where(dropped, null_class, labels)
    return Batch(x0, {"class_labels": labels}, generator)
