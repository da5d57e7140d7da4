r"""Estimates of the mean and the principal directions of data that come in batches.

A batch of m samples adds rows to a matrix X whose scatter matrix X'X is n times the covariance S: its samples minus
their mean, and one for the shift of the mean, (n m / (n + m))^1/2 (mean of the batch - mean so far). While d x d
numbers are few, X'X is added up; beyond, X is replaced by its leading singular rows after each batch, which is exact
for data of that rank and close for decaying spectra. The trace is exact in either case.

Estimated eigenvalues are spread too far apart; shrinkage brings them together,

    Cov = (1 - rho) S + rho tr(S)/d I,

with rho of the oracle approximating estimator in scikit-learn's form. Directions stay as they are.

References: Shrinkage Algorithms for MMSE Covariance Estimation (Chen, Wiesel, Eldar, Hero, 2010, arXiv 0907.4698),
equation 23; Incremental Learning for Robust Visual Tracking (Ross, Lim, Lin, Yang, 2008).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..progress import progress_bar, say

FULL_COVARIANCE_LIMIT = 4096
"""K whole covariance matrices are kept while they are estimated where d sqrt(K) is at most this."""
DEFAULT_RANK = 256
"""By default larger data get this many principal directions."""
KEPT_PER_DIRECTION = 2
"""This many singular rows of larger data are kept for each principal direction."""


class Law(NamedTuple):
    """The moments of x0 in its principal directions: mean (d,), directions (r, d), variances (r,), floor ()."""

    mean: Tensor
    directions: Tensor
    variances: Tensor
    floor: Tensor


class Moments:
    """The mean and the scatter matrix X'X of samples that come in batches, in float64.

    Args:
        d: the number of dimensions.
        kept: how many leading singular rows stand for X; with `None` X'X itself is added up.
        device: where the sums are kept.
    """

    def __init__(self, d: int, kept: int | None, device: torch.device) -> None:
        self.kept, self.count = kept, 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(d if kept is None else 0, d, dtype=torch.float64, device=device)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x0: Tensor) -> None:
        """Add a batch (m, d)."""
        m, n = len(x0), self.count + len(x0)
        centre = x0.mean(0)
        shift = centre - self.mean
        rows = torch.cat([x0 - centre, sqrt(self.count * m / n) * shift[None]])
        self.trace += rows.square().sum()
        if self.kept is None:
            self.scatter += rows.T @ rows
        else:
            _, values, directions = torch.linalg.svd(torch.cat([self.scatter, rows]), full_matrices=False)
            self.scatter = (values[:, None] * directions)[: self.kept]
        self.mean += shift * (m / n)
        self.count = n

    def law(self, rank: int, shrink: bool) -> Law:
        """Return the moments in the first `rank` principal directions."""
        n, d = self.count, len(self.mean)
        if self.kept is None:
            variances, directions = _eigenvalues(self.scatter / n)
        else:
            _, values, directions = torch.linalg.svd(self.scatter, full_matrices=False)
            variances = values.square() / n
        trace, known = self.trace / n, len(variances)
        rest = (trace - variances.sum()).clamp(min=0) / max(d - known, 1)
        share = oas_shrinkage(trace, variances.square().sum() + (d - known) * rest**2, d, n) if shrink else 0.0
        floor = (trace - variances[:rank].sum()).clamp(min=0) / max(d - rank, 1)
        shrunk = [(1 - share) * v + share * trace / d for v in (variances[:rank], floor)]
        return Law(self.mean, directions[:rank], *shrunk)


def oas_shrinkage(trace: Tensor, trace_of_square: Tensor, d: int, n: int) -> Tensor:
    """Return rho of the oracle approximating shrinkage, in [0, 1], from tr S, tr S^2 and n samples in d dimensions."""
    spread = trace_of_square - trace**2 / d
    rho = (trace_of_square + trace**2) / ((n + 1) * spread)
    return torch.where(spread > 0, rho, 1.0).clamp(max=1)


@dataclass
class DataMoments:
    """The moments of x0 of each class, the shape of a sample and the rank r; bridges at several T can share them."""

    shape: list[int]
    rank: int
    classes: list[Moments]
    progress: bool = False
    _laws: dict[bool, list[Law]] = field(default_factory=dict)

    @property
    def smallest_class(self) -> int:
        """The number of samples of the class that has the fewest."""
        return min(moments.count for moments in self.classes)

    def laws(self, shrink: bool) -> list[Law]:
        """Return the moments of each class in its principal directions, computed once."""
        if shrink not in self._laws:
            say(f"principal directions of {prod(self.shape)} dimensions", shown=self.progress)
            self._laws[shrink] = [moments.law(self.rank, shrink) for moments in self.classes]
        return self._laws[shrink]

    def notes(self, measured_on: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the note for people that is stored with a bridge."""
        return dict(measured_on or {}) | {"num_samples": sum(m.count for m in self.classes)} | dict(settings)


def data_moments(batches: Iterable[Any], rank: int | None, num_classes: int | None, progress: bool) -> DataMoments:
    """Estimate the moments of each class in one pass. By default the rank is d, or DEFAULT_RANK for large data.

    Raises:
        ValueError: rank is out of range; data are none, too few, not finite or of different shapes.
    """
    data: DataMoments | None = None
    classes = count_classes(num_classes)
    for x0, labels in read_batches(batches, num_classes, progress, "moments"):
        x0 = x0.double()
        if data is None:
            shape, d = list(x0.shape[1:]), prod(x0.shape[1:])
            whole = classes * d**2 <= FULL_COVARIANCE_LIMIT**2
            if rank is None:
                rank = d if whole else min(d, DEFAULT_RANK)
            if not 1 <= rank <= d:
                raise ValueError(f"rank must be from 1 to the {d} dimensions of the data, got {rank}")
            kept = None if whole else min(d, KEPT_PER_DIRECTION * rank)
            data = DataMoments(shape, rank, [Moments(d, kept, x0.device) for _ in range(classes)], progress)
        if list(x0.shape[1:]) != data.shape:
            raise ValueError(f"a batch has samples of shape {list(x0.shape[1:])}, the first had {data.shape}")
        if not x0.isfinite().all():
            raise ValueError("the data are not finite")
        for moments, part in zip(data.classes, split_by_class(x0.flatten(1), labels, len(data.classes)), strict=True):
            if len(part):
                moments.add(part)
    if data is None:
        raise ValueError("there are no data: `batches` is empty")
    needed = 2 if data.rank == prod(data.shape) else data.rank + 1
    if data.smallest_class < needed:
        raise ValueError(f"rank {data.rank} needs {needed} samples of each class, one has {data.smallest_class}")
    return data


def read_batches(
    batches: Iterable[Any], num_classes: int | None, progress: bool, what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x0, (B, *shape), and the labels on the CPU, (B,), of each batch; labels are 0 without classes."""
    for batch in progress_bar(batches, what, shown=progress, unit="batch"):
        x0, cond = (batch, {}) if isinstance(batch, Tensor) else batch
        if num_classes is None:
            yield x0, torch.zeros(len(x0), dtype=torch.long)
        else:
            yield x0, read_labels(cond.get("class_labels"), len(x0), num_classes)


def read_labels(class_labels: Tensor | None, n: int, num_classes: int) -> Tensor:
    """Return the labels on the CPU, (n,).

    Raises:
        ValueError: they are missing, not n integers, or out of range.
    """
    if class_labels is None:
        raise ValueError(f"the bridge is of {num_classes} classes: class_labels are needed")
    labels = class_labels.to("cpu")
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"class_labels must be ({n},) integers, got {tuple(labels.shape)} of {labels.dtype}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"class_labels must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}")
    return labels.long()


def split_by_class(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, ...]:
    """Return the samples of each class, in their order."""
    order = labels.argsort(stable=True).to(x.device)
    return x[order].split(labels.bincount(minlength=classes).tolist())


def count_classes(num_classes: int | None) -> int:
    """Return K, which is 1 without classes.

    Raises:
        ValueError: num_classes is below 1.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be None or at least 1, got {num_classes}")
    return 1 if num_classes is None else num_classes


def require_repeatable(batches: Iterable[Any]) -> None:
    """Refuse an iterator: it would be empty in the second pass over the data.

    Raises:
        ValueError: `batches` is an iterator.
    """
    if iter(batches) is batches:
        raise ValueError("the data are gone through twice: give a list, a DataLoader or the like, not an iterator")


def _eigenvalues(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, decreasing, (d,), and the eigenvectors as rows, (d, d)."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0), vectors.flip(1).T


def principal_law(mean: Tensor, covariance: Tensor, rank: int) -> Law:
    """Return given moments, (d,) and (d, d), in the first `rank` principal directions."""
    values, directions = _eigenvalues(covariance)
    return Law(mean, directions[:rank], values[:rank], values[rank:].sum() / max(len(values) - rank, 1))
