"""`noise_levels`. Truth: the grids of diffusers' EDM scheduler, its signal-to-noise ratios, and laws by their moments
and by Kolmogorov-Smirnov distance (2.5/sqrt(n): probability 1e-5)."""

from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffusers_ext import (
    karras_sigmas,
    log_linear_sigmas,
    log_normal_sigmas,
    look_ahead_sigma,
    lower_sigma,
    min_snr_weight,
)

GRIDS = {"karras": karras_sigmas, "exponential": log_linear_sigmas}
N = 100_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_uniform(u: Tensor) -> None:
    u = u.double().sort().values
    assert u[0] >= 0
    assert u[-1] <= 1
    assert (u - torch.arange(1, len(u) + 1) / len(u)).abs().max() < 2.5 / len(u) ** 0.5


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("n", [2, 5, 18, 100])
def test_grid_is_that_of_the_edm_scheduler(kind: str, n: int) -> None:
    scheduler = EDMEulerScheduler(sigma_schedule=kind)
    scheduler.set_timesteps(n)
    torch.testing.assert_close(GRIDS[kind](n, 0.002, 80.0).float(), scheduler.sigmas[:-1], rtol=2e-5, atol=0)


def test_rho_is_passed_on_as_the_edm_scheduler_means_it() -> None:
    scheduler = EDMEulerScheduler(rho=3.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(
        karras_sigmas(18, 0.002, 80.0, rho=3.0).float(), scheduler.sigmas[:-1], rtol=2e-5, atol=0
    )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_grid_goes_down_from_the_upper_to_the_lower_bound(grid) -> None:
    sigmas = grid(40, 0.01, 30.0)
    assert sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([30.0, 0.01], dtype=torch.float64))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_tensor_bounds_give_one_grid_for_each_entry(grid) -> None:
    low, high = torch.tensor([0.01, 0.5, 1.0]), torch.tensor([2.0, 3.0, 1.0])
    many = grid(6, low, high)
    assert many.dtype == torch.float32
    for i in range(3):
        torch.testing.assert_close(many[:, i], grid(6, low[i].item(), high[i].item()).float())


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.3)])
def test_log_normal_law(mean: float, std: float) -> None:
    z = (log_normal_sigmas(N, mean, std, seeded()).log() - mean) / std
    assert_uniform(torch.special.ndtr(z))


def test_defaults_of_the_log_normal_law_are_those_of_edm() -> None:
    assert_uniform(torch.special.ndtr((log_normal_sigmas(N, generator=seeded()).log() + 1.2) / 1.2))


def test_lower_sigma_drops_by_a_uniform_amount() -> None:
    sigma = torch.linspace(1, 3, N, dtype=torch.float64)
    assert_uniform((sigma - lower_sigma(sigma, width=0.3, generator=seeded())) / 0.3)
    assert_uniform((sigma - lower_sigma(sigma, generator=seeded())) / 0.05)  # the paper's width
    assert_uniform((1 - lower_sigma(sigma, width=0.3, relative=True, generator=seeded()) / sigma) / 0.3)


def test_lower_sigma_is_never_below_the_floor_nor_above_sigma() -> None:
    sigma = torch.cat([torch.linspace(1e-4, 0.1, N // 2), torch.linspace(0.1, 50, N // 2)])
    for options in ({}, {"width": 5.0, "floor": 0.01}, {"width": 0.9, "relative": True}, {"width": 0.0}):
        lower, floor = lower_sigma(sigma, generator=seeded(), **options), options.get("floor", 0.002)
        assert (lower <= sigma).all()
        assert (lower[sigma >= floor] >= floor).all()
        assert torch.equal(lower[sigma < floor], sigma[sigma < floor])
    assert torch.equal(lower, sigma)  # width 0


def test_lower_sigma_reaches_the_floor_as_often_as_its_law_says() -> None:
    sigma = torch.full((N,), 0.03, dtype=torch.float64)
    at_floor = (lower_sigma(sigma, generator=seeded()) == 0.002).double().mean().item()
    p = (0.05 - 0.03 + 0.002) / 0.05
    assert abs(at_floor - p) < 5 * (p * (1 - p) / N) ** 0.5


@pytest.mark.parametrize("options", [{"width": -0.1}, {"width": 1.0, "relative": True}])
def test_lower_sigma_refuses_a_width_that_makes_no_sense(options: dict) -> None:
    with pytest.raises(ValueError, match=f"width must be .*, got {options['width']}"):
        lower_sigma(torch.ones(2), **options)


def warped_time(sigma: Tensor, low: float = 0.002, high: float = 80.0) -> Tensor:
    """u of a noise level, 0 at the top: its place on the EDM scheduler's own grid, by interpolation."""
    scheduler, n = EDMEulerScheduler(sigma_min=low, sigma_max=high), 20_001
    scheduler.set_timesteps(n)
    grid = scheduler.sigmas[:-1].double().numpy()[::-1]
    return torch.from_numpy(1 - np.interp(sigma.double().numpy(), grid, np.linspace(0, 1, n)))


@pytest.mark.parametrize("k", [0.1, 0.3])
@pytest.mark.parametrize("bounds", [(0.002, 80.0), (0.01, 10.0)], ids=str)
def test_look_ahead_goes_forward_by_a_uniform_amount_of_the_edm_schedulers_time(k: float, bounds: tuple) -> None:
    sigma = karras_sigmas(N, *bounds)[: int((1 - k) * N)]  # those whose longest step ends before sigma_min
    ahead = look_ahead_sigma(sigma, k, *bounds, generator=seeded())
    drop = (warped_time(ahead, *bounds) - warped_time(sigma, *bounds)) / k
    assert_uniform(drop.clamp(0))
    assert drop.min() > -1e-4


def test_look_ahead_keeps_to_the_bounds_and_below_sigma() -> None:
    sigma = torch.cat(
        [torch.tensor([1e-4, 0.001]), karras_sigmas(1000, 0.002, 80.0).float(), torch.tensor([100.0, 1e4])]
    )
    for k, rho in product((0.0, 0.01, 0.2, 1.0, 5.0), (2.0, 3.5, 7.0)):
        ahead = look_ahead_sigma(sigma, k, 0.002, 80.0, rho=rho, generator=seeded())
        assert (ahead <= sigma).all()
        assert (ahead[2:] <= 0.0021).sum() > 0.7 * (k == 5) * len(ahead)  # 4/5 of the draws of k = 5 pass the end
        assert (ahead <= 80).all()
        assert torch.equal(ahead[:2], sigma[:2])
        assert (ahead[2:] >= 0.002 * (1 - 1e-6)).all()
    assert look_ahead_sigma(torch.full((N,), 80.0), 1.0, 0.002, 80.0, generator=seeded()).min() < 0.003
    above = look_ahead_sigma(torch.full((N,), 1e4), 0.1, 0.002, 80.0, generator=seeded())
    assert torch.equal(above, look_ahead_sigma(torch.full((N,), 80.0), 0.1, 0.002, 80.0, generator=seeded()))


def test_look_ahead_is_further_with_a_larger_k_and_no_step_with_0() -> None:
    sigma = log_normal_sigmas(N, generator=seeded(1)).clamp(0.002, 80)
    steps = [look_ahead_sigma(sigma, k, 0.002, 80.0, generator=seeded()) for k in (0.0, 1e-4, 0.1, 0.2)]
    torch.testing.assert_close(steps[0], sigma, rtol=3e-6, atol=0)
    torch.testing.assert_close(steps[1], sigma, rtol=5e-3, atol=0)
    assert (steps[2] <= steps[1]).all()
    assert (steps[3] <= steps[2]).all()
    assert (steps[3] < steps[2]).double().mean() > 0.9


def test_look_ahead_reaches_sigma_min_as_often_as_its_law_says() -> None:
    sigma = karras_sigmas(101, 0.002, 80.0)[95].expand(N)  # u = 0.95
    at_end = (look_ahead_sigma(sigma, 0.2, 0.002, 80.0, generator=seeded()) < 0.002001).double().mean().item()
    assert abs(at_end - 0.75) < 5 * (0.75 * 0.25 / N) ** 0.5


@pytest.mark.parametrize("arguments", [(-0.1, 0.002, 80.0), (0.1, 0.0, 80.0), (0.1, 80.0, 0.002)], ids=str)
def test_look_ahead_refuses_arguments_that_make_no_sense(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"(k|sigma_min|sigma_max) must be (above|at least)"):
        look_ahead_sigma(torch.ones(2), *arguments)


LAWS = {
    "log_normal": lambda generator: log_normal_sigmas(64, generator=generator),
    "lower": lambda generator: lower_sigma(torch.ones(64), generator=generator),
    "look_ahead": lambda generator: look_ahead_sigma(torch.ones(64), 0.1, 0.002, 80.0, generator=generator),
}


@pytest.mark.parametrize("draw", LAWS.values(), ids=LAWS.keys())
def test_a_law_takes_its_randomness_from_the_generator_alone(draw) -> None:
    state = torch.get_rng_state()
    first, again, other = (draw(seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_is_that_of_diffusers_signal_to_noise_ratios(gamma: float) -> None:
    scheduler, t = DDPMScheduler(), torch.arange(1000)
    snr = compute_snr(scheduler, t)  # of the training scripts: weight of eps = min(snr, gamma)/snr
    abar = scheduler.alphas_cumprod
    ours = min_snr_weight(((1 - abar) / abar).sqrt(), gamma)
    torch.testing.assert_close(ours, snr.clamp(max=gamma) / snr, rtol=1e-5, atol=0)


def test_min_snr_gamma_is_5_by_default() -> None:
    sigma = torch.linspace(0.01, 3, 100)
    assert torch.equal(min_snr_weight(sigma), min_snr_weight(sigma, 5.0))
