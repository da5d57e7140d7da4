"""Train or fine-tune a diffusers model with the consistency regulariser (Daras et al., 2023, arXiv 2302.09057).

    accelerate launch training/train_consistency.py --preset digits --output_dir digits-model
    accelerate launch training/train_consistency.py --pretrained_model_name_or_path google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --random_flip --train_batch_size 128 --max_train_steps 10000

`--help` lists every argument; `--config run.yaml` reads them from a file.
"""

from dataclasses import dataclass
from typing import Literal

from diffusers_ext import consistency_loss, lower_sigma, score_matching_loss
from diffusers_ext.commands import parse_arguments
from diffusers_ext.errors import InputError, command
from diffusers_ext.fields import arg
from diffusers_ext.training import TrainingArguments, TrainingLoop

PAPER = ("Consistent Diffusion Models: Mitigating Sampling Drift by Learning to be Consistent", "2302.09057")


@dataclass
class ConsistencyArguments(TrainingArguments):
    """Adds the regulariser's arguments; the paper has weight 10, fraction 1, 5 steps euler_maruyama, absolute 0.05."""

    consistency_weight: float = arg(10.0, "Weight of the regulariser; 0 switches it off.", at_least=0)
    consistency_fraction: float = arg(0.25, "Share of the batch that it is applied to.", above=0, at_most=1)
    consistency_start: float = arg(0.0, "Share of the training after which it begins.", at_least=0, below=1)
    rollout: Literal["posterior", "euler_maruyama"] = arg(
        "posterior", "Rule of one step; euler_maruyama, the paper's, needs 5 of them."
    )
    rollout_steps: int = arg(1, "Steps from sigma to the lower noise level.", at_least=1)
    sigma_width: float = arg(0.05, "The lower level is at most this far below sigma.", above=0)
    sigma_width_relative: bool = arg(False, "sigma_width is a fraction of sigma, below 1.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_width_relative and self.sigma_width >= 1:
            raise InputError(f"--sigma_width must be below 1 where it is relative, got {self.sigma_width}")


@command
def main() -> None:
    args = parse_arguments(ConsistencyArguments)
    loop = TrainingLoop(args, "train_consistency", PAPER)
    denoiser, process = loop.denoiser, loop.denoiser.process

    for batch in loop:
        x0, generator = batch.x0, batch.generator
        sigma = loop.levels.draw(len(x0), generator, x0.device)
        x = process.perturb(x0, sigma, generator)
        denoised = denoiser(x, sigma, **batch.cond)
        terms = {
            "denoising": score_matching_loss(
                denoiser, x, x0, sigma, prediction=denoised, weight=loop.weight(sigma), **batch.cond
            )
        }
        loss = terms["denoising"].mean()

        if args.consistency_weight != 0 and loop.step >= args.consistency_start * loop.total_steps:
            part, weight = batch.part(args.consistency_fraction)
            if part.stop > 0:
                terms["consistency"] = consistency_loss(
                    denoiser,
                    x[part],
                    sigma[part],
                    lower_sigma(sigma[part], args.sigma_width, relative=args.sigma_width_relative, generator=generator),
                    denoised=denoised[part],
                    steps=args.rollout_steps,
                    rollout=args.rollout,
                    generator=generator,
                    **loop.subject.part(batch.cond, part),
                )
                loss = loss + args.consistency_weight * weight * terms["consistency"].mean()

        loop.update(loss, sigma=sigma, **terms)

    loop.finish()


if __name__ == "__main__":
    main()
