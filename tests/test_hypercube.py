"""`hypercube`. Truth: sums with 60 digits (mpmath), quadrature, simulated reflections, the laws a heat kernel obeys."""

from math import sqrt

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_ext.hypercube import SWITCH, heat_kernel_log_prob, heat_kernel_score, reflect

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SIGMAS = (1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, SWITCH - 1e-6, SWITCH + 1e-6, 0.4, 0.6, 1.0, 5.0, 50.0)


def truth(x: float, x0: float, sigma: float) -> tuple[float, float, float]:
    """log p and its first two derivatives: images below sigma 0.8, eigenfunctions above, with 60 digits."""
    with mpmath.workdps(60):
        x, x0, s, pi = mpmath.mpf(x), mpmath.mpf(x0), mpmath.mpf(sigma), mpmath.pi
        if s < 0.8:
            z = [(x - c) / s for k in range(-8, 9) for c in (2 * k + x0, 2 * k - x0)]
            nearest = min(map(abs, z))
            z = [v for v in z if v**2 < nearest**2 + 300]  # the others are less than 1e-65 of it
            density = [mpmath.npdf(v) / s for v in z]
            slope = [-v / s * n for v, n in zip(z, density, strict=True)]
            bend = [(v**2 - 1) / s**2 * n for v, n in zip(z, density, strict=True)]
        else:
            w = [j * pi for j in range(16)]
            r = [(2 if v else 1) * mpmath.exp(-((v * s) ** 2) / 2) * mpmath.cos(v * x0) for v in w]
            density = [a * mpmath.cos(v * x) for a, v in zip(r, w, strict=True)]
            slope = [-a * v * mpmath.sin(v * x) for a, v in zip(r, w, strict=True)]
            bend = [-a * v**2 * mpmath.cos(v * x) for a, v in zip(r, w, strict=True)]
        p, dp, ddp = mpmath.fsum(density), mpmath.fsum(slope), mpmath.fsum(bend)
        return float(mpmath.log(p)), float(dp / p), float(ddp / p - (dp / p) ** 2)


@pytest.fixture(scope="module")
def hard() -> dict[str, torch.Tensor]:
    """Faces, corners and their neighbourhoods at every scale, all exact in float32 where sigma >= 0.01."""
    g = np.random.default_rng(0)
    near = [0.0, 6e-8, 1e-6, 1e-3, 0.02, 0.2]
    edge = [*near, 0.5, *(1 - d for d in near)]
    points = [(x, x0, s) for x in edge for x0 in edge for s in SIGMAS]
    for s in 10 ** g.uniform(-3, 0.2, 800):
        distance = np.minimum(g.exponential(size=2) * s ** g.choice([0.0, 1.0, 2.0], 2), 1)
        points.append((*np.where(g.random(2) < 0.5, distance, 1 - distance), s))
    points = [p if p[2] < 0.01 else tuple(np.float32(p).astype(float)) for p in points]
    rows = [(*p, *truth(*p)) for p in points]
    names = ("x", "x0", "sigma", "log_prob", "score", "curvature")
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def worst(value: torch.Tensor, expected: torch.Tensor, unit: torch.Tensor | float = 1.0) -> float:
    """Largest error in `unit`, relative where the expected value exceeds it."""
    assert value.isfinite().all()
    error = (value.double() - expected).abs() * unit
    return (error / (expected.abs() * unit).clamp(min=1)).max().item()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernel_is_right_everywhere(hard: dict, dtype: torch.dtype) -> None:
    rows = {k: v[hard["sigma"] > (0.0099 if dtype == torch.float32 else 0)] for k, v in hard.items()}
    x, x0, sigma = (rows[k].to(dtype) for k in ("x", "x0", "sigma"))
    x.requires_grad_()
    score = heat_kernel_score(x, x0, sigma)
    log_prob = heat_kernel_log_prob(x, x0, sigma)
    (slope,) = torch.autograd.grad(log_prob.sum(), x, create_graph=True)
    (slope_of_slope,) = torch.autograd.grad(slope.sum(), x)
    (slope_of_score,) = torch.autograd.grad(score.sum(), x)
    assert worst(log_prob, rows["log_prob"]) < TOLERANCE[dtype]
    assert worst(score, rows["score"], rows["sigma"]) < TOLERANCE[dtype]
    assert worst(slope_of_score, rows["curvature"], rows["sigma"] ** 2) < TOLERANCE[dtype]
    # autograd adds up the images' pulls in another order, in which those at opposite corners cancel
    assert worst(slope, rows["score"], rows["sigma"]) < 5 * TOLERANCE[dtype]
    assert worst(slope_of_slope, rows["curvature"], rows["sigma"] ** 2) < 5 * TOLERANCE[dtype]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(x=st.floats(0, 1), x0=st.floats(0, 1), log_sigma=st.floats(-6.9, 3.9))
def test_kernel_is_right_anywhere(x: float, x0: float, log_sigma: float) -> None:
    sigma = float(np.exp(log_sigma))
    log_prob, score, _ = truth(x, x0, sigma)
    x, x0, log_prob, score = torch.tensor([[x], [x0], [log_prob], [score]], dtype=torch.float64)
    assert worst(heat_kernel_log_prob(x, x0, sigma), log_prob) < 1e-12
    assert worst(heat_kernel_score(x, x0, sigma), score, sigma) < 1e-12


def test_gradients_are_finite_where_the_waves_cut_short_add_up_to_nothing() -> None:
    x0 = 1e-4 * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    x = (2 / 11 + 1e-7 * torch.arange(-5, 5).repeat(10_000)).requires_grad_()  # sin(11 pi x / 2) = 0
    for function in (heat_kernel_log_prob, heat_kernel_score):
        (slope,) = torch.autograd.grad(function(x, x0, 1e-4).sum(), x)
        assert slope.isfinite().all()


# the laws of a heat kernel

NODES, WEIGHTS = (torch.from_numpy(v) / 2 for v in np.polynomial.legendre.leggauss(400))  # exact for sigma > 0.02
NODES = NODES + 0.5


def density(x: torch.Tensor, x0: torch.Tensor, sigma: float) -> torch.Tensor:
    return heat_kernel_log_prob(*torch.broadcast_tensors(x, x0), sigma).exp()


@pytest.mark.parametrize("sigma", [0.03, 0.3, 0.36, 2.0])
def test_density_integrates_to_one_and_its_flux_vanishes_at_the_faces(sigma: float) -> None:
    x0 = torch.tensor([0.0, 1e-3, 0.4, 1.0], dtype=torch.float64)
    mass = (WEIGHTS[:, None] * density(NODES[:, None], x0, sigma)).sum(0)
    torch.testing.assert_close(mass, torch.ones(4).double(), rtol=0, atol=1e-12)
    for face in (0.0, 1.0):
        flux = heat_kernel_score(torch.full_like(x0, face), x0, sigma)
        torch.testing.assert_close(flux, torch.zeros_like(x0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.01, 0.2, 0.5, 3.0])
def test_density_is_symmetric_in_its_ends_and_under_exchange_of_the_faces(sigma: float) -> None:
    x, x0 = torch.rand(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_prob = heat_kernel_log_prob(x, x0, sigma)
    torch.testing.assert_close(heat_kernel_log_prob(x0, x, sigma), log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(heat_kernel_log_prob(1 - x, 1 - x0, sigma), log_prob, rtol=1e-11, atol=1e-11)
    score = heat_kernel_score(x, x0, sigma)
    torch.testing.assert_close(heat_kernel_score(1 - x, 1 - x0, sigma), -score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("first", "second"), [(0.05, 0.1), (0.3, 0.2), (0.2, 0.6), (1.0, 0.5)])
def test_two_steps_make_one(first: float, second: float) -> None:
    x, x0 = torch.rand(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = density(NODES[:, None], x0, first) * density(x, NODES[:, None], second)
    expected = density(x, x0, sqrt(first**2 + second**2))
    torch.testing.assert_close((WEIGHTS[:, None] * product).sum(0), expected, rtol=0, atol=1e-11)


# reflection


def test_reflect_keeps_the_box_to_the_last_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = torch.cat([x, torch.tensor([0, 1, 0.5, 6e-8, 1 - 6e-8, 1e-30]).to(dtype)])
        assert torch.equal(reflect(x), x)


def test_reflect_is_even_of_period_two_and_a_mirror_at_each_face() -> None:
    x = torch.arange(-64 * 7, 64 * 7 + 1) / 64  # exact
    assert torch.equal(reflect(-x), reflect(x))
    assert torch.equal(reflect(x + 2), reflect(x))
    assert torch.equal(reflect(1 + x), reflect(1 - x))
    assert reflect(x).min() == 0
    assert reflect(x).max() == 1


@pytest.mark.parametrize(("x0", "sigma"), [(0.1, 0.2), (0.8, 0.34), (0.0, 0.4), (0.9, 1.0), (0.3, 4.0)])
def test_reflected_noise_has_the_law_of_the_kernel(x0: float, sigma: float) -> None:
    noise = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = reflect(x0 + sigma * noise).sort().values
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    p = density(grid, torch.tensor(x0).double(), sigma)
    cdf = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(p, grid)])
    at_samples = torch.from_numpy(np.interp(x, grid, cdf))
    empirical = torch.arange(1, len(x) + 1) / len(x)
    assert (at_samples - empirical).abs().max() < 2.2 / len(x) ** 0.5  # Kolmogorov-Smirnov: probability 1e-4


# calling


@pytest.mark.parametrize("function", [heat_kernel_log_prob, heat_kernel_score])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3)])
def test_each_sample_has_its_own_sigma(function, shape: tuple[int, ...]) -> None:
    x, x0 = torch.rand(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.02, 0.3, 0.5, 3.0], dtype=torch.float64)
    together = function(x, x0, sigma)
    assert together.shape == shape
    for i, s in enumerate(sigma):
        torch.testing.assert_close(function(x[i], x0[i], s), together[i])
        torch.testing.assert_close(function(x[i], x0[i], s.item()), together[i])


@pytest.mark.parametrize("function", [heat_kernel_log_prob, heat_kernel_score])
def test_refuses_a_sigma_that_is_no_noise_level(function) -> None:
    x = torch.rand(3, 2)
    for sigma in (0, 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma must be positive"):
            function(x, x, sigma)
    with pytest.raises(ValueError, match=r"sigma has shape \(2,\)"):
        function(x, x, torch.ones(2))


@pytest.mark.parametrize("function", [heat_kernel_log_prob, heat_kernel_score])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_comes_back_half(function, dtype: torch.dtype) -> None:
    x, x0 = torch.rand(2, 4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    sigma = torch.tensor([0.02, 0.2, 0.5, 2.0])
    value = function(x, x0, sigma)
    assert value.dtype == dtype
    assert torch.equal(value, function(x.float(), x0.float(), sigma).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(x.float(), x0.float(), sigma), function(x.float(), x0.float(), sigma.float()))
        assert torch.equal(function(x, x0, sigma), value)


@pytest.mark.parametrize("function", [heat_kernel_log_prob, heat_kernel_score])
def test_no_branch_reads_the_data(function) -> None:
    x, x0 = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.02, 0.2, 0.5, 2.0])
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x0, sigma), function(x, x0, sigma))
    with FakeTensorMode():  # raises where a value would be read
        fake = function(torch.empty(4, 3), torch.empty(4, 3), torch.empty(4))
    assert fake.shape == (4, 3)


def test_gradients_with_respect_to_every_argument() -> None:
    x, x0 = torch.rand(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.2, 0.34, 0.36, 0.7, 2.0], dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, x0, sigma))
    for function in (heat_kernel_log_prob, heat_kernel_score):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
