"""The noise levels that training draws, and their weights.

By default these are those of the schedule and of the network's own output. Flow models have the laws of Stable
Diffusion 3 beside them: u in (0, 1) is drawn from a law (`logit_normal`, `mode`, or uniform), and the level is that of
the u N-th of the scheduler's N steps, which begin at pure noise, with its shift; `sigma_sqrt` and `cosmap` are weights.

Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024, arXiv
2403.03206), section 3.1; the functions are those of diffusers' training scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from ..errors import InputError
from ..fields import Ranged, arg
from ..interop import NoiseSchedule, live_config
from ..noise_levels import lower_sigma, min_snr_weight
from ..randomness import rand_like, randn_like
from ..score import ScoreModel
from .arguments import TrainingArguments


@dataclass
class LowerLevelArguments(Ranged):
    """Arguments of the consistency loss: the part of the batch that it takes, and its lower noise level."""

    consistency_fraction: float = arg(
        0.25, "Share of the batch that the consistency loss is applied to.", above=0, at_most=1
    )
    sigma_width: float = arg(0.05, "Its lower level is at most this far below sigma.", above=0)
    sigma_width_relative: bool = arg(False, "sigma_width is a fraction of sigma, below 1.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_width_relative and self.sigma_width >= 1:
            raise InputError(f"--sigma_width must be below 1 where it is relative, got {self.sigma_width}")

    def draw_lower(self, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """Return the lower noise level of each sigma, (n,)."""
        return lower_sigma(sigma, self.sigma_width, relative=self.sigma_width_relative, generator=generator)


class Levels:
    """Draws noise levels, and weighs them.

    Args:
        args: the run's arguments.
        schedule: the noise levels of the model.
        scheduler: the pipeline's scheduler.
        model: the network as a function of (x, sigma).

    Raises:
        InputError: `--weighting_scheme` is for flow models.
    """

    def __init__(self, args: TrainingArguments, schedule: NoiseSchedule, scheduler: Any, model: ScoreModel) -> None:
        self.args, self.schedule, self.model, self.scheme = args, schedule, model, args.weighting_scheme
        if self.scheme is None:
            return
        if schedule.family != "flow":
            raise InputError(
                f"--weighting_scheme is for flow models, and the pipeline has a {type(scheduler).__name__}"
            )
        fresh = type(scheduler).from_config(live_config(scheduler))  # its grid has all trained steps
        self.flow = fresh.sigmas[: schedule.num_train_timesteps].double()

    def draw(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Return n noise levels sigma, (n,)."""
        if self.scheme is None:
            return self.schedule.draw_sigmas(n, generator, device)
        args = self.args
        law = {"logit_mean": args.logit_mean or 0.0, "logit_std": args.logit_std or 1.0}
        scale = 1.29 if args.mode_scale is None else args.mode_scale
        u = compute_density_for_timestep_sampling(
            self.scheme, n, **law, mode_scale=scale, device=device, generator=generator
        )
        self.flow = self.flow.to(device)
        t = self.flow[(u * len(self.flow)).long().clamp(0, len(self.flow) - 1)]
        return (t / (1 - t)).clamp(max=self.schedule.sigma_max).float()

    def draw_above(self, data_noise: Tensor, generator: torch.Generator) -> Tensor:
        """Return noise levels for images that have noise themselves, (n,), at or above it.

        Those of clean images are as `draw` has them. Of the others, half are near their noise s, where the sampler
        ends, tau = s 0.8 exp(N(0, 1)) above it in quadrature, and half log-uniform.

        Args:
            data_noise: (n,), the standard deviation s, 0 for clean images.
        """
        usual = self.draw(len(data_noise), generator, data_noise.device)
        tau = 0.8 * data_noise * randn_like(data_noise, generator).exp()
        low, high = data_noise.clamp(min=1e-6), self.schedule.sigma_max
        wide = low * (high / low) ** rand_like(data_noise, generator)
        near = (data_noise**2 + tau**2) ** 0.5
        above = torch.where(rand_like(data_noise, generator) < 0.5, near.clamp(max=high), wide)
        return torch.where(data_noise > 0, torch.maximum(above, data_noise), usual)

    def weight(self, sigma: Tensor) -> Tensor:
        """Return the score-matching weight, (B,): Min-SNR, or that of the network's own output, times the scheme's."""
        if self.args.min_snr_gamma is not None:
            return min_snr_weight(sigma, self.args.min_snr_gamma)
        weight = self.model.output_weight(sigma)
        if self.scheme is None:
            return weight
        return weight * compute_loss_weighting_for_sd3(self.scheme, sigma / (1 + sigma))
