"""Random numbers: seeds, and the one rule for where numbers are drawn.

They are drawn on the device of their generator and then moved, so that a CPU generator gives the same numbers whatever
the accelerator. Without a generator they are drawn on the device where they are asked for, from the global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What random numbers are for. Each has a number of its own, which is part of their seed."""

    ORDER = 0
    """The order of the images in an epoch."""
    AUGMENTATION = 1
    """Crops and flips of an image."""
    NOISE = 2
    """A micro-batch of the training: latents, noise levels, noise, dropped conditions."""
    DROPOUT = 3
    """The network's own dropout."""
    VALIDATION = 4
    """The noise of the denoising loss by noise level."""
    BEST = 5
    """Samples that decide which pipeline is the best."""
    DISCRIMINATOR = 6
    """The first weights of a discriminator."""
    PROJECTION = 7
    """Which step a discriminator judges."""


@dataclass(frozen=True)
class Seeds:
    """The seeds of a run: a function of its own seed, of what the numbers are for, and of which of them.

    Seeds(0)(Stream.NOISE, 7)                        # a seed for micro-batch 7
    Seeds(0).generator(Stream.NOISE, 7, device="cuda")
    """

    seed: int

    def __call__(self, stream: Stream, *numbers: int) -> int:
        """A well-mixed 63-bit seed."""
        return seed_for(self.seed, stream, *numbers)

    def generator(self, stream: Stream, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator with this seed."""
        return torch.Generator(device).manual_seed(self(stream, *numbers))


def seed_for(*parts: int) -> int:
    """A well-mixed 63-bit seed of non-negative integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def randn(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise."""
    return torch.randn(tuple(shape), generator=generator, device=_source(generator, device), dtype=dtype).to(device)


def randn_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of `x`."""
    return randn(x.shape, generator, device=x.device, dtype=x.dtype)


def rand(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw from the uniform law on [0, 1)."""
    return torch.rand(tuple(shape), generator=generator, device=_source(generator, device), dtype=dtype).to(device)


def rand_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw from the uniform law on [0, 1), of the shape, dtype and device of `x`."""
    return rand(x.shape, generator, device=x.device, dtype=x.dtype)


def randint(
    high: int,
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw integers from 0 to high - 1, each equally likely; int64."""
    return torch.randint(high, tuple(shape), generator=generator, device=_source(generator, device)).to(device)


def categorical(weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw n indices of the weights (K,), each in proportion to its weight. The weights stay on their device, unlike
    those of `torch.multinomial`, which on a CPU draws the same."""
    u = rand((n,), generator, device=weights.device, dtype=torch.float64)
    below = weights.cumsum(0)
    return torch.searchsorted((below / below[-1]).double(), u)


def _source(generator: torch.Generator | None, device: torch.device | str) -> torch.device | str:
    return device if generator is None else generator.device
