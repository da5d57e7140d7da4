"""Time and memory of one optimiser step: plain denoising against observation guidance in several forms.

    python benchmarks/observation_cost.py [--preset digits] [--batch_size 64] [--repeats 15]

"generator" is the update of the trained network alone: the time of the discriminator's loss and update and that of the
forward and backward pass through it, measured in the same step, is taken out. "whole" is one full alternation. "reuse"
makes the step of the prediction that the denoising loss has, "again" evaluates the network for it anew, in both losses.
Every round runs all variants once, in random order; printed are the ratios to plain denoising, medians and quartiles
(on a CPU of this process's own time, as others may share the machine), and the peak of the memory beyond the weights
(on a CPU the activations that autograd saves, counted by its hooks).
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, Update, in_turn, machine, now, peak_memory, ratio
from torch import Tensor

from diffusers_ext import NoiseLevelDiscriminator, discriminator_loss, look_ahead_sigma, observation_loss
from diffusers_ext.presets import PRESETS
from diffusers_ext.reports.card import table

PLAIN = "plain denoising"
VARIANTS: dict[str, dict] = {
    PLAIN: {},
    "Euler, reuse": {"projection": "euler", "reuse": True},
    "Euler, again": {"projection": "euler", "reuse": False},
    "Heun, reuse": {"projection": "heun", "reuse": True},
    "Heun, again": {"projection": "heun", "reuse": False},
}
LOOK_AHEAD, GAMMA = 0.1, 0.01  # the paper's, from scratch; they do not matter for the cost
CLOCK = time.process_time if DEVICE == "cpu" else time.perf_counter


class Reached(torch.autograd.Function):
    """The identity; calls a function when its backward pass is reached."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, reached: Callable[[], None]) -> Tensor:
        ctx.reached = reached  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.reached()  # type: ignore[attr-defined]
        return gradient, None


class Alternation(Update):
    """One update of the network and one of the discriminator, with the seconds that the latter takes.

    Attributes:
        seconds: of the discriminator, in each of the steps so far, by variant.
    """

    def __init__(self, preset: str, batch_size: int, channels: str | None) -> None:
        super().__init__(preset, batch_size)
        channels = channels or PRESETS[preset].arguments.get("discriminator_channels")
        widths = {} if channels is None else {"block_out_channels": tuple(map(int, channels.split(",")))}
        self.disc = NoiseLevelDiscriminator(self.network.config.in_channels, **widths).to(DEVICE)
        trained = [p for p in self.disc.parameters() if p.requires_grad]
        self.disc_optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.0, 0.99), fused=True)
        self.seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        self.marked = 0.0

    def mark(self, run: Callable[[], Tensor]) -> Tensor:
        """Call a function, and count its seconds as the discriminator's."""
        start = now(CLOCK)
        result = run()
        self.marked += now(CLOCK) - start
        return result

    def seen(self, x_next: Tensor, *levels: Tensor) -> Tensor:
        """The discriminator, with its time marked, that of its backward pass, too."""
        left = [0.0]

        def begins() -> None:
            left[0] = now(CLOCK)

        def ends() -> None:
            self.marked += now(CLOCK) - left[0]

        return self.mark(lambda: Reached.apply(self.disc(Reached.apply(x_next, ends), *levels), begins))

    def step(self, variant: str, projection: str | None = None, reuse: bool = True) -> None:
        self.marked = 0.0
        x, sigma, denoised, loss = self.denoise()
        if projection is None:
            self.descend(loss)
        else:
            sigma_next = look_ahead_sigma(sigma, LOOK_AHEAD, self.schedule.sigma_min, self.schedule.sigma_max)
            game = {"denoised": denoised if reuse else None, "projection": projection}
            levels, known = (sigma, sigma_next), {"sigma_data": self.disc.config.sigma_data}
            judged = self.mark(
                lambda: discriminator_loss(self.denoiser, self.disc, x, self.x0, *levels, **known, **game).loss.mean()
            )
            self.disc.requires_grad_(False)
            loss = loss + GAMMA * observation_loss(self.denoiser, self.seen, x, *levels, **game).mean()
            self.disc.requires_grad_(True)
            self.descend(loss)
            self.mark(lambda: self.learn(judged))
        self.seconds[variant].append(self.marked)

    def learn(self, judged: Tensor) -> Tensor:
        """One step of the discriminator's optimiser."""
        judged.backward()
        self.disc_optimizer.step()
        self.disc_optimizer.zero_grad()
        return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--channels", help="of the discriminator; by default those of the preset, or else of the class")
    args = parser.parse_args()
    game = Alternation(args.preset, args.batch_size, args.channels)
    variants = {name: partial(game.step, name, **options) for name, options in VARIANTS.items()}
    whole = in_turn(variants, args.repeats, clock=CLOCK)
    own = {
        name: [a - b for a, b in zip(times, game.seconds[name][-args.repeats :], strict=True)]
        for name, times in whole.items()
    }
    memory = {name: peak_memory(run, saved_alone=True) for name, run in variants.items()}

    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (game.network, game.disc)]
    print(f"preset {args.preset}, batch {args.batch_size}, {machine()}, {args.repeats} rounds")
    print(f"network {sizes[0]:.2f}M parameters, discriminator {sizes[1]:.2f}M")
    rows = []
    for name in variants:
        ratios = [ratio(times[name], whole[PLAIN]) for times in (own, whole)]
        rows.append([name, *ratios, f"{memory[name] / memory[PLAIN]:.2f}"])
    print(table(["variant", "generator", "whole", "peak memory"], rows))


if __name__ == "__main__":
    main()
