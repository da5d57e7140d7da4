"""Whether a model of the whitened coordinates is better than the Gaussian, N(0, I), on data that it was not fitted to.

The measure is the mean of log q(w) over held-out samples, each with several draws of noise. A model that does not gain
is not used: with few samples in many dimensions, a flow or a mixture is far worse than the Gaussian.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .base import Latents

HELD_OUT = 0.1
"""The share of the samples that is held out."""
HELD_OUT_DRAWS = 4
"""The noise of each held-out sample is drawn so often."""

Batch = tuple[Tensor, Tensor]
"""w, (n, l), and labels, (n,)."""


def divide(n: int, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Divide the indices of n samples at random: those to fit to, and a share `held_out` to evaluate on.

    Raises:
        ValueError: one of the two is empty.
    """
    order, evaluated = torch.randperm(n, generator=generator), round(held_out * n)
    if not 0 < evaluated < n:
        raise ValueError(f"{held_out=} of {n} samples leaves none to train on, or none to evaluate on")
    return order[evaluated:], order[:evaluated]


def held_out_batch(latents: Latents, evaluated: Tensor, generator: torch.Generator) -> Batch:
    """Return the held-out samples, each with `HELD_OUT_DRAWS` draws of noise."""
    return latents.draw(evaluated.repeat(HELD_OUT_DRAWS), generator)


@torch.no_grad()
def held_out_loss(log_prob: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> float:
    """Return the mean of -log q(w) in nats."""
    return -log_prob(*batch).mean().item()


def warn_gaussian_is_kept(what: str) -> None:
    warnings.warn(f"no {what} was better than the Gaussian on held-out data: the Gaussian is kept", stacklevel=3)
