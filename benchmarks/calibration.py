"""Calibration: what its estimate costs, and what its schedulers cost.

    python benchmarks/calibration.py --model digits-model --dataset_name digits --resolution 16
    python benchmarks/calibration.py --schedulers

The first measures the error of the offset, E|o^ - o|^2, per forward pass: the plain average of the paper against the
control variate, antithetic noise and both, by noise level. The ratio is that of the passes that reach an equal error.

The second times a loop of 50 steps of a calibrated scheduler, with a network that does nothing, against the stock one
with one bare subtraction of a tensor from each output; in random order, ratio of the medians.
(MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 keep glibc from giving memory back between
steps, whose page faults cost more than what is to be measured.)
"""

import argparse
import random
import statistics
import time
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from diffusers_ext import (
    CalibratedDDIMScheduler,
    CalibratedDPMSolverMultistepScheduler,
    Calibration,
    estimate_calibration,
    noise_schedule,
)
from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.batches import first_images
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import load_images
from diffusers_ext.subjects import subject_of
from diffusers_ext.training import TrainingArguments

ESTIMATORS = {
    "plain average": {"control_variate": False, "antithetic": False},
    "control variate": {"control_variate": True, "antithetic": False},
    "antithetic": {"control_variate": False, "antithetic": True},
}


def estimator_cost(args: argparse.Namespace, for_data: list[str]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(args.model).to(args.device)
    network, scheduler = pipeline.unet.eval(), pipeline.scheduler
    size, channels = network.config.sample_size, network.config.in_channels
    source = load_images(parse_arguments(TrainingArguments, for_data), "train")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[: args.num_samples]
    images = first_images(source, len(source), Transform(size, channels))
    x0, labels = images.images[order].to(args.device), images.labels[order].to(args.device)
    told = {} if subject_of(pipeline).num_classes is None else {"class_labels": labels}

    def batches() -> Any:
        for part in torch.arange(len(x0)).split(64):
            yield x0[part], {name: value[part] for name, value in told.items()}

    errors = {}
    for name, options in ESTIMATORS.items():
        calibration = estimate_calibration(network, scheduler, batches(), num_levels=args.num_levels, **options)
        passes = 2 if options["antithetic"] else 1
        errors[name] = calibration.noise_floor[:, 0].double() * calibration.num_samples[:, 0] * passes
    sigmas = torch.tensor(calibration.config.sigmas, dtype=torch.float64)
    times = noise_schedule(scheduler).time(sigmas)
    ratios = {name: errors["plain average"] / error for name, error in errors.items()}
    print(f"{args.num_samples} samples; passes of the plain average for one pass at equal error\n")
    print("| timestep | sigma | " + " | ".join(ESTIMATORS) + " |\n" + "|---" * (2 + len(ESTIMATORS)) + "|")
    for i, (t, sigma) in enumerate(zip(times.tolist(), sigmas.tolist(), strict=True)):
        print(f"| {t:.0f} | {sigma:.3g} | " + " | ".join(f"{ratios[name][i]:.3g}" for name in ESTIMATORS) + " |")
    above = times > 300
    print("| above 300, median | | " + " | ".join(f"{ratios[n][above].median():.3g}" for n in ESTIMATORS) + " |")
    print("| above 300, least | | " + " | ".join(f"{ratios[n][above].min():.3g}" for n in ESTIMATORS) + " |")
    # The timesteps of a sampler are spread evenly in t, and not in ln sigma: average the passes saved over those.
    even = torch.linspace(301, 999, 200, dtype=torch.float64)
    print(
        "| above 300, even in t, mean | | "
        + " | ".join(f"{_at(even, times, ratios[n]):.3g}" for n in ESTIMATORS)
        + " |"
    )


def _at(t: torch.Tensor, times: torch.Tensor, values: torch.Tensor) -> float:
    """The harmonic mean at evenly spread times: how many times fewer passes in all."""
    i = torch.searchsorted(times, t).clamp(1, len(times) - 1)
    share = ((t - times[i - 1]) / (times[i] - times[i - 1])).clamp(0, 1)
    return (1 / torch.lerp(values[i - 1].log(), values[i].log(), share).exp()).mean().reciprocal().item()


def scheduler_cost(args: argparse.Namespace) -> None:
    print("| scheduler | batch | calibrated : stock with a subtraction | the latter : itself |\n|---|---|---|---|")
    for stock, kind in (
        (DDIMScheduler, CalibratedDDIMScheduler),
        (DPMSolverMultistepScheduler, CalibratedDPMSolverMultistepScheduler),
    ):
        for shape in ((16, 4, 64, 64), (64, 3, 32, 32)):
            plain = stock()
            config = {k: v for k, v in plain.config.items() if not k.startswith("_")}
            calibration = Calibration(
                shape=list(shape[1:]),
                sigmas=torch.logspace(-2, 2, 24).tolist(),
                scheduler={"_class_name": stock.__name__, **config},
            ).to(args.device)
            calibration.offsets.normal_(0, 0.1)
            calibration.shrinkage.fill_(1)
            calibrated = kind.from_scheduler(plain, calibration)
            output, offset = torch.randn(shape, device=args.device), torch.randn(1, *shape[1:], device=args.device)

            def loop(scheduler: Any, bare: bool, output: Any = output, offset: Any = offset) -> float:
                start = time.perf_counter()
                scheduler.set_timesteps(50, device=args.device)
                x = output
                for t in scheduler.timesteps:
                    x = scheduler.step(output - offset if bare else output, t, x).prev_sample
                if args.device == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - start

            variants = {"calibrated": calibrated, "stock": plain, "again": plain}
            times: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(args.repeats):
                for name in random.sample(list(variants), 3):
                    times[name].append(loop(variants[name], name != "calibrated"))
            calibrated_time, stock_time, again = (statistics.median(times[name]) for name in variants)
            size = "x".join(map(str, shape))
            print(f"| {stock.__name__} | {size} | {calibrated_time / stock_time:.3f} | {again / stock_time:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of a pipeline with a UNet2DModel")
    parser.add_argument("--schedulers", action="store_true")
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--num_levels", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=201)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args, for_data = parser.parse_known_args()
    if args.schedulers:
        scheduler_cost(args)
    if args.model is not None:
        estimator_cost(args, for_data)


if __name__ == "__main__":
    main()
