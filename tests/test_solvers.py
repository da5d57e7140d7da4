"""`solvers`. Truth: diffusers' own steps (DDIM, Euler, Heun, DDPM), the exact probability-flow map of a Gaussian and of
a mixture, and the exact law of Gaussian data at each noise level."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from oracles import Gaussian, along, host_units, plain_denoiser, two_bumps
from torch import Tensor

from diffusers_ext import denoiser_from, euler, euler_maruyama, heun, karras_sigmas, posterior, sample, solvers

ALL = [euler, heun, euler_maruyama, posterior]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def field(model_input: Tensor, time: Tensor) -> Tensor:
    return torch.sin(2 * model_input + along(0.01 * torch.as_tensor(time), model_input)) + 0.2


# step by step with diffusers


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_euler_is_ddim_step_by_step(prediction_type: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(20)
    denoiser = denoiser_from(field, scheduler)
    for t in scheduler.timesteps:
        h = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=seeded(int(t)))
        theirs = scheduler.step(field(h, t), t, h, eta=0.0).prev_sample
        (a, b), (a_next, b_next) = host_units(scheduler, t), host_units(scheduler, max(t - 50, torch.tensor(0)))
        if t < 50:  # the last step goes to the data
            a_next, b_next = 1.0, 0.0
        ours = a_next * euler(denoiser, h / a, b / a, b_next / a_next)
        torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("make", "step"), [(EulerDiscreteScheduler, euler), (HeunDiscreteScheduler, heun)])
def test_a_run_ends_where_the_scheduler_of_that_name_ends(make: Callable, step: solvers.Step) -> None:
    scheduler = make(timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    start = scheduler.init_noise_sigma * torch.randn(3, 2, 4, 4, generator=seeded())
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(field(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1 :: scheduler.order]]).double()
    assert sigmas[-1] == 0
    ours = sample(denoiser_from(field, scheduler), start.double(), sigmas, step)
    torch.testing.assert_close(ours, x.double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_posterior_is_ddpm_with_the_small_variance(prediction_type: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(20)
    denoiser = denoiser_from(field, scheduler)
    for t in scheduler.timesteps[:-1]:
        h = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=seeded(int(t)))
        theirs = scheduler.step(field(h, t), t, h, generator=seeded(7)).prev_sample
        (a, b), (a_next, b_next) = host_units(scheduler, t), host_units(scheduler, t - 50)
        ours = a_next * posterior(denoiser, h / a, b / a, b_next / a_next, generator=seeded(7))
        torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=2e-5)


# order of convergence


@pytest.mark.parametrize(("step", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("law", [Gaussian(0.3, 0.25), two_bumps()], ids=["gaussian", "mixture"])
def test_order_of_convergence_to_the_exact_flow(law, step: solvers.Step, order: int) -> None:
    start = 4.0 * torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    exact = law.flow(start, 4.0, 0.05)
    counts = [32, 64, 128, 256]
    denoiser = plain_denoiser(law.denoiser)
    errors = [
        (sample(denoiser, start, karras_sigmas(n + 1, 0.05, 4.0), step) - exact).square().mean().sqrt().item()
        for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.25 <= slope <= order + 0.5


@pytest.mark.parametrize("step", [euler, heun], ids=["euler", "heun"])
def test_each_sample_can_have_its_own_noise_levels(step: solvers.Step) -> None:
    law = Gaussian(0.3, 0.25)
    sigma = torch.tensor([0.5, 2.0, 10.0], dtype=torch.float64)
    x = law.sample(3, seeded()) + sigma
    together = step(plain_denoiser(law.denoiser), x, sigma, sigma / 2)
    for i in range(3):
        alone = step(plain_denoiser(law.denoiser), x[i : i + 1], sigma[i].item(), sigma[i].item() / 2)
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("step", ALL, ids=lambda s: s.__name__)
def test_the_last_step_to_sigma_zero(step: solvers.Step) -> None:
    law = two_bumps()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    denoised = law.denoiser(x, 0.3)
    result = step(plain_denoiser(law.denoiser), x, 0.3, 0.0, generator=seeded())
    if step is not euler_maruyama:  # which has noise of its own down to 0
        torch.testing.assert_close(result, denoised)
    assert result.isfinite().all()


# the stochastic rules


def affine(
    step: solvers.Step, law: Gaussian, sigma: float, sigma_next: float, monkeypatch
) -> tuple[float, float, float]:
    """x_next = slope x + offset + spread z, for Gaussian data: read off by choosing the noise z."""

    def run(x: float, z: float) -> float:
        monkeypatch.setattr(solvers, "randn_like", lambda x, generator=None: torch.full_like(x, z))
        x_next = step(plain_denoiser(law.denoiser), torch.tensor([x], dtype=torch.float64), sigma, sigma_next)
        monkeypatch.undo()
        return x_next.item()

    offset = run(0.0, 0.0)
    return run(1.0, 0.0) - offset, offset, run(0.0, 1.0) - offset


def final_law(step: solvers.Step, law: Gaussian, sigmas: Tensor, monkeypatch) -> tuple[float, float]:
    """Mean and variance at the end of a chain that starts with the exact law, without sampling."""
    mean, variance = law.mean.item(), law.variance.item() + sigmas[0].item() ** 2
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        slope, offset, spread = affine(step, law, sigma, sigma_next, monkeypatch)
        mean, variance = slope * mean + offset, slope**2 * variance + spread**2
    return mean, variance


@pytest.mark.parametrize("step", [euler_maruyama, posterior], ids=lambda s: s.__name__)
def test_the_law_of_a_stochastic_chain_converges_to_that_of_the_data_with_order_1(step, monkeypatch) -> None:
    law, counts = Gaussian(0.3, 0.25), [32, 64, 128, 256]
    errors = []
    for n in counts:
        mean, variance = final_law(step, law, karras_sigmas(n + 1, 0.05, 4.0), monkeypatch)
        assert mean == pytest.approx(0.3, abs=1e-9)
        errors.append(abs(variance - (0.25 + 0.05**2)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 0.75 <= slope <= 1.5
    assert errors[-1] < 0.02 * 0.25


def test_posterior_has_the_exact_conditional_mean_for_gaussian_data_at_any_step(monkeypatch) -> None:
    law = Gaussian(0.3, 0.25)
    for sigma, sigma_next in ((0.5, 0.45), (3.0, 0.2), (10.0, 0.0)):
        slope, offset, _ = affine(posterior, law, sigma, sigma_next, monkeypatch)
        # x_next = x0 + sigma_next n', x = x_next + independent noise: regression of x_next on x
        gain = (0.25 + sigma_next**2) / (0.25 + sigma**2)
        assert (slope, offset) == pytest.approx((gain, 0.3 * (1 - gain)), abs=1e-12)


def test_posterior_is_exact_in_law_for_a_single_data_point_at_any_number_of_steps() -> None:
    point = 0.7
    denoiser = plain_denoiser(lambda x, sigma: torch.full_like(x, point))
    x = point + 5.0 * torch.randn(200_000, dtype=torch.float64, generator=seeded())
    x = sample(denoiser, x, [5.0, 0.8, 0.5], posterior, generator=seeded(1))
    z = ((x - point) / 0.5).sort().values
    empirical = torch.arange(1, len(z) + 1) / len(z)
    assert (torch.special.ndtr(z) - empirical).abs().max() < 2.5 / len(z) ** 0.5


def test_one_euler_maruyama_step_freezes_drift_and_diffusion_of_the_reverse_equation(monkeypatch) -> None:
    law, sigma, h = Gaussian(0.3, 0.25), torch.tensor(1.3, dtype=torch.float64, requires_grad=True), 0.4
    (g2,) = torch.autograd.grad(sigma**2, sigma)  # the variance added for each unit of sigma
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(law.log_prob(x, 1.3).sum(), x)
    _, offset, spread = affine(euler_maruyama, law, 1.3, 1.3 - h, monkeypatch)
    assert offset == pytest.approx((g2 * h * score).item(), rel=1e-9)
    assert spread**2 == pytest.approx((g2 * h).item(), rel=1e-9)


# the calling convention


@pytest.mark.parametrize("step", ALL, ids=lambda s: s.__name__)
def test_a_known_prediction_is_not_computed_again(step: solvers.Step) -> None:
    law, calls = two_bumps(), []

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma.item())
        return law.denoiser(x, sigma)

    denoiser, x = plain_denoiser(network), torch.linspace(-2, 2, 9, dtype=torch.float64)
    fresh = step(denoiser, x, 1.0, 0.5, generator=seeded())
    assert calls == ([1.0, 0.5] if step is heun else [1.0])
    calls.clear()
    reused = step(denoiser, x, 1.0, 0.5, denoised=law.denoiser(x, 1.0), generator=seeded())
    assert calls == ([0.5] if step is heun else [])
    torch.testing.assert_close(reused, fresh)


@pytest.mark.parametrize("step", ALL, ids=lambda s: s.__name__)
def test_conditions_reach_every_evaluation_of_a_run(step: solvers.Step) -> None:
    seen = []

    def network(x: Tensor, sigma: Tensor, *, class_labels: Tensor) -> Tensor:
        seen.append(class_labels)
        return 0.5 * x

    labels = torch.tensor([3, 1])
    sample(plain_denoiser(network), torch.ones(2, 3), [2.0, 1.0, 0.5], step, generator=seeded(), class_labels=labels)
    assert len(seen) == (4 if step is heun else 2)
    assert all(one is labels for one in seen)


@pytest.mark.parametrize("step", [euler_maruyama, posterior], ids=lambda s: s.__name__)
def test_noise_comes_from_the_generator_and_is_new_at_every_step(step: solvers.Step) -> None:
    denoiser, x, state = plain_denoiser(lambda x, sigma: 0 * x), torch.zeros(20_000), torch.get_rng_state()
    first, again, other = (sample(denoiser, x, [2.0, 1.0, 0.5], step, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    g = seeded(1)
    steps = [step(denoiser, x, 2.0, 1.0, generator=g), step(denoiser, x, 2.0, 1.0, generator=g)]
    assert abs(torch.corrcoef(torch.stack(steps))[0, 1].item()) < 5 / len(x) ** 0.5


def test_a_grid_may_be_a_tensor_or_a_list() -> None:
    law, x = two_bumps(), torch.linspace(-2, 2, 9, dtype=torch.float64)
    denoiser = plain_denoiser(law.denoiser)
    levels = [2.0, 1.0, 0.25, 0.0]
    for step in (euler, heun):
        expected = sample(denoiser, x, levels, step)
        assert torch.equal(sample(denoiser, x, torch.tensor(levels), step), expected)
    assert torch.equal(sample(denoiser, x, levels), sample(denoiser, x, levels, euler))
