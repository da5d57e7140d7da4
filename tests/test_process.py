"""`process`, and the oracles themselves. Truth: torch.distributions, autograd of log densities, quadrature."""

import pytest
import torch
from oracles import Gaussian, Mixture, image_mixture, two_bumps
from torch.distributions import Normal

from diffusers_ext import GaussianProcess
from diffusers_ext.process import align

GENERIC = {"line": two_bumps(), "vector": image_mixture(5), "image": image_mixture(2, 3, 3)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# the oracles


@pytest.mark.parametrize("law", GENERIC.values(), ids=GENERIC.keys())
def test_oracle_denoiser_is_tweedie_of_its_density(law: Mixture) -> None:
    sigma = torch.tensor([0.05, 0.3, 1.0, 7.0], dtype=torch.float64)
    x = law.sample(4, seeded(1)).requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(x, sigma).sum(), x)
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    torch.testing.assert_close(law.denoiser(x.detach(), sigma), x.detach() + s**2 * score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.3), (0.6, 0.8), (0.2, 0.8)])
def test_oracle_density_integrates_to_one_and_its_mean_is_that_of_the_data(a: float, b: float) -> None:
    law, h = two_bumps(), torch.linspace(-15, 15, 40001, dtype=torch.float64)
    p = law.log_prob(h, b, a).exp()
    assert torch.trapezoid(p, h).item() == pytest.approx(1, abs=1e-10)
    data_mean = 0.3 * -1.0 + 0.7 * 0.8
    assert torch.trapezoid(p * law.posterior_mean(h, a, b), h).item() == pytest.approx(data_mean, abs=1e-9)


def test_oracle_samples_have_the_oracle_density() -> None:
    law = two_bumps()
    x = law.sample(200_000, seeded()).sort().values
    empirical = torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x)
    assert (law._cdf(x, 0.0) - empirical).abs().max() < 2.5 / len(x) ** 0.5  # KS: probability 1e-5


@pytest.mark.parametrize("law", [Gaussian(0.4, 0.25), two_bumps()], ids=["gaussian", "mixture"])
def test_oracle_flow_obeys_the_probability_flow_equation(law: Mixture) -> None:
    x, sigma, h = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.7, 1e-4
    slope = (law.flow(x, sigma, sigma + h) - law.flow(x, sigma, sigma - h)) / (2 * h)
    score = (law.denoiser(x, sigma) - x) / sigma**2
    torch.testing.assert_close(slope, -sigma * score, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(law.flow(law.flow(x, 3.0, 0.2), 0.2, 3.0), x, rtol=0, atol=1e-8)


# the process


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.tensor([0.3, 2.0, 5.0])], ids=["number", "()", "(B,)"])
def test_perturbed_data_are_normal_around_the_data(sigma: torch.Tensor | float) -> None:
    x0 = torch.tensor([-1.0, 0.0, 4.0])[:, None].expand(3, 100_000)
    x = GaussianProcess().perturb(x0, sigma, seeded())
    for row, start, s in zip(x, x0[:, 0], torch.as_tensor(sigma).expand(3), strict=True):
        z = ((row - start) / s).sort().values.double()
        empirical = torch.arange(1, len(z) + 1) / len(z)
        assert (torch.special.ndtr(z) - empirical).abs().max() < 2.5 / len(z) ** 0.5


def test_target_score_is_the_gradient_of_the_log_density() -> None:
    x0, x = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_()
    sigma = torch.tensor([0.01, 0.5, 1.0, 80.0], dtype=torch.float64)
    log_prob = Normal(x0, sigma[:, None, None]).log_prob(x).sum()
    (score,) = torch.autograd.grad(log_prob, x)
    torch.testing.assert_close(GaussianProcess().target_score(x.detach(), x0, sigma), score)


def test_log_prior_is_that_of_the_prior_it_samples() -> None:
    process = GaussianProcess()
    x = process.sample_prior((5, 3, 2), 7.0, seeded(), dtype=torch.float64)
    expected = Normal(torch.zeros(()).double(), 7.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(process.log_prior(x, 7.0), expected)
    z = process.sample_prior((200_000,), 7.0, seeded(), dtype=torch.float64)
    assert abs(z.std().item() / 7 - 1) < 5 * (2 * len(z)) ** -0.5
    assert abs(z.mean().item()) < 5 * 7 / len(z) ** 0.5


def test_gaussian_process_lives_everywhere() -> None:
    x = torch.tensor([-1e3, 0.0, 1e3])
    assert torch.equal(GaussianProcess().constrain(x), x)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4, 4), (3, 2, 6, 4, 4)], ids=str)
def test_align_gives_each_sample_its_own_sigma(shape: tuple[int, ...]) -> None:
    sigma, x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.ones(shape, dtype=torch.float32)
    product = align(sigma, x) * x
    assert product.dtype == torch.float32
    for i in range(3):
        assert (product[i] == i + 1).all()
    assert ((align(2.5, x) * x) == 2.5).all()
    assert ((align(torch.tensor(2.5), x) * x) == 2.5).all()


@pytest.mark.parametrize("sigma", [torch.ones(2), torch.ones(1), torch.ones(3, 1)], ids=["2", "1", "3x1"])
def test_align_refuses_a_sigma_that_would_broadcast_over_something_else(sigma: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs \(\) or \(3,\)"):
        align(sigma, torch.ones(3, 2, 2))
