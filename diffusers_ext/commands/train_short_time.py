r"""Train or fine-tune a diffusers model on the diffusion times [0, T] alone (Franzese et al., 2022, arXiv 2206.05173).

    diffusers-ext train-short-time --preset digits --max_diffusion_time 0.6 --output_dir short-digits
    diffusers-ext train-short-time --pretrained_model_name_or_path google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --random_flip --max_diffusion_time 0.4 --bridge flow --output_dir short-cifar10

The result is a `ShortTimePipeline`: its chain starts from an auxiliary model ("bridge") of the data at T, which is
fitted first.
"""

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from ..bridges.fitting import BridgeArguments, fit_bridge
from ..conversion import short_time_pipeline
from ..data.encoded import EncodedImages
from ..errors import InputError, command
from ..losses import score_matching_loss
from ..training import TrainingArguments, TrainingLoop
from .parsing import parse_arguments

PAPER = ("How Much is Enough? A Study on Diffusion Times in Score-based Generative Models", "2206.05173")


@dataclass
class ShortTimeArguments(BridgeArguments, TrainingArguments):
    """Arguments that also say at which T the diffusion ends, and which bridge models the data there."""

    def adapt(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        try:
            return short_time_pipeline(pipeline, self.max_diffusion_time)
        except ValueError as error:
            raise InputError(str(error)) from error


@command
def main() -> None:
    args = parse_arguments(ShortTimeArguments)
    loop = TrainingLoop(args, "train_short_time", PAPER)
    denoiser, schedule, process = loop.denoiser, loop.schedule, loop.denoiser.process
    if loop.accelerator.is_main_process:  # the only one that samples and saves
        device = loop.accelerator.device
        data = EncodedImages(args, loop.subject, loop.source, loop.data.transform, args.max_bridge_samples, device)
        told = {"data": data.described}
        about: dict[str, Any] = {
            "num_classes": data.num_classes,
            "seed": args.seed,
            "measured_on": told,
        }
        loop.pipeline.register_modules(bridge=fit_bridge(args, data, loop.pipeline.scheduler, **about))
        loop.pipeline.to(device)

    for batch in loop:
        x0, generator = batch.x0, batch.generator
        sigma = schedule.draw_sigmas(len(x0), generator, x0.device)
        x = process.perturb(x0, sigma, generator)
        loss = score_matching_loss(denoiser, x, x0, sigma, weight=loop.weight(sigma), **batch.cond)
        loop.update(loss.mean(), sigma=sigma, denoising=loss)

    loop.finish()


if __name__ == "__main__":
    main()
