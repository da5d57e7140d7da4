r"""Distances between sets of images, how much of one set the other covers, and how much is copied from it.

The Frechet distance of two sets of features is that of the Gaussians with their moments,

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2).

Estimated from n samples it is biased upwards by about c/n: compare at equal n only, and beside the distance between two
sets of real images. The jackknife removes that bias: with d^2_(j) from all samples but those of group j of g,

    pseudo-values  v_j = g d^2 - (g - 1) d^2_(j),        d^2 ~ mean v_j,        standard error std(v_j) / g^1/2,

with an interval by Student's t of g - 1 degrees of freedom. It may include values below 0. (A bootstrap of the biased
estimate does not cover the truth: resampling adds to the bias.) Below n = d other terms than c/n remain, and the
interval of the Frechet distance does not cover it.

It is called FID only with the features of one particular Inception network (`Extractor.is_fid`).

The kernel distance is the squared maximum mean discrepancy under the kernel k(x, y) = (x.y / d + 1)^3, which is 0 where
the moments of orders 1 to 3 agree. From samples x_1..x_n and y_1..y_m,

    1/(n(n-1)) sum_{i != j} k(x_i, x_j) + 1/(m(m-1)) sum_{i != j} k(y_i, y_j) - 2/(nm) sum_ij k(x_i, y_j)

has no bias at any n and m, and may be below 0. The jackknife gives its interval.

Precision is the share of generated samples that lie in the manifold of the real ones, recall the share of the real ones
in that of the generated; the manifold of a set is the union of balls around its samples, each with the distance to the
k-th nearest other sample of the set as its radius. Both depend on the sizes of the sets: compare at equal ones.

A sample counts as a copy if it is as near to a training sample as only a given share of held-out samples are, the
level: what was never seen passes for a copy with that probability.

All that compares each sample with each runs in blocks of rows, so that memory grows with n and not with n^2.

References: GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017, arXiv 1706.08500); Bias and Confidence in
Not Quite Large Samples (Tukey, 1958); Demystifying MMD GANs (Binkowski et al., 2018, arXiv 1801.01401), equation 4 and
section 4; Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019, arXiv
1904.06991), equations 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ranges import require

_ENTRIES = 2**23  # of a block of a matrix of all pairs: 64 MB in float64


def frechet_distance(features_1: Tensor, features_2: Tensor) -> float:
    """Return d^2 of two sets of features, (n_1, d) and (n_2, d); computed in float64.

    Raises:
        ValueError: the sets are not two-dimensional, not finite, of different d, or of fewer than 2 samples.
    """
    _check(features_1, features_2, at_least=2, what="a covariance")
    features_1, features_2 = features_1.double(), features_2.double()
    mean_1, mean_2 = features_1.mean(0), features_2.mean(0)
    # With C = A^T A, A the centred samples / (n - 1)^1/2, the trace of the root is the nuclear norm of A_1 A_2^T.
    a_1 = (features_1 - mean_1) / (len(features_1) - 1) ** 0.5
    a_2 = (features_2 - mean_2) / (len(features_2) - 1) ** 0.5
    cross = torch.linalg.svdvals(_square(a_1) @ _square(a_2).T).sum()
    return ((mean_1 - mean_2).square().sum() + a_1.square().sum() + a_2.square().sum() - 2 * cross).item()


def kernel_distance(features_1: Tensor, features_2: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy of features (n, d) and (m, d) without bias, in float64.

    Raises:
        ValueError: the sets are not two-dimensional, not finite, of different d, or of fewer than 2 samples.
    """
    _check(features_1, features_2, at_least=2, what="an average over pairs")
    x, y = features_1.double(), features_2.double()
    return (_mean_over_pairs(x) + _mean_over_pairs(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))).item()


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of k(x_i, y_j) over all i and j."""
    blocks = ((part @ y.T).div_(x.shape[1]).add_(1).pow_(3).sum() for part in _blocks(x, y))
    return torch.stack(list(blocks)).sum()


def _mean_over_pairs(x: Tensor) -> Tensor:
    """Return the mean of k(x_i, x_j) over i != j."""
    diagonal = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
    return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


class Interval(NamedTuple):
    """An estimate without the bias of order 1/n, and an interval around it."""

    estimate: float
    low: float
    high: float


def jackknife(
    function: Callable[[Tensor, Tensor], float],
    features_1: Tensor,
    features_2: Tensor,
    *,
    groups: int = 10,
    level: float = 0.95,
) -> Interval:
    """Remove the bias of order 1/n from a function of two sets of samples, such as `frechet_distance`.

    `kernel_distance` has no bias, but gets an interval, which is too wide where the two laws are the same.

    Args:
        features_1, features_2, groups: as for `pseudo_values`, which raises the same errors.
        level: the probability that the interval covers the truth.
    """
    return student_interval(pseudo_values(function, features_1, features_2, groups=groups), level)


def pseudo_values(
    function: Callable[[Tensor, Tensor], float], features_1: Tensor, features_2: Tensor, *, groups: int = 10
) -> Tensor:
    """Return the v_j of the module's docstring, (groups,), in float64.

    Any two sets of n samples are divided into groups in the same way. So for features whose row i comes from the same
    noise as row i of others, the differences of their values make a paired comparison: `student_interval(values -
    others)`.

    Args:
        features_1, features_2: (n_1, d) and (n_2, d), independent samples; each set is divided at random, in the
            same way at every call.
        groups: g of the module's docstring; the function is called g + 1 times.

    Raises:
        ValueError: fewer than 2 groups, or fewer than 2 samples in a group.
    """
    n = min(len(features_1), len(features_2))
    require("groups", groups, at_least=2)
    if n < 2 * groups:
        raise ValueError(f"the jackknife needs 2 groups of 2 samples at least: {groups} groups of {n} samples")
    # At random: in turn, samples whose classes come in turn would leave out a class at a time.
    generator = torch.Generator().manual_seed(0)
    member = [torch.randperm(len(f), generator=generator) % groups for f in (features_1, features_2)]
    whole = function(features_1, features_2)
    left_out = [function(features_1[member[0] != j], features_2[member[1] != j]) for j in range(groups)]
    return groups * whole - (groups - 1) * torch.tensor(left_out, dtype=torch.float64)


def student_interval(values: Tensor, level: float = 0.95) -> Interval:
    """Return the mean of independent values (n,), and an interval by Student's t of n - 1 degrees of freedom.

    Raises:
        ValueError: fewer than 2 values, or `level` is not above 0 and below 1.
    """
    require("level", level, above=0, below=1)
    if len(values) < 2:
        raise ValueError(f"an interval needs 2 values at least, got {len(values)}")
    mean, n = values.mean().item(), len(values)
    half = _student_quantile(level, n - 1) * values.std().item() / n**0.5
    return Interval(mean, mean - half, mean + half)


def _student_quantile(level: float, degrees: int) -> float:
    """Return q with P(|t| <= q) = level, by integration over the angle of t = degrees^1/2 tan(angle)."""
    angle = torch.linspace(0, torch.pi / 2, 100_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (degrees - 1), angle)
    i = int(torch.searchsorted(mass / mass[-1], level)) + 1
    return (degrees**0.5 * angle[i].tan()).item()


def precision_recall(features: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Return precision and recall of generated samples (n, d) against real ones (m, d), computed in float64.

    Raises:
        ValueError: the sets are not two-dimensional, not finite, of different d, or of k samples or fewer; or
            k is below 1.
    """
    require("k", k, at_least=1)
    _check(features, real, at_least=k + 1, what=f"the distance to neighbour {k}")
    features, real = features.double(), real.double()
    return _covered(features, real, k), _covered(real, features, k)


def _covered(points: Tensor, manifold: Tensor, k: int) -> float:
    """Return the share of the points that lie in the manifold of a set."""
    to_itself = (_distances(part, manifold) for part in _blocks(manifold, manifold))
    radii = torch.cat([distances.kthvalue(k + 1, dim=1).values for distances in to_itself])
    inside = [(_distances(part, manifold) <= radii).any(1) for part in _blocks(points, manifold)]
    return torch.cat(inside).double().mean().item()


class Nearest(NamedTuple):
    """The nearest reference sample of each sample: Euclidean distances (n,) in float64 and indices (n,)."""

    distances: Tensor
    indices: Tensor


def nearest(features: Tensor, reference: Tensor) -> Nearest:
    """Find the nearest reference sample (m, d) of each of the features (n, d) by comparison with all, in float64.

    Raises:
        ValueError: the sets are not two-dimensional, not finite, of different d, or empty.
    """
    _check(features, reference, at_least=1, what="the nearest sample")
    features, reference = features.double(), reference.double()
    squares = reference.square().sum(1)
    found = ((squares - 2 * part @ reference.T).argmin(1) for part in _blocks(features, reference))
    indices = torch.cat(list(found))
    return Nearest((features - reference[indices]).norm(dim=1), indices)  # 0, and not nearly so, for copies


def copies(features: Tensor, training: Tensor, held_out: Tensor, level: float = 0.01) -> float:
    """Return the share of samples nearer to a training sample than all but `level` of the held-out samples are.

    It is about `level` for samples of the law that the training and the held-out ones are from, and 1 for copies. More
    than `level` is a sign of memorised images only if the samples are as various as the held-out ones: a model that
    draws the most common images alone is near to training samples, too.

    Args:
        features: (n, d), of generated samples.
        training: (m, d).
        held_out: (l, d), of samples of the law of the training ones that the model has not seen; 1 / level at least.
        level: above 0 and below 1.

    Raises:
        ValueError: a set is not two-dimensional, not finite, of another d, or too small; or `level` is out of range.
    """
    threshold = copy_threshold(training, held_out, level)
    return (nearest(features, training).distances <= threshold).double().mean().item()


def copy_threshold(training: Tensor, held_out: Tensor, level: float = 0.01) -> float:
    """Return the distance to a training sample up to which `copies` counts a sample.

    Raises:
        ValueError: as `copies`.
    """
    require("level", level, above=0, below=1)
    if len(held_out) * level < 1:
        raise ValueError(f"level {level} needs at least {math.ceil(1 / level)} held-out samples, got {len(held_out)}")
    # A new sample of the same law is as near as the k-th nearest of l with probability k / (l + 1).
    k = round(level * (len(held_out) + 1))
    return nearest(held_out, training).distances.kthvalue(k).values.item()


def _blocks(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Split x so that the pairs of a part with all rows of y are at most _ENTRIES."""
    return x.split(max(1, _ENTRIES // len(y)))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances, (n, m); without a matrix product, so that a sample is at distance 0 of itself."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _check(features_1: Tensor, features_2: Tensor, *, at_least: int, what: str) -> None:
    shapes = f"{tuple(features_1.shape)} and {tuple(features_2.shape)}"
    if features_1.ndim != 2 or features_2.ndim != 2 or features_1.shape[1] != features_2.shape[1]:
        raise ValueError(f"features must be (n, d) with one d, got {shapes}")
    if min(len(features_1), len(features_2)) < at_least:
        raise ValueError(f"{what} needs at least {at_least} samples, got {shapes}")
    for number, features in enumerate((features_1, features_2), 1):
        if not features.isfinite().all():
            raise ValueError(
                f"features_{number} has values that are not finite: the images, or the model that drew them"
            )


def _square(a: Tensor) -> Tensor:
    """Return R (d, d) with R^T R = A^T A where A has more rows than columns, and A itself otherwise."""
    return torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a
