r"""Train or fine-tune a diffusers model with the consistency regulariser (Daras et al., 2023, arXiv 2302.09057).

    diffusers-ext train-consistency --preset digits --output_dir digits-model
    diffusers-ext train-consistency --pretrained_model_name_or_path google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --random_flip --train_batch_size 128 --max_train_steps 10000
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..data.noise import NoisyDataArguments, has_noise
from ..errors import command
from ..fields import arg
from ..losses import ambient_loss, consistency_loss, denoised_copies, score_matching_loss
from ..randomness import rand_like
from ..training import Batch, TrainingArguments, TrainingLoop
from ..training.levels import LowerLevelArguments
from .parsing import parse_arguments

BELOW_FROM = 0.3
"""Share of the training after which copies that the model has denoised are trained on."""
LEAST_VARIANCE = 0.9
"""Of the variance of clean images, that copies must have kept."""

PAPER = ("Consistent Diffusion Models: Mitigating Sampling Drift by Learning to be Consistent", "2302.09057")


@dataclass
class ConsistencyArguments(LowerLevelArguments, NoisyDataArguments, TrainingArguments):
    """Adds the regulariser's arguments; the paper has weight 10, fraction 1, 5 steps euler_maruyama, absolute 0.05."""

    consistency_weight: float | None = arg(
        None, "Weight of the regulariser, by default 10, and 0 for images with noise; 0 switches it off.", at_least=0
    )
    consistency_start: float = arg(0.0, "Share of the training after which it begins.", at_least=0, below=1)
    rollout: Literal["posterior", "euler_maruyama"] = arg(
        "posterior", "Rule of one step; euler_maruyama, the paper's, needs 5 of them."
    )
    rollout_steps: int = arg(1, "Steps from sigma to the lower noise level.", at_least=1)

    def lowest_noise(self, data_noise: Sequence[float]) -> float:
        return 0.0 if self.below_noise == "rollout" else min(data_noise)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.consistency_weight is None:
            self.consistency_weight = 0.0 if has_noise(self) else 10.0


def below(loop: TrainingLoop, batch: Batch, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put denoised copies for clean images into half of a batch of images with noise, at levels below it.

    Returns:
        x0, the noise and sigma of the batch, and the weight of each row: 0 for copies that have lost variance.
    """
    x0, half, lowest = batch.x0, slice(len(batch.x0) // 2), loop.schedule.sigma_min
    cond = loop.subject.part(batch.cond, half)
    copies, variance = denoised_copies(loop.denoiser, x0[half], noise[half], lowest, **cond)
    levels = lowest * (noise[half] / lowest) ** rand_like(noise[half], batch.generator)
    weight = (variance > LEAST_VARIANCE).to(sigma).expand(len(copies))
    rest = slice(half.stop, None)
    clean, whole = torch.zeros_like(levels), torch.ones_like(sigma[rest])
    pairs = (copies, x0[rest]), (clean, noise[rest]), (levels, sigma[rest]), (weight, whole)
    x0, noise, sigma, weight = (torch.cat(pair) for pair in pairs)
    return x0, noise, sigma, weight


@command
def main() -> None:
    args = parse_arguments(ConsistencyArguments)
    loop = TrainingLoop(args, "train_consistency", PAPER)
    denoiser, process = loop.denoiser, loop.denoiser.process

    for batch in loop:
        x0, noise, generator = batch.x0, batch.data_noise, batch.generator
        if noise is None:
            sigma = loop.levels.draw(len(x0), generator, x0.device)
            x = process.perturb(x0, sigma, generator)
            denoised = denoiser(x, sigma, **batch.cond)
            matching = {"prediction": denoised, "weight": loop.weight(sigma), **batch.cond}
            terms = {"denoising": score_matching_loss(denoiser, x, x0, sigma, **matching)}
        else:
            sigma, kept = loop.levels.draw_above(noise, generator), torch.ones_like(noise)
            if args.below_noise == "rollout" and loop.step >= BELOW_FROM * loop.total_steps:
                x0, noise, sigma, kept = below(loop, batch, noise, sigma)
            x = process.perturb(x0, (sigma**2 - noise**2).clamp(min=0) ** 0.5, generator)
            denoised = denoiser(x, sigma, **batch.cond)
            terms = {"ambient": kept * ambient_loss(denoised, x, x0, noise, sigma, weight=loop.weight(sigma))}
        (loss,) = (term.mean() for term in terms.values())

        assert args.consistency_weight is not None  # `__post_init__` has set it
        if args.consistency_weight != 0 and loop.step >= args.consistency_start * loop.total_steps:
            part, weight = batch.part(args.consistency_fraction)
            if part.stop > 0:
                lower = args.draw_lower(sigma[part], generator)
                terms["consistency"] = consistency_loss(
                    denoiser,
                    x[part],
                    sigma[part],
                    lower if noise is None else torch.maximum(lower, noise[part]),
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
