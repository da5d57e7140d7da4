"""The laws of noise levels of flow models. Truth: their densities in closed form, and diffusers' own grid of steps."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext import denoiser_from, noise_schedule
from diffusers_ext.errors import InputError
from diffusers_ext.training import TrainingArguments
from diffusers_ext.training.levels import Levels, LowerLevelArguments

N = 40_000


def levels(shift: float = 1.0, **options) -> Levels:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    args = TrainingArguments(**options)
    return Levels(args, noise_schedule(scheduler), scheduler, denoiser_from(lambda x, t: x, scheduler))


def drawn(made: Levels) -> torch.Tensor:
    """The times t = sigma / (1 + sigma) of N draws, from 0 (data) to 1 (noise)."""
    sigma = made.draw(N, torch.Generator().manual_seed(0), torch.device("cpu")).double()
    return sigma / (1 + sigma)


@pytest.mark.parametrize(("mean", "std"), [(None, None), (0.5, 0.6)])
def test_the_logit_is_normal(mean, std) -> None:
    """diffusers counts u from pure noise: the logit of the time is that of 1 - u."""
    t = drawn(levels(weighting_scheme="logit_normal", logit_mean=mean, logit_std=std))
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(-(mean or 0.0), abs=4 * (std or 1.0) / N**0.5 + 2e-3)
    assert logit.std().item() == pytest.approx(std or 1.0, rel=0.03)


@pytest.mark.parametrize("scheme", ["none", "cosmap", "sigma_sqrt"])
def test_other_schemes_draw_all_steps_alike(scheme) -> None:
    t = drawn(levels(weighting_scheme=scheme)).sort().values
    assert (t - torch.linspace(0, 1, N, dtype=torch.float64)).abs().max() < 1.95 / N**0.5 + 1e-3


def test_the_mode_is_where_its_scale_puts_it() -> None:
    """F(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), of a uniform u."""
    t = drawn(levels(weighting_scheme="mode", mode_scale=1.0))
    u = torch.linspace(0, 1, N, dtype=torch.float64)
    law = 1 - u - 1.0 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    expected = (1 - law).clamp(0, 1).sort().values  # t = 1 - u of the grid
    assert (t.sort().values - expected).abs().max() < 0.02
    assert (t - 0.5).abs().mean() < 0.24  # a uniform law has 0.25


def test_the_levels_are_those_of_the_shifted_scheduler() -> None:
    t = drawn(levels(shift=3.0, weighting_scheme="none"))
    grid = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000].double()
    assert torch.cdist(t[:200, None], grid[:, None]).amin(1).max() < 1e-3
    assert t.median().item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)


def test_the_weight_is_the_schemes_beside_that_of_the_output() -> None:
    sigma = torch.tensor([0.25, 1.0, 4.0])
    t = sigma / (1 + sigma)
    plain = levels().weight(sigma)
    assert torch.equal(levels(weighting_scheme="logit_normal").weight(sigma), plain)
    cosmap = 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    torch.testing.assert_close(levels(weighting_scheme="cosmap").weight(sigma), plain * cosmap)
    torch.testing.assert_close(levels(weighting_scheme="sigma_sqrt").weight(sigma), plain / t**2)


def test_without_a_scheme_the_schedule_draws_and_others_than_flow_models_have_none() -> None:
    made = levels()
    ours = made.draw(5, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert torch.equal(ours, made.schedule.draw_sigmas(5, torch.Generator().manual_seed(1), torch.device("cpu")))
    scheduler = DDIMScheduler()
    args = TrainingArguments(weighting_scheme="mode")
    with pytest.raises(InputError, match="--weighting_scheme is for flow models, and the pipeline has a DDIMScheduler"):
        Levels(args, noise_schedule(scheduler), scheduler, denoiser_from(lambda x, t: x, scheduler))


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "none"])
def test_the_generator_alone_draws_them(scheme) -> None:
    made, cpu, before = levels(weighting_scheme=scheme), torch.device("cpu"), torch.get_rng_state()
    first, again, other = (made.draw(9, torch.Generator().manual_seed(seed), cpu) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("width", "relative"), [(0.05, False), (0.3, False), (0.3, True)])
def test_the_lower_level_is_drawn_by_the_arguments_and_the_generator(width, relative) -> None:
    """U[0, width] below sigma, or below 1 as a share of it."""
    args = LowerLevelArguments(sigma_width=width, sigma_width_relative=relative)
    sigma = torch.full((N,), 40.0, dtype=torch.float64)
    lower, again = (args.draw_lower(sigma, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(lower, again)
    drop = (sigma - lower) / (40.0 if relative else 1.0) / width
    assert 0 <= drop.min() < 1e-3
    assert 1 - 1e-3 < drop.max() <= 1
    assert drop.mean().item() == pytest.approx(0.5, abs=4 / (12 * N) ** 0.5)
