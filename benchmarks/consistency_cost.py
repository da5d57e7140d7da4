"""Time and memory of one optimiser step: plain denoising against the consistency loss in several forms.

    python benchmarks/consistency_cost.py [--preset mnist] [--batch_size 64] [--repeats 9]

Every variant runs in turn, `repeats` times over; printed are the medians as ratios to plain denoising, and the peak of
the memory beyond the weights (on a CPU the activations that autograd saves, counted by its hooks). "paper's structure"
is the loss without reuse: Euler-Maruyama, 5 steps, D(x, sigma) evaluated anew for the regulariser and in each rollout.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from diffusers_ext import consistency_loss, denoiser_from, lower_sigma, noise_schedule, score_matching_loss
from diffusers_ext.noise_levels import karras_sigmas
from diffusers_ext.presets import PRESETS
from diffusers_ext.solvers import euler_maruyama

VARIANTS: dict[str, dict] = {
    "plain denoising": {"fraction": 0.0},
    "posterior, 1 step, quarter of the batch": {"fraction": 0.25, "steps": 1},
    "posterior, 1 step, whole batch": {"fraction": 1.0, "steps": 1},
    "posterior, 5 steps, quarter of the batch": {"fraction": 0.25, "steps": 5},
    "posterior, 5 steps, whole batch": {"fraction": 1.0, "steps": 5},
    "paper's structure, whole batch": {"fraction": 1.0, "steps": 5, "paper": True},
}


def papers_structure(denoiser: Callable, x: Tensor, sigma: Tensor, sigma_next: Tensor, steps: int) -> Tensor:
    """The loss with every evaluation made where it is needed."""
    sigmas = karras_sigmas(steps + 1, sigma_next, sigma).clamp(sigma_next, sigma)

    @torch.no_grad()
    def rollout() -> Tensor:
        y = x
        for s, s_next in pairwise(sigmas):
            y = euler_maruyama(denoiser, y, s, s_next)
        return y

    residuals = [denoiser(rollout(), sigma_next) - denoiser(x, sigma) for _ in range(2)]
    return (residuals[0] * residuals[1]).flatten(1).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="mnist")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    network = UNet2DModel(**PRESETS[args.preset].model).to(device)
    scheduler = DDIMScheduler(**PRESETS[args.preset].scheduler[1])
    denoiser, schedule = denoiser_from(network, scheduler), noise_schedule(scheduler)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    config = network.config
    x0 = torch.rand(args.batch_size, config.in_channels, config.sample_size, config.sample_size, device=device) * 2 - 1

    def step(fraction: float, steps: int = 1, paper: bool = False) -> None:
        sigma = schedule.draw_sigmas(len(x0), device=device)
        x = denoiser.process.perturb(x0, sigma)
        denoised = denoiser(x, sigma)
        weight = denoiser.output_weight(sigma)
        loss = score_matching_loss(denoiser, x, x0, sigma, prediction=denoised, weight=weight).mean()
        if fraction:
            part = slice(round(fraction * len(x0)))
            lower = lower_sigma(sigma[part])
            if paper:
                loss = loss + papers_structure(denoiser, x[part], sigma[part], lower, steps).mean()
            else:
                extra = consistency_loss(denoiser, x[part], sigma[part], lower, denoised=denoised[part], steps=steps)
                loss = loss + extra.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(args.repeats + 1):
        for name, options in VARIANTS.items():
            start = time.perf_counter()
            step(**options)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    memory = {name: peak(lambda options=options: step(**options), device) for name, options in VARIANTS.items()}

    plain = "plain denoising"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"preset {args.preset}, batch {args.batch_size}, {name}, median of {args.repeats}")
    print("| variant | time | peak memory |\n|---|---|---|")
    for variant, values in times.items():
        ratios = [a / b for a, b in zip(values, times[plain], strict=True)]
        print(f"| {variant} | {statistics.median(ratios):.2f} | {memory[variant] / memory[plain]:.2f} |")


def peak(run: Callable[[], None], device: str) -> float:
    """Bytes: the peak beyond what is there before on a GPU; all that autograd saves, each tensor once, on a CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


if __name__ == "__main__":
    main()
