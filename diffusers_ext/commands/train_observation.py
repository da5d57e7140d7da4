r"""Train or fine-tune a diffusers model with observation guidance (Kang et al., CVPR 2024, arXiv 2310.04041).

    diffusers-ext train-observation --preset digits --output_dir digits-model
    diffusers-ext train-observation --pretrained_model_name_or_path google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --random_flip --train_batch_size 128 --max_train_steps 10000

A discriminator judges one sampler step of the model; sampling does not need it. The result is the pipeline whose
samples of `--frechet_steps` steps were nearest to held-out images.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError, command
from ..fields import arg
from ..losses import PROJECTIONS, consistency_loss, discriminator_loss, observation_loss, score_matching_loss
from ..noise_levels import look_ahead_sigma
from ..randomness import Stream
from ..score import Denoiser
from ..training import Adversary, Batch, Best, TrainingArguments, TrainingLoop
from ..training.adversary import new_discriminator
from ..training.levels import LowerLevelArguments
from .parsing import parse_arguments

PAPER = ("Observation-Guided Diffusion Probabilistic Models", "2310.04041")

# The paper's weights and look-ahead: from scratch, and for fine-tuning by projection (`random` has no value of theirs).
SCRATCH_WEIGHT, TUNING_WEIGHTS = 0.01, {"euler": 0.025, "heun": 0.005, "random": 0.005}
SCRATCH_LOOK_AHEAD, TUNING_LOOK_AHEAD = 0.1, 0.2


@dataclass
class ObservationArguments(LowerLevelArguments, TrainingArguments):
    """Adds the arguments of the loss.

    The loss is that of denoising, a mean over pixels and samples with the weight of train_consistency.py (by default
    the error of the network's output), plus gamma times the mean of -disc(fake) over samples, for all levels alike.
    """

    observation_weight: float | None = arg(
        None,
        "gamma; 0: plain denoising. By default 0.01 from scratch, 0.025 for fine-tuning with euler, else 0.005.",
        at_least=0,
    )
    projection: Literal["euler", "heun", "random"] = arg("euler", "The step that is judged; random: one per step.")
    look_ahead: float | None = arg(
        None, "Longest step, in the rho = 7 time from 0 to 1: 0.1 from scratch, else 0.2.", above=0, at_most=1
    )
    r1_weight: float = arg(1.0, "Weight of the discriminator's gradient penalty.", at_least=0)
    discriminator_learning_rate: float = arg(
        2e-4, "Peak learning rate of the discriminator, on the same schedule.", above=0
    )
    discriminator_beta1: float = arg(0.0, "AdamW beta1 of the discriminator.", at_least=0, below=1)
    discriminator_beta2: float = arg(0.99, "AdamW beta2 of the discriminator.", at_least=0, below=1)
    discriminator_channels: str = arg("64,128,256,256", "Its features; the resolution halves between two of them.")
    discriminator_sees_prompt: bool = arg(
        False, "Text-to-image: it is told the pooled embedding of the prompt, or the mean over its tokens."
    )
    max_logit: float = arg(
        100.0,
        "Stop when mean logits are beyond this, or R1 beyond its square, for three records.",
        above=0,
        at_most=math.inf,
    )
    push_discriminator: bool = arg(False, "Save it in the folder discriminator/, and push it with the pipeline.")
    validation_steps: int | None = arg(
        500, "Optimiser steps between two sample grids and Frechet distances.", at_least=1
    )
    frechet_steps: int = arg(
        10, "Sampler steps of the images whose Frechet distance chooses the best pipeline.", at_least=1
    )
    frechet_samples: int = arg(500, "Images for it; 0 measures none, and the last pipeline is the result.", at_least=0)
    patience: int | None = arg(
        None, "Stop after so many validations without a better pipeline; by default never.", at_least=1
    )
    consistency_weight: float = arg(
        0.0, "Weight of the consistency loss (train_consistency.py) in the same run.", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        scratch = self.pretrained_model_name_or_path is None
        if self.observation_weight is None:
            self.observation_weight = SCRATCH_WEIGHT if scratch else TUNING_WEIGHTS[self.projection]
        if self.look_ahead is None:
            self.look_ahead = SCRATCH_LOOK_AHEAD if scratch else TUNING_LOOK_AHEAD
        if self.frechet_samples == 1:
            raise InputError("--frechet_samples 1: a covariance needs 2 at least; 0 measures none")
        if not all(width.isdecimal() and int(width) > 0 for width in self.discriminator_channels.split(",")):
            raise InputError(f"--discriminator_channels must be like 64,128, got {self.discriminator_channels!r}")


def step(
    args: ObservationArguments, loop: TrainingLoop, denoiser: Denoiser, adversary: Adversary | None, batch: Batch
) -> None:
    """Train on one micro-batch. Denoising and consistency draw first, so that they draw as in train_consistency.py."""
    schedule, x0, generator = loop.schedule, batch.x0, batch.generator
    sigma = loop.levels.draw(len(x0), generator, x0.device)
    x = denoiser.process.perturb(x0, sigma, generator)
    denoised = denoiser(x, sigma, **batch.cond)
    matching = {"prediction": denoised, "weight": loop.weight(sigma), **batch.cond}
    terms = {"denoising": score_matching_loss(denoiser, x, x0, sigma, **matching)}
    loss = terms["denoising"].mean()

    if args.consistency_weight > 0:
        part, weight = batch.part(args.consistency_fraction)
        if part.stop > 0:
            lower = args.draw_lower(sigma[part], generator)
            options = {"denoised": denoised[part], "generator": generator, **loop.subject.part(batch.cond, part)}
            terms["consistency"] = consistency_loss(denoiser, x[part], sigma[part], lower, **options)
            loss = loss + args.consistency_weight * weight * terms["consistency"].mean()

    if adversary is None:
        loop.update(loss, sigma=sigma, **terms)
        return

    assert args.look_ahead is not None  # `__post_init__` has set both
    assert args.observation_weight is not None
    bounds = schedule.sigma_min, schedule.sigma_max
    sigma_next = look_ahead_sigma(sigma, args.look_ahead, *bounds, generator=generator)
    projection: str = args.projection
    if projection == "random":  # drawn for each optimiser step, the same on all devices
        projection = list(PROJECTIONS)[loop.seeds(Stream.PROJECTION, loop.step) % len(PROJECTIONS)]
    # Both losses use the weights before the update; the sampler step reuses the prediction of the denoising loss.
    seen = adversary.seen(batch.cond)
    game = {"denoised": denoised, "projection": projection, "discriminator_cond": seen, **batch.cond}
    penalty = {"sigma_data": adversary.network.config.sigma_data, "r1_weight": args.r1_weight}
    judged = discriminator_loss(denoiser, adversary.judge, x, x0, sigma, sigma_next, **penalty, **game)
    terms["observation"] = observation_loss(denoiser, adversary.judge, x, sigma, sigma_next, **game)
    loop.update(loss + args.observation_weight * terms["observation"].mean(), sigma=sigma, **terms)
    adversary.update(judged, sigma=sigma)


@command
def main() -> None:
    args = parse_arguments(ObservationArguments)
    loop = TrainingLoop(args, "train_observation", PAPER)
    denoiser, adversary = loop.denoiser, None
    if (args.observation_weight or 0) > 0:
        adversary = Adversary(
            new_discriminator(loop, args.discriminator_channels, args.discriminator_sees_prompt),
            learning_rate=args.discriminator_learning_rate,
            betas=(args.discriminator_beta1, args.discriminator_beta2),
            max_logit=args.max_logit,
            saved=args.push_discriminator,
        )
        loop.keep(adversary)
    if args.frechet_samples > 0:
        loop.keep(Best(steps=args.frechet_steps, samples=args.frechet_samples, patience=args.patience))

    for batch in loop:
        step(args, loop, denoiser, adversary, batch)

    loop.finish()


if __name__ == "__main__":
    main()
