"""Time and memory of the score of the box's heat kernel: the package's against the formulas written plainly.

    python benchmarks/heat_kernel.py [--batch_size 128] [--channels 3] [--size 32] [--repeats 9]

"Plainly" is as the sums stand on paper, every term along a trailing dimension: below sigma 0.141 the ratio of two sums
over 42 images with 1e-12 in its denominator, above it 20 cosines, the samples parted by a mask. sigma is log-uniform in
[0.01, 5], the tensors are float32. The variants run in turn, `repeats` times over; printed are medians and quartiles
of the ratios to the plain formulas, and the peak of what one call allocates (read by the allocator on a GPU, by the
profiler on a CPU).
"""

import statistics
from functools import partial
from math import log, pi

import torch
from bench import DEVICE, flags, in_turn, machine, peak_memory, ratio
from torch import Tensor

from diffusers_ext.hypercube import heat_kernel_score, reflect
from diffusers_ext.reports.card import table


def plain(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    def by_images(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        k = 2 * torch.arange(-10, 11, device=x.device)
        distance = x - torch.cat([x0 + k, -x0 + k], -1)
        weight = torch.exp(-(distance**2) / (2 * sigma**2))
        return (-distance / sigma**2 * weight).sum(-1) / (weight.sum(-1) + 1e-12)

    def by_cosines(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        w = pi * torch.arange(1, 21, device=x.device)
        decay = torch.exp(-(w**2) * sigma**2 / 2) * torch.cos(w * x0)
        return -2 * (decay * w * torch.sin(w * x)).sum(-1) / (1 + 2 * (decay * torch.cos(w * x)).sum(-1) + 1e-12)

    small, sigma, score = sigma < 0.141, sigma.reshape(-1, *[1] * (x.ndim - 1)), torch.empty_like(x)
    for chosen, formula in ((small, by_images), (~small, by_cosines)):
        score[chosen] = formula(*(tensor[chosen].unsqueeze(-1) for tensor in (x, x0, sigma)))
    return score


@torch.no_grad()
def main() -> None:
    args, _ = flags(__doc__, batch_size=128, channels=3, size=32, repeats=9)
    generator = torch.Generator().manual_seed(0)
    sigma = 0.01 * torch.exp(torch.rand(args.batch_size, generator=generator) * log(500))
    x0 = torch.rand(args.batch_size, args.channels, args.size, args.size, generator=generator)
    x = reflect(x0 + sigma.reshape(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator))
    tensors = [t.to(DEVICE) for t in (x, x0, sigma)]
    functions = {"plain formulas": plain, "heat_kernel_score": heat_kernel_score}
    functions["the same, compiled"] = torch.compile(heat_kernel_score, fullgraph=True)
    variants = {name: partial(function, *tensors) for name, function in functions.items()}
    times = in_turn(variants, args.repeats, warm_up=2)
    memory = {name: peak_memory(run) for name, run in variants.items()}

    print(f"{tuple(x.shape)}, {machine()}, {args.repeats} rounds; memory in units of x ({x.nbytes / 2**20:.1f} MiB)")
    rows, base = [], "plain formulas"
    for name, values in times.items():
        ms, sizes = 1000 * statistics.median(values), (memory[name] / x.nbytes, memory[name] / memory[base])
        rows.append([name, f"{ms:.1f}", ratio(times[base], values, ".1f"), f"{sizes[0]:.1f}", f"{sizes[1]:.3f}"])
    print(table(["variant", "ms", "speed-up (quartiles)", "peak memory", "share"], rows))


if __name__ == "__main__":
    main()
