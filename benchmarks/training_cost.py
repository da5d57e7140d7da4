"""Time and memory of training: the losses beside plain denoising, and the loop beside one written by hand.

    python benchmarks/training_cost.py --of consistency [--preset mnist] [--batch_size 64] [--rounds 15]
    python benchmarks/training_cost.py --of observation [--preset digits] [--channels 32,64,64]
    python benchmarks/training_cost.py --of loop [--preset mnist] [--steps 6]

Consistency: "paper's structure" is the loss without reuse: Euler-Maruyama, 5 steps, D(x, sigma) evaluated anew for the
regulariser and in each rollout. Observation: "whole" is one full alternation, an update of the network and one of the
discriminator, and "generator" that of the network alone, beside a discriminator that costs nothing (the mean of the
image); "reuse" makes the step of the prediction that the denoising loss has, "again" evaluates the network for it anew,
in both losses; `--channels` are the discriminator's, by default the preset's. Printed are the ratios to plain denoising
(on a CPU of this process's own time, as others may share the machine) and of the peak of the memory beyond the weights.

Loop: images per second of the training loop with weight 0 against a minimal loop written by hand, `--steps` in turn.
Both train the same network with the same batch size, AdamW, gradient clipping and moving average. The hand-written loop
has its images in memory; ours reads, converts and stacks them. On a GPU: bfloat16, channels_last and torch.compile; the
bare forward and backward pass is timed, too, and our steps run under `torch.cuda.set_sync_debug_mode("error")`, so that
any wait of the host for the device ends the benchmark. Ratios are medians and quartiles over the rounds.
"""

import itertools
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product

import torch
from bench import DEVICE, flags, in_turn, machine, peak_memory, ratio
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

import diffusers_ext as ext
from diffusers_ext.commands import parse_arguments
from diffusers_ext.noise_levels import karras_sigmas
from diffusers_ext.presets import PRESETS
from diffusers_ext.reports.card import table
from diffusers_ext.solvers import euler_maruyama
from diffusers_ext.training import TrainingArguments, TrainingLoop

PLAIN = "plain denoising"
LOOK_AHEAD, GAMMA = 0.1, 0.01  # the paper's, from scratch; they do not matter for the cost


def papers_structure(denoiser: Callable, x: Tensor, sigma: Tensor, sigma_next: Tensor, steps: int) -> Tensor:
    """The consistency loss with every evaluation made where it is needed."""
    sigmas = karras_sigmas(steps + 1, sigma_next, sigma).clamp(sigma_next, sigma)

    @torch.no_grad()
    def rollout() -> Tensor:
        y = x
        for s, s_next in pairwise(sigmas):
            y = euler_maruyama(denoiser, y, s, s_next)
        return y

    residuals = [denoiser(rollout(), sigma_next) - denoiser(x, sigma) for _ in range(2)]
    return (residuals[0] * residuals[1]).flatten(1).mean(1)


class Updates:
    """Updates of a preset's network, and of a discriminator, on random images."""

    def __init__(self, preset: str, batch_size: int, channels: str | None) -> None:
        self.network = UNet2DModel(**PRESETS[preset].model).to(DEVICE)
        scheduler = DDIMScheduler(**PRESETS[preset].scheduler[1])
        self.denoiser, self.schedule = ext.denoiser_from(self.network, scheduler), ext.noise_schedule(scheduler)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        in_channels, side = self.network.config.in_channels, self.network.config.sample_size
        self.x0 = torch.rand(batch_size, in_channels, side, side, device=DEVICE) * 2 - 1
        channels = channels or PRESETS[preset].arguments.get("discriminator_channels")
        widths = {} if channels is None else {"block_out_channels": tuple(map(int, channels.split(",")))}
        self.disc = ext.NoiseLevelDiscriminator(in_channels, **widths).to(DEVICE)
        learnt = [p for p in self.disc.parameters() if p.requires_grad]
        self.disc_optimizer = torch.optim.AdamW(learnt, lr=1e-4, betas=(0.0, 0.99), fused=True)

    def update(self, extra: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> None:
        """One step by the denoising loss, and by what is made of noisy images, their levels and the prediction."""
        sigma = self.schedule.draw_sigmas(len(self.x0), device=DEVICE)
        x = self.denoiser.process.perturb(self.x0, sigma)
        denoised, weight = self.denoiser(x, sigma), self.denoiser.output_weight(sigma)
        loss = ext.score_matching_loss(self.denoiser, x, self.x0, sigma, prediction=denoised, weight=weight).mean()
        if extra is not None:
            loss = loss + extra(x, sigma, denoised)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def consistency(self, fraction: float, steps: int, paper: bool = False) -> None:
        def extra(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
            part = slice(round(fraction * len(x)))
            levels, options = (sigma[part], ext.lower_sigma(sigma[part])), {"steps": steps}
            if paper:
                return papers_structure(self.denoiser, x[part], *levels, **options).mean()
            return ext.consistency_loss(self.denoiser, x[part], *levels, denoised=denoised[part], **options).mean()

        self.update(extra)

    def observation(self, projection: str, reuse: bool, whole: bool) -> None:
        judged = []

        def extra(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
            levels = sigma, ext.look_ahead_sigma(sigma, LOOK_AHEAD, self.schedule.sigma_min, self.schedule.sigma_max)
            game = {"denoised": denoised if reuse else None, "projection": projection}
            judge: Callable[..., Tensor] = self.disc if whole else lambda x_next, *_: x_next.flatten(1).mean(1)
            if whole:
                known = game | {"sigma_data": self.disc.config.sigma_data}
                judged.append(
                    ext.discriminator_loss(self.denoiser, self.disc, x, self.x0, *levels, **known).loss.mean()
                )
            return GAMMA * ext.observation_loss(self.denoiser, judge, x, *levels, **game).mean()

        self.update(extra)
        for loss in judged:
            loss.backward()
            self.disc_optimizer.step()
            self.disc_optimizer.zero_grad()


def ours(args: Namespace, folder: str) -> tuple[TrainingLoop, Iterator[None]]:
    """The loop, and one optimiser step for each item of the iterator."""
    words = "--dataset_name digits --report_to none --logging_steps 1000000 --checkpointing_steps 0"
    if DEVICE == "cuda":
        words += " --mixed_precision bf16 --channels_last --torch_compile --dataloader_num_workers 8"
    options = ["--preset", args.preset, "--output_dir", folder, "--max_train_steps", "1000000", *words.split()]
    loop = TrainingLoop(parse_arguments(TrainingArguments, options), "throughput", ("A paper", "2302.09057"))

    def steps() -> Iterator[None]:
        for batch in loop:
            sigma = loop.schedule.draw_sigmas(len(batch.x0), batch.generator, batch.x0.device)
            x = loop.denoiser.process.perturb(batch.x0, sigma, batch.generator)
            loss = ext.score_matching_loss(loop.denoiser, x, batch.x0, sigma, weight=loop.weight(sigma), **batch.cond)
            loop.update(loss.mean(), sigma=sigma, denoising=loss)
            yield

    return loop, steps()


def by_hand(loop: TrainingLoop) -> Callable[[], None]:
    """One step of the loop that one would write in ten lines, with a network and optimiser of its own."""
    network = type(loop.subject.network).from_config(loop.subject.network.config).to(loop.accelerator.device)
    args, cuda = loop.args, DEVICE == "cuda"
    model: Callable = torch.compile(network.to(memory_format=torch.channels_last)) if cuda else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ema = EMAModel(network.parameters(), decay=args.ema_decay, foreach=True)
    abar = loop.pipeline.scheduler.alphas_cumprod.to(loop.accelerator.device)
    images = torch.rand(args.train_batch_size, *loop.validation.images.shape[1:], device=abar.device) * 2 - 1

    def step() -> None:
        t = torch.randint(len(abar), (len(images),), device=images.device)
        a, s = (abar[t] ** 0.5)[:, None, None, None], ((1 - abar[t]) ** 0.5)[:, None, None, None]
        noise = torch.randn_like(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=cuda):
            output = model(a * images + s * noise, t, return_dict=False)[0]
        (output.float() - (a * noise - s * images)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())

    return step


def bare(loop: TrainingLoop) -> Callable[[], None]:
    """Forward and backward pass of the loop's own network, nothing else."""
    x = torch.randn(loop.args.train_batch_size, *loop.validation.images.shape[1:], device=loop.accelerator.device)
    x = x.contiguous(memory_format=torch.channels_last if loop.args.channels_last else torch.contiguous_format)
    t = torch.rand(len(x), device=x.device) * 1000

    def step() -> None:
        loop.model(x, t, return_dict=False)[0].square().mean().backward()
        loop.model.zero_grad(set_to_none=True)

    return step


def loss_costs(args: Namespace) -> None:
    updates = Updates(args.preset, args.batch_size, args.channels)
    variants = {PLAIN: updates.update}
    if args.of == "consistency":
        for steps, (part, fraction) in product((1, 5), {"quarter of the": 0.25, "whole": 1.0}.items()):
            name = f"posterior, {steps} step{'s' if steps > 1 else ''}, {part} batch"
            variants[name] = partial(updates.consistency, fraction, steps)
        variants["paper's structure, whole batch"] = partial(updates.consistency, 1.0, 5, paper=True)
    else:
        for kind, projection, how in product(("generator", "whole"), ("Euler", "Heun"), ("reuse", "again")):
            run = partial(updates.observation, projection.lower(), how == "reuse", kind == "whole")
            variants[f"{projection}, {how}, {kind}"] = run
        sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (updates.network, updates.disc)]
        print(f"network {sizes[0]:.2f}M parameters, discriminator {sizes[1]:.2f}M")
    times = in_turn(variants, args.rounds, clock=time.process_time if DEVICE == "cpu" else time.perf_counter)
    memory = {name: peak_memory(run) for name, run in variants.items()}
    print(f"preset {args.preset}, batch {args.batch_size}, {machine()}, {args.rounds} rounds")
    rows = [[name, ratio(times[name], times[PLAIN]), f"{memory[name] / memory[PLAIN]:.2f}"] for name in variants]
    print(table(["variant", "time", "peak memory"], rows))


def loop_cost(args: Namespace) -> None:
    modes = itertools.chain(["default"], itertools.repeat("error"))  # of waits of the host, which compiling makes

    def run(step: Callable[[], None], checked: bool = False) -> None:
        if checked:
            torch.cuda.set_sync_debug_mode(next(modes))
        for _ in range(args.steps):
            step()
        if checked:
            torch.cuda.set_sync_debug_mode("default")

    with tempfile.TemporaryDirectory() as folder:
        loop, steps = ours(args, folder)
        variants = {"ours": partial(run, lambda: next(steps), DEVICE == "cuda"), "by hand": partial(run, by_hand(loop))}
        if DEVICE == "cuda":
            variants["bare forward and backward"] = partial(run, bare(loop))
        times = in_turn(variants, args.rounds)
    print(f"\npreset {args.preset}, batch {loop.args.train_batch_size}, {machine()}, {args.rounds} rounds")
    for other in list(variants)[1:]:
        print(f"images per second of ours / {other}: {ratio(times[other], times['ours'], '.3f')}")


def main() -> None:
    choices = {"of": ("consistency", "observation", "loop"), "preset": PRESETS}
    defaults = {"preset": "digits", "batch_size": 64, "steps": 20, "rounds": 15, "channels": None}
    args, _ = flags(__doc__, choices=choices, of=str, **defaults)
    loop_cost(args) if args.of == "loop" else loss_costs(args)


if __name__ == "__main__":
    main()
