"""Time and memory of one optimiser step: plain denoising against the consistency loss in several forms.

    python benchmarks/consistency_cost.py [--preset mnist] [--batch_size 64] [--repeats 9]

Every variant runs in turn, `repeats` times over; printed are the ratios to plain denoising (medians and quartiles), and
the peak of the memory beyond the weights (on a CPU the activations that autograd saves, counted by its hooks). "paper's
structure" is the loss without reuse: Euler-Maruyama, 5 steps, D(x, sigma) evaluated anew for the regulariser and in
each rollout.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from timing import Update, in_turn, machine, peak_memory, ratio
from torch import Tensor

from diffusers_ext import consistency_loss, lower_sigma
from diffusers_ext.noise_levels import karras_sigmas
from diffusers_ext.presets import PRESETS
from diffusers_ext.reports.card import table
from diffusers_ext.solvers import euler_maruyama

PLAIN = "plain denoising"
VARIANTS: dict[str, dict] = {
    PLAIN: {"fraction": 0.0},
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


def step(update: Update, fraction: float, steps: int = 1, paper: bool = False) -> None:
    """One update with the consistency loss of a fraction of the batch."""
    x, sigma, denoised, loss = update.denoise()
    if fraction:
        part = slice(round(fraction * len(x)))
        lower = lower_sigma(sigma[part])
        if paper:
            extra = papers_structure(update.denoiser, x[part], sigma[part], lower, steps)
        else:
            options = {"denoised": denoised[part], "steps": steps}
            extra = consistency_loss(update.denoiser, x[part], sigma[part], lower, **options)
        loss = loss + extra.mean()
    update.descend(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="mnist")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    update = Update(args.preset, args.batch_size)
    variants = {name: partial(step, update, **options) for name, options in VARIANTS.items()}
    times = in_turn(variants, args.repeats)
    memory = {name: peak_memory(run, saved_alone=True) for name, run in variants.items()}
    print(f"preset {args.preset}, batch {args.batch_size}, {machine()}, {args.repeats} rounds")
    rows = [[name, ratio(times[name], times[PLAIN]), f"{memory[name] / memory[PLAIN]:.2f}"] for name in variants]
    print(table(["variant", "time", "peak memory"], rows))


if __name__ == "__main__":
    main()
