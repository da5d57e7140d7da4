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

from argparse import Namespace
from functools import partial
from itertools import product
from typing import Any

import torch
from bench import DEVICE, flags, in_turn, ratio
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from trained import batches, held_out_images, load

from diffusers_ext import Calibration, estimate_calibration, noise_schedule
from diffusers_ext.interop import stored_scheduler
from diffusers_ext.reports.card import table
from diffusers_ext.schedulers import calibrated_class

PLAIN = "plain average"
ESTIMATORS = {
    PLAIN: {"control_variate": False, "antithetic": False},
    "control variate": {"control_variate": True, "antithetic": False},
    "antithetic": {"control_variate": False, "antithetic": True},
}


def estimator_cost(args: Namespace, for_data: list[str]) -> None:
    subject = load(args.model, args.device)
    images = held_out_images(for_data, subject, 0).training
    scheduler, errors = subject.pipeline.scheduler, {}
    for name, options in ESTIMATORS.items():
        data = batches(subject, images, args.num_samples, 64)
        calibration = estimate_calibration(subject.network, scheduler, data, num_levels=args.num_levels, **options)
        passes = calibration.num_samples[:, 0] * (2 if options["antithetic"] else 1)
        errors[name] = calibration.noise_floor[:, 0].double() * passes
    sigmas = torch.tensor(calibration.config.sigmas, dtype=torch.float64)
    times = noise_schedule(scheduler).time(sigmas)
    ratios = torch.stack([errors[PLAIN] / error for error in errors.values()], 1)  # (levels, estimators)
    rows = [(f"{t:.0f}", f"{sigma:.3g}", found) for t, sigma, found in zip(times, sigmas, ratios, strict=True)]
    above = ratios[times > 300]
    # The timesteps of a sampler are spread evenly in t, and not in ln sigma: average the passes saved over those.
    even = torch.linspace(301, 999, 200, dtype=torch.float64)
    rows += [("above 300, median", "", above.median(0).values), ("above 300, least", "", above.amin(0))]
    rows += [("above 300, even in t, mean", "", [_at(even, times, values) for values in ratios.T])]
    print(f"{args.num_samples} samples; passes of the plain average for one pass at equal error\n")
    body = [[t, sigma, *(f"{value:.3g}" for value in found)] for t, sigma, found in rows]
    print(table(["timestep", "sigma", *ESTIMATORS], body))


def _at(t: Tensor, times: Tensor, values: Tensor) -> float:
    """The harmonic mean at evenly spread times: how many times fewer passes in all."""
    i = torch.searchsorted(times, t).clamp(1, len(times) - 1)
    share = ((t - times[i - 1]) / (times[i] - times[i - 1])).clamp(0, 1)
    return (1 / torch.lerp(values[i - 1].log(), values[i].log(), share).exp()).mean().reciprocal().item()


def loop(scheduler: Any, x: Tensor, output: Tensor, offset: Tensor | None = None) -> None:
    """50 steps from x with this output of the network, perhaps less an offset."""
    scheduler.set_timesteps(50, device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(output if offset is None else output - offset, t, x).prev_sample


def scheduler_cost(args: Namespace) -> None:
    rows = []
    for stock, shape in product((DDIMScheduler(), DPMSolverMultistepScheduler()), ((16, 4, 64, 64), (64, 3, 32, 32))):
        settings = {"sigmas": torch.logspace(-2, 2, 24).tolist(), "scheduler": stored_scheduler(stock)}
        calibration = Calibration(shape=list(shape[1:]), **settings)
        calibration.offsets.normal_(0, 0.1)
        calibration.shrinkage.fill_(1)
        name = type(stock).__name__
        calibrated = calibrated_class(name).from_scheduler(stock, calibration.to(args.device))
        output, offset = torch.randn(shape, device=args.device), torch.randn(1, *shape[1:], device=args.device)
        bare = partial(loop, stock, output, output, offset)
        variants = {"calibrated": partial(loop, calibrated, output, output), "stock": bare, "again": bare}
        times = in_turn(variants, args.repeats, warm_up=0)
        ratios = [ratio(times[one], times["stock"], ".3f") for one in ("calibrated", "again")]
        rows.append([name, "x".join(map(str, shape)), *ratios])
    print(table(["scheduler", "batch", "calibrated : stock with a subtraction", "the latter : itself"], rows))


def main() -> None:
    args, for_data = flags(
        __doc__, rest=True, model=None, schedulers=False, num_samples=512, num_levels=24, repeats=201, device=DEVICE
    )
    if args.schedulers:
        scheduler_cost(args)
    if args.model is not None:
        estimator_cost(args, for_data)


if __name__ == "__main__":
    main()
