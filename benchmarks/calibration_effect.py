"""Does calibration help? Samples and likelihood of models with their mean error, without it, and with a random pattern.

    python benchmarks/calibration_effect.py --output_dir effect-digits --training_steps 200 800 \
        --preset digits
    python benchmarks/calibration_effect.py --output_dir effect-mnist --training_steps 1000 \
        --preset mnist --dataset_name $MNIST

For models trained for so many steps (in output_dir, by the project's script; what is there is used again), and for so
many forward passes per noise level spent on the estimate:

    plain     the plain average of the paper
    ours      antithetic noise and shrinkage, with as many passes
    random    a random pattern with the norm of `ours` at every level

Frechet distance of a small classifier's features to held-out images, the same noise for all variants, with its change
from the baseline; and "bound", the gain of the likelihood bound on held-out images, int (2 o^ . o - |o^|^2) dln(sigma)
in bits per dimension, o measured there. `--schedulers` are names with settings, as `evaluate` takes them. Writes an
evaluation (index.html, table.md ...) for each model and scheduler.
"""

import copy
from math import log
from pathlib import Path
from typing import Any

import torch
from bench import flags
from trained import batches, held_out_images, load, train

from diffusers_ext import Calibration, ClassConditionalPipeline, estimate_calibration
from diffusers_ext.data.batches import Images
from diffusers_ext.evaluation import evaluate, markdown_table, read_schedulers, swap_scheduler, write_report
from diffusers_ext.schedulers import calibrated_class
from diffusers_ext.subjects import Subject

PLAIN = {"control_variate": False, "antithetic": False, "shrink": False}


def measure(subject: Subject, images: Images, n: int, **options: Any) -> Calibration:
    """The mean error on the first n images."""
    data, scheduler = batches(subject, images, n), subject.pipeline.scheduler
    return estimate_calibration(subject.network, scheduler, data, num_levels=16, **options)


def random_pattern(calibration: Calibration) -> Calibration:
    """Directions at random, one for all levels, so that it is as smooth in sigma; the norms stay."""
    other = copy.deepcopy(calibration)
    pattern = torch.randn(calibration.offsets.shape[2:], generator=torch.Generator().manual_seed(1))
    norms = calibration.offsets.flatten(2).norm(dim=2)
    other.offsets.copy_((pattern / pattern.norm()) * norms.reshape(*norms.shape, *[1] * pattern.ndim))
    return other


def bound_gain(calibration: Calibration, truth: Calibration) -> float:
    """Bits per dimension; unbiased, as `truth` is of other images and other noise."""
    used = (calibration.offsets * calibration.shrinkage[..., None, None, None]).flatten(2)
    gain = (2 * used * truth.offsets.flatten(2) - used.square()).sum(2)[:, 0].double()
    sigmas = torch.tensor(calibration.config.sigmas, dtype=torch.float64)
    return torch.trapezoid(gain, sigmas.log()).item() / (used.shape[2] * log(2))


def main() -> None:
    args, for_training = flags(
        __doc__, rest=True, output_dir=Path, preset="digits", training_steps=[200, 800], passes=[100, 1000, 4000],
        nfe=[5, 10, 20, 50], schedulers=["DDIMScheduler"], num_samples=500,
    )  # fmt: skip
    for_training = ["--preset", args.preset, *for_training]
    options = {"nfe": args.nfe, "num_samples": args.num_samples, "batch_size": 100, "extractor": "classifier"}
    for steps in args.training_steps:
        arguments = [*for_training, "--consistency_weight", "0", "--max_train_steps", str(steps)]
        subject = load(train("train_consistency.py", args.output_dir / f"steps-{steps}", arguments))
        real = held_out_images(for_training, subject, args.num_samples)
        truth = measure(subject, real.reference, 1000, seed=1)
        found: dict[str, Calibration | None] = {"baseline": None}
        for passes in args.passes:
            plain, ours = measure(subject, real.training, passes, **PLAIN), measure(subject, real.training, passes // 2)
            for name, tables in (("plain", plain), ("ours", ours), ("random", random_pattern(ours))):
                found[f"{passes} passes, {name}, bound {bound_gain(tables, truth):+.5f}"] = tables
        for scheduler in args.schedulers:
            ((name, settings),) = read_schedulers([scheduler]).values()
            stock, network = swap_scheduler(subject.pipeline, name, **settings), subject.network
            subtract = calibrated_class(type(stock).__name__).from_scheduler
            models = {name: ClassConditionalPipeline(network, subtract(stock, table)) for name, table in found.items()}
            folder = args.output_dir / f"steps-{steps}-{scheduler}"
            evaluation = evaluate(models, real, folder, likelihood=None, **options)
            write_report(evaluation, folder)
            print(f"{steps} steps, {scheduler}\n\n{markdown_table(evaluation)}\n")


if __name__ == "__main__":
    main()
