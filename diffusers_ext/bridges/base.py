r"""What all bridges share: principal directions of the data, and a law of the whitened coordinates in them.

The rows of U, (r, d), are the first r principal directions of the data, s^2 the variances of x_T along them:

    x_T = m + U' (s * w) + rest,        w ~ q,  rest ~ N(0, floor) in the orthogonal complement,
    log nu(x_T) = log q(w) - sum log s - 1/2 (|rest|^2 / floor + (d - r) log(2 pi floor)),   w = U (x_T - m) / s.

m, s and U follow from the moments of x0 and need no noise: m = alpha_T E x0, s^2 = alpha_T^2 lambda + sigma_T^2 with
lambda the eigenvalues of Cov x0, decreasing; the floor is alpha_T^2 times the mean of the discarded ones, + sigma_T^2,
the best scalar but not an exact law. With r = d nothing is discarded. The subclasses differ in q, the law of the
whitened coordinates: it is N(0, I) for all of them, or for all but the leading l, which follow another law. Sampling
maps one draw n ~ N(0, I) of the shape of the data: U n becomes w, (I - U'U) n becomes the rest.

Shapes: d is the product of `shape`, K the number of classes, 1 without classes: each class has its own m, U, s, floor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log, pi, prod
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from ..interop import VPSchedule, noise_schedule, require_vp, stored_schedule, stored_scheduler
from ..randomness import randn
from .moments import Law, count_classes, read_batches, read_labels, split_by_class

LATENT_RANK = 32
"""By default a mixture or a flow models this many leading directions."""


class Bridge(ModelMixin, ConfigMixin, ABC):
    """A model nu of the law of x_T. A new one is N(0, I); `fit` of a subclass makes one for given data.

    Tensors are float32 at least: casting to half precision does not change them.

    Args:
        shape: the shape of a sample without the batch dimension, (C, H, W) for images.
        max_diffusion_time: T, in (0, 1].
        scheduler: class name and configuration of the scheduler that belongs to the score model.
        rank: r, from 1 to d.
        num_classes: K, of a class-conditional bridge.
        measured_on: a note for people on how it was fitted: data, number of samples, seed, settings.

    Attributes:
        mean: m, (K, *shape).
        directions: U, (K, r, d), orthonormal rows.
        scales: s, (K, r).
        floor: variance of the rest in each direction, (K,); it has no effect where r = d.

    Raises:
        ValueError: rank or num_classes are out of range.
    """

    _keep_in_fp32_modules: ClassVar = ["mean", "directions", "scales", "floor"]  # a list, or diffusers ignores it

    mean: Tensor
    directions: Tensor
    scales: Tensor
    floor: Tensor

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        max_diffusion_time: float,
        scheduler: Mapping[str, Any],
        rank: int,
        num_classes: int | None = None,
        measured_on: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        d, classes = prod(shape), count_classes(num_classes)
        if not 1 <= rank <= d:
            raise ValueError(f"rank must be from 1 to the {d} dimensions of the data, got {rank}")
        self.register_buffer("mean", torch.zeros(classes, *shape))
        self.register_buffer("directions", torch.eye(rank, d).repeat(classes, 1, 1))
        self.register_buffer("scales", torch.ones(classes, rank))
        self.register_buffer("floor", torch.ones(classes))

    @abstractmethod
    def _sample_latent(self, noise: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        """Draw w ~ q of class k, (n, l), from noise ~ N(0, I), (n, l)."""

    @abstractmethod
    def _latent_log_prob(self, w: Tensor, k: int) -> Tensor:
        """Return log q(w) of class k, (n,), for w (n, l)."""

    @property
    def latent_rank(self) -> int:
        """l: q models the l leading ones of the r coordinates."""
        return self.config.get("latent_rank", self.config.rank)

    @property
    def schedule(self) -> VPSchedule:
        """The noise levels of the stored scheduler."""
        return require_vp(stored_schedule(self.config.scheduler))

    @property
    def timestep(self) -> int:
        """The timestep of T: a sampler that starts from this bridge begins there."""
        return self.schedule.last_timestep(self.config.max_diffusion_time)

    def check(
        self, scheduler: Any, *, max_diffusion_time: float | None = None, shape: Sequence[int] | None = None
    ) -> None:
        """Check that a sampler can start here: that the bridge was fitted for its schedule, its T and its samples.

        Args:
            scheduler: a scheduler of diffusers.
            max_diffusion_time: the sampler's T; by default that of the scheduler's configuration, where it has one.
            shape: the shape of the sampler's samples without the batch dimension; not checked by default.

        Raises:
            ValueError: something differs, which the message names, or the schedule is not variance-preserving.
        """
        schedule, own, fitted = require_vp(noise_schedule(scheduler)), self.schedule, self.config.max_diffusion_time
        if max_diffusion_time is None:
            max_diffusion_time = scheduler.config.get("max_diffusion_time", fitted)
        differ, timestep = [], schedule.last_timestep(max_diffusion_time)
        if timestep != self.timestep:
            differ.append(
                f"max_diffusion_time={max_diffusion_time} is timestep {timestep}, it was fitted at {fitted}, which is "
                f"timestep {self.timestep}"
            )
        n = min(len(own.sigmas), len(schedule.sigmas))
        same_steps = own.num_train_timesteps == schedule.num_train_timesteps
        if not (same_steps and torch.allclose(own.sigmas[:n], schedule.sigmas[:n], rtol=1e-4)):
            differ.append("the noise schedule (betas, num_train_timesteps) is another one")
        if shape is not None and tuple(shape) != tuple(self.config.shape):
            differ.append(f"samples have the shape {tuple(shape)}, it was fitted with {tuple(self.config.shape)}")
        if differ:
            raise ValueError(f"this bridge belongs to another model or setting: {'; '.join(differ)}")

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, class_labels: Tensor | None = None) -> Tensor:
        """Draw x_T ~ nu, (n, *shape), in the coordinates of the scheduler's samples.

        Args:
            n: the number of samples.
            generator: the source of all randomness; on any device.
            class_labels: (n,) integers; a class-conditional bridge needs them, others ignore them.

        Raises:
            ValueError: n is below 1, or labels are missing, not n or out of range.
        """
        noise = randn((n, *self.config.shape), generator, device=self.mean.device, dtype=self.mean.dtype)

        def draw(noise: Tensor, k: int) -> Tensor:
            u, directions = noise @ self.directions[k].T, self.directions[k]
            rest = noise - u @ directions
            leading = self._sample_latent(u[:, : self.latent_rank], k, generator)
            w = torch.cat([leading, u[:, self.latent_rank :]], 1)
            return self.mean[k].flatten() + (self.scales[k] * w) @ directions + self.floor[k].sqrt() * rest

        return self._by_class(draw, noise.flatten(1), class_labels).reshape(noise.shape)

    def log_prob(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return log nu(x), (n,), in nats, normalised; differentiable.

        Args:
            x: (n, *shape), in the coordinates of the scheduler's samples.
            class_labels: as for `sample`.

        Raises:
            ValueError: x is of another shape, or as `sample` does.
        """
        if tuple(x.shape[1:]) != tuple(self.config.shape):
            raise ValueError(f"samples of x have the shape {tuple(x.shape[1:])}, not {tuple(self.config.shape)}")

        def density(x: Tensor, k: int) -> Tensor:
            w = self._whiten(x, k)
            rest = x - self.mean[k].flatten() - (self.scales[k] * w) @ self.directions[k]
            left = x.shape[1] - w.shape[1]
            log_rest = -0.5 * (rest.square().sum(1) / self.floor[k] + left * (2 * pi * self.floor[k]).log())
            log_q = self._latent_log_prob(w[:, : self.latent_rank], k) + standard_log_prob(w[:, self.latent_rank :])
            return log_q - self.scales[k].log().sum() + (log_rest if left else 0)

        return self._by_class(density, x.flatten(1).to(self.mean), class_labels)

    def _whiten(self, x: Tensor, k: int) -> Tensor:
        """Return w, (n, r), of x (n, d)."""
        return (x - self.mean[k].flatten()) @ self.directions[k].T / self.scales[k]

    def _by_class(self, function: Callable[[Tensor, int], Tensor], x: Tensor, class_labels: Tensor | None) -> Tensor:
        """Apply function(x of class k, k) to each class, and return the results in the order of x.

        Labels are read on the CPU: nothing else waits for the device.
        """
        if len(x) == 0:
            raise ValueError("there must be at least one sample")
        with torch.autocast(x.device.type, enabled=False):
            if self.config.num_classes is None:
                return function(x, 0)
            labels = read_labels(class_labels, len(x), self.config.num_classes)
            parts = enumerate(split_by_class(x, labels, self.config.num_classes))
            order = labels.argsort(stable=True)
            return torch.cat([function(part, k) for k, part in parts if len(part)])[order.argsort().to(x.device)]

    def _alpha_sigma(self) -> tuple[float, float]:
        """Return alpha_T and sigma_T."""
        sigma = self.schedule.sigmas[self.timestep]
        alpha = self.schedule.scale(sigma)
        return alpha.item(), (alpha * sigma).item()

    @torch.no_grad()
    def _set_moments(self, laws: Iterable[Law]) -> None:
        """Set m, U, s and the floor of each class from the moments of its x0.

        Raises:
            ValueError: a covariance of x_T is not positive.
        """
        alpha, sigma = self._alpha_sigma()
        for k, law in enumerate(laws):
            variances, floor = alpha**2 * law.variances + sigma**2, alpha**2 * law.floor + sigma**2
            if not (variances > 0).all() or not floor > 0:
                raise ValueError(f"the covariance is singular: at T its smallest variance is {variances.min():.3g}")
            self.mean[k] = alpha * law.mean.reshape(self.mean.shape[1:])
            self.directions[k], self.scales[k], self.floor[k] = law.directions, variances.sqrt(), floor

    def _latents(self, batches: Iterable[Any], progress: bool) -> Latents:
        """Whiten all data, in a pass over them; this moves the bridge to their device."""
        alpha, sigma = self._alpha_sigma()
        rows, all_labels = [], []
        for x0, labels in read_batches(batches, self.config.num_classes, progress, "projecting"):
            x_T = (alpha * x0.flatten(1)).to(self.to(x0.device).mean)
            w = [self._whiten(part, k) for k, part in enumerate(split_by_class(x_T, labels, len(self.mean)))]
            rows.append(torch.cat(w)[:, : self.latent_rank])
            all_labels.append(labels.sort(stable=True).values.to(x0.device))
        return Latents(torch.cat(rows), torch.cat(all_labels), sigma / self.scales[:, : self.latent_rank])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bridge:
        """Move and cast, but not below float32: principal directions in half precision are not orthonormal."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            low = tensor.is_floating_point() and moved.dtype.itemsize < torch.float32.itemsize
            return tensor.to(moved.device) if low else moved

        return super()._apply(keep, recurse)


class Latents(NamedTuple):
    """The leading whitened coordinates of the data before noise is added; `draw` adds it.

    Args:
        signal: w of alpha_T x0, (N, l).
        labels: (N,); 0 without classes.
        noise_scales: sigma_T / s, (K, l).
    """

    signal: Tensor
    labels: Tensor
    noise_scales: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return w of x_T of the samples `index`, (n, l), with new noise for each, and their labels, (n,)."""
        signal, labels = self.signal[index.to(self.signal.device)], self.labels[index.to(self.labels.device)]
        return signal + self.noise_scales[labels] * randn(signal.shape, generator, device=signal.device), labels


def checked_scheduler(scheduler: Any, max_diffusion_time: float) -> dict[str, Any]:
    """Return what a bridge stores of the scheduler, after checking that it has a timestep of T.

    `fit` calls it before its first pass over the data.

    Raises:
        ValueError: T is not in (0, 1], or the schedule is not variance-preserving.
    """
    require_vp(noise_schedule(scheduler)).last_timestep(max_diffusion_time)
    return stored_scheduler(scheduler)


def default_latent_rank(rank: int) -> int:
    """Return l of a fit that names none."""
    return min(LATENT_RANK, rank)


def require_latent_rank(latent_rank: int, rank: int) -> None:
    """Check that l is in range.

    Raises:
        ValueError: it is not.
    """
    if not 1 <= latent_rank <= rank:
        raise ValueError(f"latent_rank must be from 1 to the rank, {rank}, got {latent_rank}")


def standard_log_prob(u: Tensor) -> Tensor:
    """Return log N(u; 0, I), over the last dimension."""
    return -0.5 * (u.square().sum(-1) + u.shape[-1] * log(2 * pi))
