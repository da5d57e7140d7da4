r"""The bridge that needs the mean and the covariance of the data alone.

With q = N(0, I) the model of x_T is the Gaussian

    nu = N(alpha_T E x0, alpha_T^2 Cov x0 + sigma_T^2 I),

the one closest to the law of x_T in KL[p_T || nu]: its moments are those of x_T. Below full rank, r < d, the smallest
d - r eigenvalues of Cov x0 are replaced by their mean.

Reference: A Study on Diffusion Times (arXiv 2206.05173, see the package) starts from richer models; this one is the
baseline that they have to beat.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Bridge, checked_scheduler, standard_log_prob
from .moments import DataMoments, count_classes, data_moments, principal_law


class GaussianBridge(Bridge):
    """The Gaussian with the mean and the (shrunk) covariance of x_T, or with its principal part and a scalar floor.

    Arguments and attributes are those of `Bridge`.
    """

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
        moments: DataMoments | None = None,
    ) -> GaussianBridge:
        """Estimate the moments of x0 in one pass and add the noise in closed form.

        Sums are in float64 on the device of the data.

        Args:
            batches: x0, (B, *shape), or (x0, {"class_labels": (B,)}): what the score model was trained on, scaled as it
                was (latents included). Beyond FULL_COVARIANCE_LIMIT larger batches are faster.
            scheduler: the scheduler of the score model; variance-preserving.
            max_diffusion_time: T in (0, 1].
            rank: r; by default d, or DEFAULT_RANK beyond FULL_COVARIANCE_LIMIT. The principal directions are exact
                below the limit and incremental beyond.
            num_classes: K, for moments of each class.
            shrink: whether the covariance is shrunk (`moments`).
            measured_on: a note for people, stored with the result.
            progress: whether a progress bar is shown.
            moments: those of the same batches, classes and rank, by `moments.data_moments`, which a bridge at another T
                has in common; then the batches are not read for them.

        Returns:
            The bridge, on the CPU.

        Raises:
            ValueError: T or the schedule is refused by `VPSchedule.last_timestep`; rank is out of range; data are
                none, too few, not finite or of different shapes; labels are missing or out of range.
        """
        stored = checked_scheduler(scheduler, max_diffusion_time)
        data = data_moments(batches, rank, num_classes, progress) if moments is None else moments
        notes = data.notes(measured_on, {"shrink": shrink})
        bridge = cls(data.shape, max_diffusion_time, stored, data.rank, num_classes, notes)
        bridge._set_moments(data.laws(shrink))
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
        """Make the bridge of given moments of x0, which are not shrunk.

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
        rank, shape = d if rank is None else rank, list(means.shape[1:])
        stored = checked_scheduler(scheduler, max_diffusion_time)
        bridge = cls(shape, max_diffusion_time, stored, rank, num_classes, measured_on)
        laws = [principal_law(m.double().flatten(), c.double(), rank) for m, c in zip(means, covariances, strict=True)]
        bridge._set_moments(laws)
        return bridge

    def _sample_latent(self, noise: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        return noise

    def _latent_log_prob(self, w: Tensor, k: int) -> Tensor:
        return standard_log_prob(w)
