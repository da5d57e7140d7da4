"""`noise_levels`. Truth: the grids of diffusers' EDM scheduler, its signal-to-noise ratios, and laws by their moments
and by Kolmogorov-Smirnov distance (2.5/sqrt(n): probability 1e-5)."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffusers_ext import karras_sigmas, log_linear_sigmas, log_normal_sigmas, lower_sigma, min_snr_weight

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
    with pytest.raises(ValueError, match=f"width {options['width']} must be"):
        lower_sigma(torch.ones(2), **options)


@pytest.mark.parametrize("draw", [log_normal_sigmas, lower_sigma], ids=["log_normal", "lower"])
def test_a_law_takes_its_randomness_from_the_generator_alone(draw) -> None:
    argument = 64 if draw is log_normal_sigmas else torch.ones(64)
    state = torch.get_rng_state()
    first, again, other = (draw(argument, generator=seeded(s)) for s in (1, 1, 2))
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
