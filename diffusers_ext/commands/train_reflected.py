r"""Train a reflected diffusion model (Lou, Ermon, 2023, arXiv 2304.04740): its samples keep to the range of the data.

    diffusers-ext train-reflected --preset digits --output_dir reflected-digits
    diffusers-ext train-reflected --preset cifar10 --class_conditional --output_dir reflected-cifar10

The result opens as `ReflectedPipeline`, after `import diffusers_ext`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..errors import InputError, command
from ..fields import arg
from ..interop import NoiseSchedule
from ..losses import score_matching_loss
from ..noise_levels import log_normal_sigmas
from ..randomness import rand_like
from ..training import TrainingArguments, TrainingLoop
from .parsing import parse_arguments

SIGMA_MAX = 3.0  # 1.5 widths of [-1, 1]: there the law is uniform to 3e-5
LAW = -0.2, 0.8  # mean and standard deviation of ln(sigma), chosen by trying
LOWEST = 0.005  # for likelihood: below the width of a bin of 8 bits, 0.0078, there is nothing to learn

PAPER = ("Reflected Diffusion Models", "2304.04740")


@dataclass
class ReflectedArguments(TrainingArguments):
    """Noise levels are in the units of images in [-1, 1]; the paper's, in units of the box, are half as large."""

    needs_scheduler: ClassVar[str | None] = "ReflectedScheduler"

    label_drop: float = arg(0.2, "Share of labels replaced by the null class.", at_least=0, at_most=1)
    sigma_min: float | None = arg(None, "Lowest noise level: 0.02 by default, 0.005 for likelihood.", above=0)
    sigma_max: float | None = arg(None, "Highest noise level: 3 by default, 10 for epsilon.", above=0)
    purpose: Literal["samples", "likelihood"] = arg(
        "samples",
        "What the noise levels serve, where the network predicts a point; for likelihood half of them are log-uniform.",
    )
    sigma_log_mean: float | None = arg(
        None,
        "Draw ln(sigma) from a normal law of this mean, within bounds; by default -0.2, and for epsilon it is uniform.",
    )
    sigma_log_std: float | None = arg(
        None, "Standard deviation of that law: by default 0.8, and 1.2 for epsilon.", above=0
    )
    algorithm_type: str | None = arg(None, "Sampler: sde (the default), ode or heun.")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.sigma_min, self.sigma_max
        if low is not None and high is not None and low >= high:
            raise InputError(f"--sigma_min must be below --sigma_max, got {low} and {high}")

    def scheduler_settings(self) -> dict[str, Any]:
        own = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "algorithm_type": self.algorithm_type}
        settings = super().scheduler_settings() | own
        if self.scheduler in (None, self.needs_scheduler) and self.beta_schedule is None:  # others are refused later
            settings["prediction_type"] = prediction = self.prediction_type or "point"
            if self.sigma_max is None and prediction == "point":
                settings["sigma_max"] = SIGMA_MAX
            if self.sigma_min is None and prediction == "point" and self.purpose == "likelihood":
                settings["sigma_min"] = LOWEST
        return settings

    def law(self, schedule: NoiseSchedule) -> tuple[float, float] | None:
        """Return mean and standard deviation of ln(sigma); `None` for a uniform one within the bounds."""
        mean, std = LAW
        if schedule.prediction_type == "epsilon":
            if self.sigma_log_mean is None:
                return None
            std = 1.2
        mean = mean if self.sigma_log_mean is None else self.sigma_log_mean
        return mean, std if self.sigma_log_std is None else self.sigma_log_std


@command
def main() -> None:
    args = parse_arguments(ReflectedArguments)
    loop = TrainingLoop(args, "train_reflected", PAPER)
    model, schedule, process = loop.score_model, loop.schedule, loop.score_model.process
    law = args.law(schedule)

    for batch in loop:
        n, generator, device = len(batch.x0), batch.generator, batch.x0.device
        if law is None:
            sigma = schedule.draw_sigmas(n, generator, device)
        else:
            sigma = log_normal_sigmas(n, *law, generator, device)
            sigma = sigma.clamp(schedule.sigma_min, schedule.sigma_max)
            if args.purpose == "likelihood":  # the bound is an integral over ln(sigma)
                uniform = schedule.draw_sigmas(n, generator, device)
                sigma = torch.where(rand_like(sigma, generator) < 0.5, sigma, uniform)
        x = process.perturb(batch.x0, sigma, generator)
        loss = score_matching_loss(model, x, batch.x0, sigma, weight=loop.weight(sigma), **batch.cond)
        loop.update(loss.mean(), sigma=sigma, score_matching=loss)

    loop.finish()


if __name__ == "__main__":
    main()
