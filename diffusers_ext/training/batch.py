"""The micro-batch that the loop yields: samples, their conditions, and the source of random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.batches import Images
from ..data.latent_cache import LatentCache
from ..data.prepared import RunData
from ..data.sources import HubStream
from ..randomness import Seeds, Stream
from ..subjects import Condition, Subject
from .arguments import TrainingArguments

FEWEST = 8
"""Rows of a call of the network: a GPU takes nearly as long for fewer."""


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
    data_noise: Tensor | None = None
    """The standard deviation of the noise of each sample, (B,), where the data have any: x0 is not clean then."""

    def part(self, share: float) -> tuple[slice, float]:
        """Return the rows that a loss is computed of, and its weight.

        Where `part_of` asks for a part of the micro-batches, these are drawn from the seed, and the weight keeps the
        mean; of the others it is no row. All devices compute the loss in the same of their micro-batches. So there, and
        only there, a run depends on how many devices share its accumulation.
        """
        rows, chance = part_of(len(self.x0), share)
        if chance == 1:
            return slice(rows), 1.0
        drawn = torch.rand((), generator=self.seeds.generator(Stream.PART, self.turn)).item() < chance
        return slice(rows if drawn else 0), 1 / chance


def part_of(size: int, share: float) -> tuple[int, float]:
    """Return of how many rows a loss on a share of the data is computed, and in which part of the micro-batches.

    These are the first `share` of the rows, rounded up, in every micro-batch; but where that is less than a row, or
    less than half of the rows and than `FEWEST`, more rows in some of the micro-batches.
    """
    n = share * size
    rows = max(math.ceil(n), min(math.ceil(size / 2), FEWEST))
    return rows, 1.0 if n >= 1 and rows == math.ceil(n) else n / rows


def make_batch(
    subject: Subject,
    args: TrainingArguments,
    seeds: Seeds,
    m: int,
    images: Images,
    device: torch.device,
    world: int = 1,
    cache: LatentCache | None = None,
) -> Batch:
    """Make micro-batch number m of a run, and set the global random state, for dropout."""
    generator = seeds.generator(Stream.NOISE, m, device=device)
    torch.manual_seed(seeds(Stream.DROPOUT, m))
    share = (args.proportion_empty_prompts or 0.0) if subject.takes_captions else args.label_drop
    if cache is not None:
        assert images.indices is not None
        x0, condition = cache.rows(images.indices, generator)
        resolution = cache.transform.resolution
    else:
        pixels = images.images.to(device, non_blocking=True)
        if args.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        x0, resolution = subject.encode(pixels, generator), pixels.shape[-1]
        condition = subject.conditions(replace(images, labels=images.labels.to(device, non_blocking=True)))
    noise = None if images.data_noise is None else images.data_noise.to(device, non_blocking=True)
    return Batch(x0, subject.drop(condition, share, generator, resolution), generator, m // world, seeds, noise)


def fill_cache(args: TrainingArguments, subject: Any, data: RunData, accelerator: Accelerator) -> LatentCache:
    """Encode the images and captions of a run once, and move the encoders away from the GPU.

    Raises:
        InputError: the disk has not enough space.
    """
    from datasets import config

    root = Path(args.cache_dir or config.HF_DATASETS_CACHE)
    assert not isinstance(data.source, HubStream)
    cache = LatentCache(subject, data.source, data.transform, root, data.mark, args.max_train_samples)
    cache.fill(accelerator, args.train_batch_size)
    subject.null_condition(data.transform.resolution)
    for other in subject.others:
        other.to("cpu")
    return cache
