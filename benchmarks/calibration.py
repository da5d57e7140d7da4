"""Calibration: what its estimate costs, and what its schedulers cost.

    python benchmarks/calibration.py --model digits-model --dataset_name digits --resolution 16
    python benchmarks/calibration.py --schedulers

The first measures the error of the offset, E|o^ - o|^2, per forward pass: the plain average of the paper against the
control variate, antithetic noise and both, by noise level. The ratio is that of the passes that reach an equal error.

The second times a loop of 50 steps of a calibrated scheduler, with a network that does nothing, against the stock one
with one bare subtraction of a tensor from each output; in random order, medians and quartiles of the ratios.
(MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 keep glibc from giving memory back between
steps, whose page faults cost more than what is to be measured.)
"""

import argparse
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from timing import DEVICE, in_turn, ratio
from torch import Tensor
from trained import batches, load, real_images

from diffusers_ext import Calibration, estimate_calibration, noise_schedule
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.interop import stored_scheduler
from diffusers_ext.reports.card import table
from diffusers_ext.schedulers import calibrated_class
from diffusers_ext.subjects import subject_of

PLAIN = "plain average"
ESTIMATORS = {
    PLAIN: {"control_variate": False, "antithetic": False},
    "control variate": {"control_variate": True, "antithetic": False},
    "antithetic": {"control_variate": False, "antithetic": True},
}


def estimator_cost(args: argparse.Namespace, for_data: list[str]) -> None:
    subject = subject_of(load(args.model).to(args.device))
    images = rows_of(real_images(for_data, subject.pipeline).training, 0, args.num_samples)
    scheduler, errors = subject.pipeline.scheduler, {}
    for name, options in ESTIMATORS.items():
        data = batches(subject, images, 64)
        calibration = estimate_calibration(subject.network, scheduler, data, num_levels=args.num_levels, **options)
        passes = 2 if options["antithetic"] else 1
        errors[name] = calibration.noise_floor[:, 0].double() * calibration.num_samples[:, 0] * passes
    sigmas = torch.tensor(calibration.config.sigmas, dtype=torch.float64)
    times = noise_schedule(scheduler).time(sigmas)
    ratios = [errors[PLAIN] / error for error in errors.values()]
    rows = [
        [f"{t:.0f}", f"{sigma:.3g}", *(f"{values[i]:.3g}" for values in ratios)]
        for i, (t, sigma) in enumerate(zip(times.tolist(), sigmas.tolist(), strict=True))
    ]
    above = times > 300
    # The timesteps of a sampler are spread evenly in t, and not in ln sigma: average the passes saved over those.
    even = torch.linspace(301, 999, 200, dtype=torch.float64)
    rows.append(["above 300, median", "", *(f"{values[above].median():.3g}" for values in ratios)])
    rows.append(["above 300, least", "", *(f"{values[above].min():.3g}" for values in ratios)])
    rows.append(["above 300, even in t, mean", "", *(f"{_at(even, times, values):.3g}" for values in ratios)])
    print(f"{args.num_samples} samples; passes of the plain average for one pass at equal error\n")
    print(table(["timestep", "sigma", *ESTIMATORS], rows))


def _at(t: Tensor, times: Tensor, values: Tensor) -> float:
    """The harmonic mean at evenly spread times: how many times fewer passes in all."""
    i = torch.searchsorted(times, t).clamp(1, len(times) - 1)
    share = ((t - times[i - 1]) / (times[i] - times[i - 1])).clamp(0, 1)
    return (1 / torch.lerp(values[i - 1].log(), values[i].log(), share).exp()).mean().reciprocal().item()


def loop(scheduler: Any, output: Tensor, offset: Tensor | None = None) -> None:
    """50 steps with this output of the network, perhaps less an offset."""
    scheduler.set_timesteps(50, device=output.device)
    x = output
    for t in scheduler.timesteps:
        x = scheduler.step(output if offset is None else output - offset, t, x).prev_sample


def scheduler_cost(args: argparse.Namespace) -> None:
    rows = []
    for stock, shape in product((DDIMScheduler(), DPMSolverMultistepScheduler()), ((16, 4, 64, 64), (64, 3, 32, 32))):
        sigmas = torch.logspace(-2, 2, 24).tolist()
        calibration = Calibration(shape=list(shape[1:]), sigmas=sigmas, scheduler=stored_scheduler(stock))
        calibration.offsets.normal_(0, 0.1)
        calibration.shrinkage.fill_(1)
        name = type(stock).__name__
        calibrated = calibrated_class(name).from_scheduler(stock, calibration.to(args.device))
        output, offset = torch.randn(shape, device=args.device), torch.randn(1, *shape[1:], device=args.device)
        bare = partial(loop, stock, output, offset)
        variants = {"calibrated": partial(loop, calibrated, output), "stock": bare, "again": bare}
        times = in_turn(variants, args.repeats, warm_up=0)
        ratios = [ratio(times[one], times["stock"], ".3f") for one in ("calibrated", "again")]
        rows.append([name, "x".join(map(str, shape)), *ratios])
    print(table(["scheduler", "batch", "calibrated : stock with a subtraction", "the latter : itself"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of a pipeline of pixels")
    parser.add_argument("--schedulers", action="store_true")
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--num_levels", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=201)
    parser.add_argument("--device", default=DEVICE)
    args, for_data = parser.parse_known_args()
    if args.schedulers:
        scheduler_cost(args)
    if args.model is not None:
        estimator_cost(args, for_data)


if __name__ == "__main__":
    main()
