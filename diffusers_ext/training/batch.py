"""The micro-batch that the loop yields: samples, their conditions, and the source of random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data.batches import Images
from ..randomness import Seeds, Stream
from ..subjects import Condition, Subject
from .arguments import TrainingArguments


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device."""

    x0: Tensor
    """Clean samples (B, C, H, W): images in [-1, 1], or latents where the pipeline has an autoencoder."""
    cond: Condition
    """The condition of the samples, some rows replaced by the null condition: keyword arguments of the network."""
    generator: torch.Generator
    """The source of every random number of this micro-batch."""
    turn: int = 0
    """The number of the micro-batches before it on the same device: the same on all devices."""
    seeds: Seeds = field(default_factory=lambda: Seeds(0))
    """The seeds of the run."""

    def part(self, share: float) -> tuple[slice, float]:
        """Return the rows that a loss is computed of, and its weight.

        These are the first `share` of the rows, rounded up. Where that is less than one row it is one row in so many of
        the micro-batches, drawn from the seed, with the weight that keeps the mean: 1 / (share B), and else no row.
        """
        n = share * len(self.x0)
        if n >= 1:
            return slice(math.ceil(n)), 1.0
        drawn = torch.rand((), generator=self.seeds.generator(Stream.PART, self.turn)).item() < n
        return slice(int(drawn)), 1 / n


def make_batch(
    subject: Subject,
    args: TrainingArguments,
    seeds: Seeds,
    m: int,
    images: Images,
    device: torch.device,
    world: int = 1,
) -> Batch:
    """Make micro-batch number m of a run, and set the global random state, for dropout."""
    generator = seeds.generator(Stream.NOISE, m, device=device)
    torch.manual_seed(seeds(Stream.DROPOUT, m))
    pixels = images.images.to(device, non_blocking=True)
    if args.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    x0 = subject.encode(pixels, generator)
    condition = subject.conditions(replace(images, labels=images.labels.to(device, non_blocking=True)))
    share = (args.proportion_empty_prompts or 0.0) if subject.takes_captions else args.label_drop
    return Batch(x0, subject.drop(condition, share, generator, pixels.shape[-1]), generator, m // world, seeds)
