"""Time and memory of one optimiser step: plain denoising against observation guidance in several forms.

    python benchmarks/observation_cost.py [--preset digits] [--batch_size 64] [--repeats 15]

"generator" is the update of the trained network alone: the time of the discriminator's loss and update and that of the
forward and backward pass through it, measured in the same step, is taken out. "whole" is one full alternation. "reuse"
makes the step of the prediction that the denoising loss has, "again" evaluates the network for it anew, in both losses.
Every round runs all variants once, in random order; printed are the ratios of the medians to plain denoising (on a CPU
of this process's own time, as others may share the machine), and the peak of the memory beyond the weights (on a CPU
the activations that autograd saves, counted by its hooks).
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from consistency_cost import peak
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from diffusers_ext import (
    NoiseLevelDiscriminator,
    denoiser_from,
    discriminator_loss,
    look_ahead_sigma,
    noise_schedule,
    observation_loss,
    score_matching_loss,
)
from diffusers_ext.presets import PRESETS

PLAIN = "plain denoising"
VARIANTS: dict[str, dict] = {
    PLAIN: {},
    "Euler, reuse": {"projection": "euler", "reuse": True},
    "Euler, again": {"projection": "euler", "reuse": False},
    "Heun, reuse": {"projection": "heun", "reuse": True},
    "Heun, again": {"projection": "heun", "reuse": False},
}
LOOK_AHEAD, GAMMA = 0.1, 0.01  # the paper's, from scratch; they do not matter for the cost


class Clock:
    """Seconds of a step, and how many of them went into marked parts; on a CPU those of this process alone."""

    def __init__(self, device: str) -> None:
        self.device, self.marked = device, 0.0

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, run: Callable[[], Tensor]) -> Tensor:
        start = self.now()
        result = run()
        self.marked += self.now() - start
        return result


class Timed(torch.autograd.Function):
    """The identity; marks the time that its backward pass is reached."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, reached: Callable[[], None]) -> Tensor:
        ctx.reached = reached  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.reached()  # type: ignore[attr-defined]
        return gradient, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--channels", help="of the discriminator; by default those of the preset, or else of the class")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    network = UNet2DModel(**PRESETS[args.preset].model).to(device)
    config = network.config
    scheduler = DDIMScheduler(**PRESETS[args.preset].scheduler[1])
    denoiser, schedule = denoiser_from(network, scheduler), noise_schedule(scheduler)
    channels = args.channels or PRESETS[args.preset].arguments.get("discriminator_channels")
    widths = {} if channels is None else {"block_out_channels": tuple(map(int, channels.split(",")))}
    disc = NoiseLevelDiscriminator(config.in_channels, **widths).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    trained = [p for p in disc.parameters() if p.requires_grad]
    disc_optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.0, 0.99), fused=True)
    x0 = torch.rand(args.batch_size, config.in_channels, config.sample_size, config.sample_size, device=device) * 2 - 1

    def step(clock: Clock, projection: str | None = None, reuse: bool = True) -> None:
        sigma = schedule.draw_sigmas(len(x0), device=device)
        x = denoiser.process.perturb(x0, sigma)
        denoised = denoiser(x, sigma)
        weight = denoiser.output_weight(sigma)
        loss = score_matching_loss(denoiser, x, x0, sigma, prediction=denoised, weight=weight).mean()
        judged = None
        if projection is not None:
            sigma_next = look_ahead_sigma(sigma, LOOK_AHEAD, schedule.sigma_min, schedule.sigma_max)
            game = {"denoised": denoised if reuse else None, "projection": projection}
            judged = clock.mark(
                lambda: discriminator_loss(
                    denoiser, disc, x, x0, sigma, sigma_next, sigma_data=disc.config.sigma_data, **game
                ).loss.mean()
            )

            def seen(x_next: Tensor, *levels: Tensor) -> Tensor:
                """The discriminator, with its time taken out, backward, too."""
                left = [0.0]

                def begins() -> None:
                    left[0] = clock.now()

                def ends() -> None:
                    clock.marked += clock.now() - left[0]

                return clock.mark(lambda: Timed.apply(disc(Timed.apply(x_next, ends), *levels), begins))

            disc.requires_grad_(False)
            loss = loss + GAMMA * observation_loss(denoiser, seen, x, sigma, sigma_next, **game).mean()
            disc.requires_grad_(True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if judged is not None:

            def update() -> Tensor:
                judged.backward()
                disc_optimizer.step()
                disc_optimizer.zero_grad()
                return judged

            clock.mark(update)

    whole: dict[str, list[float]] = {name: [] for name in VARIANTS}
    own: dict[str, list[float]] = {name: [] for name in VARIANTS}
    order = list(VARIANTS)
    for repeat in range(args.repeats + 1):
        random.Random(repeat).shuffle(order)
        for name in order:
            clock = Clock(device)
            start = clock.now()
            step(clock, **VARIANTS[name])
            seconds = clock.now() - start
            if repeat:  # the first round warms up
                whole[name].append(seconds)
                own[name].append(seconds - clock.marked)
    memory = {
        name: peak(lambda options=options: step(Clock(device), **options), device) for name, options in VARIANTS.items()
    }

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (network, disc)]
    print(f"preset {args.preset}, batch {args.batch_size}, {name}, medians of {args.repeats} rounds")
    print(f"network {sizes[0]:.2f}M parameters, discriminator {sizes[1]:.2f}M")
    print("| variant | generator | whole | peak memory |\n|---|---|---|---|")
    plain = statistics.median(whole[PLAIN])
    for variant in VARIANTS:
        ratios = [statistics.median(times[variant]) / plain for times in (own, whole)]
        print(f"| {variant} | {ratios[0]:.2f} | {ratios[1]:.2f} | {memory[variant] / memory[PLAIN]:.2f} |")


if __name__ == "__main__":
    main()
