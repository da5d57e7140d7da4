"""Evaluations of the network that a likelihood costs, by the error, for three ways to solve the probability flow.

    python benchmarks/likelihood_cost.py --model digits-model --preset digits

`log_likelihood` (dopri5 of torchdiffeq in z = x / (1 + sigma^2)^1/2 and ln sigma), the same solver in x, and RK45 of
scipy in sigma on the host, the whole batch one vector, as is usual. The same probes for all; the error is the root mean
square over the images against a solution of `--reference` tolerance, in bits per dimension.
"""

from functools import partial
from math import log, prod
from time import perf_counter

import numpy as np
import torch
from bench import DEVICE, flags
from scipy.integrate import solve_ivp
from torch import Tensor
from torchdiffeq import odeint
from trained import held_out_images, load

import diffusers_ext as ext
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.likelihood import _worst_sample, hutchinson_divergence, rademacher
from diffusers_ext.reports.card import table


def main() -> None:
    defaults = {"preset": "digits", "images": 8, "tolerances": [1e-2, 1e-3, 1e-4, 1e-5], "reference": 3e-7}
    args, for_data = flags(__doc__, rest=True, model=str, **defaults)
    subject = load(args.model)
    images = rows_of(held_out_images(["--preset", args.preset, *for_data], subject, 20).unseen, 0, args.images)
    x = ext.dequantize(images.images, torch.Generator().manual_seed(0)).to(DEVICE)
    scheduler = subject.pipeline.scheduler
    schedule, model = ext.noise_schedule(scheduler), ext.score_model_from(subject.network, scheduler)
    low, high, dims, calls = schedule.sigma_min, schedule.sigma_max, prod(x.shape[1:]), []
    subject.network.register_forward_hook(lambda *_: calls.append(1))
    probes = rademacher(1, x, torch.Generator(DEVICE).manual_seed(1))
    cond = subject.conditions(images)

    def ours(tolerance: float) -> Tensor:
        options = {"divergence": "hutchinson", "generator": torch.Generator(DEVICE).manual_seed(1), **cond}
        return ext.log_likelihood(model, x, low, high, rtol=tolerance, atol=tolerance, **options)

    def slope(y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:  # of x and log p, for each unit of ln sigma
        return hutchinson_divergence(lambda x: -(sigma**2) * model.score(x, sigma, **cond), y, probes)

    def in_x(tolerance: float) -> Tensor:
        def field(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            v, divergence = slope(state[0], u.exp())
            return v, divergence / dims

        u = torch.tensor([low, high], dtype=torch.float64, device=x.device).log()
        options = {"norm": _worst_sample, "min_step": log(high / low) / 1000}
        start = (x, x.new_zeros(len(x)))
        y, gain = (
            v[-1] for v in odeint(field, start, u, rtol=tolerance, atol=tolerance, method="dopri5", options=options)
        )
        return model.process.log_prior(y, high) + dims * gain

    def scipys(tolerance: float) -> Tensor:
        def field(sigma: float, state: np.ndarray) -> np.ndarray:
            y = torch.from_numpy(state[: x.numel()]).to(x).reshape(x.shape)
            parts = slope(y, torch.tensor(sigma, dtype=x.dtype, device=x.device))
            return np.concatenate([(part / sigma).double().cpu().numpy().ravel() for part in parts])

        start = np.concatenate([x.double().cpu().numpy().ravel(), np.zeros(len(x))])
        end = torch.from_numpy(solve_ivp(field, (low, high), start, rtol=tolerance, atol=tolerance).y[:, -1]).to(x)
        return model.process.log_prior(end[: x.numel()].reshape(x.shape), high) + end[x.numel() :]

    bits, rows = partial(ext.bits_per_dim, shape=x.shape[1:]), []
    exact = bits(ours(args.reference))
    for tolerance in args.tolerances:
        cells = []
        for solve in (ours, in_x, scipys):
            calls.clear()
            start = perf_counter()
            error = (bits(solve(tolerance)) - exact).square().mean().sqrt().item()
            cells.append(f"{len(calls)}, {error:.1e}, {perf_counter() - start:.0f} s")
        rows.append([f"{tolerance:g}", *cells])
    print(table(["tolerance; evaluations, error, seconds", "log_likelihood", "in x", "RK45 of scipy"], rows))


if __name__ == "__main__":
    main()
