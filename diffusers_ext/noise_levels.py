r"""Noise levels: grids to sample on, laws to train with, weights of the loss.

Grids are decreasing. Laws take a generator. Weights multiply the score-matching loss sigma^2 |score - target|^2, whose
unit is the mean square error of eps.

References: Karras et al., 2022, arXiv 2206.00364, equation 5 (grid) and table 1 (training law); Consistent Diffusion
Models (Daras et al., 2023, arXiv 2302.09057; `lower_sigma`); Observation-Guided Diffusion Probabilistic Models (Kang et
al., CVPR 2024, arXiv 2310.04041; `look_ahead_sigma`); Efficient Diffusion Training via Min-SNR Weighting (Hang
et al., 2023, arXiv 2303.09556).
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from .randomness import rand_like, randn
from .ranges import require

RHO = 7.0


def _as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _check_grid(n: int, sigma_min: Tensor | float, sigma_max: Tensor | float) -> None:
    """Check the size and, where they are numbers, the bounds of a grid."""
    require("n", n, at_least=1)
    if not isinstance(sigma_min, Tensor) and not isinstance(sigma_max, Tensor):
        require("sigma_min", sigma_min, above=0)
        require("sigma_max", sigma_max, at_least=sigma_min)


def karras_sigmas(n: int, sigma_min: Tensor | float, sigma_max: Tensor | float, rho: float = RHO) -> Tensor:
    """Return `n` levels from `sigma_max` down to `sigma_min`, equidistant in sigma^(1/rho).

    The bounds are numbers (the grid is then float64 of shape (n,)) or tensors of one shape S: one grid for each entry,
    shape (n, *S).

    Raises:
        ValueError: n is below 1, rho is not positive, or the numbers are not 0 < sigma_min <= sigma_max.
    """
    require("rho", rho, above=0)
    _check_grid(n, sigma_min, sigma_max)
    low, high = _as_tensor(sigma_min) ** (1 / rho), _as_tensor(sigma_max) ** (1 / rho)
    u = torch.linspace(0, 1, n, dtype=high.dtype, device=high.device).reshape(-1, *[1] * high.ndim)
    return (high + u * (low - high)) ** rho


def log_linear_sigmas(n: int, sigma_min: Tensor | float, sigma_max: Tensor | float) -> Tensor:
    """Return `n` levels from `sigma_max` down to `sigma_min`, equidistant in log sigma; shapes and errors are
    those of `karras_sigmas`."""
    _check_grid(n, sigma_min, sigma_max)
    low, high = _as_tensor(sigma_min).log(), _as_tensor(sigma_max).log()
    u = torch.linspace(0, 1, n, dtype=high.dtype, device=high.device).reshape(-1, *[1] * high.ndim)
    return (high + u * (low - high)).exp()


def log_normal_sigmas(
    n: int,
    mean: float = -1.2,
    std: float = 1.2,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw from the training law of EDM: ln sigma ~ N(mean, std^2); shape (n,).

    Raises:
        ValueError: the mean is not finite, or std is negative.
    """
    require("mean", mean)
    require("std", std, at_least=0)
    return (mean + std * randn((n,), generator, device=device)).exp()


def lower_sigma(
    sigma: Tensor,
    width: float = 0.05,
    floor: float = 0.002,
    relative: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the lower noise level of the consistency loss: sigma' = max(sigma - U[0, width], floor), at most sigma.

    `relative` makes the width a fraction of sigma, sigma' = sigma (1 - U[0, width]): for schedules that reach far above
    sigma = 1, where an absolute width changes nothing. The paper's law is absolute, with width 0.05 and floor 0.002.

    Raises:
        ValueError: width or floor is negative, or width is relative and not below 1.
    """
    require("width", width, at_least=0, below=1 if relative else None)
    require("floor", floor, at_least=0)
    drop = width * rand_like(sigma, generator)
    lower = sigma * (1 - drop) if relative else sigma - drop
    return torch.minimum(lower.clamp(min=floor), sigma)


def look_ahead_sigma(
    sigma: Tensor,
    k: float,
    sigma_min: float,
    sigma_max: float,
    rho: float = RHO,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next noise level of the observation loss: u' = min(1, u + k U[0, 1]) in the time u of `karras_sigmas`,
    which runs from 0 at sigma_max to 1 at sigma_min and is linear in sigma^(1/rho).

    The result has the shape of sigma and is at most sigma. A sigma above sigma_max looks ahead from sigma_max. One at
    or below sigma_min stays as it is: there is no step, from which a discriminator learns nothing.

    Args:
        sigma: of any shape, of a floating dtype.
        k: the longest step, in the unit of u. The paper has 0.1 from scratch and 0.2 for fine-tuning.

    Raises:
        ValueError: k is negative, rho not positive, or the bounds are not 0 < sigma_min < sigma_max.
    """
    require("k", k, at_least=0)
    require("rho", rho, above=0)
    require("sigma_min", sigma_min, above=0)
    require("sigma_max", sigma_max, above=sigma_min)
    u = rand_like(sigma, generator)
    width = sigma_max ** (1 / rho) - sigma_min ** (1 / rho)
    root = sigma.clamp(sigma_min, sigma_max) ** (1 / rho) - k * u * width
    ahead = root.clamp(min=sigma_min ** (1 / rho)) ** rho
    return torch.minimum(ahead.clamp(min=sigma_min), sigma)


def min_snr_weight(sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Return the weight min(SNR, gamma) of the error of x0, as the weight min(1, gamma sigma^2) of that of eps.

    SNR = sigma^-2.

    Raises:
        ValueError: gamma is not positive.
    """
    require("gamma", gamma, above=0, at_most=inf)
    return (gamma * sigma**2).clamp(max=1)
