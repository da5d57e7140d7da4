"""Images per second of the training loop with weight 0 against a minimal loop written by hand.

    python benchmarks/training_throughput.py [--preset mnist] [--steps 40] [--rounds 5]

Both train the same network with the same batch size, AdamW, gradient clipping and moving average, in one process and in
turn; printed are the medians and quartiles of the ratios. The hand-written loop has its images in memory; ours reads,
converts and stacks them.

On a GPU: bfloat16, channels_last and torch.compile; the bare forward and backward pass is timed, too, and the steps run
under `torch.cuda.set_sync_debug_mode("error")`, so that any wait of the host for the device ends the benchmark.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator

import torch
from diffusers.training_utils import EMAModel
from timing import DEVICE, in_turn, machine, ratio

from diffusers_ext import score_matching_loss
from diffusers_ext.commands import parse_arguments
from diffusers_ext.presets import PRESETS
from diffusers_ext.training import TrainingArguments, TrainingLoop


def ours(args: argparse.Namespace, folder: str) -> tuple[TrainingLoop, Iterator[None]]:
    """The loop, and one optimiser step for each item of the iterator."""
    options = ["--preset", args.preset, "--dataset_name", "digits", "--report_to", "none", "--logging_steps", "1000000"]
    options += ["--checkpointing_steps", "0", "--max_train_steps", "1000000", "--output_dir", folder]
    if DEVICE == "cuda":
        options += ["--mixed_precision", "bf16", "--channels_last", "--torch_compile", "--dataloader_num_workers", "8"]
    loop = TrainingLoop(parse_arguments(TrainingArguments, options), "throughput", ("A paper", "2302.09057"))

    def steps() -> Iterator[None]:
        for batch in loop:
            sigma = loop.schedule.draw_sigmas(len(batch.x0), batch.generator, batch.x0.device)
            x = loop.denoiser.process.perturb(batch.x0, sigma, batch.generator)
            loss = score_matching_loss(loop.denoiser, x, batch.x0, sigma, weight=loop.weight(sigma), **batch.cond)
            loop.update(loss.mean(), sigma=sigma, denoising=loss)
            yield

    return loop, steps()


def by_hand(loop: TrainingLoop) -> Callable[[], None]:
    """One step of the loop that one would write in ten lines, with a network and optimiser of its own."""
    network = type(loop.subject.network).from_config(loop.subject.network.config).to(loop.accelerator.device)
    model: Callable = network
    cuda = DEVICE == "cuda"
    if cuda:
        network.to(memory_format=torch.channels_last)
        model = torch.compile(network)
    args = loop.args
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ema = EMAModel(network.parameters(), decay=args.ema_decay, foreach=True)
    abar = loop.pipeline.scheduler.alphas_cumprod.to(loop.accelerator.device)
    images = loop.validation.images[: args.train_batch_size].to(loop.accelerator.device)
    images = images.repeat(-(-args.train_batch_size // len(images)), 1, 1, 1)[: args.train_batch_size]

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
    if loop.args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    t = torch.rand(len(x), device=x.device) * 1000

    def step() -> None:
        loop.model(x, t, return_dict=False)[0].square().mean().backward()
        loop.model.zero_grad(set_to_none=True)

    return step


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    """So many steps."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def without_waiting(run: Callable[[], None]) -> Callable[[], None]:
    """The same, in which from the second call on any wait of the host for the GPU is an error."""
    modes = itertools.chain(["default"], itertools.repeat("error"))

    def checked() -> None:
        torch.cuda.set_sync_debug_mode(next(modes))
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="mnist")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        loop, steps = ours(args, folder)
        variants = {"ours": repeated(lambda: next(steps), args.steps), "by hand": repeated(by_hand(loop), args.steps)}
        if DEVICE == "cuda":
            variants["ours"] = without_waiting(variants["ours"])
            variants["bare forward and backward"] = repeated(bare(loop), args.steps)
        times = in_turn(variants, args.rounds)

    print(f"\npreset {args.preset}, batch {loop.args.train_batch_size}, {machine()}, {args.rounds} rounds")
    for other in list(variants)[1:]:
        print(f"images per second of ours / {other}: {ratio(times[other], times['ours'], '.3f')}")


if __name__ == "__main__":
    main()
