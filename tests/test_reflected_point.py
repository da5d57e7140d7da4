"""Reflected models that predict a point. Truth: exact scores of mixtures and of uniform data, whose point is found by
bisection; the distribution function of the kernel, which its probability flow keeps; draws of the forward process."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_models import tiny_unet
from torch import Tensor, nn

from diffusers_ext import ReflectedModel, ReflectedPipeline, ReflectedProcess, ReflectedScheduler, boundary_flux
from diffusers_ext.hypercube import heat_kernel_flow, heat_kernel_log_prob, heat_kernel_score, reflect
from diffusers_ext.interop import noise_schedule, score_model_from
from diffusers_ext.likelihood import log_likelihood
from diffusers_ext.score import reflected_point

BOXES = [ReflectedProcess(), ReflectedProcess(0.0, 4.0)]
POINTS = torch.tensor([0.0, 0.03, 0.2, 0.25, 0.6, 0.97, 1.0], dtype=torch.float64)  # of the unit box, two on its faces
WEIGHTS = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 0.5, 2.0], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_score(x: Tensor, sigma: Tensor | float, law: str) -> Tensor:
    """d/dx log p_sigma in the unit box, elementwise: of the mixture of POINTS, or of uniform data."""
    if law == "uniform":
        return torch.zeros_like(x)
    sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[:1])
    kernels = [(heat_kernel_log_prob(x, p.expand(x.shape), sigma), heat_kernel_score(x, p.expand(x.shape), sigma))
               for p in POINTS]  # fmt: skip
    share = torch.softmax(torch.stack([log + w.log() for (log, _), w in zip(kernels, WEIGHTS, strict=True)]), 0)
    return sum(s * k for s, (_, k) in zip(share, kernels, strict=True))


def bisected(x: Tensor, sigma: Tensor, score: Tensor) -> Tensor:
    """The point of the unit box at which the kernel has this score."""
    low, high = torch.zeros_like(x), torch.ones_like(x)
    for _ in range(60):
        middle = (low + high) / 2
        below = heat_kernel_score(x, middle, sigma) < score
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def oracle(process: ReflectedProcess, law: str) -> ReflectedModel:
    """A model whose network answers what its target is; its time is sigma."""

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.expand(len(x))
        y, s = (x - process.low) / process.width, sigma / process.width
        point = 2 * bisected(y, s, unit_score(y, s, law)) - 1
        centred, r = 2 * y - 1, (2 * s).reshape(-1, *[1] * (x.ndim - 1))  # in half-widths
        return (centred / (1 + r**2) - point) * (1 + r**2) ** 0.5 / r

    return ReflectedModel(network, lambda sigma: sigma, process, "point")


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3, 0.36, 0.6, 1.0])
def test_the_score_of_the_kernel_rises_with_its_point(sigma: float) -> None:
    x = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)[:, None].expand(-1, 201)
    x0 = torch.linspace(0, 1, 201, dtype=torch.float64).expand(49, -1)
    k = heat_kernel_score(x.reshape(-1), x0.reshape(-1), sigma).reshape(49, 201)
    assert (k.diff(dim=1) > 0).all()


@pytest.mark.parametrize("law", ["mixture", "uniform"])
@pytest.mark.parametrize("process", BOXES, ids=str)
def test_the_exact_score_is_that_of_one_point(process: ReflectedProcess, law: str) -> None:
    sigma = torch.tensor([0.02, 0.05, 0.2, 0.4, 0.8, 1.2], dtype=torch.float64) * process.width
    x = process.low + process.width * torch.linspace(0, 1, 41, dtype=torch.float64).expand(6, -1)
    expected = unit_score((x - process.low) / process.width, sigma / process.width, law) / process.width
    error = align_like(sigma, x) * (oracle(process, law).score(x, sigma) - expected)
    assert error.abs().max() < 1e-6


def align_like(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def test_the_point_is_clamped_and_not_folded() -> None:
    process, x = ReflectedProcess(0.0, 4.0), torch.tensor([[1.0, 3.0]])
    # half-widths: y = (-1/2, 1/2), s = 1: D = y/2 - F/2^(1/2)
    point = reflected_point(process, torch.tensor([[0.2, -4.0]]), x, 2.0)
    assert point[0, 0].item() == pytest.approx(2 + 2 * (-0.25 - 0.2 / 2**0.5))
    assert point[0, 1].item() == 4.0


def test_the_weight() -> None:
    model = ReflectedModel(lambda x, t: x, lambda s: s, ReflectedProcess(0.0, 4.0), "point")
    weights = model.output_weight(torch.tensor([1e-3, 4 / np.pi, 8.0]))  # q = 0, 1 and 4 pi^2
    assert weights[0].item() == pytest.approx(1 / 1.01, rel=1e-5)
    assert weights[1].item() == pytest.approx(1 / (1 / (np.e - 1) + 0.01), rel=1e-5)
    assert weights[2].item() == pytest.approx(100, rel=1e-3)


# --- likelihood -------------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """A smooth random function of one coordinate."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.size = nn.Linear(2, 32), nn.Linear(32, 1), size

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = torch.cat([2 * x, time.reshape(-1, 1).expand(len(x), 1)], 1)
        return self.size * self.second(torch.tanh(2 * self.first(h)))


def model(prediction_type: str, size: float = 2.0) -> ReflectedModel:
    return ReflectedModel(Random(size).double(), torch.log, ReflectedProcess(), prediction_type)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0])
def test_no_flux_through_the_faces(sigma: float) -> None:
    x = 2 * torch.rand(200, 1, dtype=torch.float64, generator=seeded()) - 1
    flux = {kind: boundary_flux(model(kind), x, sigma, generator=seeded()).abs().max() for kind in ("point", "epsilon")}
    assert flux["point"] < 1e-9
    assert flux["epsilon"] > 0.1


def test_the_density_of_the_flow_integrates_to_1() -> None:
    n = 1500
    x = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) * 2 / n - 1
    mass = {
        kind: log_likelihood(model(kind), x, 0.1, 3.0, rtol=1e-5, atol=1e-5).exp().sum().item() * 2 / n
        for kind in ("point", "epsilon")
    }
    assert mass["point"] == pytest.approx(1, abs=2e-3)
    assert abs(mass["epsilon"] - 1) > 0.02  # what flows through the faces


# --- the frozen point -------------------------------------------------------------------------------------------------


def distribution(x: Tensor, x0: float, sigma: float) -> Tensor:
    """P(X <= x) at sigma, by the images of the folded line in closed form."""
    normal = torch.distributions.Normal(0.0, 1.0)
    total = torch.zeros_like(x)
    for k in range(-8, 9):
        for centre in (x0 + 2 * k, 2 * k - x0):
            total += normal.cdf((x - centre) / sigma) - normal.cdf(torch.as_tensor(-centre / sigma, dtype=x.dtype))
    return total


@pytest.mark.parametrize("x0", [0.0, 0.1, 0.55, 1.0])
@pytest.mark.parametrize(("sigma", "ratio"), [(1.2, 0.7), (0.5, 0.75), (0.3, 0.75), (0.05, 0.75)])
def test_the_flow_of_a_point_keeps_its_distribution_function(sigma: float, ratio: float, x0: float) -> None:
    levels = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    x = torch.from_numpy(np.interp(levels, distribution(grid, x0, sigma), grid))
    errors = []
    for steps in (4, 8):
        x_next = heat_kernel_flow(x, torch.full_like(x, x0), sigma, ratio * sigma, steps)
        errors.append((distribution(x_next, x0, ratio * sigma) - distribution(x, x0, sigma)).abs().max().item())
    assert errors[0] < 2e-3
    assert errors[1] < max(errors[0] / 3, 2e-6)


@pytest.mark.parametrize("x0", [-1.0, 0.3])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(3.0, 2.2), (3.0, 0.5), (1.0, 0.8), (0.3, 0.1)])
def test_a_posterior_draw_is_one_of_the_forward_process(sigma: float, sigma_next: float, x0: float) -> None:
    process, n = ReflectedProcess(), 200_000
    start = torch.full((n,), x0, dtype=torch.float64)

    def draw(seed: int) -> Tensor:
        return torch.randn(n, dtype=torch.float64, generator=seeded(seed))

    between = process.constrain(start + sigma_next * draw(1))
    end = process.constrain(between + (sigma**2 - sigma_next**2) ** 0.5 * draw(2))
    other = process.constrain(start + sigma * draw(3))
    choice = torch.rand(n, dtype=torch.float64, generator=seeded(4))
    ours = process.posterior(other, start, sigma, sigma_next, draw(5), choice)
    for moment in (lambda x, y: x, lambda x, y: x**2, lambda x, y: x * y, lambda x, y: (np.pi * x).cos() * y**2):
        a, b = moment(between, end), moment(ours, other)
        assert abs(a.mean() - b.mean()) < 5 * ((a.var() + b.var()) / n) ** 0.5


# --- the scheduler ----------------------------------------------------------------------------------------------------


def scheduler(algorithm: str, **settings) -> ReflectedScheduler:
    settings = {"sigma_max": 3.0, "prediction_type": "point", "algorithm_type": algorithm} | settings
    return ReflectedScheduler(**settings)


def before_the_end(sampler: ReflectedScheduler, x: Tensor, steps: int, seed: int = 0) -> tuple[Tensor, float]:
    """x before the last step of the exact model, and its noise level; the last step answers with the point."""
    exact, g = oracle(ReflectedProcess(), "mixture"), seeded(seed)
    sampler.set_timesteps(steps)
    for i, t in enumerate(sampler.timesteps):
        output = exact.network(x, sampler.sigmas[i].double())
        if i == steps - 1:
            point = reflected_point(ReflectedProcess(), output, x, sampler.sigmas[i].double())
            assert torch.equal(sampler.step(output, t, x, generator=g).prev_sample, point)
            return x, sampler.sigmas[i].item() / 2
        x = sampler.step(output, t, x, generator=g).prev_sample
    raise AssertionError


def of_the_mixture(x: Tensor, sigma: float) -> Tensor:
    parts = [w * distribution(x, p, sigma) for p, w in zip(POINTS.tolist(), WEIGHTS.tolist(), strict=True)]
    return sum(parts) / WEIGHTS.sum()


def test_the_ode_follows_the_quantiles_with_order_1_at_least() -> None:
    level = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    errors = []
    for steps in (8, 16, 32, 64):
        x, sigma = before_the_end(scheduler("ode", sigma_min=0.2), 2 * level[:, None] - 1, steps)
        errors.append((of_the_mixture((x[:, 0] + 1) / 2, sigma) - level).abs().max().item())
    rates = [a / b for a, b in pairwise(errors)]
    assert all(rate > 1.7 for rate in rates)
    assert errors[-1] < 0.01


def test_the_sde_has_the_law_of_the_data_process() -> None:
    n, errors = 20_000, []
    for steps in (8, 32):
        start = 2 * torch.rand(n, 1, dtype=torch.float64, generator=seeded(9)) - 1
        x, sigma = before_the_end(scheduler("sde", sigma_min=0.2), start, steps)
        cdf = of_the_mixture(((x[:, 0] + 1) / 2).sort().values, sigma)
        errors.append((cdf - (torch.arange(n) + 0.5) / n).abs().max().item())
    assert errors[1] < 0.02  # Kolmogorov-Smirnov: 1.63 / n^1/2 = 0.0115 at 1%, and the steps' own bias
    assert errors[0] > errors[1]


def test_all_randomness_of_a_step_is_the_generators() -> None:
    sampler = scheduler("sde")
    sampler.set_timesteps(10)
    output, x, t = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.3), sampler.timesteps[3]
    state = torch.get_rng_state()
    first, again, other = (sampler.step(output, t, x, generator=seeded(s)).prev_sample for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    each = sampler.step(output, t, x, generator=[seeded(1), seeded(1)]).prev_sample
    assert torch.equal(each[0], each[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("algorithm", ["ode", "sde", "heun"])
def test_guidance_combines_points_of_the_box_and_clamps_the_result(algorithm: str) -> None:
    torch.manual_seed(0)
    unet = tiny_unet(num_class_embeds=4)
    pipe = ReflectedPipeline(unet, scheduler(algorithm), null_class=3)
    pipe.set_progress_bar_config(disable=True)
    x = 2 * torch.rand(2, 1, 8, 8, generator=seeded()) - 1
    time, process = torch.tensor(999.0), pipe.scheduler.process
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():
            parameter.mul_(20)  # so that points are beyond the box
        outputs = [unet(x, time, torch.tensor(labels)).sample for labels in ([3, 3], [0, 2])]
    free, guided = (reflected_point(process, output, x, 3.0) for output in outputs)
    assert (guided.abs() == 1).float().mean() > 0.1
    point = (free + 4 * (guided - free)).clamp(-1, 1)
    seen = pipe._predict(x, time, torch.tensor([0, 2]), 4.0)
    torch.testing.assert_close(reflected_point(process, seen, x, 3.0), point, rtol=1e-4, atol=1e-4)
    eps = -3 * process.target_score(x, point, 3.0)
    torch.testing.assert_close(pipe.scheduler.eps(seen, x, torch.tensor([3.0])), eps, rtol=1e-3, atol=1e-4)
    if algorithm != "heun":
        options = {"guidance_scale": 4.0, "num_inference_steps": 1, "generator": seeded(), "output_type": "np"}
        drawn = pipe([0, 2], latents=x, **options).images
        np.testing.assert_allclose(drawn, (point.movedim(1, 3).numpy() + 1) / 2, atol=1e-4)


def test_the_configuration_makes_the_model() -> None:
    schedule = noise_schedule(scheduler("sde"))
    assert schedule.prediction_type == "point"
    made = score_model_from(tiny_unet(), scheduler("sde"))
    assert made.prediction_type == "point"
    with pytest.raises(ValueError, match="predicts epsilon or point, not 'sample'"):
        ReflectedScheduler(prediction_type="sample")


def test_reflect_is_the_fold_of_the_bridge() -> None:
    x = torch.linspace(-9, 9, 181, dtype=torch.float64)
    assert torch.allclose(reflect(x), torch.acos(torch.cos(np.pi * x)) / np.pi)
