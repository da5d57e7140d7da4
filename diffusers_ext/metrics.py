r"""Distances between sets of images, and what one covers of the other.

The Frechet distance of two sets of features is that of the Gaussians with their moments,

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2).

Estimated from n samples it is biased upwards by about c/n: compare at equal n only, and beside the distance between two
sets of real images. The jackknife removes that bias: with d^2_(j) from all samples but those of group j of g,

    pseudo-values  v_j = g d^2 - (g - 1) d^2_(j),        d^2 ~ mean v_j,        standard error std(v_j) / g^1/2,

with an interval by Student's t of g - 1 degrees of freedom. It may include values below 0. (A bootstrap of the biased
estimate does not cover the truth: resampling adds to the bias.)

It is called FID only with the features of one particular Inception network.

Precision is the share of generated samples that lie in the manifold of the real ones, recall the share of the real ones
in that of the generated; the manifold of a set is the union of balls around its samples, each with the distance to the
k-th nearest other sample of the set as its radius. Both depend on the sizes of the sets: compare at equal ones.

References: GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017, arXiv 1706.08500); Bias and Confidence in
Not Quite Large Samples (Tukey, 1958); Improved Precision and Recall Metric for Assessing Generative Models
(Kynkaanniemi et al., 2019, arXiv 1904.06991), equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def frechet_distance(features_1: Tensor, features_2: Tensor) -> float:
    """d^2 of two sets of features, (n_1, d) and (n_2, d); computed in float64.

    Raises:
        ValueError: the sets are not two-dimensional, of different d, or of fewer than 2 samples.
    """
    _check(features_1, features_2, at_least=2, what="a covariance")
    features_1, features_2 = features_1.double(), features_2.double()
    mean_1, mean_2 = features_1.mean(0), features_2.mean(0)
    # With C = A^T A, A the centred samples / (n - 1)^1/2, the trace of the root is the nuclear norm of A_1 A_2^T.
    a_1 = (features_1 - mean_1) / (len(features_1) - 1) ** 0.5
    a_2 = (features_2 - mean_2) / (len(features_2) - 1) ** 0.5
    cross = torch.linalg.svdvals(_square(a_1) @ _square(a_2).T).sum()
    return ((mean_1 - mean_2).square().sum() + a_1.square().sum() + a_2.square().sum() - 2 * cross).item()


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
    """A function of two sets of samples, such as `frechet_distance`, with its bias of order 1/n taken off.

    Args:
        features_1, features_2: (n_1, d) and (n_2, d), independent samples; each set is dealt out to the groups in turn.
        groups: g of the module's docstring; the function is called g + 1 times.
        level: of the interval.

    Raises:
        ValueError: fewer than 2 groups, or fewer than 2 samples in a group.
    """
    n = min(len(features_1), len(features_2))
    if groups < 2 or n < 2 * groups:
        raise ValueError(f"the jackknife needs 2 groups of 2 samples at least: {groups} groups of {n} samples")
    whole, member = function(features_1, features_2), [torch.arange(len(f)) % groups for f in (features_1, features_2)]
    left_out = [function(features_1[member[0] != j], features_2[member[1] != j]) for j in range(groups)]
    values = groups * whole - (groups - 1) * torch.tensor(left_out, dtype=torch.float64)
    half = _student_quantile(level, groups - 1) * values.std().item() / groups**0.5
    return Interval(values.mean().item(), values.mean().item() - half, values.mean().item() + half)


def _student_quantile(level: float, degrees: int) -> float:
    """q with P(|t| <= q) = level, by integration of the density over the angle of t = degrees^1/2 tan(angle)."""
    angle = torch.linspace(0, torch.pi / 2, 100_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (degrees - 1), angle)
    i = int(torch.searchsorted(mass / mass[-1], level)) + 1
    return (degrees**0.5 * angle[i].tan()).item()


def precision_recall(features: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of features (n, d) of generated samples, against those of real ones (m, d); in float64.

    Raises:
        ValueError: the sets are not two-dimensional, of different d, or of k samples or fewer; or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check(features, real, at_least=k + 1, what=f"the distance to neighbour {k}")
    features, real = features.double(), real.double()
    return _covered(features, real, k), _covered(real, features, k)


def _covered(points: Tensor, manifold: Tensor, k: int) -> float:
    """The share of the points that lie in the manifold of a set."""
    exact = "donot_use_mm_for_euclid_dist"  # a sample is at distance 0 of itself, and its nearest neighbour
    radii = torch.cdist(manifold, manifold, compute_mode=exact).kthvalue(k + 1, dim=1).values
    inside = torch.cdist(points, manifold, compute_mode=exact) <= radii
    return inside.any(1).double().mean().item()


def _check(features_1: Tensor, features_2: Tensor, *, at_least: int, what: str) -> None:
    shapes = f"{tuple(features_1.shape)} and {tuple(features_2.shape)}"
    if features_1.ndim != 2 or features_2.ndim != 2 or features_1.shape[1] != features_2.shape[1]:
        raise ValueError(f"features must be (n, d) with one d, got {shapes}")
    if min(len(features_1), len(features_2)) < at_least:
        raise ValueError(f"{what} needs at least {at_least} samples, got {shapes}")


def _square(a: Tensor) -> Tensor:
    """R (d, d) with R^T R = A^T A, where A has more rows than columns; A itself otherwise."""
    return torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a
