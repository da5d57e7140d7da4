"""Train a reflected diffusion model (Lou, Ermon, 2023, arXiv 2304.04740): its samples keep to the range of the data.

    accelerate launch training/train_reflected.py --preset digits --output_dir reflected-digits
    accelerate launch training/train_reflected.py --preset cifar10 --class_conditional --output_dir reflected-cifar10

The result opens as `ReflectedPipeline`, after `import diffusers_ext`. `--help` lists every argument;
`--config run.yaml` reads them from a file.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers_ext import log_normal_sigmas, score_matching_loss
from diffusers_ext.commands import parse_arguments
from diffusers_ext.errors import InputError, command
from diffusers_ext.fields import arg
from diffusers_ext.training import TrainingArguments, TrainingLoop

PAPER = ("Reflected Diffusion Models", "2304.04740")


@dataclass
class ReflectedArguments(TrainingArguments):
    """Noise levels are in the units of images in [-1, 1]; the paper's, in units of the box, are half as large."""

    needs_scheduler: ClassVar[str | None] = "ReflectedScheduler"

    label_drop: float = arg(0.2, "Share of labels replaced by the null class.", at_least=0, at_most=1)
    sigma_min: float | None = arg(None, "Lowest noise level: 0.02 by default, 0.0002 for likelihood.", above=0)
    sigma_max: float | None = arg(None, "Highest noise level, 10 by default.", above=0)
    sigma_log_mean: float | None = arg(
        None, "Draw ln(sigma) from a normal law of this mean, within bounds; by default it is uniform."
    )
    sigma_log_std: float = arg(1.2, "Standard deviation of that law.", above=0)
    algorithm_type: str | None = arg(None, "Sampler: sde (the default), ode or heun.")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.sigma_min, self.sigma_max
        if low is not None and high is not None and low >= high:
            raise InputError(f"--sigma_min must be below --sigma_max, got {low} and {high}")

    def scheduler_settings(self) -> dict[str, Any]:
        own = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "algorithm_type": self.algorithm_type}
        return super().scheduler_settings() | own


@command
def main() -> None:
    args = parse_arguments(ReflectedArguments)
    loop = TrainingLoop(args, "train_reflected", PAPER)
    model, schedule, process = loop.score_model, loop.schedule, loop.score_model.process

    for batch in loop:
        n, generator, device = len(batch.x0), batch.generator, batch.x0.device
        if args.sigma_log_mean is None:
            sigma = schedule.draw_sigmas(n, generator, device)
        else:
            sigma = log_normal_sigmas(n, args.sigma_log_mean, args.sigma_log_std, generator, device)
            sigma = sigma.clamp(schedule.sigma_min, schedule.sigma_max)
        x = process.perturb(batch.x0, sigma, generator)
        loss = score_matching_loss(model, x, batch.x0, sigma, weight=loop.weight(sigma), **batch.cond)
        loop.update(loss.mean(), sigma=sigma, score_matching=loss)

    loop.finish()


if __name__ == "__main__":
    main()
