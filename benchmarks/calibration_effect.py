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

Frechet distance of a small classifier's features to held-out images, the same noise for all variants, and the change
of the likelihood bound on held-out images, int (2 o^ . o - |o^|^2) dln(sigma) in bits per dimension, o measured there.
Writes results.jsonl and table.md.
"""

import argparse
import copy
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from trained import Study, batches, load, pivot, train

from diffusers_ext import Calibration, estimate_calibration
from diffusers_ext.data.batches import Images
from diffusers_ext.evaluation import swap_scheduler
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.schedulers import calibrated_class
from diffusers_ext.subjects import subject_of

PLAIN = {"control_variate": False, "antithetic": False, "shrink": False}


def measure(pipeline: DiffusionPipeline, images: Images, n: int, **options: Any) -> Calibration:
    """The mean error on the first n images."""
    subject = subject_of(pipeline)
    data = batches(subject, rows_of(images, 0, n))
    return estimate_calibration(subject.network, pipeline.scheduler, data, num_levels=16, **options)


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


def variants(pipeline: DiffusionPipeline, images: Images, passes: int) -> dict[str, Calibration | None]:
    """What is subtracted, estimated in so many passes."""
    if passes == 0:
        return {"baseline": None}
    ours = measure(pipeline, images, passes // 2)
    return {"plain": measure(pipeline, images, passes, **PLAIN), "ours": ours, "random": random_pattern(ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--training_steps", type=int, nargs="+", default=[200, 800])
    parser.add_argument("--passes", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--schedulers", nargs="+", default=["DDIMScheduler"])
    parser.add_argument("--num_samples", type=int, default=500)
    args, for_training = parser.parse_known_args()
    for_training = ["--preset", args.preset, *for_training]

    pipelines = {}
    for steps in args.training_steps:
        options = ["--consistency_weight", "0", "--max_train_steps", str(steps)]
        folder = train("train_consistency.py", args.output_dir / f"steps-{steps}", [*for_training, *options])
        pipelines[steps] = load(folder)
    study = Study(args.output_dir, pipelines[args.training_steps[0]], for_training, args.num_samples)
    for training_steps, pipeline in pipelines.items():
        truth = measure(pipeline, study.real.reference, 1000, seed=1)
        for passes in (0, *args.passes):
            found = variants(pipeline, study.real.training, passes)
            for scheduler, (variant, calibration) in product(args.schedulers, found.items()):
                key = {"training_steps": training_steps, "scheduler": scheduler, "passes": passes, "variant": variant}
                stock = swap_scheduler(pipeline, scheduler)
                calibrated = calibrated_class(type(stock).__name__).from_scheduler(stock, calibration)
                bound = 0.0 if calibration is None else bound_gain(calibration, truth)
                distance = {str(n): study.distance(study.draw(pipeline, calibrated, n)) for n in args.nfe}
                study.add(key, bound=bound, distance=distance)
    cells = [
        row | {"bits": f"{row['bound']:+.5f}", "nfe": int(n), "shown": f"{distance:.2f}"}
        for row in study.rows
        for n, distance in row["distance"].items()
        if int(n) in args.nfe
    ]
    names = {"training steps": "training_steps", **{name: name for name in ("scheduler", "passes", "variant")}}
    study.report(pivot(cells, names | {"bound, bits/dim": "bits"}, "nfe", "NFE", lambda cell: cell["shown"]))


if __name__ == "__main__":
    main()
