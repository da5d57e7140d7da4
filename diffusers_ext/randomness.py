"""Random numbers: seeds, and the one rule for where numbers are drawn.

They are drawn on the device of their generator and then moved, so that a CPU generator gives the same numbers whatever
the accelerator. Without a generator they are drawn on the device where they are asked for, from the global state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

MAX_SEED = 2**63 - 1
"""The largest seed of a run, which every generator takes."""
RULE = 2
"""The rule by which seeds are made now. A checkpoint stores the rule of its run, which goes on under it."""


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
    WEIGHTS = 8
    """The first weights of a new network."""
    GRID = 9
    """The pictures of a sample grid."""
    BRIDGE_LATENTS = 10
    """Latents that a bridge is fitted to."""
    BRIDGE_REPORT = 11
    """The likelihood bound by diffusion time."""
    CALIBRATION_LATENTS = 12
    """Latents that the mean error is measured on."""
    CALIBRATION_NOISE = 13
    """Their noise."""
    SPLIT = 14
    """Which real images are the reference of an evaluation."""
    SAMPLES = 15
    """What an evaluation draws."""
    CLASSES = 16
    """The classes of what it draws."""
    DEQUANTIZATION = 17
    """The dequantisation of images, and the estimates of their likelihood."""
    PART = 18
    """In which micro-batches a loss is computed that takes less than one row of each."""


@dataclass(frozen=True)
class Seeds:
    """The seeds of a run: a function of its own seed, of what the numbers are for, and of which of them.

        Seeds(0)(Stream.NOISE, 7)                        # a seed for micro-batch 7
        Seeds(0).generator(Stream.NOISE, 7, device="cuda")

    Rule 2 hashes the seed, the stream and the numbers as a text, so that no two lists of numbers share a seed. Rule 1,
    of version 0.1.0, pads a list with zeros: (0, 6) has the seed of (0, 6, 0). It is kept for checkpoints of that time.
    """

    seed: int
    rule: int = RULE

    def __call__(self, stream: Stream, *numbers: int) -> int:
        """A well-mixed 63-bit seed."""
        if self.rule == 1:
            return self.seed if stream == Stream.GRID else _padded(self.seed, stream, *numbers)
        digest = hashlib.sha256(" ".join(map(str, (self.seed, int(stream), *numbers))).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, stream: Stream, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator with this seed."""
        return torch.Generator(device).manual_seed(self(stream, *numbers))


def _padded(*parts: int) -> int:
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
