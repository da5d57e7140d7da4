"""Time and memory of the score of the box's heat kernel: the package's against the formulas written plainly.

    python benchmarks/heat_kernel.py [--batch_size 128] [--channels 3] [--size 32] [--repeats 9]

"Plainly" is as the sums stand on paper, every term along a trailing dimension: below sigma 0.141 the ratio of two sums
over 42 images with 1e-12 in its denominator, above it 20 cosines, the samples parted by a mask. sigma is log-uniform in
[0.01, 5], the tensors are float32. The variants run in turn, `repeats` times over; printed are medians and quartiles
of the ratios to the plain formulas, and the peak of what one call allocates (read by the allocator on a GPU, by the
profiler on a CPU).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from math import log, pi

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from diffusers_ext.hypercube import heat_kernel_score, reflect


def plain_images(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    k = 2 * torch.arange(-10, 11, device=x.device)
    distance = x.unsqueeze(-1) - torch.cat([x0.unsqueeze(-1) + k, -x0.unsqueeze(-1) + k], -1)
    sigma = sigma.unsqueeze(-1)
    weight = torch.exp(-(distance**2) / (2 * sigma**2))
    return (-distance / sigma**2 * weight).sum(-1) / (weight.sum(-1) + 1e-12)


def plain_cosines(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    w = pi * torch.arange(1, 21, device=x.device)
    decay = torch.exp(-(w**2) * sigma.unsqueeze(-1) ** 2 / 2) * torch.cos(w * x0.unsqueeze(-1))
    angle = w * x.unsqueeze(-1)
    return -2 * (decay * w * torch.sin(angle)).sum(-1) / (1 + 2 * (decay * torch.cos(angle)).sum(-1) + 1e-12)


def plain(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    sigma, small = sigma.reshape(-1, *[1] * (x.ndim - 1)), sigma < 0.141
    score = torch.empty_like(x)
    score[small] = plain_images(x[small], x0[small], sigma[small])
    score[~small] = plain_cosines(x[~small], x0[~small], sigma[~small])
    return score


def peak(run: Callable[[], object], device: str) -> float:
    """Bytes allocated at most at one time during a call, beyond what is there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    generator = torch.Generator().manual_seed(0)
    sigma = 0.01 * torch.exp(torch.rand(args.batch_size, generator=generator) * log(500))
    x0 = torch.rand(args.batch_size, args.channels, args.size, args.size, generator=generator)
    x = reflect(x0 + sigma.reshape(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator))
    x, x0, sigma = (t.to(device) for t in (x, x0, sigma))

    compiled = torch.compile(heat_kernel_score, fullgraph=True)
    variants = {"plain formulas": plain, "heat_kernel_score": heat_kernel_score, "the same, compiled": compiled}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(args.repeats + 2):
        for name, function in variants.items():
            start = time.perf_counter()
            function(x, x0, sigma)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat > 1:  # the first rounds compile and warm up
                times[name].append(time.perf_counter() - start)
    memory = {name: peak(lambda f=function: f(x, x0, sigma), device) for name, function in variants.items()}

    base = "plain formulas"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{tuple(x.shape)}, {where}, median of {args.repeats}; memory in units of x ({x.nbytes / 2**20:.1f} MiB)")
    print("| variant | ms | speed-up (quartiles) | peak memory | share |\n|---|---|---|---|---|")
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times[base], values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speed = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        share = memory[name] / memory[base]
        ms = 1000 * statistics.median(values)
        print(f"| {name} | {ms:.1f} | {speed} | {memory[name] / x.nbytes:.1f} | {share:.3f} |")


if __name__ == "__main__":
    main()
