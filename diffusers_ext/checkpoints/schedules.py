r"""The schedulers of converted models.

A variance-preserving SDE with beta(t) = beta_min + t (beta_max - beta_min) on [0, 1] has

    abar(t) = exp( -t beta_min - t^2 (beta_max - beta_min) / 2 ),

and its network is given (N - 1) t. diffusers' schedulers know a table of N levels: that of timestep i is abar at
t = i / (N - 1) here, by `trained_betas`, and that of timestep 0 is abar(1e-5), the least time of the training. (The
`linear` betas of diffusers are near: their levels are those of half a step later, 5% more noise at i = 10.)

Reference: Song et al., 2020, arXiv 2011.13456, appendix B and C.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from torch import Tensor

from ..schedulers import ReflectedScheduler

N, LEAST_TIME = 1000, 1e-5


def vp_betas(beta_min: float, beta_max: float) -> Tensor:
    """Return the N betas of a variance-preserving SDE, float64."""
    t = (torch.arange(N, dtype=torch.float64) / (N - 1)).clamp(min=LEAST_TIME)
    log_abar = -t * beta_min - t**2 * (beta_max - beta_min) / 2
    return -torch.expm1(torch.diff(log_abar, prepend=torch.zeros(1, dtype=torch.float64)))


def vp_scheduler(beta_min: float, beta_max: float) -> DDIMScheduler:
    """Return a scheduler for a network of the variance-preserving SDE that predicts epsilon."""
    betas = vp_betas(beta_min, beta_max).tolist()
    return DDIMScheduler(N, trained_betas=betas, clip_sample=False, timestep_spacing="trailing")


def ddpm_scheduler(beta_schedule: str, learned_variance: bool = False, clip: bool = True) -> DDPMScheduler:
    """Return a scheduler for a network of N timesteps.

    Args:
        beta_schedule: `linear` or `squaredcos_cap_v2`.
        learned_variance: whether the network predicts the variance.
        clip: whether x0 is clipped, with the smaller fixed variance, as ADM samples; or not, with the larger one, as
            score_sde does.
    """
    variance = "learned_range" if learned_variance else "fixed_small" if clip else "fixed_large"
    options = {"variance_type": variance, "clip_sample": clip, "timestep_spacing": "trailing"}
    return DDPMScheduler(N, beta_schedule=beta_schedule, **options)


def edm_scheduler(sigma_min: float, sigma_max: float, sigma_data: float) -> EDMEulerScheduler:
    """Return a scheduler for a network with EDM's preconditioning."""
    return EDMEulerScheduler(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, prediction_type="epsilon")


def reflected_scheduler(sigma_min: float, sigma_max: float) -> ReflectedScheduler:
    """Return a scheduler for a network of a reflected process in [-1, 1] that predicts epsilon."""
    return ReflectedScheduler(N, sigma_min=sigma_min, sigma_max=sigma_max, prediction_type="epsilon")
