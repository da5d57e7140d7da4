r"""Auxiliary models of diffused data, from which sampling starts at a diffusion time T < 1: "bridges".

Sampling usually starts from N(0, I) at T = 1. At a shorter T that is not the law of the diffused data

    x_T = alpha_T x0 + sigma_T n,        alpha_T^2 + sigma_T^2 = 1,  n ~ N(0, I),

and a density nu(x_T) close to it takes the place of N(0, I). The law of x_T is smoother than that of the data, so a
weak model is enough. (Not a Schroedinger bridge.) With B = -2 ln alpha_T,

    KL[p_T || N(0, I)] = 1/2 |E x0|^2 e^-B + 1/4 |Cov x0 - I|^2 e^-2B + O(e^-3B),

and a Gaussian with the mean and covariance of x_T has neither of the two terms written: `GaussianBridge`, which every
other model has to beat. Coordinates are those of the samples of a variance-preserving scheduler, here and nowhere else
in the package; in (x, sigma) they are scale(sigma) (x0 + sigma n) with scale = alpha_T and sigma = sigma_T / alpha_T.

**One mechanism.** The rows of U, (r, d), are the first r principal directions of the data, s^2 the variances of x_T
along them:

    x_T = m + U' (s * w) + rest,        w ~ q,  rest ~ N(0, floor) in the orthogonal complement,
    log nu(x_T) = log q(w) - sum log s - 1/2 (|rest|^2 / floor + (d - r) log(2 pi floor)),   w = U (x_T - m) / s.

m, s and U are those of the moments of x0, without noise: m = alpha_T E x0, s^2 = alpha_T^2 lambda + sigma_T^2 with
lambda the eigenvalues of Cov x0, decreasing; the floor is alpha_T^2 times the mean of the discarded ones, + sigma_T^2,
the best scalar but not an exact law. With r = d nothing is left over. The three classes differ in q, the law of the
whitened coordinates: N(0, I); or that for all but the leading l of them, whose law is a mixture of Gaussians, of a
Dirichlet process, or a normalising flow. Sampling maps one draw n ~ N(0, I) of the shape of the data: U n becomes w,
(I - U'U) n becomes the rest.

Shapes: d is the product of `shape`, K the number of classes, 1 without classes: each class has its own m, U, s, floor.

References: How Much Is Enough? A Study on Diffusion Times in Score-Based Generative Models (Franzese, Rossi, Yang,
Finamore, Rossi, Filippone, Michiardi, 2022, arXiv 2206.05173); Neural Spline Flows (Durkan, Bekasov, Murray,
Papamakarios, 2019, arXiv 1906.04032). How the moments are estimated: `diffusers_ext.moments`.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite, log, pi, prod
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..interop import VPSchedule, noise_schedule, require_vp, stored_schedule, stored_scheduler
from ..moments import (
    Law,
    count_classes,
    data_moments,
    principal_law,
    read_batches,
    read_labels,
    require_repeatable,
    split_by_class,
)
from ..randomness import categorical, randn

LATENT_RANK = 32
"""Leading directions that a mixture or a flow models."""
EVALUATE_EVERY = 50
"""Steps of training between evaluations of a flow."""
HELD_OUT_DRAWS = 4
"""Draws of the noise for each held-out sample."""


class Bridge(ModelMixin, ConfigMixin, ABC):
    """The law of x_T: what all bridges share. As constructed N(0, I); made by `fit` of a subclass.

    Tensors are float32 at least: casting to half precision leaves them as they are.

    Args:
        shape: of a sample without the batch, (C, H, W) for images.
        max_diffusion_time: T, in (0, 1].
        scheduler: class name and configuration of the scheduler that belongs to the score model.
        rank: r, from 1 to d.
        num_classes: K, of a class-conditional bridge.
        measured_on: what it was fitted on, for people: data, number of samples, seed, settings.

    Attributes:
        mean: m, (K, *shape).
        directions: U, (K, r, d), orthonormal rows.
        scales: s, (K, r).
        floor: variance of the rest in each direction, (K,); of no effect where r = d.

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
        """w ~ q of class k, (n, l), from noise ~ N(0, I), (n, l)."""

    @abstractmethod
    def _latent_log_prob(self, w: Tensor, k: int) -> Tensor:
        """log q(w) of class k, (n,), for w (n, l)."""

    @property
    def latent_rank(self) -> int:
        """l: how many of the r coordinates, the leading ones, q models."""
        return self.config.get("latent_rank", self.config.rank)

    @property
    def schedule(self) -> VPSchedule:
        """The noise levels that this was fitted for."""
        return require_vp(stored_schedule(self.config.scheduler))

    @property
    def timestep(self) -> int:
        """The timestep of T: the first of a sampler that starts here."""
        return self.schedule.last_timestep(self.config.max_diffusion_time)

    def check(
        self, scheduler: Any, *, max_diffusion_time: float | None = None, shape: Sequence[int] | None = None
    ) -> None:
        """That this was fitted for a sampler with such a schedule, starting at such a T, of samples of such a shape.

        Args:
            scheduler: of diffusers.
            max_diffusion_time: by default that of the scheduler's configuration, where it has one.
            shape: of a sample without the batch.

        Raises:
            ValueError: names what differs, or the schedule is not variance-preserving.
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
            n: how many.
            generator: of all randomness; on any device.
            class_labels: (n,) integers; needed by a class-conditional bridge and ignored by others.

        Raises:
            ValueError: n is below 1, or labels are missing, not n or out of range.
        """
        noise = randn((n, *self.config.shape), generator, device=self.mean.device, dtype=self.mean.dtype)

        def place(noise: Tensor, k: int) -> Tensor:
            u, directions = noise @ self.directions[k].T, self.directions[k]
            rest = noise - u @ directions
            leading = self._sample_latent(u[:, : self.latent_rank], k, generator)
            w = torch.cat([leading, u[:, self.latent_rank :]], 1)
            return self.mean[k].flatten() + (self.scales[k] * w) @ directions + self.floor[k].sqrt() * rest

        return self._of_each_class(place, noise.flatten(1), class_labels).reshape(noise.shape)

    def log_prob(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """log nu(x), (n,), in nats, normalised; differentiable.

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
            log_q = self._latent_log_prob(w[:, : self.latent_rank], k) + _standard_log_prob(w[:, self.latent_rank :])
            return log_q - self.scales[k].log().sum() + (log_rest if left else 0)

        return self._of_each_class(density, x.flatten(1).to(self.mean), class_labels)

    def _whiten(self, x: Tensor, k: int) -> Tensor:
        """w of x (n, d)."""
        return (x - self.mean[k].flatten()) @ self.directions[k].T / self.scales[k]

    def _of_each_class(
        self, function: Callable[[Tensor, int], Tensor], x: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        """function(x of class k, k), in the order of x. Labels are read on the CPU, the only wait for a device."""
        if len(x) == 0:
            raise ValueError("there must be at least one sample")
        with torch.autocast(x.device.type, enabled=False):
            if self.config.num_classes is None:
                return function(x, 0)
            labels = read_labels(class_labels, len(x), self.config.num_classes)
            parts = enumerate(split_by_class(x, labels, self.config.num_classes))
            order = labels.argsort(stable=True)
            return torch.cat([function(part, k) for k, part in parts if len(part)])[order.argsort().to(x.device)]

    def _diffusion(self) -> tuple[float, float]:
        """alpha_T and sigma_T."""
        sigma = self.schedule.sigmas[self.timestep]
        alpha = self.schedule.scale(sigma)
        return alpha.item(), (alpha * sigma).item()

    @torch.no_grad()
    def _place(self, laws: Iterable[Law]) -> None:
        """Take over the moments of x0 of each class.

        Raises:
            ValueError: a covariance of x_T is not positive.
        """
        alpha, sigma = self._diffusion()
        for k, law in enumerate(laws):
            variances, floor = alpha**2 * law.variances + sigma**2, alpha**2 * law.floor + sigma**2
            if not (variances > 0).all() or not floor > 0:
                raise ValueError(f"the covariance is singular: at T its smallest variance is {variances.min():.3g}")
            self.mean[k] = alpha * law.mean.reshape(self.mean.shape[1:])
            self.directions[k], self.scales[k], self.floor[k] = law.directions, variances.sqrt(), floor

    def _latents(self, batches: Iterable[Any], progress: bool) -> Latents:
        """Go through the data again, on their device, and stay there."""
        alpha, sigma = self._diffusion()
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


class GaussianBridge(Bridge):
    """q = N(0, I): nu is the Gaussian with the mean and the (shrunk) covariance of x_T, or with its principal part and
    a scalar floor. Arguments and attributes of `Bridge`."""

    @classmethod
    def fit(
        cls,
        batches: Iterable[Any],
        scheduler: Any,
        max_diffusion_time: float,
        *,
        rank: int | None = None,
        num_classes: int | None = None,
        shrink: bool = True,
        measured_on: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> GaussianBridge:
        """From the moments of x0, in one pass, without noise; accumulated in float64 on the device of the data.

        Args:
            batches: x0, (B, *shape), or (x0, {"class_labels": (B,)}): what the score model was trained on, scaled as it
                was (latents included). Beyond FULL_COVARIANCE_LIMIT larger batches are faster.
            scheduler: of the score model; variance-preserving.
            max_diffusion_time: T in (0, 1].
            rank: r; by default d, or DEFAULT_RANK beyond FULL_COVARIANCE_LIMIT. The principal directions are exact
                below the limit and incremental beyond.
            num_classes: K, for moments of each class.
            shrink: shrink the covariance.
            measured_on: stored with the result, for people.
            progress: show a progress bar.

        Returns:
            The bridge, on the CPU.

        Raises:
            ValueError: T or the schedule is refused by `VPSchedule.last_timestep`; rank is out of range; data are
                none, too few, not finite or of different shapes; labels are missing or out of range.
        """
        stored = _stored(scheduler, max_diffusion_time)
        data = data_moments(batches, rank, num_classes, progress)
        notes = data.notes(measured_on, {"shrink": shrink})
        bridge = cls(data.shape, max_diffusion_time, stored, data.rank, num_classes, notes)
        bridge._place(data.laws(shrink))
        return bridge

    @classmethod
    def from_moments(
        cls,
        mean: Tensor,
        covariance: Tensor,
        scheduler: Any,
        max_diffusion_time: float,
        *,
        rank: int | None = None,
        num_classes: int | None = None,
        measured_on: Mapping[str, Any] | None = None,
    ) -> GaussianBridge:
        """From given moments of x0, as they are.

        Args:
            mean: (*shape), or (K, *shape) with `num_classes`.
            covariance: (d, d), or (K, d, d).
            rank: r; d by default.
            scheduler, max_diffusion_time, num_classes, measured_on: as for `fit`.

        Raises:
            ValueError: shapes do not fit; the covariance is not symmetric, finite and positive at T; or as `fit` does.
        """
        means, covariances = (mean, covariance) if num_classes is not None else (mean[None], covariance[None])
        classes, d = count_classes(num_classes), means[0].numel()
        if len(means) != classes or covariances.shape != (classes, d, d):
            raise ValueError(
                f"mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)} do not fit, for {num_classes=}"
            )
        if not (means.isfinite().all() and covariances.isfinite().all()):
            raise ValueError("the moments are not finite")
        if not torch.allclose(covariances, covariances.mT, rtol=1e-4, atol=1e-6):
            raise ValueError("the covariance is not symmetric")
        rank, shape, stored = d if rank is None else rank, list(means.shape[1:]), _stored(scheduler, max_diffusion_time)
        bridge = cls(shape, max_diffusion_time, stored, rank, num_classes, measured_on)
        laws = [principal_law(m.double().flatten(), c.double(), rank) for m, c in zip(means, covariances, strict=True)]
        bridge._place(laws)
        return bridge

    def _sample_latent(self, noise: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        return noise

    def _latent_log_prob(self, w: Tensor, k: int) -> Tensor:
        return _standard_log_prob(w)


class MixtureBridge(Bridge):
    """q = sum_c weights_c N(means_c, L_c L_c'): a Dirichlet-process mixture of each class in the whitened coordinates,
    at its expected parameters.

    Args:
        num_components: C, at least 2: the truncation of the process, not all of which get weight.
        latent_rank: l, from 1 to r.
        shape, max_diffusion_time, scheduler, rank, num_classes, measured_on: of `Bridge`.

    Attributes:
        weights: (K, C), sum to 1.
        means: (K, C, l).
        cholesky: L, (K, C, l, l), lower triangular.

    Raises:
        ValueError: fewer than 2 components; or as `Bridge` does.
    """

    _keep_in_fp32_modules: ClassVar = [*Bridge._keep_in_fp32_modules, "weights", "means", "cholesky"]

    weights: Tensor
    means: Tensor
    cholesky: Tensor

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        max_diffusion_time: float,
        scheduler: Mapping[str, Any],
        rank: int,
        latent_rank: int,
        num_components: int,
        num_classes: int | None = None,
        measured_on: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, max_diffusion_time, scheduler, rank, num_classes, measured_on)
        _require_several(num_components)
        table = (count_classes(num_classes), num_components)
        self.register_buffer("weights", torch.full(table, 1 / num_components))
        _require_latent_rank(latent_rank, rank)
        self.register_buffer("means", torch.zeros(*table, latent_rank))
        self.register_buffer("cholesky", torch.eye(latent_rank).repeat(*table, 1, 1))

    @classmethod
    def fit(
        cls,
        batches: Iterable[Any],
        scheduler: Any,
        max_diffusion_time: float,
        *,
        num_components: int = 16,
        rank: int | None = None,
        latent_rank: int | None = None,
        num_classes: int | None = None,
        shrink: bool = True,
        noise_draws: int = 1,
        concentration: float | None = None,
        max_iter: int = 1000,
        seed: int = 0,
        measured_on: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> MixtureBridge:
        """Variational fit by scikit-learn on diffused data, after the moments. Holds N noise_draws r numbers.

        Args:
            batches: as for `GaussianBridge.fit`; gone through twice.
            num_components: C.
            rank: r, as for `GaussianBridge.fit`.
            latent_rank: l; LATENT_RANK by default, r at most.
            noise_draws: how often each sample is used, with noise of its own.
            concentration: of the Dirichlet process: the larger, the more components get weight; 1 / C by default.
            max_iter: iterations of the fit; scikit-learn warns if they do not suffice.
            seed: of the noise, and of the fit.
            scheduler, max_diffusion_time, num_classes, shrink, measured_on, progress: as for `GaussianBridge.fit`.

        Returns:
            The bridge, on the CPU.

        Raises:
            ValueError: fewer than 2 components, fewer samples in a class than components, batches that can be gone
                through once only; or as `GaussianBridge.fit` does.
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.mixture import BayesianGaussianMixture
        except ImportError as error:
            raise ImportError('MixtureBridge needs scikit-learn: pip install "diffusers_ext[bridge]"') from error
        _require_several(num_components)
        require_repeatable(batches)
        stored = _stored(scheduler, max_diffusion_time)
        data = data_moments(batches, rank, num_classes, progress)
        latent_rank = min(LATENT_RANK, data.rank) if latent_rank is None else latent_rank
        settings = {"shrink": shrink, "noise_draws": noise_draws, "concentration": concentration, "seed": seed}
        notes = data.notes(measured_on, settings)
        bridge = cls(data.shape, max_diffusion_time, stored, data.rank, latent_rank, num_components, num_classes, notes)
        if data.smallest_class * noise_draws < num_components:
            raise ValueError(f"{num_components} components need as many samples, a class has {data.smallest_class}")
        bridge._place(data.laws(shrink))
        latents, generator = bridge._latents(batches, progress), torch.Generator().manual_seed(seed)
        for k in range(count_classes(num_classes)):
            index = (latents.labels == k).nonzero().flatten()
            w, _ = latents.draw(index.repeat(noise_draws), generator)
            mixture = BayesianGaussianMixture(
                n_components=num_components,
                weight_concentration_prior_type="dirichlet_process",
                weight_concentration_prior=concentration,
                max_iter=max_iter,
                random_state=seed,
            ).fit(w.double().cpu().numpy())
            bridge.weights[k] = torch.from_numpy(mixture.weights_ / mixture.weights_.sum())
            bridge.means[k] = torch.from_numpy(mixture.means_)
            bridge.cholesky[k] = torch.linalg.cholesky(torch.from_numpy(mixture.covariances_))
        return bridge.to("cpu")

    def _sample_latent(self, noise: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        c = categorical(self.weights[k], len(noise), generator)
        return self.means[k][c] + (self.cholesky[k][c] @ noise[..., None])[..., 0]

    def _latent_log_prob(self, w: Tensor, k: int) -> Tensor:
        centred = (w - self.means[k][:, None]).mT  # (C, r, n)
        u = torch.linalg.solve_triangular(self.cholesky[k], centred, upper=False)
        log_volumes = self.cholesky[k].diagonal(dim1=1, dim2=2).log().sum(1)
        return (_standard_log_prob(u.mT) + (self.weights[k].log() - log_volumes)[:, None]).logsumexp(0)


class FlowBridge(Bridge):
    """q is a neural spline flow (zuko's NSF) of the whitened coordinates, given the class.

    As constructed the flow is the identity, q = N(0, I): training starts from the Gaussian bridge.

    Args:
        latent_rank: l, from 1 to r.
        transforms: how many are composed.
        hidden_features: layers of the networks that give the splines of a transform.
        bins: of a spline; beyond 5 standard deviations it is the identity.
        shape, max_diffusion_time, scheduler, rank, num_classes, measured_on: of `Bridge`.

    Attributes:
        flow: `zuko.flows.NSF`, from w to N(0, I).

    Raises:
        ValueError: as `Bridge` does.
        ImportError: zuko is not installed.
    """

    _keep_in_fp32_modules: ClassVar = [*Bridge._keep_in_fp32_modules, "flow"]

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        max_diffusion_time: float,
        scheduler: Mapping[str, Any],
        rank: int,
        latent_rank: int,
        num_classes: int | None = None,
        transforms: int = 3,
        hidden_features: Sequence[int] = (128, 128),
        bins: int = 8,
        seed: int = 0,
        measured_on: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, max_diffusion_time, scheduler, rank, num_classes, measured_on)
        _require_latent_rank(latent_rank, rank)
        layers = tuple(hidden_features)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the accelerators, too
            self.flow = _flows().NSF(
                latent_rank, num_classes or 0, bins=bins, transforms=transforms, hidden_features=layers
            )
        for spline in self.flow.transform.transforms:
            last = spline.hyper[-1].parameters() if hasattr(spline, "hyper") else spline.parameters()
            for parameter in last:
                nn.init.zeros_(parameter)

    @classmethod
    def fit(
        cls,
        batches: Iterable[Any],
        scheduler: Any,
        max_diffusion_time: float,
        *,
        rank: int | None = None,
        latent_rank: int | None = None,
        num_classes: int | None = None,
        shrink: bool = True,
        transforms: int = 3,
        hidden_features: Sequence[int] = (128, 128),
        bins: int = 8,
        max_steps: int = 5000,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        held_out: float = 0.1,
        patience: int = 10,
        seed: int = 0,
        measured_on: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> FlowBridge:
        """Maximum likelihood on diffused data by Adam, with fresh noise at each step, after the moments.

        It stops after `patience` evaluations without a better one on held-out data, or at the first that is not finite,
        and keeps the best, which may be the Gaussian it starts from; then it warns.

        Args:
            batches: as for `GaussianBridge.fit`; gone through twice. Holds N r numbers.
            rank: r, as for `GaussianBridge.fit`.
            latent_rank: l; LATENT_RANK by default, r at most.
            transforms, hidden_features, bins: as for the class.
            max_steps: steps at most; EVALUATE_EVERY lie between evaluations.
            batch_size, learning_rate: of a step.
            held_out: share of the samples for evaluation, in (0, 1).
            patience: in evaluations.
            seed: of initialisation, batches and noise.
            scheduler, max_diffusion_time, num_classes, shrink, measured_on, progress: as for `GaussianBridge.fit`.

        Returns:
            The bridge, on the CPU; trained on the device of the data. `measured_on["gain_over_gaussian"]` is the gain
            on held-out data in nats.

        Raises:
            ValueError: held_out leaves nothing to train or to evaluate on, batches can be gone through once only; or as
                `GaussianBridge.fit` does.
            ImportError: zuko is not installed.
        """
        _flows()
        require_repeatable(batches)
        stored, layers = _stored(scheduler, max_diffusion_time), list(hidden_features)
        data = data_moments(batches, rank, num_classes, progress)
        latent_rank = min(LATENT_RANK, data.rank) if latent_rank is None else latent_rank
        bridge = cls(
            data.shape, max_diffusion_time, stored, data.rank, latent_rank, num_classes, transforms, layers, bins, seed
        )
        bridge._place(data.laws(shrink))
        latents, generator = bridge._latents(batches, progress), torch.Generator().manual_seed(seed)
        order = torch.randperm(len(latents.labels), generator=generator)
        n = round(held_out * len(order))
        if not 0 < n < len(order):
            raise ValueError(f"{held_out=} of {len(order)} samples leaves none to train on, or none to evaluate on")
        evaluated, trained = latents.draw(order[:n].repeat(HELD_OUT_DRAWS), generator), order[n:]

        def draw() -> tuple[Tensor, Tensor]:
            return latents.draw(trained[torch.randint(len(trained), (batch_size,), generator=generator)], generator)

        optimizer = torch.optim.Adam(bridge.flow.parameters(), learning_rate)
        steps, gain = bridge._train(draw, evaluated, optimizer, max_steps, patience, progress)
        settings = {"shrink": shrink, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
        settings |= {"held_out": held_out, "steps": steps, "gain_over_gaussian": gain}
        bridge.register_to_config(measured_on=data.notes(measured_on, settings))
        return bridge.to("cpu").eval()

    def _train(
        self,
        draw: Callable[[], tuple[Tensor, Tensor]],
        evaluated: tuple[Tensor, Tensor],
        optimizer: torch.optim.Optimizer,
        max_steps: int,
        patience: int,
        progress: bool,
    ) -> tuple[int, float]:
        """The step of the best flow, which is kept, and by how much it is better than the Gaussian, in nats."""
        best, at, start, waited = _copy(self.flow), 0, self._held_out(evaluated), 0
        lowest = start
        bar = tqdm(range(1, max_steps + 1), disable=not progress, desc="training the flow")
        for step in bar:
            loss = -self._flow_log_prob(*draw()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % EVALUATE_EVERY and step != max_steps:
                continue
            found = self._held_out(evaluated)
            bar.set_postfix(gain_over_gaussian=start - found)
            if found < lowest:
                best, at, lowest, waited = _copy(self.flow), step, found, 0
                continue
            waited += 1
            if not isfinite(found):
                warnings.warn(f"the flow diverged by step {step}: that of step {at} is kept", stacklevel=3)
            if not isfinite(found) or waited == patience:
                break
        bar.close()
        self.flow.load_state_dict(best)
        if at == 0:
            warnings.warn("no flow was better than the Gaussian on held-out data: the Gaussian is kept", stacklevel=3)
        return at, start - lowest

    @torch.no_grad()
    def _held_out(self, evaluated: tuple[Tensor, Tensor]) -> float:
        return -self._flow_log_prob(*evaluated).mean().item()

    def _transform(self, labels: Tensor, like: Tensor) -> Any:
        classes = self.config.num_classes
        return self.flow.transform(None if classes is None else nn.functional.one_hot(labels, classes).to(like))

    def _flow_log_prob(self, w: Tensor, labels: Tensor) -> Tensor:
        u, log_determinant = self._transform(labels, w).call_and_ladj(w)
        return _standard_log_prob(u) + log_determinant

    def _sample_latent(self, noise: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        return self._transform(_constant(k, noise), noise).inv(noise)

    def _latent_log_prob(self, w: Tensor, k: int) -> Tensor:
        return self._flow_log_prob(w, _constant(k, w))


class Latents(NamedTuple):
    """Data as they are in the whitened coordinates of a bridge, before noise.

    Args:
        signal: w of alpha_T x0, (N, r).
        labels: (N,); 0 without classes.
        noise_scales: sigma_T / s, (K, r).
    """

    signal: Tensor
    labels: Tensor
    noise_scales: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """w of x_T of the samples `index`, (n, r), with noise of its own, and their labels, (n,)."""
        signal, labels = self.signal[index.to(self.signal.device)], self.labels[index.to(self.labels.device)]
        return signal + self.noise_scales[labels] * randn(signal.shape, generator, device=signal.device), labels


def _stored(scheduler: Any, max_diffusion_time: float) -> dict[str, Any]:
    """What is stored of the scheduler; a T or a schedule that cannot be had is refused before any pass over data."""
    require_vp(noise_schedule(scheduler)).last_timestep(max_diffusion_time)
    return stored_scheduler(scheduler)


def _require_several(num_components: int) -> None:
    """Refuse a mixture of one component."""
    if num_components < 2:
        raise ValueError(f"a mixture needs at least 2 components, got {num_components}: GaussianBridge has one")


def _flows() -> Any:
    try:
        from zuko import flows
    except ImportError as error:
        raise ImportError('FlowBridge needs zuko: pip install "diffusers_ext[bridge]"') from error
    return flows


def _require_latent_rank(latent_rank: int, rank: int) -> None:
    if not 1 <= latent_rank <= rank:
        raise ValueError(f"latent_rank must be from 1 to the rank, {rank}, got {latent_rank}")


def _standard_log_prob(u: Tensor) -> Tensor:
    """log N(u; 0, I), over the last dimension."""
    return -0.5 * (u.square().sum(-1) + u.shape[-1] * log(2 * pi))


def _constant(k: int, like: Tensor) -> Tensor:
    """The label k for each row."""
    return torch.full((len(like),), k, device=like.device)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
