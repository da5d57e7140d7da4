"""Why HeunDiscreteScheduler fails on the cosine schedule: its first step, by the exact model of Gaussian pixels.

    python benchmarks/first_step.py

Prints the standard deviation of samples of N(0.2, 0.4^2) and the first two noise levels. From x at sigma_0 a Heun step
to sigma_1 averages the slopes (x - D_0) / sigma_0 and (x' - D_1) / sigma_1, so that D_1 - D_0 enters x multiplied by
(sigma_0 - sigma_1) / (2 sigma_1), which is thousands on the cosine schedule, and below 3 with linear betas.
"""

from itertools import product
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

MEAN, STD = 0.2, 0.4


def sample(scheduler: Any, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled, abar = scheduler.scale_model_input(x, t).double(), scheduler.alphas_cumprod[int(t)].double()
        x0 = MEAN + abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar) * (scaled - abar.sqrt() * MEAN)
        x = scheduler.step(((scaled - abar.sqrt() * x0) / (1 - abar).sqrt()).to(x), t, x).prev_sample
    return x


def main() -> None:
    kinds = HeunDiscreteScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler
    for betas, kind, steps in product(("squaredcos_cap_v2", "linear"), kinds, (5, 10, 25, 50)):
        trained = dict(DDIMScheduler(beta_schedule=betas, timestep_spacing="trailing").config)
        trained.pop("_use_default_values")  # or another class replaces the betas by its own
        scheduler = kind.from_config(trained)
        std, (first, second) = sample(scheduler, steps).std(), scheduler.sigmas.unique().flip(0)[:2]
        print(f"{betas}, {kind.__name__}, {steps} steps: std {std:.3f}, levels {first:.1f}, {second:.2f}")


if __name__ == "__main__":
    main()
