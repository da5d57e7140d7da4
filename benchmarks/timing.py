"""How long variants of a computation take beside each other, how much memory, and what a plain training update is.

Every round runs all variants once, in random order. A ratio is that of two times of one round, so that a machine which
becomes slower does not change it; shown are its median over the rounds and, in brackets, its quartiles.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from diffusers_ext import denoiser_from, noise_schedule, score_matching_loss
from diffusers_ext.presets import PRESETS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Clock = Callable[[], float]


def machine() -> str:
    """The name of the device, for people."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def now(clock: Clock = time.perf_counter) -> float:
    """Seconds, read when the device has done all that it was asked for."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock()


def in_turn(
    variants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; those of the first rounds, which compile and warm up, are left out."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name in random.Random(number).sample(list(variants), len(variants)):
            start = now(clock)
            variants[name]()
            seconds = now(clock) - start
            if number >= warm_up:
                times[name].append(seconds)
    return times


def ratio(times: Sequence[float], others: Sequence[float], spec: str = ".2f") -> str:
    """The median and the quartiles of the times in units of others."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):{spec}} ({low:{spec}} to {high:{spec}})"


def peak_memory(run: Callable[[], object], saved_alone: bool = False) -> float:
    """Bytes allocated at most at one time during a call, beyond what was there before.

    On a GPU the allocator counts them. On a CPU it is the profiler, or, with `saved_alone`, it is the activations that
    autograd saves, each tensor once.
    """
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if saved_alone:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(saved.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most


class Update:
    """A preset's network with an optimiser, and random images x0 to train it on."""

    def __init__(self, preset: str, batch_size: int) -> None:
        self.network = UNet2DModel(**PRESETS[preset].model).to(DEVICE)
        scheduler = DDIMScheduler(**PRESETS[preset].scheduler[1])
        self.denoiser, self.schedule = denoiser_from(self.network, scheduler), noise_schedule(scheduler)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        channels, side = self.network.config.in_channels, self.network.config.sample_size
        self.x0 = torch.rand(batch_size, channels, side, side, device=DEVICE) * 2 - 1

    def denoise(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy images, their noise levels, what the network makes of them, and the loss."""
        sigma = self.schedule.draw_sigmas(len(self.x0), device=DEVICE)
        x = self.denoiser.process.perturb(self.x0, sigma)
        denoised, weight = self.denoiser(x, sigma), self.denoiser.output_weight(sigma)
        loss = score_matching_loss(self.denoiser, x, self.x0, sigma, prediction=denoised, weight=weight)
        return x, sigma, denoised, loss.mean()

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
