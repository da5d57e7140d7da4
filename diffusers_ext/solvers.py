r"""One step of the reverse process, from `sigma` down to `sigma_next`, and the loop over a grid.

With r = sigma_next / sigma, D the denoiser at (x, sigma) and z ~ N(0, I):

    euler            x <- D + r (x - D)                              probability-flow ODE, order 1; DDIM with eta = 0
    heun             euler, then the average of both ends' slopes    probability-flow ODE, order 2
    euler_maruyama   x <- x + 2 (sigma_next - sigma) (x - D) / sigma + (2 sigma (sigma - sigma_next))^1/2 z     SDE
    posterior        x <- D + r^2 (x - D) + sigma_next (1 - r^2)^1/2 z   SDE; the law of x_next given x and x0 = D;
                                                                         DDPM with the small variance

    langevin         x <- x + d s + (2 d)^1/2 z                      corrector: keeps sigma, for any process

(s is the score, d = (step_size sigma)^2.) Every rule but the corrector has one calling convention,
`step(denoiser, x, sigma, sigma_next, *, denoised, generator, **cond)`, where `denoised` is D(x, sigma) if the caller
has it already.

References: Karras et al., 2022, arXiv 2206.00364, algorithms 1 and 2; Denoising Diffusion Implicit Models (Song, Meng,
Ermon, 2020, arXiv 2010.02502); Score-Based Generative Modeling through SDEs (Song et al., 2020, arXiv 2011.13456),
algorithm 4 (corrector).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from .process import align
from .randomness import randn_like
from .ranges import require
from .score import Denoiser, ScoreModel


class Step(Protocol):
    """The calling convention of this module."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        *,
        denoised: Tensor | None = None,
        generator: torch.Generator | None = None,
        **cond: Any,
    ) -> Tensor: ...


def euler(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    denoised: Tensor | None = None,
    generator: torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    """x <- D + r (x - D); `generator` is not used."""
    denoised = denoiser(x, sigma, **cond) if denoised is None else denoised
    return denoised + align(sigma_next, x) / align(sigma, x) * (x - denoised)


def heun(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    denoised: Tensor | None = None,
    generator: torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    """Step with two evaluations and no noise. If sigma_next is the number 0, where no second slope exists, this is the
    Euler step; a tensor sigma_next must be positive."""
    denoised = denoiser(x, sigma, **cond) if denoised is None else denoised
    x_euler = euler(denoiser, x, sigma, sigma_next, denoised=denoised)
    if not isinstance(sigma_next, Tensor) and sigma_next == 0:
        return x_euler
    slope = (x - denoised) / align(sigma, x)
    slope_next = denoiser.eps(x_euler, sigma_next, **cond)
    return x + (align(sigma_next, x) - align(sigma, x)) * (slope + slope_next) / 2


def euler_maruyama(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    denoised: Tensor | None = None,
    generator: torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    """The step of the consistent-diffusion paper; biased when the steps are few (see `losses.consistency_loss`)."""
    denoised = denoiser(x, sigma, **cond) if denoised is None else denoised
    sigma, sigma_next = align(sigma, x), align(sigma_next, x)
    noise = (2 * sigma * (sigma - sigma_next)) ** 0.5 * randn_like(x, generator)
    return x + 2 * (sigma_next - sigma) * (x - denoised) / sigma + noise


def posterior(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    denoised: Tensor | None = None,
    generator: torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    """Draw x_next from p(x_next | x, x0 = D)."""
    denoised = denoiser(x, sigma, **cond) if denoised is None else denoised
    sigma_next = align(sigma_next, x)
    r = sigma_next / align(sigma, x)
    return denoised + r**2 * (x - denoised) + sigma_next * (1 - r**2) ** 0.5 * randn_like(x, generator)


@torch.no_grad()
def langevin(
    model: ScoreModel,
    x: Tensor,
    sigma: Tensor | float,
    *,
    steps: int = 1,
    step_size: float = 0.16,
    generator: torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    """Make Langevin steps at one noise level, each followed by `model.process.constrain`.

    They bring the law of x, which stays at `sigma`, nearer to the model's p_sigma: as `step_size` goes to 0, and
    `steps` to infinity like step_size^-2, it becomes p_sigma.

    Raises:
        ValueError: `step_size`, `steps` or a number `sigma` is not positive.
    """
    require("steps", steps, at_least=1)
    require("step_size", step_size, above=0)
    if not isinstance(sigma, Tensor):
        require("sigma", sigma, above=0)
    d = (step_size * align(sigma, x)) ** 2
    for _ in range(steps):
        x = x + d * model.score(x, sigma, **cond) + (2 * d) ** 0.5 * randn_like(x, generator)
        x = model.process.constrain(x)
    return x


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    step: Step = euler,
    *,
    generator: torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    """Integrate from x at the first of `sigmas` (decreasing; the last may be 0) to the last of them.

    Raises:
        ValueError: the levels are not decreasing, or not finite, or one is negative.
    """
    levels = sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas
    if not (all(a > b for a, b in pairwise(levels)) and all(0 <= level < inf for level in levels)):
        raise ValueError(f"sigmas must be decreasing, finite and at least 0, got {levels}")
    for sigma, sigma_next in pairwise(levels):
        x = step(denoiser, x, sigma, sigma_next, generator=generator, **cond)
    return x
