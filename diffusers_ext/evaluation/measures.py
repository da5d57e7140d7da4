"""What is measured of images and of a model: `quality` of features, `likelihood` of held-out images.

A `Judge` holds the features of real images, with which all samples of one evaluation are compared.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from math import log, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Images
from ..data.sources import DataArguments
from ..errors import InputError
from ..extractors import Extractor, pixel_extractor
from ..interop import noise_schedule, score_model_from
from ..likelihood import bits_per_dim, dequantize, elbo, log_likelihood
from ..losses import ambient_loss, score_matching_loss
from ..metrics import (
    Interval,
    copy_threshold,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_recall,
    pseudo_values,
    student_interval,
)
from ..noise_levels import log_linear_sigmas
from ..progress import progress_bar
from ..randomness import Seeds, Stream
from ..reports.measured import Likelihood, Quality
from ..subjects import Subject
from .real_images import GROUPS, RealImages, rows_of
from .samples import Drawing

SIGMA_BINS = 10  # noise levels of `loss_by_sigma`
MEMORISED = 0.01  # see `Quality.copies`


@dataclass(frozen=True)
class LikelihoodSettings:
    """How many held-out images the likelihood is measured on, and how exactly.

    Attributes:
        images: the number of images for the upper bound; 0 leaves it out.
        evaluations: evaluations of the network for each image's bound.
        ode_images: the number of images for the likelihood by the probability flow, which needs torchdiffeq; 0 leaves
            it out.

    Raises:
        InputError: a number is negative, or too small for an interval.
    """

    images: int = 256
    evaluations: int = 32
    ode_images: int = 16

    def __post_init__(self) -> None:
        if not self.evaluations >= 1:
            raise InputError(f"--likelihood_evaluations must be at least 1, got {self.evaluations}")
        for name, number in (("likelihood_images", self.images), ("ode_images", self.ode_images)):
            if not (number == 0 or number >= 2):
                raise InputError(f"--{name} must be 0, or at least 2 for an interval, got {number}")


NO_QUALITY = Quality(Interval(nan, nan, nan), Interval(nan, nan, nan), nan, nan, nan)
"""That of samples of which some are not finite: they have no rank among others."""


@dataclass(frozen=True)
class Manifold:
    """The features (n, d) of real images that every `quality` of one evaluation is measured against, on one device.

    Attributes:
        reference, training: features of the reference and of the training images.
        count: the number of images for precision and recall, which depend on it, so it is the same for all.
        copy_distance: see `diffusers_ext.metrics.copy_threshold`; `None` where held-out images are too few to tell.
    """

    reference: Tensor
    training: Tensor
    count: int
    copy_distance: float | None

    @classmethod
    def of(cls, reference: Tensor, training: Tensor, held_out: Tensor | None, count: int) -> Manifold:
        """Make it, with the distance below which a sample counts as a copy, if there are enough held-out features."""
        if held_out is None or len(held_out) * MEMORISED < 1:
            return cls(reference, training, count, None)
        return cls(reference, training, count, copy_threshold(training, held_out, MEMORISED))

    @property
    def least(self) -> int:
        """The fewest images that a Frechet distance needs: with fewer than features its bias cannot be removed."""
        return self.reference.shape[1]


def quality(features: Tensor, real: Manifold, pixels: tuple[Tensor, Tensor] | None = None) -> Quality:
    """Return the quality of samples, or of other real images, by their features (n, d), rows in random order.

    Precision and recall are those of the first `real.count` images of both sides. The Frechet distance of fewer images
    than features is NaN. `pixels` are the pixel features of both sides, if their distance is wanted.
    """
    reference = real.reference
    precision, recall = precision_recall(features[: real.count], reference[: real.count])
    near = None
    if real.copy_distance is not None:
        near = (nearest(features, real.training).distances <= real.copy_distance).double().mean().item()
    enough = min(len(features), len(reference)) >= real.least
    frechet = pseudo_values(frechet_distance, features, reference, groups=GROUPS) if enough else None
    kernel = pseudo_values(kernel_distance, features, reference, groups=GROUPS)
    seen = None
    if pixels is not None and min(map(len, pixels)) >= pixels[0].shape[1]:
        seen = pseudo_values(frechet_distance, *pixels, groups=GROUPS)
    return Quality(
        frechet=Interval(nan, nan, nan) if frechet is None else student_interval(frechet),
        kernel=student_interval(kernel),
        precision=precision,
        recall=recall,
        copies=near,
        frechet_values=[] if frechet is None else frechet.tolist(),
        kernel_values=kernel.tolist(),
        pixels=None if seen is None else student_interval(seen),
        pixels_values=[] if seen is None else seen.tolist(),
    )


class Judge:
    """Real images in the features of an extractor, with which samples are compared.

        judge = Judge(real, extractor, num_samples=500)
        ours, baseline = (judge.measure(drawing, folder) for drawing in drawings)
        ours.frechet, ours.change(baseline)          # intervals, the second of the pairs
        ours.pixels, ours.change(baseline, "pixels")  # by what is seen without knowing what the images show

    `quality` takes features of images that are no drawing.

    Args:
        real: see `RealImages`.
        extractor: see `make_extractor`; the features are compared on its device.
        num_samples: the size of each set that is judged; precision and recall are those of as many images of all sets.
        progress: whether bars are shown.
    """

    def __init__(self, real: RealImages, extractor: Extractor, num_samples: int, *, progress: bool = False) -> None:
        self.extractor, self.progress, self.pixels = extractor, progress, pixel_extractor(extractor.device)
        self._pixels = [self.pixels(one.images).to(extractor.device) for one in (real.reference, real.floor)]
        training, reference = self.features(real.training, "training"), self.features(real.reference, "reference")
        self._floor = self.features(real.floor, "floor")
        held_out = None if real.held_out is None else self.features(real.held_out, "held_out")
        count = min(num_samples, len(reference), len(self._floor))
        self.manifold = Manifold.of(reference, training, held_out, count)

    def features(self, images: Images, name: str = "") -> Tensor:
        """Return the features (n, d) of images."""
        split, what = images.images.split(500), f"features, {name}"
        parts = progress_bar(split, what, unit="batch", leave=False, shown=self.progress)
        return torch.cat([self.extractor(part).cpu() for part in parts]).to(self.extractor.device)

    @functools.cached_property
    def floor(self) -> Quality:
        """The quality of real images that are not in the reference, which a perfect model would reach."""
        return quality(self._floor, self.manifold, (self._pixels[1], self._pixels[0]))

    def quality(self, features: Tensor, pixels: Tensor | None = None) -> Quality:
        """Return the quality of samples by their features (n, d), rows in random order, and by their pixel features."""
        device = self.extractor.device
        seen = None if pixels is None else (pixels.to(device), self._pixels[0])
        return quality(features.to(device), self.manifold, seen)

    def measure(self, drawing: Drawing, folder: Path) -> Quality:
        """Return the quality of the images of a drawing that lie in a folder."""
        return self.quality(*(drawing.features(folder, one) for one in (self.extractor, self.pixels)))


def likelihood(
    subject: Subject,
    held_out: Images,
    settings: LikelihoodSettings,
    *,
    batch_size: int = DataArguments.train_batch_size,
    seed: int = DataArguments.seed,
    progress: bool = True,
) -> Likelihood:
    """Measure the likelihood of held-out images under a model, at the lowest noise level of its network's training.

    A class-conditional model gets the labels, or the null class for images without one. A model of short diffusion
    times starts from its bridge.

    Args:
        subject: a model of pixels.
        held_out: the images, of which the first are measured.
        settings: how many images are measured, and how exactly.
        batch_size: images of a forward pass.
        seed: the seed of dequantisation, noise and noise levels.
        progress: whether bars are shown.
    """
    scheduler, network = subject.pipeline.scheduler, subject.network
    schedule = noise_schedule(scheduler)
    model, device = score_model_from(network, scheduler), network.device
    images = rows_of(held_out, 0, max(settings.images, settings.ode_images))
    generator = Seeds(seed).generator(Stream.DEQUANTIZATION)
    x = dequantize(images.images, generator)
    if subject.null_class is not None:
        images = replace(images, labels=images.labels.where(images.labels >= 0, subject.null_class))
    condition, bridge = subject.conditions(images), subject.bridge

    def bits(asked: int, what: str, method: Any, **options: Any) -> Interval | None:
        count = min(asked, len(x))
        if count < 2:
            return None
        parts = []
        for first in progress_bar(range(0, count, batch_size), what, shown=progress, unit="batch"):
            rows = slice(first, min(first + batch_size, count))
            cond = subject.part(condition, rows)
            start = {} if bridge is None else {"log_prior": _log_start(bridge, schedule, cond.get("class_labels"))}
            low_high = schedule.sigma_min, schedule.sigma_max
            found = method(model, x[rows].to(device), *low_high, generator=generator, **start, **options, **cond)
            parts.append(bits_per_dim(getattr(found, "total", found), x.shape[1:]).double().cpu())
        return student_interval(torch.cat(parts))

    bounds = schedule.sigma_min, schedule.sigma_max
    losses = loss_by_sigma(subject, images, bounds, seeds=Seeds(seed), batch_size=batch_size)
    ode = {"divergence": "hutchinson", "rtol": 1e-4, "atol": 1e-4}  # at 1e-3 off by 0.05 bits per dimension
    return Likelihood(
        ode=bits(settings.ode_images, "bits per dimension, ODE", log_likelihood, **ode),
        bound=bits(settings.images, "bits per dimension, bound", elbo, n=settings.evaluations),
        **losses,
    )


def _log_start(bridge: Any, schedule: Any, labels: Tensor | None) -> Any:
    """Return the log density of x at the highest noise level, from the bridge, which is a law of x_T = scale x."""

    def log_prior(x: Tensor, sigma: float) -> Tensor:
        scale = schedule.scale(torch.tensor(sigma, dtype=torch.float64)).item()
        return bridge.log_prob(scale * x, class_labels=labels) + x[0].numel() * log(scale)

    return log_prior


@torch.no_grad()
def loss_by_sigma(
    subject: Subject, validation: Images, sigma_range: tuple[float, float], *, seeds: Seeds, batch_size: int
) -> dict[str, list[float]]:
    """Return the mean square error of eps on the validation images at log-spaced noise levels, for a fixed noise.

    Of images that have noise themselves, it is the ambient loss, from a tenth above their noise on.
    """
    network = subject.network
    model, device = score_model_from(network, subject.pipeline.scheduler), network.device
    generator = seeds.generator(Stream.VALIDATION)
    sigmas = log_linear_sigmas(SIGMA_BINS, *sigma_range)
    total = torch.zeros(len(sigmas))
    for first in range(0, len(validation.images), batch_size):
        rows = rows_of(validation, first, first + batch_size)
        x0, cond = subject.encode(rows.images.to(device), generator), subject.conditions(rows)
        before = generator.get_state()
        for i, sigma in enumerate(sigmas.tolist()):
            generator.set_state(before)
            if rows.data_noise is None:
                x = model.process.perturb(x0, sigma, generator)
                total[i] += score_matching_loss(model, x, x0, sigma, weight=1.0, **cond).sum().cpu()
            else:
                noise = rows.data_noise.to(device)
                level = (1.1 * noise).clamp(min=sigma)  # at the noise itself there is nothing to compare
                x = model.process.perturb(x0, (level**2 - noise**2).sqrt(), generator)
                total[i] += ambient_loss(model(x, level, **cond), x, x0, noise, level).sum().cpu()
    return {"sigmas": sigmas.tolist(), "eps_mse": (total / len(validation.images)).tolist()}
