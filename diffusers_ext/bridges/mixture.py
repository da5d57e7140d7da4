r"""The bridge whose leading whitened coordinates follow a mixture of Gaussians.

    q(w) = sum_c weights_c N(w; means_c, L_c L_c'),

fitted to the diffused data of each class by variational inference of a Dirichlet-process mixture, truncated at C
components, and used at its expected parameters. The process gives few components weight where few are enough. With few
samples in many dimensions it collapses on them: where a mixture of most samples is not better than N(0, I) on the
others, the class keeps N(0, I), the Gaussian bridge.

References: A Study on Diffusion Times (arXiv 2206.05173, see the package); Variational Inference for Dirichlet Process
Mixtures (Blei, Jordan, 2006).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..randomness import categorical
from ..ranges import require
from .base import Bridge, Latents, checked_scheduler, default_latent_rank, require_latent_rank, standard_log_prob
from .held_out import HELD_OUT, divide, held_out_batch, held_out_loss, warn_gaussian_is_kept
from .moments import DataMoments, count_classes, data_moments, require_repeatable

MIN_SAMPLES = 20
"""A class with fewer samples cannot be judged, and keeps the Gaussian."""

Mixture = tuple[Tensor, Tensor, Tensor]
"""Weights (C,), means (C, l) and L, (C, l, l)."""


class MixtureBridge(Bridge):
    """q is a mixture of Gaussians in the whitened coordinates, one for each class.

    Args:
        num_components: C, at least 2: the truncation of the process; not all components get weight.
        latent_rank: l, from 1 to r.
        shape, max_diffusion_time, scheduler, rank, num_classes, measured_on: as for `Bridge`.

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
        require_latent_rank(latent_rank, rank)
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
        moments: DataMoments | None = None,
    ) -> MixtureBridge:
        """Estimate the moments, then fit the mixture to diffused data. It holds N noise_draws l numbers.

        Args:
            batches: as for `GaussianBridge.fit`; they are read twice.
            num_components: C.
            rank: r, as for `GaussianBridge.fit`.
            latent_rank: l; LATENT_RANK by default, r at most.
            noise_draws: how often each sample is used, each time with new noise.
            concentration: of the Dirichlet process: the larger, the more components get weight; 1 / C by default.
            max_iter: the most iterations of the fit; scikit-learn warns if they do not suffice.
            seed: the seed of the noise and of the fit.
            scheduler, max_diffusion_time, num_classes, shrink, measured_on, progress, moments: as for
                `GaussianBridge.fit`.

        Returns:
            The bridge, on the CPU. `measured_on["gain_over_gaussian"]` is the gain on held-out data in nats for each
            class, 0 where the Gaussian is kept.

        Raises:
            ValueError: a number is out of range, fewer samples in a class than components, batches that can be read
                once only; or as `GaussianBridge.fit` does.
            ImportError: scikit-learn is not installed.
        """
        _estimator()
        _require_several(num_components)
        require("noise_draws", noise_draws, at_least=1)
        require("concentration", concentration, above=0)
        require("max_iter", max_iter, at_least=1)
        require_repeatable(batches)
        stored = checked_scheduler(scheduler, max_diffusion_time)
        data = data_moments(batches, rank, num_classes, progress) if moments is None else moments
        latent_rank = default_latent_rank(data.rank) if latent_rank is None else latent_rank
        bridge = cls(data.shape, max_diffusion_time, stored, data.rank, latent_rank, num_components, num_classes)
        if data.smallest_class * noise_draws < num_components:
            raise ValueError(f"{num_components} components need as many samples, a class has {data.smallest_class}")
        bridge._set_moments(data.laws(shrink))
        latents, generator = bridge._latents(batches, progress), torch.Generator().manual_seed(seed)
        gains = []
        for k in range(count_classes(num_classes)):

            def fit(index: Tensor, noise: torch.Generator) -> Mixture:
                w, _ = latents.draw(index.repeat(noise_draws), noise)
                return fit_mixture(w, num_components, concentration, max_iter, seed)

            of_class = (latents.labels == k).nonzero().flatten().cpu()
            gains.append(bridge._gain(k, latents, of_class, fit, seed))
            if gains[-1] > 0:
                bridge._set_mixture(k, *fit(of_class, generator))
        if kept := [str(k) for k, gain in enumerate(gains) if not gain > 0]:
            warn_gaussian_is_kept("mixture" if num_classes is None else f"mixture of classes {', '.join(kept)}")
        settings: dict[str, Any] = {"shrink": shrink, "noise_draws": noise_draws, "concentration": concentration}
        settings |= {"seed": seed, "held_out": HELD_OUT, "gain_over_gaussian": gains}
        bridge.register_to_config(measured_on=data.notes(measured_on, settings))
        return bridge.to("cpu")

    def _gain(
        self, k: int, latents: Latents, index: Tensor, fit: Callable[[Tensor, torch.Generator], Mixture], seed: int
    ) -> float:
        """Return by how many nats for each sample a mixture of most samples of a class is better than N(0, I) on the
        others, at least 0; the class has N(0, I) before and after."""
        generator = torch.Generator().manual_seed(seed)
        gaussian = tuple(tensor.clone() for tensor in (self.weights[k], self.means[k], self.cholesky[k]))
        if len(index) < max(MIN_SAMPLES, self.config.num_components + MIN_SAMPLES):
            return 0.0
        training, evaluated = divide(len(index), HELD_OUT, generator)
        held_out = held_out_batch(latents, index[evaluated], generator)
        self._set_mixture(k, *fit(index[training], generator))
        mixture = held_out_loss(lambda w, _: self._latent_log_prob(w, k), held_out)
        self._set_mixture(k, *gaussian)
        return max(held_out_loss(lambda w, _: standard_log_prob(w), held_out) - mixture, 0.0)

    def _set_mixture(self, k: int, weights: Tensor, means: Tensor, cholesky: Tensor) -> None:
        self.weights[k], self.means[k], self.cholesky[k] = weights, means, cholesky

    def _sample_latent(self, noise: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        c = categorical(self.weights[k], len(noise), generator)
        return self.means[k][c] + (self.cholesky[k][c] @ noise[..., None])[..., 0]

    def _latent_log_prob(self, w: Tensor, k: int) -> Tensor:
        centred = (w - self.means[k][:, None]).mT  # (C, l, n)
        u = torch.linalg.solve_triangular(self.cholesky[k], centred, upper=False)
        log_volumes = self.cholesky[k].diagonal(dim1=1, dim2=2).log().sum(1)
        return (standard_log_prob(u.mT) + (self.weights[k].log() - log_volumes)[:, None]).logsumexp(0)


def fit_mixture(w: Tensor, num_components: int, concentration: float | None, max_iter: int, seed: int) -> Mixture:
    """Fit the mixture to w, (n, l), by scikit-learn."""
    mixture = _estimator()(
        n_components=num_components,
        weight_concentration_prior_type="dirichlet_process",
        weight_concentration_prior=concentration,
        max_iter=max_iter,
        random_state=seed,
    ).fit(w.double().cpu().numpy())
    weights = torch.from_numpy(mixture.weights_ / mixture.weights_.sum())
    return weights, torch.from_numpy(mixture.means_), torch.linalg.cholesky(torch.from_numpy(mixture.covariances_))


def _estimator() -> Any:
    try:
        from sklearn.mixture import BayesianGaussianMixture
    except ImportError as error:
        raise ImportError("MixtureBridge needs scikit-learn: pip install scikit-learn") from error
    return BayesianGaussianMixture


def _require_several(num_components: int) -> None:
    """Refuse a mixture of one component."""
    if not num_components >= 2:
        raise ValueError(f"a mixture needs at least 2 components, got {num_components}: GaussianBridge has one")
