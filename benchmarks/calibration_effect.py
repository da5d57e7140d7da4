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
import json
from collections.abc import Iterator
from math import log
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from trained import Judge, draw, train

from diffusers_ext import Calibration, ClassConditionalPipeline, estimate_calibration
from diffusers_ext.commands import parse_arguments
from diffusers_ext.schedulers import calibrated_class
from diffusers_ext.training import TrainingArguments


def batches(x0: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for part in x0.split(50):
        yield part, {}


def measure(pipeline: Any, x0: Tensor, **options: Any) -> Calibration:
    return estimate_calibration(pipeline.unet, pipeline.scheduler, batches(x0), num_levels=16, **options)


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


def table(rows: list[dict], nfe: list[int]) -> str:
    head = "| training steps | scheduler | passes | variant | bound, bits/dim | " + " | ".join(f"NFE {n}" for n in nfe)
    lines = [head + " |", "|---" * (5 + len(nfe)) + "|"]
    for row in rows:
        cells = " | ".join(f"{row['distance'][str(n)]:.2f}" for n in nfe)
        keys = ("training_steps", "scheduler", "passes", "variant")
        lines.append("| " + " | ".join(str(row[k]) for k in keys) + f" | {row['bound']:+.5f} | {cells} |")
    return "\n".join(lines) + "\n"


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
    data = parse_arguments(TrainingArguments, for_training)
    file = args.output_dir / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    device = "cuda" if torch.cuda.is_available() else "cpu"

    for steps in args.training_steps:
        folder = args.output_dir / f"steps-{steps}"
        options = ["--consistency_weight", "0", "--max_train_steps", str(steps)]
        train("train_consistency.py", folder, [*for_training, *options])
        loaded = DiffusionPipeline.from_pretrained(folder)
        pipeline = ClassConditionalPipeline(loaded.unet.eval(), loaded.scheduler).to(device)
        pipeline.set_progress_bar_config(disable=True)
        judge = Judge(data, pipeline.unet.config.sample_size, pipeline.unet.config.in_channels, device)
        x0, truth = judge.seen, measure(pipeline, judge.held_out[:1000], seed=1)
        for passes in (0, *args.passes):
            variants: dict[str, Calibration | None] = {"baseline": None}
            if passes:
                plain = {"control_variate": False, "antithetic": False, "shrink": False}
                ours = measure(pipeline, x0[: passes // 2])
                variants = {
                    "plain": measure(pipeline, x0[:passes], **plain),
                    "ours": ours,
                    "random": random_pattern(ours),
                }
            for scheduler in args.schedulers:
                for variant, calibration in variants.items():
                    key = {"training_steps": steps, "scheduler": scheduler, "passes": passes, "variant": variant}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    stock = getattr(diffusers, scheduler).from_config(loaded.scheduler.config)
                    pipeline.scheduler = calibrated_class(scheduler).from_scheduler(stock, calibration)
                    bound = 0.0 if calibration is None else bound_gain(calibration, truth)
                    distance = {str(n): judge.distance(draw(pipeline, args.num_samples, n)) for n in args.nfe}
                    rows.append(key | {"bound": bound, "distance": distance})
                    with file.open("a") as out:
                        out.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), flush=True)
                pipeline.scheduler = loaded.scheduler
    (args.output_dir / "table.md").write_text(table(rows, args.nfe))
    print(table(rows, args.nfe))


if __name__ == "__main__":
    main()
