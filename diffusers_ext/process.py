r"""How noise is added.

Everything in this package is written in the variance-exploding coordinates of Karras et al.,

    x = x0 + sigma n,        n ~ N(0, I),

where `x0` is a data point, `sigma` the noise level and `x` the noisy sample. A schedule that scales its samples (the
variance-preserving ones, flow matching) is a change of units, made in `diffusers_ext.interop` and nowhere else.

Shapes: `x` and `x0` are (B, ...) of any rank; `sigma` is a number, a tensor of shape () or one of shape (B,), aligned
with the first dimension of `x`.

Reference: Elucidating the Design Space of Diffusion-Based Generative Models (Karras, Aittala, Aila, Laine, 2022,
arXiv 2206.00364), section 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor


def align(sigma: Tensor | float, x: Tensor) -> Tensor:
    """View `sigma`, () or (B,), so that it broadcasts over `x` (B, ...), in the dtype and on the device of `x`.

    Raises:
        ValueError: `sigma` has neither shape () nor one entry for each sample of `x`.
    """
    if not isinstance(sigma, Tensor):
        return torch.full((), sigma, dtype=x.dtype, device=x.device)
    if sigma.ndim == 0:
        return sigma.to(x)
    if sigma.shape != x.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; x of shape {tuple(x.shape)} needs () or ({len(x)},)")
    return sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))


def randn(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise on `device`, drawn on the generator's own device: a CPU generator gives the same noise
    whatever the accelerator."""
    drawn_on = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=drawn_on, dtype=dtype).to(device)


def randn_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `x`."""
    return randn(x.shape, generator, device=x.device, dtype=x.dtype)


class Process(ABC):
    """A diffusion that takes data to noise; what a network's output means depends on it."""

    @abstractmethod
    def perturb(self, x0: Tensor, sigma: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
        """Draw x ~ p(x | x0) at noise level `sigma`."""

    @abstractmethod
    def target_score(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        """grad_x log p(x | x0), the regression target of denoising score matching."""

    @abstractmethod
    def constrain(self, x: Tensor) -> Tensor:
        """Bring a sampler's iterate back to where the process lives."""

    @abstractmethod
    def sample_prior(
        self,
        shape: Sequence[int],
        sigma_max: float,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw the start of a reverse process at noise level `sigma_max`."""

    @abstractmethod
    def log_prior(self, x: Tensor, sigma_max: float) -> Tensor:
        """Log density of `sample_prior`, (B,), in nats."""


@dataclass(frozen=True)
class GaussianProcess(Process):
    """x = x0 + sigma n on the whole space; the prior is N(0, sigma_max^2 I)."""

    def perturb(self, x0: Tensor, sigma: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
        return x0 + align(sigma, x0) * randn_like(x0, generator)

    def target_score(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        return (x0 - x) / align(sigma, x) ** 2

    def constrain(self, x: Tensor) -> Tensor:
        return x

    def sample_prior(
        self,
        shape: Sequence[int],
        sigma_max: float,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return sigma_max * randn(shape, generator, device=device, dtype=dtype)

    def log_prior(self, x: Tensor, sigma_max: float) -> Tensor:
        z = x.flatten(1) / sigma_max
        return -0.5 * z.square().sum(1) - z.shape[1] * (log(sigma_max) + 0.5 * log(2 * pi))
