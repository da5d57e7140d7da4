"""Train a reflected diffusion model (Lou, Ermon, 2023, arXiv 2304.04740): its samples keep to the range of the data.

    accelerate launch training/train_reflected.py --preset digits --output_dir reflected-digits
    accelerate launch training/train_reflected.py --preset cifar10 --class_conditional --output_dir reflected-cifar10

The result opens as `ReflectedPipeline`, after `import diffusers_ext`. `--help` lists every argument;
`--config run.yaml` reads them from a file.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffusers_ext import log_normal_sigmas, score_matching_loss
from diffusers_ext.commands import parse_arguments
from diffusers_ext.errors import InputError, command
from diffusers_ext.training import TrainingArguments, TrainingLoop

PAPER = ("Reflected Diffusion Models", "2304.04740")


@dataclass
class ReflectedArguments(TrainingArguments):
    """Noise levels are in the units of images in [-1, 1]; the paper's, in units of the box, are half as large."""

    needs_scheduler: ClassVar[str | None] = "ReflectedScheduler"

    label_drop: float = field(default=0.2, metadata={"help": "Share of labels replaced by the null class."})
    sigma_min: float | None = field(
        default=None, metadata={"help": "Lowest noise level: 0.02 by default, 0.0002 for likelihood."}
    )
    sigma_max: float | None = field(default=None, metadata={"help": "Highest noise level, 10 by default."})
    sigma_log_mean: float | None = field(
        default=None,
        metadata={"help": "Draw ln(sigma) from a normal law of this mean, within bounds; by default it is uniform."},
    )
    sigma_log_std: float = field(default=1.2, metadata={"help": "Standard deviation of that law."})
    algorithm_type: str | None = field(default=None, metadata={"help": "Sampler: sde (the default), ode or heun."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_log_std <= 0:
            raise InputError(f"--sigma_log_std must be above 0, got {self.sigma_log_std}")

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
