r"""Distances between sets of images.

The Frechet distance of two sets of features is that of the Gaussians with their moments,

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2).

Estimated from n samples it is biased upwards, the more so the smaller n: compare at equal n only, and beside the
distance between two sets of real images. It is called FID only with the features of one particular Inception network.

Reference: GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017, arXiv 1706.08500).
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features_1: Tensor, features_2: Tensor) -> float:
    """d^2 of two sets of features, (n_1, d) and (n_2, d); computed in float64.

    Raises:
        ValueError: the sets are not two-dimensional, of different d, or of fewer than 2 samples.
    """
    shapes = f"{tuple(features_1.shape)} and {tuple(features_2.shape)}"
    if features_1.ndim != 2 or features_2.ndim != 2 or features_1.shape[1] != features_2.shape[1]:
        raise ValueError(f"features must be (n, d) with one d, got {shapes}")
    if min(len(features_1), len(features_2)) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {shapes}")
    features_1, features_2 = features_1.double(), features_2.double()
    mean_1, mean_2 = features_1.mean(0), features_2.mean(0)
    # With C = A^T A, A the centred samples / (n - 1)^1/2, the trace of the root is the nuclear norm of A_1 A_2^T.
    a_1 = (features_1 - mean_1) / (len(features_1) - 1) ** 0.5
    a_2 = (features_2 - mean_2) / (len(features_2) - 1) ** 0.5
    cross = torch.linalg.svdvals(_square(a_1) @ _square(a_2).T).sum()
    return ((mean_1 - mean_2).square().sum() + a_1.square().sum() + a_2.square().sum() - 2 * cross).item()


def _square(a: Tensor) -> Tensor:
    """R (d, d) with R^T R = A^T A, where A has more rows than columns; A itself otherwise."""
    return torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a
