r"""Data laws whose diffusion is known exactly, in float64: the truth that the other tests compare with.

A law is given at a noisy point h = a x0 + b n (n ~ N(0, I)) in any units: `a = 1, b = sigma` are those of the package,
`a = sqrt(abar), b = sqrt(1 - abar)` those of the variance-preserving schedulers, `a = 1 - u, b = u` flow matching.

`posterior_mean` (conditioning of Gaussians) and `log_prob` (convolution of Gaussians) are written independently of each
other; `test_process.py` checks one against the gradient of the other (Tweedie) and the flow against its own ODE.

`network_of` turns a law into the perfect network of a scheduler, from the definitions of what it predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor

from diffusers_ext import Denoiser
from diffusers_ext.score import Coefficients


def along(sigma: Tensor | float, x: Tensor) -> Tensor:
    """`sigma`, a number or one entry for each sample, broadcast over x (B, ...)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) if sigma.ndim else sigma


@dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, diag variances_k): weights (K,), means and variances (K, *shape)."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.means.shape[1:], dtype=torch.float64, generator=generator)
        return self.means[k] + self.variances[k].sqrt() * noise

    def _components(self, h: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        """log (weight_k density_k(h)), (K, B)."""
        a, b = along(a, h), along(b, h)
        rows = []
        for w, m, v in zip(self.weights, self.means, self.variances, strict=True):
            total = (a**2 * v + b**2).expand_as(h)
            log_density = -0.5 * ((h - a * m) ** 2 / total + torch.log(2 * pi * total))
            rows.append(w.log() + log_density.reshape(len(h), -1).sum(1))
        return torch.stack(rows)

    def log_prob(self, h: Tensor, sigma: Tensor | float, a: Tensor | float = 1.0) -> Tensor:
        """log p(h), (B,)."""
        return self._components(h.double(), a, sigma).logsumexp(0)

    def posterior_mean(self, h: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        """E[x0 | h] for h = a x0 + b n."""
        h = h.double()
        shares = self._components(h, a, b).softmax(0)
        a, b = along(a, h), along(b, h)
        total = torch.zeros_like(h)
        for share, m, v in zip(shares, self.means, self.variances, strict=True):
            gain = a * v / (a**2 * v + b**2)
            total = total + along(share, h) * (m + gain * (h - a * m))
        return total

    def denoiser(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x] for x = x0 + sigma n."""
        return self.posterior_mean(x, 1.0, sigma)

    def flow(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The probability-flow map of scalar data, x (B,): the monotone transport of the law at sigma to sigma_next."""
        q = self._cdf(x, sigma)
        low, high = torch.full_like(x, -50.0), torch.full_like(x, 50.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self._cdf(middle, sigma_next) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _cdf(self, x: Tensor, sigma: float) -> Tensor:
        scaled = (x - self.means[:, None]) / (self.variances[:, None] + sigma**2).sqrt()
        return (self.weights[:, None] * torch.special.ndtr(scaled)).sum(0)


class Gaussian(Mixture):
    """N(mean, diag variance), of any shape; numbers make scalar data of shape ()."""

    def __init__(self, mean: Tensor | float, variance: Tensor | float) -> None:
        mean, variance = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (mean, variance)))
        super().__init__(torch.ones(1, dtype=torch.float64), mean[None], variance[None])

    @property
    def mean(self) -> Tensor:
        return self.means[0]

    @property
    def variance(self) -> Tensor:
        return self.variances[0]

    def flow(self, x: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        """The affine map between the laws at the two levels; any shape."""
        start, end = self.variance + along(sigma, x) ** 2, self.variance + along(sigma_next, x) ** 2
        return self.mean + (end / start).sqrt() * (x - self.mean)


@dataclass(frozen=True)
class Folded:
    """A mixture with its coordinates folded into the box [low, high] by reflection at the faces; at every sigma of a
    reflected process it is the free one, folded, since folding commutes with adding noise and folding again.

    The density is the sum over all points that fold onto x, plainly: `images` of them on each side.
    """

    law: Mixture
    low: float = -1.0
    high: float = 1.0
    images: int = 40

    def fold(self, y: Tensor) -> Tensor:
        period = 2 * (self.high - self.low)
        u = (y - self.low) % period
        return self.low + torch.minimum(u, period - u)

    def sample(self, n: int, generator: torch.Generator, sigma: float = 0.0) -> Tensor:
        y = self.law.sample(n, generator)
        return self.fold(y + sigma * torch.randn(y.shape, dtype=y.dtype, generator=generator))

    def log_prob(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log p_sigma(x) with respect to dx, (B,)."""
        period = 2 * (self.high - self.low)
        shifts = period * torch.arange(-self.images, self.images + 1, dtype=torch.float64)
        x = x.double()
        places = torch.cat([x + s.reshape(-1, *[1] * x.ndim) for s in (shifts, shifts)])  # (images, B, ...)
        places[len(shifts) :] = 2 * self.low - places[len(shifts) :]
        rows = []
        for w, m, v in zip(self.law.weights, self.law.means, self.law.variances, strict=True):
            total = (v + along(sigma, x) ** 2).expand_as(x)
            coordinates = (-0.5 * ((places - m) ** 2 / total + torch.log(2 * pi * total))).logsumexp(0)
            rows.append(w.log() + coordinates.reshape(len(x), -1).sum(1))
        return torch.stack(rows).logsumexp(0)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        with torch.enable_grad():
            x = x.detach().double().requires_grad_()
            return torch.autograd.grad(self.log_prob(x, sigma).sum(), x)[0]

    def cdf(self, x: Tensor, sigma: float) -> Tensor:
        """P(X <= x) of scalar data, x (B,)."""
        period = 2 * (self.high - self.low)
        total = torch.zeros_like(x)
        for shift in (period * j for j in range(-self.images, self.images + 1)):
            total = total + self.law._cdf(x + shift, sigma) - self.law._cdf(2 * self.low - x + shift, sigma)
        return total


def two_bumps() -> Mixture:
    """A lopsided mixture on the line."""
    return Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])))


def image_mixture(*shape: int, seed: int = 0) -> Mixture:
    """Three components of a given shape, no symmetry anywhere."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(3, *shape, dtype=torch.float64, generator=g)
    variances = 0.05 + torch.rand(3, *shape, dtype=torch.float64, generator=g)
    return Mixture(torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), means, variances)


def plain_denoiser(function: Callable[..., Tensor]) -> Denoiser:
    """`Denoiser` of a function (x, sigma, **cond) -> x0, with no preconditioning to go wrong."""

    def identity(sigma: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(sigma), torch.zeros_like(sigma), torch.ones_like(sigma))

    return Denoiser(function, identity, lambda sigma: sigma)


def host_units(scheduler: Any, time: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of the scheduler's noisy sample a x0 + b n at the time that its network is told, by its own tables."""
    time = torch.as_tensor(time).double()
    if hasattr(scheduler, "precondition_outputs"):
        return torch.ones_like(time), (4 * time).exp()
    if scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction":
        u = time / scheduler.config.num_train_timesteps
        return 1 - u, u
    index = time.round().long()
    assert torch.allclose(index.double(), time, atol=1e-6), f"not on the grid of trained timesteps: {time}"
    abar = scheduler.alphas_cumprod.double()[index]
    return abar.sqrt(), (1 - abar).sqrt()


def raw_target(scheduler: Any, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """What a network of this scheduler is trained to output, given the clean data and the noise: the definitions."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    a, b = (along(v, x0) for v in host_units(scheduler, time))
    if hasattr(scheduler, "precondition_outputs"):  # solve the scheduler's own (affine) map for its raw output
        skip = scheduler.precondition_outputs(x0 + b * noise, torch.zeros_like(x0), b)
        slope = scheduler.precondition_outputs(torch.zeros_like(x0), torch.ones_like(x0), b)
        return (x0 - skip) / slope
    targets = {"epsilon": noise, "sample": x0, "v_prediction": a * noise - b * x0, "flow_prediction": noise - x0}
    return targets[kind]


def network_of(law: Mixture, scheduler: Any) -> Callable[..., Tensor]:
    """The perfect network of `scheduler` for data from `law`: E[target | its input], float64.

    Every target is affine in (x0, noise), and noise = (h - a x0)/b given the noisy sample h: the posterior mean of x0
    gives the posterior mean of the target.
    """

    def network(model_input: Tensor, time: Tensor) -> Tensor:
        time = torch.as_tensor(time).double().expand(len(model_input))
        a, b = host_units(scheduler, time)
        h = model_input.double()
        if hasattr(scheduler, "precondition_inputs"):
            h = h / scheduler.precondition_inputs(torch.ones_like(h), along(b, h))
        x0 = law.posterior_mean(h, a, b)
        return raw_target(scheduler, x0, (h - along(a, h) * x0) / along(b, h), time)

    return network
