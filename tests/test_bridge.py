"""`bridges`. Truth: Gaussian laws in closed form (torch.distributions), the exact density of a diffused
mixture (`oracles.Mixture`), quadrature on grids, and scikit-learn's estimators."""

import builtins
from math import log, pi

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from oracles import Gaussian, Mixture
from sklearn.covariance import OAS
from torch.distributions import MultivariateNormal

from diffusers_ext import FlowBridge, GaussianBridge, MixtureBridge
from diffusers_ext.bridges import moments
from diffusers_ext.bridges.moments import Moments
from diffusers_ext.interop import stored_scheduler

SCHEDULER = DDPMScheduler()
T = 0.4
SMALL_FLOW = {"transforms": 2, "hidden_features": (16,), "max_steps": 150, "batch_size": 64, "progress": False}
SMALL_MIXTURE = {"num_components": 3, "progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def at(max_diffusion_time, scheduler=SCHEDULER):
    """alpha and sigma of the last timestep of [0, T], from the scheduler's own table."""
    abar = scheduler.alphas_cumprod[round(1000 * max_diffusion_time) - 1].double()
    return abar.sqrt().item(), (1 - abar).sqrt().item()


def two_modes():
    """A mixture in the plane far from a Gaussian at T = 0.2."""
    values = [0.35, 0.65], [[-1.6, 0.4], [0.9, -0.5]], [[0.02, 0.05], [0.03, 0.02]]
    return Mixture(*(torch.tensor(v, dtype=torch.float64) for v in values))


def random_covariance(d, seed=0):
    root = torch.randn(d, d, dtype=torch.float64, generator=seeded(seed))
    return root @ root.T / d + 0.05 * torch.eye(d, dtype=torch.float64)


def in_batches(x, size=64, labels=None):
    if labels is None:
        return list(x.split(size))
    return [(part, {"class_labels": y}) for part, y in zip(x.split(size), labels.split(size), strict=True)]


def grid(half=7.0, n=281):
    """Points of the plane, (n^2, 2), and the area of each."""
    line = torch.linspace(-half, half, n)
    return torch.cartesian_prod(line, line), (2 * half / (n - 1)) ** 2


@pytest.fixture(scope="module")
def planar():
    """Each class, fitted to the planar mixture with r = 1 and r = 2 at T = 0.2."""
    data = in_batches(two_modes().sample(3000, seeded()).float(), 500)
    fitted = {}
    for r in (1, 2):
        fitted["gaussian", r] = GaussianBridge.fit(data, SCHEDULER, 0.2, rank=r, progress=False)
        fitted["mixture", r] = MixtureBridge.fit(data, SCHEDULER, 0.2, rank=r, **SMALL_MIXTURE)
        small = SMALL_FLOW | {"max_steps": 300, "learning_rate": 5e-3}
        fitted["flow", r] = FlowBridge.fit(data, SCHEDULER, 0.2, rank=r, **small)
    return fitted


PLANAR = [(kind, r) for kind in ("gaussian", "mixture", "flow") for r in (1, 2)]


# the Gaussian


@pytest.mark.parametrize("shape", [(5,), (1, 2, 3)])
@pytest.mark.parametrize("time", [0.05, 0.4, 1.0])
def test_gaussian_data_have_the_density_of_a_gaussian(shape, time):
    d = torch.Size(shape).numel()
    mean, covariance = torch.randn(*shape, dtype=torch.float64, generator=seeded(1)), random_covariance(d)
    model = GaussianBridge.from_moments(mean, covariance, SCHEDULER, time)
    a, b = at(time)
    truth = MultivariateNormal(a * mean.flatten(), a**2 * covariance + b**2 * torch.eye(d, dtype=torch.float64))
    x = 2 * torch.randn(50, *shape, dtype=torch.float64, generator=seeded(2))
    assert torch.allclose(model.log_prob(x.float()).double(), truth.log_prob(x.flatten(1)), atol=1e-3, rtol=1e-4)


def test_coordinates_are_those_of_the_scheduler():
    """For data diffused by the scheduler itself: the oracle's density of sqrt(abar) x0 + sqrt(1 - abar) n."""
    law = Gaussian(torch.tensor([0.7, -1.2]), torch.tensor([0.3, 0.02]))
    model = GaussianBridge.from_moments(law.mean, law.variance.diag(), SCHEDULER, T)
    assert model.timestep == 399
    x0, noise = law.sample(100, seeded()), torch.randn(100, 2, dtype=torch.float64, generator=seeded(1))
    x = SCHEDULER.add_noise(x0, noise, torch.tensor([model.timestep]))
    a, b = at(T)
    assert torch.allclose(model.log_prob(x).double(), law.log_prob(x, b, a), atol=1e-4)


def test_fewer_directions_leave_the_mean_discarded_eigenvalue():
    d, r = 7, 3
    mean, covariance = torch.randn(d, dtype=torch.float64, generator=seeded(3)), random_covariance(d, 4)
    model = GaussianBridge.from_moments(mean, covariance, SCHEDULER, T, rank=r)
    values, vectors = np.linalg.eigh(covariance.numpy())  # increasing
    values[: d - r] = values[: d - r].mean()
    a, b = at(T)
    dense = torch.from_numpy(vectors @ np.diag(a**2 * values + b**2) @ vectors.T)
    truth = MultivariateNormal(a * mean, dense)
    x = 2 * torch.randn(50, d, dtype=torch.float64, generator=seeded(5))
    assert torch.allclose(model.log_prob(x).double(), truth.log_prob(x), atol=1e-3)
    drawn = model.sample(40_000, seeded(6)).double()
    assert torch.allclose(drawn.mean(0), a * mean, atol=0.02)
    assert torch.allclose(drawn.T.cov(), dense, atol=0.03)


def expected_log_ratio(law, model, max_diffusion_time):
    """KL[p_T || nu] on the line by quadrature, in float64."""
    a, b = at(max_diffusion_time)
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    log_p = law.log_prob(x, b, a)
    with torch.no_grad():
        return torch.trapezoid(log_p.exp() * (log_p - model.double().log_prob(x)), x[:, 0]).item()


def slope(x, y):
    return np.polyfit(x, y, 1)[0]


def test_kl_of_the_standard_normal_has_the_two_terms_of_the_expansion():
    law = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [[-0.5], [0.6]], [[0.1], [0.3]])))
    mean = (law.weights[:, None] * law.means).sum(0)
    variance = (law.weights[:, None] * (law.variances + law.means**2)).sum(0) - mean**2
    remainders, rates = [], []
    for time in (0.5, 0.6, 0.7, 0.8):
        rate = -2 * log(at(time)[0])
        standard = GaussianBridge([1], time, stored_scheduler(SCHEDULER), 1)  # as constructed: N(0, I)
        written = 0.5 * mean.square() * np.exp(-rate) + 0.25 * (variance - 1).square() * np.exp(-2 * rate)
        remainders.append(abs(expected_log_ratio(law, standard, time) - written.item()))
        rates.append(rate)
    assert slope(rates, np.log(remainders)) < -3 + 0.1


def test_moment_matching_removes_both_terms():
    law = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.8], [[-1.5], [0.6]], [[0.05], [0.2]])))
    mean = (law.weights[:, None] * law.means).sum(0)
    variance = (law.weights[:, None] * (law.variances + law.means**2)).sum(0) - mean**2
    rates, left = [], []
    for time in (0.5, 0.55, 0.6, 0.65):
        model = GaussianBridge.from_moments(mean, variance.diag(), SCHEDULER, time)
        rates.append(-2 * log(at(time)[0]))
        left.append(expected_log_ratio(law, model, time))
    # What is left begins with the third cumulant c: c^2 / 12 e^-3B.
    third = (law.weights[:, None] * ((law.means - mean) ** 3 + 3 * (law.means - mean) * law.variances)).sum().item()
    assert slope(rates, np.log(left)) == pytest.approx(-3, abs=0.15)
    assert left[-1] == pytest.approx(third**2 / 12 * np.exp(-3 * rates[-1]), rel=0.1)


# densities and samples of each class


@pytest.mark.parametrize(("kind", "r"), PLANAR)
def test_densities_integrate_to_one(planar, kind, r):
    points, area = grid()
    with torch.no_grad():
        assert planar[kind, r].log_prob(points).double().exp().sum().item() * area == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("kind", "r"), PLANAR)
def test_samples_follow_the_density(planar, kind, r):
    """A chi-squared test on 12 x 12 cells, whose probabilities are sums of the density over a fine grid."""
    model, n, cells, half = planar[kind, r], 20_000, 12, 3.0
    fine = cells * 30
    line = (torch.arange(fine) + 0.5) / fine * 2 * half - half
    with torch.no_grad():
        density = model.log_prob(torch.cartesian_prod(line, line)).double().exp() * (2 * half / fine) ** 2
    expected = density.reshape(cells, 30, cells, 30).sum((1, 3)) * n
    drawn = model.sample(n, seeded(7))
    cell = ((drawn + half) / (2 * half) * cells).floor().long()
    cell = cell[((cell >= 0) & (cell < cells)).all(1)]
    found = torch.zeros(cells, cells, dtype=torch.float64)
    found.index_put_((cell[:, 0], cell[:, 1]), torch.ones(len(cell), dtype=torch.float64), accumulate=True)
    many = expected > 8
    chi2 = ((found - expected) ** 2 / expected)[many].sum()
    assert many.sum() > 30
    assert chi2 < many.sum() + 5 * (2 * many.sum()) ** 0.5


def margin(law, model, max_diffusion_time):
    """KL[p_T || model] in the plane, by quadrature with the exact density."""
    points, area = grid()
    a, b = at(max_diffusion_time)
    log_p = law.log_prob(points, b, a)
    with torch.no_grad():
        return (log_p.exp() * (log_p - model.log_prob(points).double())).sum().item() * area


def test_a_mixture_finds_a_mixture(planar):
    gaussian, mixture = margin(two_modes(), planar["gaussian", 2], 0.2), margin(two_modes(), planar["mixture", 2], 0.2)
    a, b = at(0.2)
    law = two_modes()
    mean = (law.weights[:, None] * law.means).sum(0)
    centred = law.means - mean
    covariance = (law.weights[:, None] * law.variances).sum(0).diag() + centred.T @ (law.weights[:, None] * centred)
    points, area = grid()
    truth = law.log_prob(points, b, a)
    best = MultivariateNormal(a * mean, a**2 * covariance + b**2 * torch.eye(2)).log_prob(points.double())
    known = ((truth - best) * truth.exp()).sum().item() * area
    assert known > 0.1  # nats
    assert gaussian == pytest.approx(known, abs=0.01)
    assert 0 < mixture < 0.01


def test_correlated_components():
    """A mixture made by hand, against torch.distributions; the moments of its samples by hand."""
    model = MixtureBridge([2], T, stored_scheduler(SCHEDULER), 2, 2, num_components=2)
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    factors = torch.tensor([[[0.5, 0.0], [1.5, 0.2]], [[1.0, 0.0], [-0.8, 0.3]]])
    model.weights[0], model.means[0], model.cholesky[0] = weights, means, factors
    covariances = factors @ factors.mT
    components = MultivariateNormal(means, covariances)
    truth = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), components)
    x = 2 * torch.randn(30, 2, generator=seeded())
    assert torch.allclose(model.log_prob(x), truth.log_prob(x), atol=1e-4)
    drawn, mean = model.sample(40_000, seeded(1)), weights @ means
    within = (weights[:, None, None] * covariances).sum(0)
    assert torch.allclose(drawn.mean(0), mean, atol=0.03)
    assert torch.allclose(drawn.T.cov(), within + (means - mean).T @ (weights[:, None] * (means - mean)), atol=0.05)


def test_what_is_not_modelled_keeps_the_variances_of_the_gaussian():
    """A third, independent coordinate of little variance beside the plane: modelled or not, with the density of its own
    Gaussian, and not that of a floor shared with others."""
    x0 = torch.cat([two_modes().sample(3000, seeded()).float(), 0.3 * torch.randn(3000, 2, generator=seeded(1))], 1)
    x0[:, 3] /= 10
    data = in_batches(x0, 500)
    model = MixtureBridge.fit(data, SCHEDULER, 0.2, latent_rank=2, **SMALL_MIXTURE)
    gaussian = GaussianBridge.fit(data, SCHEDULER, 0.2, progress=False)
    assert (model.config.rank, model.latent_rank) == (4, 2)
    x = model.sample(20_000, seeded(2))
    a, b = at(0.2)
    expected = torch.tensor([a**2 * 0.09 + b**2, a**2 * 0.0009 + b**2])
    torch.testing.assert_close(x[:, 2:].var(0), expected, rtol=0.04, atol=0)
    plane = MixtureBridge.fit(in_batches(x0[:, :2], 500), SCHEDULER, 0.2, **SMALL_MIXTURE)
    rest = torch.distributions.Normal(0.0, expected.sqrt()).log_prob(x[:, 2:]).sum(1)
    torch.testing.assert_close(model.log_prob(x).mean(), (plane.log_prob(x[:, :2]) + rest).mean(), rtol=0, atol=0.02)
    assert model.log_prob(x).mean() > gaussian.log_prob(x).mean() + 0.1
    with pytest.raises(ValueError, match="latent_rank must be from 1 to the rank, 4, got 5"):
        MixtureBridge.fit(data, SCHEDULER, 0.2, latent_rank=5, **SMALL_MIXTURE)


def test_a_flow_is_better_than_the_gaussian_it_starts_from(planar):
    gaussian, flow = margin(two_modes(), planar["gaussian", 2], 0.2), margin(two_modes(), planar["flow", 2], 0.2)
    assert 0 < flow < 0.3 * gaussian
    gain = planar["flow", 2].config.measured_on["gain_over_gaussian"]
    assert gain == pytest.approx(gaussian - flow, abs=0.08)


def test_the_gain_of_a_mixture_is_that_of_the_true_law(planar):
    gaussian, mixture = margin(two_modes(), planar["gaussian", 2], 0.2), margin(two_modes(), planar["mixture", 2], 0.2)
    (gain,) = planar["mixture", 2].config.measured_on["gain_over_gaussian"]
    assert gain == pytest.approx(gaussian - mixture, abs=0.1)


def test_a_mixture_that_collapses_on_few_samples_is_not_used():
    """200 samples of a Gaussian in 64 dimensions, of which 16 components take a dozen each."""
    data = [torch.randn(200, 64, generator=seeded())]
    with pytest.warns(UserWarning, match="no mixture was better than the Gaussian on held-out data"):
        model = MixtureBridge.fit(data, SCHEDULER, 0.2, latent_rank=64, progress=False)
    gaussian = GaussianBridge.fit(data, SCHEDULER, 0.2, progress=False)
    x = gaussian.sample(50, seeded(1))
    torch.testing.assert_close(model.log_prob(x), gaussian.log_prob(x))
    assert model.config.measured_on["gain_over_gaussian"] == [0.0]


def test_each_class_is_judged_alone():
    """Class 0 has two modes, class 1 none, class 2 too few samples to tell."""
    labels = torch.tensor([0] * 1000 + [1] * 1000 + [2] * 15)
    x0 = 0.2 * torch.randn(len(labels), 2, generator=seeded())
    x0[:1000, 0] += torch.where(torch.arange(1000) % 2 == 0, 1.5, -1.5)
    with pytest.warns(UserWarning, match=r"no mixture of classes (1, )?2 was better"):
        model = MixtureBridge.fit(in_batches(x0, 500, labels), SCHEDULER, 0.2, num_classes=3, **SMALL_MIXTURE)
    gains = model.config.measured_on["gain_over_gaussian"]
    assert gains[0] > 0.1
    assert gains[1] < 0.02
    assert gains[2] == model.means[2].abs().max() == 0


def test_a_new_flow_is_the_standard_normal():
    for r, classes in ((1, None), (3, None), (1, 2), (3, 2)):
        model = FlowBridge([3], T, stored_scheduler(SCHEDULER), r, max(1, r - 1), classes)
        x = torch.randn(20, 3, generator=seeded())
        labels = torch.zeros(20, dtype=torch.long)
        truth = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
        assert torch.allclose(model.log_prob(x, labels), truth, atol=1e-4)


def test_log_prob_is_differentiable():
    covariance = random_covariance(4)
    model = GaussianBridge.from_moments(torch.zeros(4), covariance, SCHEDULER, T)
    x = torch.randn(6, 4, generator=seeded()).requires_grad_()
    (score,) = torch.autograd.grad(model.log_prob(x).sum(), x)
    a, b = at(T)
    total = a**2 * covariance + b**2 * torch.eye(4)
    assert torch.allclose(score.double(), -torch.linalg.solve(total, x.detach().double().T).T, atol=1e-4)


# estimation


def test_fit_uses_the_moments_of_the_data():
    x0 = torch.randn(300, 2, 3, generator=seeded()) @ torch.randn(3, 3, generator=seeded(1)) + 0.5
    fitted = GaussianBridge.fit(in_batches(x0, 70), SCHEDULER, T, shrink=False, progress=False)
    flat = x0.flatten(1).double()
    exact = GaussianBridge.from_moments(x0.double().mean(0), flat.T.cov(correction=0), SCHEDULER, T)
    x = torch.randn(20, 2, 3, generator=seeded(2))
    assert torch.allclose(fitted.log_prob(x), exact.log_prob(x), atol=1e-4)
    assert fitted.config.measured_on["num_samples"] == 300


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_bridges_at_several_times_share_the_moments(kind):
    """The moments are those of x0: with those of an earlier pass each T gets the bridge that it gets by itself."""
    x0 = two_modes().sample(400, seeded(3))
    data = in_batches(x0.float())
    cls, options = {"gaussian": (GaussianBridge, {"progress": False}), "flow": (FlowBridge, SMALL_FLOW)}[kind]
    shared = moments.data_moments(data, None, None, False)
    passes = []
    monitored = Reread(data, passes)
    for time in (0.2, 0.6):
        alone = cls.fit(data, SCHEDULER, time, **options)
        ours = cls.fit(monitored, SCHEDULER, time, moments=shared, **options)
        assert all(
            torch.equal(a, b) for a, b in zip(alone.state_dict().values(), ours.state_dict().values(), strict=True)
        )
    assert len(passes) == (0 if kind == "gaussian" else 2)  # a flow projects the data at each T


class Reread:
    """Batches that can be read again; `passes` grows with each reading."""

    def __init__(self, data, passes):
        self.data, self.passes = data, passes

    def __iter__(self):
        self.passes.append(1)  # at the first batch
        yield from self.data


def test_shrinkage_is_that_of_scikit_learn():
    for n in (12, 60):
        x0 = torch.randn(n, 8, generator=seeded(n), dtype=torch.float64) * torch.arange(1, 9)
        fitted = GaussianBridge.fit(in_batches(x0, 7), SCHEDULER, T, progress=False)
        exact = GaussianBridge.from_moments(x0.mean(0), torch.from_numpy(OAS().fit(x0).covariance_), SCHEDULER, T)
        x = torch.randn(20, 8, generator=seeded(2))
        assert torch.allclose(fitted.log_prob(x), exact.log_prob(x), atol=1e-3)


def test_shrinkage_reaches_the_floor():
    """Rank r of the shrunk covariance, and not a shrunk rank-r covariance."""
    x0 = torch.randn(15, 8, generator=seeded(4), dtype=torch.float64) * torch.arange(1, 9) / 3
    fitted = GaussianBridge.fit(in_batches(x0, 7), SCHEDULER, T, rank=3, progress=False)
    shrunk = torch.from_numpy(OAS().fit(x0).covariance_)
    exact = GaussianBridge.from_moments(x0.mean(0), shrunk, SCHEDULER, T, rank=3)
    x = torch.randn(20, 8, generator=seeded(2))
    assert torch.allclose(fitted.log_prob(x), exact.log_prob(x), atol=1e-3)


def test_constant_data_are_the_noise_alone():
    """Their covariance is 0: at T it is sigma^2 I, and nothing is undefined."""
    fitted = GaussianBridge.fit([torch.full((5, 3), 0.5)], SCHEDULER, T, progress=False)
    a, b = at(T)
    x = torch.randn(10, 3, generator=seeded())
    assert torch.allclose(fitted.log_prob(x), torch.distributions.Normal(a * 0.5, b).log_prob(x).sum(1), atol=1e-3)


@pytest.mark.parametrize("shrink", [False, True])
def test_large_data_keep_their_leading_directions(monkeypatch, shrink):
    """Data of rank 5 besides little noise: the incremental path agrees with the whole covariance."""
    x0 = torch.randn(400, 5, generator=seeded()) @ torch.randn(5, 40, generator=seeded(1)) + torch.arange(40) / 10
    x0 = (x0 + 0.05 * torch.randn(400, 40, generator=seeded(2))).reshape(400, 4, 10)
    x = torch.randn(20, 4, 10, generator=seeded(3))
    whole = GaussianBridge.fit(in_batches(x0, 30), SCHEDULER, T, rank=5, shrink=shrink, progress=False)
    monkeypatch.setattr(moments, "FULL_COVARIANCE_LIMIT", 39)
    monkeypatch.setattr(moments, "DEFAULT_RANK", 5)
    large = GaussianBridge.fit(in_batches(x0, 30), SCHEDULER, T, shrink=shrink, progress=False)
    assert large.config.rank == 5
    assert torch.allclose(large.log_prob(x), whole.log_prob(x), atol=2e-2)
    assert torch.allclose(large.scales, whole.scales, rtol=1e-5)
    assert torch.allclose(large.floor, whole.floor, rtol=1e-5)


def test_incremental_directions_are_exact_where_all_are_kept():
    x0 = torch.randn(50, 12, dtype=torch.float64, generator=seeded()) + 3
    incremental = Moments(12, 12, x0.device)
    for part in x0.split(7):
        incremental.add(part)
    law = incremental.law(12, shrink=False)
    covariance = law.directions.T @ law.variances.diag() @ law.directions
    assert torch.allclose(covariance, x0.T.cov(correction=0))
    assert torch.allclose(law.mean, x0.mean(0))


def test_shrinkage_counts_the_directions_that_were_not_kept():
    """Two large variances, eight equal small ones, four rows kept: nothing is lost, and the share is OAS's own."""
    root, _ = torch.linalg.qr(torch.randn(30, 11, dtype=torch.float64, generator=seeded()) + 1)
    centred, _ = torch.linalg.qr(root - root.mean(0))
    x0 = centred[:, :10] * torch.tensor([3.0, 2.0] + 8 * [0.9], dtype=torch.float64)
    kept = Moments(10, 4, x0.device)
    kept.add(x0)
    law = kept.law(2, shrink=True)
    values = np.linalg.eigvalsh(OAS().fit(x0).covariance_)
    assert torch.allclose(law.variances, torch.from_numpy(values[[-1, -2]].copy()))
    assert law.floor.item() == pytest.approx(values[0])


# classes


def three_classes(n=3000):
    """Two lopsided modes along the second coordinate, to either side in turn: class 2 has none."""
    labels = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.5]])[labels]
    modes = torch.tensor([[1.2, -0.4], [-1.2, 0.4], [0.0, 0.0]])[labels, (torch.arange(n) % 4).clamp(max=1)]
    noise = 0.15 * torch.randn(n, 2, generator=seeded())
    return centres + noise + torch.stack([torch.zeros(n), modes], 1), labels


def third_moment(y):
    return ((y - y.mean()) ** 3).mean()


FITS = {
    "gaussian": (GaussianBridge, {"progress": False}),
    "mixture": (MixtureBridge, SMALL_MIXTURE),
    "flow": (FlowBridge, SMALL_FLOW),
}


@pytest.fixture(scope="module")
def of_classes():
    x0, labels = three_classes()
    data, longer = (
        in_batches(x0, 1000, labels),
        {"gaussian": {}, "mixture": {}, "flow": {"max_steps": 400, "batch_size": 256, "learning_rate": 5e-3}},
    )
    return {k: cls.fit(data, SCHEDULER, 0.2, num_classes=3, **o | longer[k]) for k, (cls, o) in FITS.items()}


@pytest.mark.parametrize("kind", FITS)
def test_each_class_has_its_own_law(of_classes, kind):
    model, (x0, labels) = of_classes[kind], three_classes()
    wanted = torch.tensor([2, 0, 0, 1]).repeat(2000)  # no order
    drawn = model.sample(len(wanted), seeded(1), wanted)
    a, b = at(0.2)
    for k in range(3):
        own, data = drawn[wanted == k], x0[labels == k]
        assert torch.allclose(own.mean(0), a * data.mean(0), atol=0.12)
        assert torch.allclose(own.T.cov(), a**2 * data.T.cov() + b**2 * torch.eye(2), atol=0.08)
        skewness = 0 if kind == "gaussian" else a**3 * third_moment(data[:, 1]).item()
        assert third_moment(own[:, 1]).item() == pytest.approx(skewness, abs=0.08)
    with torch.no_grad():
        mixed = model.log_prob(drawn[:40], wanted[:40])
        for i in (0, 1, 3, 17):  # each alone
            alone = model.log_prob(drawn[i : i + 1], wanted[i : i + 1])
            assert torch.allclose(mixed[i : i + 1], alone, atol=1e-5)
        other = model.log_prob(drawn[:40], (wanted[:40] + 1) % 3)
    assert (mixed - other).mean() > 1


@pytest.mark.parametrize("kind", FITS)
def test_each_class_has_a_normalised_density(of_classes, kind):
    points, area = grid(half=8.0, n=201)
    for k in range(3):
        with torch.no_grad():
            total = of_classes[kind].log_prob(points, torch.full((len(points),), k)).double().exp().sum() * area
        assert total.item() == pytest.approx(1, abs=3e-3)


def test_a_class_is_fitted_to_its_own_data_alone(of_classes):
    x0, labels = three_classes()
    for k in range(3):
        alone = GaussianBridge.fit([x0[labels == k]], SCHEDULER, 0.2, progress=False)
        x = torch.randn(10, 2, generator=seeded())
        together = of_classes["gaussian"].log_prob(x, torch.full((10,), k))
        assert torch.allclose(together, alone.log_prob(x), atol=1e-4)


def test_moments_of_each_class_can_be_given():
    means = torch.randn(2, 3, dtype=torch.float64, generator=seeded())
    covariances = torch.stack([random_covariance(3, 1), random_covariance(3, 2)])
    model = GaussianBridge.from_moments(means, covariances, SCHEDULER, T, num_classes=2)
    x = torch.randn(8, 3, dtype=torch.float64, generator=seeded(3))
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    a, b = at(T)
    truth = MultivariateNormal(a * means[labels], a**2 * covariances[labels] + b**2 * torch.eye(3)).log_prob(x)
    assert torch.allclose(model.log_prob(x, labels).double(), truth, atol=1e-4)


# files, devices, randomness


@pytest.mark.parametrize("kind", FITS)
def test_save_and_load(of_classes, kind, tmp_path):
    model = of_classes[kind]
    model.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    again = type(model).from_pretrained(tmp_path)
    x, labels = torch.randn(12, 2, generator=seeded()), torch.arange(12) % 3
    with torch.no_grad():
        torch.testing.assert_close(again.log_prob(x, labels), model.log_prob(x, labels), rtol=1e-5, atol=1e-5)
    drawn = again.sample(12, seeded(1), labels)
    torch.testing.assert_close(drawn, model.sample(12, seeded(1), labels), rtol=1e-5, atol=1e-5)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    again.check(SCHEDULER)


@pytest.mark.parametrize("kind", FITS)
def test_half_precision_leaves_the_densities_as_they_are(of_classes, kind, tmp_path):
    model = of_classes[kind]
    model.save_pretrained(tmp_path)
    x, labels = torch.randn(12, 2, generator=seeded()), torch.arange(12) % 3
    half = type(model).from_pretrained(tmp_path)
    for cast in (
        half.half(),
        half.to(torch.bfloat16),
        type(model).from_pretrained(tmp_path, torch_dtype=torch.float16),
    ):
        with torch.no_grad():
            torch.testing.assert_close(cast.log_prob(x, labels), model.log_prob(x, labels), rtol=1e-5, atol=1e-5)
        assert cast.sample(2, seeded(), labels[:2]).dtype == torch.float32
        assert cast.log_prob(x.half(), labels).dtype == torch.float32
    double = half.double()
    assert double.log_prob(x, labels).dtype == torch.float64
    with torch.no_grad():
        assert torch.allclose(double.log_prob(x, labels).float(), model.log_prob(x, labels), atol=1e-4)


@pytest.mark.parametrize("kind", FITS)
def test_autocast_leaves_the_densities_as_they_are(of_classes, kind):
    model, x, labels = of_classes[kind], torch.randn(12, 2, generator=seeded()), torch.arange(12) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cast, drawn = model.log_prob(x, labels), model.sample(12, seeded(1), labels)
    with torch.no_grad():
        assert torch.equal(cast, model.log_prob(x, labels))
    assert torch.equal(drawn, model.sample(12, seeded(1), labels))


@pytest.mark.parametrize("kind", FITS)
def test_everything_is_drawn_from_the_seed(kind):
    cls, options = FITS[kind]
    data = in_batches(two_modes().sample(600, seeded()).float(), 200)
    options = options | ({"learning_rate": 5e-3} if kind == "flow" else {})
    seed = {} if kind == "gaussian" else {"seed": 3}
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    def fit_and_draw(**seed):
        return cls.fit(data, SCHEDULER, 0.2, **options | seed).sample(9, seeded(2))

    first = fit_and_draw(**seed)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert torch.equal(fit_and_draw(**seed), first)
    if seed:
        assert not torch.equal(fit_and_draw(seed=4), first)


def test_a_bridge_of_the_standard_normal_returns_the_noise():
    model = GaussianBridge.from_moments(torch.zeros(2, 3), torch.eye(6), SCHEDULER, T)
    assert torch.allclose(model.sample(4, seeded(5)), torch.randn(4, 2, 3, generator=seeded(5)), atol=1e-5)


# the scheduler it belongs to


def test_check_names_what_differs():
    model = GaussianBridge.from_moments(torch.zeros(2, 3), torch.eye(6), SCHEDULER, T)
    model.check(SCHEDULER, max_diffusion_time=T, shape=(2, 3))
    model.check(DDIMScheduler(prediction_type="v_prediction"), max_diffusion_time=0.4001)  # the same timestep
    for other, asked, message in (
        (SCHEDULER, {"max_diffusion_time": 0.6}, "timestep 599.*timestep 399"),
        (DDIMScheduler(beta_schedule="scaled_linear"), {}, "betas"),
        (DDIMScheduler(num_train_timesteps=500), {}, "timestep 199.*betas"),
        (SCHEDULER, {"shape": (3, 2)}, r"\(3, 2\).*\(2, 3\)|\(3, 2\).*\[2, 3\]"),
        (EDMEulerScheduler(), {}, "vp"),
        (FlowMatchEulerDiscreteScheduler(), {}, "vp"),
    ):
        with pytest.raises(ValueError, match=message):
            model.check(other, **asked)


def test_check_reads_the_time_of_a_scheduler_that_has_one():
    model = GaussianBridge.from_moments(torch.zeros(1), torch.eye(1), SCHEDULER, T)
    scheduler = DDIMScheduler()
    scheduler.register_to_config(max_diffusion_time=0.2)
    with pytest.raises(ValueError, match="timestep 199"):
        model.check(scheduler)


# bad input

GOOD = [torch.randn(40, 2, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "empty"),
        ([GOOD[0], torch.zeros(3, 3)], {}, r"\[3\].*\[2\]"),
        ([torch.full((40, 2), torch.nan)], {}, "finite"),
        ([torch.tensor([[1.0, torch.inf]]).repeat(40, 1)], {}, "finite"),
        ([torch.randn(3, 5)], {"rank": 3}, "rank 3 needs 4"),
        ([torch.randn(1, 5)], {}, "needs"),
        (GOOD, {"rank": 0}, "rank"),
        (GOOD, {"rank": 3}, "rank"),
        (GOOD, {"num_classes": 0}, "num_classes"),
        (GOOD, {"num_classes": 2}, "class_labels are needed"),
        ([(GOOD[0], {"class_labels": torch.full((40,), 2)})], {"num_classes": 2}, "0 to 1"),
        ([(GOOD[0], {"class_labels": torch.full((40,), -1)})], {"num_classes": 2}, "0 to 1"),
        ([(GOOD[0], {"class_labels": torch.zeros(39, dtype=torch.long)})], {"num_classes": 2}, "integers"),
        ([(GOOD[0], {"class_labels": torch.zeros(40)})], {"num_classes": 2}, "integers"),
        ([(GOOD[0], {"class_labels": torch.zeros(40, dtype=torch.long)})], {"num_classes": 2}, "has 0"),
    ],
)
def test_bad_data_are_refused(kind, batches, options, message):
    cls, settings = FITS[kind]
    with pytest.raises(ValueError, match=message):
        cls.fit(batches, SCHEDULER, T, **settings | options)


@pytest.mark.parametrize("kind", FITS)
def test_bad_times_and_schedules_are_refused_before_the_data_are_read(kind):
    cls, settings = FITS[kind]
    for time in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="max_diffusion_time"):
            cls.fit([None], SCHEDULER, time, **settings)
    with pytest.raises(ValueError, match="vp"):
        cls.fit([None], EDMEulerScheduler(), T, **settings)


def test_bad_moments_are_refused():
    eye = torch.eye(2)
    for mean, covariance, message in (
        (torch.zeros(2), torch.eye(3), "fit"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.1, 1.0]]), "symmetric"),
        (torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, -9.0]]), "singular"),
        (torch.zeros(2), eye * torch.nan, "finite"),
        (torch.tensor([0.0, torch.inf]), eye, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianBridge.from_moments(mean, covariance, SCHEDULER, T)
    with pytest.raises(ValueError, match="fit"):
        GaussianBridge.from_moments(torch.zeros(2, 2), eye[None].repeat(3, 1, 1), SCHEDULER, T, num_classes=3)
    with pytest.raises(ValueError, match="rank"):
        GaussianBridge.from_moments(torch.zeros(2), eye, SCHEDULER, T, rank=3)


def test_bad_calls_are_refused(of_classes):
    model, x = of_classes["gaussian"], torch.zeros(4, 2)
    for labels in (None, torch.tensor([0, 1, 2, 3]), torch.tensor([0, -1, 0, 0]), torch.zeros(4), torch.tensor([0])):
        with pytest.raises(ValueError, match="class_labels"):
            model.log_prob(x, labels)
        with pytest.raises(ValueError, match="class_labels"):
            model.sample(4, seeded(), labels)
    with pytest.raises(ValueError, match="shape"):
        model.log_prob(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one"):
        model.sample(0, seeded())


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="at least 2 components"):
        MixtureBridge.fit(GOOD, SCHEDULER, T, num_components=1, progress=False)
    with pytest.raises(ValueError, match="41 components"):
        MixtureBridge.fit(GOOD, SCHEDULER, T, num_components=41, progress=False)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="held_out"):
            FlowBridge.fit(GOOD, SCHEDULER, T, held_out=share, **SMALL_FLOW)
    for cls in (MixtureBridge, FlowBridge):
        with pytest.raises(ValueError, match="twice"):
            cls.fit(iter(GOOD), SCHEDULER, T, progress=False)
    GaussianBridge.fit(iter(GOOD), SCHEDULER, T, progress=False)


@pytest.mark.parametrize(("kind", "library"), [("mixture", "sklearn.mixture"), ("flow", "zuko")])
def test_a_missing_library_is_named(kind, library, monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name == library:
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    cls, settings = FITS[kind]
    with pytest.raises(ImportError, match=f"pip install {'zuko' if kind == 'flow' else 'scikit-learn'}"):
        cls.fit(GOOD, SCHEDULER, T, **settings)


# training of the flow


def test_a_flow_that_diverges_gives_the_best_so_far():
    with pytest.warns(UserWarning, match="diverged|no flow was better"):
        model = FlowBridge.fit(GOOD, SCHEDULER, T, **SMALL_FLOW | {"learning_rate": 1e6})
    gaussian = GaussianBridge.fit(GOOD, SCHEDULER, T, progress=False)
    x = torch.randn(10, 2, generator=seeded())
    with torch.no_grad():
        assert torch.allclose(model.log_prob(x), gaussian.log_prob(x), atol=1e-4)


@pytest.mark.filterwarnings("ignore:no flow was better")
def test_a_flow_of_gaussian_data_stops_early_and_stays_near_the_gaussian():
    x0 = torch.randn(400, 2, generator=seeded())
    model = FlowBridge.fit([x0], SCHEDULER, T, **SMALL_FLOW | {"patience": 2, "max_steps": 2000})
    law = Gaussian(torch.zeros(2), torch.ones(2))
    points, area = grid(n=141)
    a, b = at(T)
    log_p = law.log_prob(points, b, a)
    with torch.no_grad():
        kl = (log_p.exp() * (log_p - model.log_prob(points).double())).sum().item() * area
    assert kl < 0.03


def test_non_finite_losses_stop_training(monkeypatch):
    evaluated = iter([1.0, 0.8, float("nan"), 0.1])
    monkeypatch.setattr("diffusers_ext.bridges.flow.held_out_loss", lambda log_prob, batch: next(evaluated))
    with pytest.warns(UserWarning, match="diverged by step 100: that of step 50"):
        model = FlowBridge.fit(GOOD, SCHEDULER, T, **SMALL_FLOW)
    assert model.config.measured_on["steps"] == 50
    assert model.config.measured_on["gain_over_gaussian"] == pytest.approx(0.2)


def test_log_of_two_pi_is_there():
    """The density of N(0, I) at 0, by hand."""
    model = GaussianBridge([3], T, stored_scheduler(SCHEDULER), 2)
    assert model.log_prob(torch.zeros(1, 3)).item() == pytest.approx(-1.5 * log(2 * pi))


@pytest.mark.parametrize(("passes", "evaluations"), [(2, 2), (3, 3), (None, 8)])
def test_a_draw_evaluates_the_networks_of_a_flow_once_for_each_group(passes, evaluations) -> None:
    """And is inverted by the map that judges it, at one evaluation each."""
    model = FlowBridge([9], T, stored_scheduler(SCHEDULER), 8, 8, transforms=2, hidden_features=(16,), passes=passes)
    generator, calls = torch.Generator().manual_seed(0), []
    for spline in model.flow.transform.transforms:
        for parameter in spline.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        spline.hyper.register_forward_hook(lambda *_: calls.append(1))
    noise = torch.randn(5, 8, generator=generator)
    w = model._sample_latent(noise, 0, None)
    assert (len(calls), (w - noise).abs().max() > 0.1) == (2 * evaluations, True)
    calls.clear()
    judged = model._flow_log_prob(w, torch.zeros(5, dtype=torch.long))
    assert len(calls) == 2
    (jacobian,) = torch.autograd.functional.jacobian(lambda v: model._transform(torch.zeros(1).long(), v)(v), (w[:1],))
    back = model._transform(torch.zeros(5).long(), w)(w)
    torch.testing.assert_close(back, noise, rtol=1e-3, atol=1e-4)
    expected = -(noise[0] ** 2).sum() / 2 - 4 * np.log(2 * np.pi) + torch.linalg.slogdet(jacobian[0, :, 0])[1]
    torch.testing.assert_close(judged[0], expected, rtol=1e-3, atol=1e-3)
