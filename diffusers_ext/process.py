r"""How noise is added.

Everything in this package is written in the variance-exploding coordinates of Karras et al.,

    x = x0 + sigma n,        n ~ N(0, I),

where `x0` is a data point, `sigma` the noise level and `x` the noisy sample. A schedule that scales its samples (the
variance-preserving ones, flow matching) is a change of units, made in `diffusers_ext.interop` and nowhere else.

Shapes: `x` and `x0` are (B, ...) of any rank; `sigma` is a number, a tensor of shape () or one of shape (B,), aligned
with the first dimension of `x`.

Data in a box can keep to it: `ReflectedProcess` folds the noise back at the faces. Tweedie's formula is false there:
the score of uniform data is 0 at every noise level, and yet E[x0 | x] is not x. The score is what all processes share.
In each coordinate it is that of one point of the box, score = d/dx log p(x | point): the kernel's score rises strictly
with x0, and the score of the data is a mean of such.

References: Elucidating the Design Space of Diffusion-Based Generative Models (Karras, Aittala, Aila, Laine, 2022,
arXiv 2206.00364), section 2; Reflected Diffusion Models (Lou, Ermon, 2023, arXiv 2304.04740).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log, pi

import torch
from torch import Tensor

from .hypercube import heat_kernel_bridge, heat_kernel_flow, heat_kernel_score, reflect
from .randomness import rand, randn, randn_like
from .shapes import align as align


class Process(ABC):
    """A diffusion that takes data to noise; the meaning of a network's output depends on it."""

    @abstractmethod
    def perturb(self, x0: Tensor, sigma: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
        """Draw x ~ p(x | x0) at noise level `sigma`."""

    @abstractmethod
    def target_score(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        """Return grad_x log p(x | x0), the regression target of denoising score matching."""

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
        """Return the log density of the law of `sample_prior`, (B,), in nats."""


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


@dataclass(frozen=True)
class ReflectedProcess(Process):
    """x = x0 + sigma n, folded back at the faces of the box [low, high]^d; the prior is uniform on it.

    `sigma` is in the units of the data. The law at sigma is uniform up to exp(-(pi sigma / (high - low))^2 / 2); the
    paper's sigma_max is 5 widths of the box.

    Raises:
        ValueError: low is not below high, or one of them is not finite.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.low) and isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the box [low, high] = [{self.low}, {self.high}] is empty or not finite")

    @property
    def width(self) -> float:
        """high - low."""
        return self.high - self.low

    @property
    def centre(self) -> float:
        """(low + high) / 2."""
        return (self.low + self.high) / 2

    def perturb(self, x0: Tensor, sigma: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
        return self.constrain(x0 + align(sigma, x0) * randn_like(x0, generator))

    def target_score(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        return heat_kernel_score(self._in_unit_box(x), self._in_unit_box(x0), sigma / self.width) / self.width

    def flow(self, x: Tensor, x0: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        """Return where the probability flow of p(. | x0) takes x from sigma to sigma_next, (B, ...)."""
        units = (self._in_unit_box(x), self._in_unit_box(x0), sigma / self.width, sigma_next / self.width)
        return self._from_unit_box(heat_kernel_flow(*units))

    def posterior(
        self,
        x: Tensor,
        x0: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        noise: Tensor,
        choice: Tensor,
    ) -> Tensor:
        """Draw x_next ~ p(x_next | x, x0) at sigma_next < sigma, exactly; `noise` is N(0, I), `choice` U[0, 1)."""
        units = (self._in_unit_box(x), self._in_unit_box(x0), sigma / self.width, sigma_next / self.width)
        return self._from_unit_box(heat_kernel_bridge(*units, noise, choice))

    def constrain(self, x: Tensor) -> Tensor:
        """Fold x back into the box; points of the box stay as they are, to the last bit."""
        folded = self._from_unit_box(reflect(self._in_unit_box(x)))
        return torch.where((x < self.low) | (x > self.high), folded, x)

    def orientation(self, x: Tensor) -> Tensor:
        """Return the derivative of `constrain`: 1 where folding keeps directions (in the box), else -1."""
        turned = 1 - 2 * self._in_unit_box(x).floor().remainder(2)
        return torch.where((x < self.low) | (x > self.high), turned, 1)

    def sample_prior(
        self,
        shape: Sequence[int],
        sigma_max: float,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw from the uniform law of the box, whatever `sigma_max`."""
        uniform = rand(shape, generator, device=device, dtype=dtype)
        return (self.low + self.width * uniform).clamp(self.low, self.high)

    def log_prior(self, x: Tensor, sigma_max: float) -> Tensor:
        x = x.flatten(1)
        inside = ((x >= self.low) & (x <= self.high)).all(1)
        return x.new_full((len(x),), -x.shape[1] * log(self.width)).where(inside, -torch.inf)

    def require_inside(self, x: Tensor, name: str = "x0") -> None:
        """Check that data lie in the box; this waits for the device.

        Raises:
            ValueError: they do not; the message gives their range.
        """
        if x.numel() == 0:
            raise ValueError(f"{name} of shape {tuple(x.shape)} is empty")
        low, high = x.aminmax()  # tensors, for the faces are rounded to their dtype where they are compared
        if not (low >= self.low and high <= self.high):
            raise ValueError(f"{name} must lie in [{self.low}, {self.high}], it is from {low:.6g} to {high:.6g}")

    def _in_unit_box(self, x: Tensor) -> Tensor:
        return (x - self.low) / self.width

    def _from_unit_box(self, x: Tensor) -> Tensor:
        return (self.low + self.width * x).clamp(self.low, self.high)
