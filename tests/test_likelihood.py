"""`likelihood`. Truth: log densities of the oracles (convolved mixtures, free and folded), closed forms for linear
scores, the Fokker-Planck equation on a lattice, the mass of a normal law in a bin."""

import sys
from math import acosh, exp, log, pi

import pytest
import torch
from oracles import Folded, Gaussian, Mixture, along, image_mixture, plain_denoiser
from scipy.integrate import quad
from torch import Tensor, nn

from diffusers_ext.likelihood import (
    bits_per_dim,
    bound_rate,
    boundary_flux,
    dequantize,
    elbo,
    exact_divergence,
    hutchinson_divergence,
    log_likelihood,
    rademacher,
)
from diffusers_ext.process import ReflectedProcess
from diffusers_ext.score import ReflectedModel
from diffusers_ext.solvers import langevin

TIGHT = {"rtol": 1e-6, "atol": 1e-6}
BOX = ReflectedProcess(-1.0, 1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian(*shape: int) -> Gaussian:
    g = seeded(3)
    return Gaussian(torch.randn(*shape, generator=g), 0.1 + torch.rand(*shape, generator=g))


def thin_mixture() -> Mixture:
    """Two components in 64 dimensions, most of them thin: an image's spectrum."""
    g, variance = seeded(4), torch.arange(1, 65, dtype=torch.float64) ** -2.0
    means = torch.randn(2, 64, dtype=torch.float64, generator=g) * variance.sqrt()
    return Mixture(double([0.4, 0.6]), means, torch.stack([0.1 * variance, 0.2 * variance]))


def folded_pair() -> Folded:
    """Two dimensions, heaped up at faces and in a corner of [-1, 1]^2."""
    means, variances = double([[-0.9, 0.3], [0.6, 0.95]]), double([[0.02, 0.05], [0.1, 0.03]])
    return Folded(Mixture(double([0.4, 0.6]), means, variances), images=20)


def folded_images() -> Folded:
    return Folded(image_mixture(1, 4, 4), 0.0, 1.5, images=20)


def reflected(score, low: float = -1.0, high: float = 1.0) -> ReflectedModel:
    """The model of a function (x, sigma, **cond) -> score."""

    def eps(x: Tensor, sigma: Tensor, **cond) -> Tensor:
        return -along(sigma, x) * score(x, sigma, **cond)

    return ReflectedModel(eps, lambda sigma: sigma, ReflectedProcess(low, high))


def oracle(law: Folded) -> ReflectedModel:
    """The exact score, with a graph that can be differentiated again where x asks for it."""

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        if not x.requires_grad:
            return law.score(x, sigma)
        return torch.autograd.grad(law.log_prob(x, sigma).sum(), x, create_graph=True)[0]

    return reflected(score, law.low, law.high)


def linear_denoiser(w: float):
    """E[x0 | x] of N(0, w I)."""
    return plain_denoiser(lambda x, sigma: w / (w + along(sigma, x) ** 2) * x)


def normal_log_prob(x: Tensor, variance: float) -> Tensor:
    return (-0.5 * x**2 / variance - 0.5 * log(2 * pi * variance)).flatten(1).sum(1)


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column."""
    return samples.mean(0), samples.std(0) / len(samples) ** 0.5


def repeated_elbo(model, x: Tensor, sigma_min: float, sigma_max: float, times: int, seed: int = 0, **options):
    """`elbo` of `times` copies of each sample: (times, B)."""
    bound = elbo(model, x.repeat(times, *[1] * (x.ndim - 1)), sigma_min, sigma_max, generator=seeded(seed), **options)
    return bound.total.reshape(times, len(x))


# the divergence of a field


@pytest.mark.parametrize("shape", [(5,), (1, 4, 4)])
def test_divergences_of_a_linear_map(shape) -> None:
    d = torch.Size(shape).numel()
    a = torch.randn(d, d, dtype=torch.float64, generator=seeded())
    x = torch.randn(3, *shape, dtype=torch.float64, generator=seeded(1))

    def field(x: Tensor) -> Tensor:
        return (x.flatten(1) @ a.T).reshape(x.shape)

    value, divergence = exact_divergence(field, x)
    torch.testing.assert_close(value, field(x))
    torch.testing.assert_close(divergence, a.trace().expand(3))
    assert not value.requires_grad
    assert not divergence.requires_grad

    n = 4000
    value, estimate = hutchinson_divergence(field, x, rademacher(n, x, seeded(2)))
    torch.testing.assert_close(value, field(x))
    off_diagonal = a + a.T - 2 * a.diag().diag()
    error = (off_diagonal.triu(1).square().sum() / n).sqrt()  # the variance of z . A z for random signs
    assert ((estimate - a.trace()).abs() < 4 * error).all()
    assert (estimate - a.trace()).abs().max() > 0.01 * error


def test_divergences_of_nonlinear_maps() -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=seeded())
    with torch.no_grad():  # a caller's choice, not ours
        _, divergence = exact_divergence(lambda x: x * x.square().sum((1, 2), keepdim=True), x)
        torch.testing.assert_close(divergence, 8 * x.square().sum((1, 2)))
        for d in (
            exact_divergence(torch.sin, x)[1],
            hutchinson_divergence(torch.sin, x, rademacher(1, x, seeded()))[1],  # a diagonal map: exact
        ):
            torch.testing.assert_close(d, x.cos().sum((1, 2)))


def test_several_probes_are_averaged() -> None:
    a = torch.randn(6, 6, dtype=torch.float64, generator=seeded())
    x = torch.zeros(2, 6, dtype=torch.float64)
    probes = rademacher(3, x, seeded(1))
    one_by_one = torch.stack([hutchinson_divergence(lambda x: x @ a, x, probe[None])[1] for probe in probes])
    torch.testing.assert_close(hutchinson_divergence(lambda x: x @ a, x, probes)[1], one_by_one.mean(0))
    assert one_by_one.std(0).min() > 0


def test_probes_are_signs_from_the_generator() -> None:
    state, x = torch.get_rng_state(), torch.zeros(100, 30)
    probes = rademacher(4, x, seeded())
    assert probes.shape == (4, 100, 30)
    assert probes.dtype == x.dtype
    assert torch.equal(probes.abs(), torch.ones_like(probes))
    assert abs(probes.mean().item()) < 4 / probes.numel() ** 0.5
    assert torch.equal(probes, rademacher(4, x, seeded()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_field_without_a_gradient_is_refused() -> None:
    x = torch.zeros(2, 3)
    for divergence in (exact_divergence, lambda f, x: hutchinson_divergence(f, x, rademacher(1, x))):
        with pytest.raises(ValueError, match="no gradient"):
            divergence(lambda x: x.detach() ** 2, x)


# the ODE


@pytest.mark.parametrize(
    "law", [gaussian(5), gaussian(1, 4, 4), image_mixture(3), image_mixture(1, 4, 4)], ids=["g5", "g144", "m3", "m144"]
)
def test_the_flow_gives_the_exact_log_density(law: Mixture) -> None:
    x = law.sample(4, seeded())
    x = x + 0.05 * torch.randn(x.shape, dtype=x.dtype, generator=seeded(1))
    found = log_likelihood(plain_denoiser(law.denoiser), x, 0.05, 30.0, log_prior=law.log_prob, **TIGHT)
    assert found.shape == (4,)
    assert (found - law.log_prob(x, 0.05)).abs().max() < 1e-4


@pytest.mark.parametrize("law", [folded_pair(), folded_images()], ids=["pair", "images"])
def test_the_flow_in_a_box_gives_the_exact_log_density_from_the_uniform_prior(law: Folded) -> None:
    x = law.sample(4, seeded(), sigma=0.05)
    found = log_likelihood(oracle(law), x, 0.05, 5 * (law.high - law.low), **TIGHT)
    assert (found - law.log_prob(x, 0.05)).abs().max() < 1e-4


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 3.0)])
def test_without_a_score_a_box_is_uniform(low: float, high: float) -> None:
    model, g = reflected(lambda x, sigma: 0 * x, low, high), seeded()
    x = low + (high - low) * torch.rand(3, 2, 2, dtype=torch.float64, generator=g)
    expected = torch.full((3,), -4 * log(high - low), dtype=torch.float64)
    for found in (
        log_likelihood(model, x, 0.01, 5 * (high - low)),
        log_likelihood(model, x, 0.01, 5 * (high - low), divergence="hutchinson", generator=g),
        elbo(model, x, 0.01, 5 * (high - low), n=4, generator=g).total,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_prior_is_that_of_the_process_unless_another_is_given() -> None:
    law, low, high = gaussian(3), 0.2, 3.0
    x = law.sample(4, seeded())
    start, end = law.variance + low**2, law.variance + high**2
    x_max = law.mean + (end / start).sqrt() * (x - law.mean)
    stretch = 0.5 * (end / start).log().sum()
    model = plain_denoiser(law.denoiser)
    found = log_likelihood(model, x, low, high, **TIGHT)
    torch.testing.assert_close(found, normal_log_prob(x_max, high**2) + stretch, rtol=0, atol=1e-5)
    seen = []
    found = log_likelihood(model, x, low, high, log_prior=lambda y, s: (seen.append((y, s)), y[:, 0])[1], **TIGHT)
    torch.testing.assert_close(found, x_max[:, 0] + stretch, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0][0], x_max, rtol=0, atol=1e-5)
    assert seen[0][1] == high


def test_hutchinsons_flow_is_right_on_average() -> None:
    law, times = image_mixture(3), 400
    x = law.sample(2, seeded())
    model, options = plain_denoiser(law.denoiser), {"log_prior": law.log_prob, "divergence": "hutchinson"}
    one = log_likelihood(model, x.repeat(times, 1), 0.05, 30.0, generator=seeded(1), **options).reshape(times, 2)
    mean, error = mean_and_error(one)
    truth = law.log_prob(x, 0.05)
    assert ((mean - truth).abs() < 4 * error).all()
    assert (error > 1e-3).all()
    four = log_likelihood(model, x.repeat(times, 1), 0.05, 30.0, generator=seeded(2), probes=4, **options)
    torch.testing.assert_close(one.std(0) / four.reshape(times, 2).std(0), double([2.0, 2.0]), rtol=0.2, atol=0)


def test_the_probes_are_drawn_once_from_the_generator() -> None:
    law, x, used, fresh = image_mixture(3), torch.ones(2, 3), seeded(), seeded()
    state = torch.get_rng_state()
    log_likelihood(
        plain_denoiser(lambda x, s: law.denoiser(x, s).float()),
        x,
        0.1,
        9.0,
        divergence="hutchinson",
        probes=2,
        generator=used,
    )
    rademacher(2, x, fresh)
    assert torch.equal(used.get_state(), fresh.get_state())
    assert torch.equal(torch.get_rng_state(), state)


def counted(function):
    """The function, and the levels that it was asked for."""
    levels = []

    def network(x: Tensor, sigma: Tensor, **cond) -> Tensor:
        levels.append(sigma.max().item())
        return function(x, sigma, **cond)

    return network, levels


def test_float32_and_thousands_of_dimensions_need_no_more_steps() -> None:
    variance = torch.arange(1, 3073) ** -1.0
    x = variance.sqrt() * torch.randn(2, 3072, generator=seeded())
    network, levels = counted(lambda x, sigma: x * (variance / (variance + along(sigma, x).float() ** 2)))
    found = log_likelihood(plain_denoiser(network), x, 0.02, 80.0, divergence="hutchinson", generator=seeded())
    assert found.dtype == torch.float32
    law = Gaussian(0.0, variance)
    x_max = law.flow(x.double(), 0.02, 80.0)
    stretch = 0.5 * ((law.variance + 80.0**2) / (law.variance + 0.02**2)).log().sum()
    assert ((found - normal_log_prob(x_max, 80.0**2) - stretch) / 3072).abs().max() < 1e-4
    assert len(levels) < 200


def test_the_model_is_asked_for_no_level_outside_the_range() -> None:
    law = gaussian(2)
    for method in ("dopri5", "bosh3"):
        network, levels = counted(law.denoiser)
        log_likelihood(plain_denoiser(network), law.sample(2, seeded()), 0.1, 7.0, method=method)
        assert min(levels) == pytest.approx(0.1, rel=1e-12)
        assert max(levels) == pytest.approx(7.0, rel=1e-12)


def test_the_error_is_controlled_in_the_worst_sample_of_a_batch() -> None:
    law = image_mixture(3)
    x = law.sample(1, seeded())
    runs = []
    for companions in (0, 500):  # data of unit variance: for the solver, they stay where they are
        moves = torch.tensor([1.0] + companions * [0.0], dtype=torch.float64)

        def exact(x: Tensor, sigma: Tensor, moves: Tensor) -> Tensor:
            still = x / (1 + along(sigma, x) ** 2)
            return still + along(moves, x) * (law.denoiser(x, sigma) - still)

        network, levels = counted(exact)
        batch = torch.cat([x, x.expand(companions, 3)])
        found = log_likelihood(plain_denoiser(network), batch, 0.05, 30.0, log_prior=law.log_prob, moves=moves)
        runs.append((len(levels), found[0].item()))
    assert runs[0] == pytest.approx(runs[1], rel=1e-12)


def test_the_default_tolerance_is_some_1e5th_of_a_nat_per_dimension() -> None:
    law = image_mixture(1, 4, 4)
    x = law.sample(8, seeded())
    network, levels = counted(law.denoiser)
    found = log_likelihood(plain_denoiser(network), x, 0.05, 30.0, log_prior=law.log_prob)
    assert ((found - law.log_prob(x, 0.05)) / 16).abs().max() < 1e-4
    assert len(levels) < 150


def test_flux_leaves_the_flow_in_the_box_and_the_solver_alive() -> None:
    speed, c, low, high = double([0.4, -0.4, 0.0]), 0.02, 0.1, 10.0  # dx/dsigma = speed + c x, through opposite faces
    network, levels = counted(lambda x, sigma: speed + c * x)
    points, ends = [], []

    def eps(x: Tensor, sigma: Tensor) -> Tensor:
        points.append(x.detach())
        return network(x, sigma)

    def log_prior(x: Tensor, sigma: float) -> Tensor:
        ends.append(x)
        return BOX.log_prior(x, sigma)

    model, x = ReflectedModel(eps, lambda sigma: sigma), double([[0.5, -0.5, 0.25]])
    found = log_likelihood(model, x, low, high, max_steps=200, log_prior=log_prior)
    at_faces = double([[1.0, -1.0, 0.25 * exp(c * (high - low))]])  # where it slides along them
    torch.testing.assert_close(ends[0], at_faces, rtol=0, atol=0.1)
    assert ends[0][0, 2].item() == pytest.approx(at_faces[0, 2].item(), abs=1e-4)
    assert torch.stack(points).abs().max() <= 1
    assert found.item() == pytest.approx(-3 * log(2) + 3 * c * (high - low), abs=1e-3)
    assert len(levels) < 2000


def test_points_on_the_faces_are_points_of_the_box() -> None:
    law = folded_pair()
    x = double([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    found = log_likelihood(oracle(law), x, 0.05, 10.0, **TIGHT)
    assert (found - law.log_prob(x, 0.05)).abs().max() < 1e-4


def test_modules_with_frozen_parameters_and_conditions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, -1.0]]), requires_grad=False)

        def forward(self, x: Tensor, sigma: Tensor, *, label: Tensor) -> Tensor:  # of N(mean, I / 4)
            mean, s2 = self.means[label], sigma.reshape(-1, 1) ** 2
            return mean + 0.25 / (0.25 + s2) * (x - mean)

    model, x, label = plain_denoiser(Net()), torch.tensor([[0.1, 0.2], [0.1, 0.2], [2.5, 0.0]]), torch.tensor([0, 1, 1])

    def truth(x: Tensor, sigma: float) -> Tensor:
        return normal_log_prob(x - model.network.means[label.repeat(len(x) // 3)], 0.25 + sigma**2)

    found = log_likelihood(model, x, 0.1, 20.0, log_prior=truth, label=label)
    torch.testing.assert_close(found, truth(x, 0.1), rtol=1e-4, atol=1e-3)
    many = {"log_prior": truth, "label": label.repeat(500)}
    mean, error = mean_and_error(repeated_elbo(model, x, 0.1, 20.0, 500, n=16, **many))
    assert ((mean - truth(x, 0.1)).abs() < 4 * error).all()


# the bound


@pytest.mark.parametrize(
    ("law", "sd"),
    [(gaussian(5), 2.0), (image_mixture(1, 4, 4), 3.5), (thin_mixture(), 5.5)],
    ids=["gaussian", "mixture", "thin"],
)
def test_the_bound_of_the_exact_score_is_the_log_density(law: Mixture, sd: float) -> None:
    x, times = law.sample(3, seeded()), 600
    x = x + 0.05 * torch.randn(x.shape, dtype=x.dtype, generator=seeded(1))
    bounds = repeated_elbo(plain_denoiser(law.denoiser), x, 0.05, 30.0, times, n=64, log_prior=law.log_prob)
    mean, error = mean_and_error(bounds)
    assert ((mean - law.log_prob(x, 0.05)).abs() < 3 * error).all()
    assert (error < sd / times**0.5).all()  # half and less of what it is without control variate


@pytest.mark.parametrize("law", [folded_pair(), folded_images()], ids=["pair", "images"])
def test_the_bound_in_a_box_of_the_exact_score_is_the_log_density(law: Folded) -> None:
    x, times = law.sample(3, seeded(), sigma=0.05), 200
    x[0] = law.high  # a corner
    bounds = repeated_elbo(oracle(law), x, 0.05, 5 * (law.high - law.low), times, n=32)
    mean, error = mean_and_error(bounds)
    assert ((mean - law.log_prob(x, 0.05)).abs() < 3 * error).all()
    assert (error < 2.0 / times**0.5).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_bound_is_unbiased_for_any_number_of_levels(n: int) -> None:
    law = gaussian(2)
    x, sigma_max = law.sample(2, seeded()), 3.0
    bounds = repeated_elbo(plain_denoiser(law.denoiser), x, 0.1, sigma_max, 20_000, n=n, log_prior=law.log_prob)
    mean, error = mean_and_error(bounds)
    assert ((mean - law.log_prob(x, 0.1)).abs() < 3.5 * error).all()
    assert (error < 0.1).all()


def test_the_prior_of_the_bound_has_no_noise_at_the_origin() -> None:
    """There E[log N(x_max; 0, high^2)], x_max = tau n, is known, and the control variate leaves no noise."""
    low, high, x = 0.1, 1.5, torch.zeros(50, 4, dtype=torch.float64)
    found = elbo(linear_denoiser(0.5), x, low, high, n=2, generator=seeded()).prior
    exact = -2 * (1 - low**2 / high**2) - 2 * log(2 * pi * high**2)
    torch.testing.assert_close(found, torch.full_like(found, exact), rtol=1e-12, atol=0)


def analytic_bound(x: float, w: float, prior: float, low: float, high: float) -> float:
    """The bound at the score -x / (w + sigma^2) in one dimension, with the prior N(0, prior)."""

    def rate(sigma: float) -> float:  # E s^2 + 2 E[s n] / tau at x + tau n
        return sigma * ((x**2 + sigma**2 - low**2) / (w + sigma**2) ** 2 - 2 / (w + sigma**2))

    expected = -0.5 * (x**2 + high**2 - low**2) / prior - 0.5 * log(2 * pi * prior)
    return expected - quad(rate, low, high)[0]


@pytest.mark.parametrize("prior", [None, 6.0])
def test_the_bound_of_a_wrong_model_has_its_analytic_value_below_its_log_density(prior) -> None:
    w, low, high = 0.5, 0.1, 1.5
    # V(sigma), the variance of the reverse SDE: -dV/d(sigma^2) = 1 - 2 V / (w + sigma^2)
    start, end = w + high**2, w + low**2
    p = high**2 if prior is None else prior
    variance = end + (p - start) * (end / start) ** 2
    x = double([[0.0], [0.7], [-1.5]])
    log_prior = None if prior is None else lambda y, sigma: normal_log_prob(y, prior)
    bounds = repeated_elbo(linear_denoiser(w), x, low, high, 20_000, n=16, log_prior=log_prior)
    mean, error = mean_and_error(bounds)
    expected = double([analytic_bound(v.item(), w, p, low, high) for v in x])
    assert ((mean - expected).abs() < 4 * error).all()
    truth = normal_log_prob(x, variance)
    assert (expected < truth).all()
    assert prior is None or (mean < truth - 4 * error).all()  # a gap of .1 to .5 nats; with the other prior of .01
    # the flow is another model: x sqrt(start / end) ~ N(0, p)
    flow = log_likelihood(linear_denoiser(w), x, low, high, log_prior=log_prior, **TIGHT)
    torch.testing.assert_close(flow, normal_log_prob(x, p * end / start), rtol=0, atol=1e-5)


def reverse_diffusion(drift: float, time: float, cells: int = 400) -> Tensor:
    """log density on [0, 1] of dx = drift dt + dW, reflected, after `time` from the uniform law: a lattice walk."""
    h = 1 / cells
    right, left = (0.5 / h**2 + s * drift / (2 * h) for s in (1, -1))
    q = torch.diag(torch.full((cells - 1,), right), 1) + torch.diag(torch.full((cells - 1,), left), -1)
    q = (q - q.sum(1).diag()).double()
    return torch.linalg.matrix_exp(q * time).mean(0).log() + log(cells)


def test_the_bound_in_a_box_holds_whatever_flows_through_the_faces() -> None:
    drift, low, high, cells = 1.0, 0.02, 0.25, 400
    truth = reverse_diffusion(drift, high**2 - low**2, cells)
    index = torch.tensor([0, 40, 200, 380, 399])
    x = ((index + 0.5) / cells).double()[:, None]
    model = reflected(lambda x, sigma: torch.full_like(x, drift), 0.0, 1.0)
    mean, error = mean_and_error(repeated_elbo(model, x, low, high, 4000, n=16))
    gap = truth[index] - mean
    assert (error < 0.005).all()
    assert (gap > -3 * error).all()
    assert (gap < drift**2 * high**2).all()
    assert truth[index[-1]] - truth[index[0]] > 0.3


def test_terms_and_total() -> None:
    law, low, high = gaussian(3), 0.2, 1.5
    x, times = law.sample(2, seeded()), 4000
    shift = law.mean.norm().item()

    def log_prior(y: Tensor, sigma: float) -> Tensor:
        return normal_log_prob(y - shift, 2.0)

    bound = elbo(
        plain_denoiser(law.denoiser), x.repeat(times, 1), low, high, n=8, generator=seeded(), log_prior=log_prior
    )
    assert torch.equal(bound.total, bound.prior + bound.diffusion)
    mean, error = mean_and_error(bound.prior.reshape(times, 2))
    expected = log_prior(x, high) - 3 * (high**2 - low**2) / (2 * 2.0)
    assert ((mean - expected).abs() < 4 * error).all()
    assert (error < 0.02).all()
    # at 0, of the ordinary prior nothing random is left
    at_0 = elbo(linear_denoiser(0.5), torch.zeros(2, 3, dtype=torch.float64), low, high, n=2, generator=seeded()).prior
    expected = normal_log_prob(torch.zeros(2, 3, dtype=torch.float64), high**2) - 1.5 * (1 - (low / high) ** 2)
    torch.testing.assert_close(at_0, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [1e-4, 0.1, 0.5, 5.0])
def test_the_rate_at_a_level(tau: float) -> None:
    w, sigma_min, times = 0.5, 0.1, 20_000
    x = double([[0.3, -0.8]]).expand(times, 2)
    noise = torch.randn(times, 2, dtype=torch.float64, generator=seeded())
    rates = bound_rate(linear_denoiser(w), x, tau, sigma_min, noise)
    s2 = sigma_min**2 + tau**2
    expected = s2**0.5 * tau * ((0.73 + 2 * tau**2) / (w + s2) ** 2 - 2 * 2 / (w + s2))
    mean, error = mean_and_error(rates)
    assert abs(mean - expected) < 4 * error
    assert error < 0.03
    levels = torch.full((times,), tau, dtype=torch.float64)
    torch.testing.assert_close(bound_rate(linear_denoiser(w), x, levels, sigma_min, noise), rates)


def test_levels_are_stratified_for_each_sample_and_between_the_bounds() -> None:
    seen, n, low, high = [], 6, 0.1, 20.0

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.clone())
        return 0 * x

    elbo(plain_denoiser(network), torch.zeros(1000, 2, dtype=torch.float64), low, high, n=n, generator=seeded())
    v = torch.stack([torch.acosh(s.clamp(min=low) / low) for s in seen]) * n / acosh(high / low)
    assert torch.equal(v.floor().clamp(max=n - 1), torch.arange(n, dtype=torch.float64)[:, None].expand(n, 1000))
    places = v - v.floor()
    assert (places.mean(1) - 0.5).abs().max() < 4 / (12 * 1000) ** 0.5
    assert (places.std(1) - 12**-0.5).abs().max() < 0.02
    torch.testing.assert_close(v[0::2] + v[1::2], (4 * torch.arange(3) + 2.0).double()[:, None].expand(3, 1000))


@pytest.mark.parametrize("drawn", [0.0, 1 - 2.0**-24])
def test_no_draw_puts_a_level_at_the_point_itself(drawn, monkeypatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, generator, device, dtype: torch.full(n, drawn, dtype=dtype))
    for model in (linear_denoiser(0.5), reflected(lambda x, sigma: -0.5 * x)):
        assert elbo(model, torch.full((2, 3), 0.5), 1e-3, 9.0, n=2).total.isfinite().all()


def test_the_bound_draws_from_the_generator_alone() -> None:
    law, state = gaussian(3), torch.get_rng_state()
    x = law.sample(4, seeded())
    first, again, other = (elbo(plain_denoiser(law.denoiser), x, 0.1, 9.0, n=4, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.total, again.total)
    assert (first.total != other.total).all()
    assert (first.prior != other.prior).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert elbo(linear_denoiser(0.5), x.half(), 0.1, 9.0, n=2).total.dtype == torch.float32


# faces


def test_the_exact_score_has_no_flux() -> None:
    for law in (folded_pair(), folded_images()):
        x = law.sample(50, seeded(), sigma=0.2)
        assert boundary_flux(oracle(law), x, 0.2, generator=seeded()).abs().max() < 1e-12


def test_flux_is_the_outward_component_at_each_face_in_turn() -> None:
    c = double([[1.0, 2.0], [4.0, 8.0]])
    x = torch.rand(8000, 2, 2, dtype=torch.float64, generator=seeded()) * 3
    sigma = torch.linspace(0.1, 2.0, 8000, dtype=torch.float64)
    flux = boundary_flux(reflected(lambda x, sigma: c + 0 * x, 0.0, 3.0), x, sigma, generator=seeded()) / sigma
    for value in (1.0, 2.0, 4.0, 8.0, -1.0, -2.0, -4.0, -8.0):
        share = torch.isclose(flux, double(value)).double().mean().item()
        assert abs(share - 1 / 8) < 4 * (7 / 64 / 8000) ** 0.5
    # the point is on the face, its other coordinates where they were
    flux = boundary_flux(reflected(lambda x, sigma: x**2 + 1, 0.0, 3.0), x, 0.5, generator=seeded())
    assert set(flux.tolist()) == {0.5 * 10, -0.5}
    others = boundary_flux(reflected(lambda x, sigma: x.flatten(1).sum(1)[:, None, None] + 0 * x, 0.0, 3.0), x, 1.0)
    total = x.flatten(1).sum(1, keepdim=True)
    choices = torch.cat([total - x.flatten(1) + 3.0, x.flatten(1) - total], 1)
    assert (choices - others[:, None]).abs().min(1).values.max() < 1e-12


def test_flux_is_taken_where_the_data_come_near_a_face() -> None:
    x = double([[0.5, 0.98, 0.03], [-0.4, 0.2, -0.6]]).repeat(400, 1)
    model = reflected(lambda x, sigma: double([1.0, 2.0, 4.0]) + 0 * x)
    near, far = boundary_flux(model, x, 0.1, generator=seeded()).reshape(400, 2).T
    assert (near - 0.2).abs().max() < 1e-12  # of a box [-1, 1], 0.03 is in the middle
    assert (far + 0.4).abs().max() < 1e-12  # none within sigma: the closest
    both = boundary_flux(model, x, 0.5, generator=seeded()).reshape(400, 2)[:, 0]
    assert torch.minimum((both - 0.5).abs(), (both - 1.0).abs()).max() < 1e-12
    assert abs((both > 0.75).double().mean().item() - 0.5) < 4 * 0.5 / 400**0.5


def test_flux_draws_from_the_generator_and_passes_conditions() -> None:
    model, state = reflected(lambda x, sigma, scale: scale * (x + 3)), torch.get_rng_state()
    x = torch.rand(20, 5, generator=seeded()) * 2 - 1
    one, same, twice = (boundary_flux(model, x, 1.0, generator=seeded(), scale=s) for s in (1.0, 1.0, 2.0))
    assert torch.equal(one, same)
    assert torch.equal(2 * one, twice)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, boundary_flux(model, x, 1.0, generator=seeded(1), scale=1.0))


# discrete data


@pytest.mark.parametrize(("levels", "low", "high"), [(256, -1.0, 1.0), (256, 0.0, 1.0), (2, -3.0, 5.0), (10, 0.0, 9.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bin_keeps_its_points(levels: int, low: float, high: float, dtype: torch.dtype) -> None:
    k = torch.arange(levels)
    images = (low + k.to(dtype) / (levels - 1) * (high - low)).expand(2000, levels)
    x = dequantize(images, seeded(), levels=levels, low=low, high=high)
    assert x.dtype == dtype
    assert (x >= low).all()
    assert (x < high).all()
    width = (high - low) / levels
    torch.testing.assert_close(((x - low) / width).floor().long(), k.expand(2000, levels), rtol=0, atol=0)
    u = (x.double() - low) / width - k
    assert abs(u.mean().item() - 0.5) < 4 / (12 * u.numel()) ** 0.5
    assert abs(u.std().item() - 12**-0.5) < 0.01
    assert (u.min(0).values < 0.01).all()
    assert (u.max(0).values > 0.99).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_no_rounding_carries_a_point_into_the_next_bin(last: bool, dtype: torch.dtype, monkeypatch) -> None:
    def extreme(n: int, shape, *, generator, device) -> Tensor:
        return torch.full(shape, n - 1 if last else 0)

    monkeypatch.setattr(torch, "randint", extreme)
    for levels, low, high in ((256, -1.0, 1.0), (256, 0.0, 1.0), (255, -1.0, 1.0), (10, 0.0, 9.0), (1000, -3.0, 0.1)):
        k = torch.arange(levels)
        x = dequantize(low + k.to(dtype) / (levels - 1) * (high - low), levels=levels, low=low, high=high)
        assert torch.equal(((x - low) * levels / (high - low)).floor().long(), k)
        assert torch.equal(((x - low) / ((high - low) / levels)).floor().long(), k)
        assert low <= x.min() <= x.max() < high
        u = (x.double() - low) * levels / (high - low) - k
        assert ((u > 0.99) if last else (u < 0.01)).all()


def test_dequantisation_draws_from_the_generator() -> None:
    state, images = torch.get_rng_state(), torch.ones(3, 4)
    assert torch.equal(dequantize(images, seeded(1)), dequantize(images, seeded(1)))
    assert not torch.equal(dequantize(images, seeded(1)), dequantize(images, seeded(2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_uniform_density_costs_eight_bits() -> None:
    for low, high, levels in ((-1.0, 1.0, 256), (0.0, 5.0, 256), (-1.0, 1.0, 32)):
        log_prob = ReflectedProcess(low, high).log_prior(torch.full((2, 3, 4, 4), low + 0.1, dtype=torch.float64), 1.0)
        for shape in ((3, 4, 4), torch.Size((3, 4, 4)), 48):
            bits = bits_per_dim(log_prob, shape, levels=levels, low=low, high=high)
            torch.testing.assert_close(bits, torch.full((2,), log(levels) / log(2), dtype=torch.float64))
    torch.testing.assert_close(bits_per_dim(double([-48 * log(2)]), 48), double([8.0]))


def test_bits_are_those_of_the_mass_in_the_bin() -> None:
    """A normal law on a grid fine for it, where Jensen's inequality costs little, and on a coarse one."""
    for levels, loss in ((256, 1e-5), (8, 0.2)):
        k = torch.arange(levels, dtype=torch.float64)
        images = (k / (levels - 1) * 2 - 1).expand(4000, levels)[..., None].reshape(-1, 1)
        x = dequantize(images, seeded(), levels=levels)
        bits = bits_per_dim(normal_log_prob(x, 0.09), 1, levels=levels).reshape(4000, levels)
        edges = torch.special.ndtr((torch.arange(levels + 1, dtype=torch.float64) * 2 / levels - 1) / 0.3)
        mass = edges.diff()
        mean, error = mean_and_error(bits)
        excess = ((mean + mass.log2()) * mass).sum() / mass.sum()
        noise = ((error * mass).square().sum() ** 0.5 / mass.sum()).item()
        assert -4 * noise < excess < loss + 4 * noise
        assert (excess > 0.01) == (levels == 8)


# what is refused


@pytest.mark.parametrize("levels", [(0.0, 1.0), (-0.1, 1.0), (2.0, 1.0), (1.0, 1.0), (0.1, float("inf"))])
def test_bad_noise_levels_are_refused(levels) -> None:
    for function in (log_likelihood, elbo):
        with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max"):
            function(linear_denoiser(1.0), torch.zeros(2, 3), *levels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "skilling"}, "divergence 'skilling' is not one of exact, hutchinson"),
        ({"divergence": "hutchinson", "probes": 0}, "probes must be at least 1"),
        ({"method": "rk4"}, "method 'rk4' is not one of dopri5"),
    ],
)
def test_bad_options_of_the_flow_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihood(linear_denoiser(1.0), torch.zeros(2, 3), 0.1, 1.0, **options)


def test_points_outside_the_box_and_models_without_one_are_refused() -> None:
    model, x = reflected(lambda x, sigma: 0 * x), torch.full((2, 3), 1.01)
    for function in (log_likelihood, elbo):
        with pytest.raises(ValueError, match=r"x must lie in \[-1.0, 1.0\]"):
            function(model, x, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"x must lie in \[-1.0, 1.0\]"):
        boundary_flux(model, x, 0.1)
    with pytest.raises(ValueError, match="GaussianProcess"):
        boundary_flux(linear_denoiser(1.0), x, 0.1)
    with pytest.raises(ValueError, match="n must be at least 1"):
        elbo(model, 0 * x, 0.1, 1.0, n=0)


def test_images_off_the_levels_are_refused() -> None:
    bytes_on_unit_interval = torch.arange(256) / 255
    with pytest.raises(ValueError, match=r"not on 256 equidistant levels from -1.0 to 1.0"):
        dequantize(bytes_on_unit_interval)
    with pytest.raises(ValueError, match="not on 256 equidistant levels"):
        dequantize(torch.tensor([1.1]))
    with pytest.raises(ValueError, match="not on 256 equidistant levels"):
        dequantize(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="too coarse"):
        dequantize(torch.zeros(1), levels=2**23 + 1)


def test_without_torchdiffeq_one_is_told_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        log_likelihood(linear_denoiser(1.0), torch.zeros(2, 3), 0.1, 1.0)
    assert exp(elbo(linear_denoiser(1.0), torch.zeros(2, 3), 0.1, 1.0, n=1).prior[0].item()) > 0  # which needs it not


def test_more_bad_numbers_are_refused() -> None:
    model, x = reflected(lambda x, sigma: 0 * x), torch.zeros(2, 3)
    for sigma in (0.0, -1.0):
        with pytest.raises(ValueError, match="sigma must be positive"):
            boundary_flux(model, x, sigma)
        with pytest.raises(ValueError, match="sigma must be above 0"):
            langevin(model, x, sigma)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        langevin(model, x, 1.0, steps=-3)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        log_likelihood(model, x, 0.1, 10.0, max_steps=0)
    with pytest.raises(ValueError, match="rtol must be above 0"):
        log_likelihood(model, x, 0.1, 10.0, rtol=-1.0)
    with pytest.raises(ValueError, match="is empty"):
        elbo(model, x[:0], 0.1, 10.0)
    weight = torch.ones((), requires_grad=True)
    assert not langevin(reflected(lambda x, sigma: weight * x), x, 1.0, steps=2).requires_grad
