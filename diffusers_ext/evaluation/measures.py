"""What is measured of images and of a model: `quality` of features, `likelihood` of held-out images.

Half of the held-out images, at random, are the reference, and the other half the floor: what real images that are new
reach by the same measures. Where held-out images are few, the training images can be the reference, as is common for
FID; then all held-out ones are the floor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, nan
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.batches import Images, first_images
from ..data.images import Transform
from ..data.sources import DataArguments, HeldOutArguments, HubStream, ImageSource, load_images, load_validation_images
from ..errors import InputError
from ..fields import arg
from ..interop import noise_schedule, score_model_from
from ..likelihood import bits_per_dim, dequantize, elbo, log_likelihood
from ..losses import score_matching_loss
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
from ..randomness import seed_for
from ..reports.measured import Likelihood, Quality
from ..subjects import Subject

GROUPS = 10  # of the jackknife
MIN_IMAGES = 2 * GROUPS
_SPLIT, _DEQUANTIZE = 9, 10  # streams of `seed_for`
SIGMA_BINS = 10  # noise levels of `loss_by_sigma`
MEMORISED = 0.01  # see `Quality.copies`


@dataclass
class MeasureArguments(HeldOutArguments):
    """What is measured, and on which real images."""

    reference: Literal["held_out", "train"] = arg(
        "held_out",
        "Compare with half of the held-out images (the other half is the floor), or with the training images.",
    )
    max_validation_samples: int = arg(10_000, "Use only the first so many held-out images.")
    likelihood_images: int = arg(256, "Held-out images of the likelihood's bound; 0 leaves it out.")
    likelihood_evaluations: int = arg(32, "Evaluations of the network for each image's bound.")
    ode_images: int = arg(16, "Held-out images of the likelihood by the probability flow; 0 leaves it out.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            raise InputError("--streaming: an evaluation compares with the same images each time; leave it away")
        for name in ("likelihood_evaluations", "max_validation_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("likelihood_images", "ode_images"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise InputError(f"--{name} must be 0, or at least 2 for an interval, got {getattr(self, name)}")


@dataclass(frozen=True)
class RealImages:
    """Images in [-1, 1], (n, C, H, W), and their labels, in random order.

    Attributes:
        training: what copies are looked for in; without held-out images half of it, the reference.
        reference: what samples are compared with.
        floor: what they can hope for.
        held_out: `None` where there are none.
        described: the reference, in words.
    """

    training: Images
    reference: Images
    floor: Images
    held_out: Images | None
    described: str


def load_real_images(args: MeasureArguments, channels: int, resolution: int) -> RealImages:
    """The images that the arguments name, by `--reference`.

    Raises:
        InputError: there are none, too few, or they are a stream.
    """
    everything = replace(args, max_train_samples=None)
    transform, n = Transform(resolution, channels), args.max_train_samples
    source, unseen = load_images(everything, args.train_split), load_validation_images(everything)
    assert not isinstance(source, HubStream)
    held_out = None if unseen is None else _drawn(unseen, args.max_validation_samples, transform, args.seed)
    training = _drawn(source, len(source) if n is None else n, transform, args.seed)
    if args.reference == "held_out":
        if held_out is None:
            raise InputError("the data have no held-out split: name it with --validation_split, or --reference train")
        reference, floor = _halves(held_out)
    elif held_out is not None:
        reference, floor = training, held_out
    else:
        reference, floor = _halves(training)
        training = reference
    for images, name in ((reference, "reference"), (floor, "floor")):
        if len(images.images) < MIN_IMAGES:
            raise InputError(
                f"the {name} has {len(images.images)} images, and an interval needs {MIN_IMAGES}: use more data, or "
                f"--reference train"
            )
    kind = "training" if reference is training else "held-out"
    return RealImages(training, reference, floor, held_out, f"{len(reference.images)} {kind} images")


class _Chosen:
    """Some images of a source, in random order: stored ones are often sorted by class."""

    def __init__(self, source: ImageSource, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed_for(seed, _SPLIT))
        self.source, self.order = source, torch.randperm(len(source), generator=generator)[:n].tolist()
        self.labels = None if source.labels is None else [source.labels[i] for i in self.order]
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.order)

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.order[index])

    def name(self, index: int) -> str:
        return self.source.name(self.order[index])


def _drawn(source: ImageSource | HubStream, n: int, transform: Transform, seed: int) -> Images:
    assert not isinstance(source, HubStream)
    return first_images(_Chosen(source, n, seed), n, transform)


def _halves(images: Images) -> tuple[Images, Images]:
    half = len(images.images) // 2
    return _part(images, 0, half), _part(images, half, 2 * half)


def _part(images: Images, first: int, last: int) -> Images:
    return Images(images.images[first:last], images.labels[first:last], images.unreadable)


@dataclass(frozen=True)
class Manifold:
    """What all `quality` of one evaluation is measured against: features (n, d) of `RealImages`, on one device.

    Attributes:
        reference, training: features.
        count: images of precision and recall, which depend on their number: the same for all.
        copy_distance: see `diffusers_ext.metrics.copy_threshold`; `None` where held-out images are too few to tell.
    """

    reference: Tensor
    training: Tensor
    count: int
    copy_distance: float | None

    @classmethod
    def of(cls, reference: Tensor, training: Tensor, held_out: Tensor | None, count: int) -> Manifold:
        if held_out is None or len(held_out) * MEMORISED < 1:
            return cls(reference, training, count, None)
        return cls(reference, training, count, copy_threshold(training, held_out, MEMORISED))

    @property
    def least(self) -> int:
        """Images that a Frechet distance needs: below the number of features its bias cannot be taken off."""
        return self.reference.shape[1]


def quality(features: Tensor, real: Manifold) -> Quality:
    """Of features (n, d), in random order.

    Precision and recall are those of the first `real.count` images of both sides. The Frechet distance of fewer images
    than features is NaN.
    """
    reference = real.reference
    precision, recall = precision_recall(features[: real.count], reference[: real.count])
    near = None
    if real.copy_distance is not None:
        near = (nearest(features, real.training).distances <= real.copy_distance).double().mean().item()
    enough = min(len(features), len(reference)) >= real.least
    frechet = pseudo_values(frechet_distance, features, reference, groups=GROUPS) if enough else None
    kernel = pseudo_values(kernel_distance, features, reference, groups=GROUPS)
    return Quality(
        frechet=Interval(nan, nan, nan) if frechet is None else student_interval(frechet),
        kernel=student_interval(kernel),
        precision=precision,
        recall=recall,
        copies=near,
        frechet_values=[] if frechet is None else frechet.tolist(),
        kernel_values=kernel.tolist(),
    )


def likelihood(subject: Subject, held_out: Images, args: MeasureArguments, *, progress: bool = True) -> Likelihood:
    """Of `args.likelihood_images` held-out images by the bound and of `args.ode_images` by the probability flow, at the
    lowest noise level that the network was trained for; class-conditional models are told the labels, or the null class
    where the data have none. A model of short diffusion times starts from its bridge.
    """
    scheduler, network = subject.pipeline.scheduler, subject.network
    schedule = noise_schedule(scheduler)
    model, device = score_model_from(network, scheduler), network.device
    images = _part(held_out, 0, max(args.likelihood_images, args.ode_images))
    generator = torch.Generator().manual_seed(seed_for(args.seed, _DEQUANTIZE))
    x = dequantize(images.images, generator)
    if subject.null_class is not None:
        images = replace(images, labels=images.labels.where(images.labels >= 0, subject.null_class))
    condition, bridge = subject.conditions(images), subject.bridge

    def bits(asked: int, what: str, method: Any, **options: Any) -> Interval | None:
        count = min(asked, len(x))
        if count < 2:
            return None
        parts = []
        for first in tqdm(range(0, count, args.train_batch_size), desc=what, disable=not progress, unit="batch"):
            rows = slice(first, min(first + args.train_batch_size, count))
            cond = subject.part(condition, rows)
            start = {} if bridge is None else {"log_prior": _log_start(bridge, schedule, cond.get("class_labels"))}
            low_high = schedule.sigma_min, schedule.sigma_max
            found = method(model, x[rows].to(device), *low_high, generator=generator, **start, **options, **cond)
            parts.append(bits_per_dim(getattr(found, "total", found), x.shape[1:]).double().cpu())
        return student_interval(torch.cat(parts))

    losses = loss_by_sigma(subject, images, args, (schedule.sigma_min, schedule.sigma_max))
    ode = {"divergence": "hutchinson", "rtol": 1e-4, "atol": 1e-4}  # at 1e-3 off by 0.05 bits per dimension
    return Likelihood(
        ode=bits(args.ode_images, "bits per dimension, ODE", log_likelihood, **ode),
        bound=bits(args.likelihood_images, "bits per dimension, bound", elbo, n=args.likelihood_evaluations),
        **losses,
    )


def _log_start(bridge: Any, schedule: Any, labels: Tensor | None) -> Any:
    """The log density of x at its highest noise level, by the bridge of x_T = scale x."""

    def log_prior(x: Tensor, sigma: float) -> Tensor:
        scale = schedule.scale(torch.tensor(sigma, dtype=torch.float64)).item()
        return bridge.log_prob(scale * x, class_labels=labels) + x[0].numel() * log(scale)

    return log_prior


_VALIDATION = 4  # the stream of `seed_for`; those of the loop are 2 and 3


@torch.no_grad()
def loss_by_sigma(
    subject: Subject, validation: Images, args: DataArguments, sigma_range: tuple[float, float]
) -> dict[str, list[float]]:
    """Mean square error of eps on the validation images at log-spaced noise levels, always with the same noise."""
    network = subject.network
    model, device = score_model_from(network, subject.pipeline.scheduler), network.device
    generator = torch.Generator().manual_seed(seed_for(args.seed, _VALIDATION))
    sigmas = log_linear_sigmas(SIGMA_BINS, *sigma_range)
    total = torch.zeros(len(sigmas))
    for first in range(0, len(validation.images), args.train_batch_size):
        rows = _part(validation, first, first + args.train_batch_size)
        x0, cond = subject.encode(rows.images.to(device), generator), subject.conditions(rows)
        before = generator.get_state()
        for i, sigma in enumerate(sigmas.tolist()):
            x = model.process.perturb(x0, sigma, generator.set_state(before))
            total[i] += score_matching_loss(model, x, x0, sigma, **cond).sum().cpu()
    return {"sigmas": sigmas.tolist(), "eps_mse": (total / len(validation.images)).tolist()}
