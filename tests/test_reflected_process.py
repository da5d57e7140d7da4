"""`ReflectedProcess` and `ReflectedModel`. Truth: the law of folded mixtures (`Folded`), exact arithmetic, autograd,
torch.distributions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import Folded, Gaussian, Mixture, along, two_bumps
from torch import Tensor
from torch.distributions import Uniform

from diffusers_ext import ReflectedModel, ReflectedProcess, score_matching_loss

BOXES = [(-1.0, 1.0), (0.0, 1.0), (-0.3, 1.7), (1e-3, 3.0), (-5.0, -2.6), (-1.1, 0.2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kolmogorov_smirnov(x: Tensor, cdf) -> float:
    """n^1/2 times the largest distance of the empirical law of x from `cdf`; above 2.5 with probability 7e-6."""
    x = x.double().sort().values
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return max((cdf(x) - steps[:-1]).max().item(), (steps[1:] - cdf(x)).max().item()) * len(x) ** 0.5


def inside(x: Tensor, low: float, high: float) -> bool:
    """In the box, whose faces are rounded to the dtype of x."""
    low, high = (torch.tensor(v, dtype=x.dtype) for v in (low, high))
    return bool(((x >= low) & (x <= high)).all())


# noise


@pytest.mark.parametrize("box", BOXES[:3], ids=str)
def test_perturbed_data_have_the_folded_law_with_a_sigma_for_each_sample(box: tuple[float, float]) -> None:
    law, sigma = Folded(two_bumps(), *box), torch.tensor([0.03, 0.3, 0.8, 3.0])
    x0 = torch.stack([law.sample(20_000, seeded(i)) for i in range(4)])
    x = ReflectedProcess(*box).perturb(x0, sigma, seeded(9))
    assert inside(x, *box)
    for row, s in zip(x, sigma.tolist(), strict=True):
        assert kolmogorov_smirnov(row, lambda v, s=s: law.cdf(v, s)) < 2.5
    assert kolmogorov_smirnov(x[0], lambda v: law.cdf(v, 0.3)) > 2.5  # the test has the power to tell


@pytest.mark.parametrize("sigma", [0.4, torch.tensor(0.4)], ids=["number", "()"])
def test_one_sigma_serves_all_samples(sigma: Tensor | float) -> None:
    x0 = torch.full((20_000,), 0.9, dtype=torch.float64)
    x = ReflectedProcess().perturb(x0, sigma, seeded())
    assert kolmogorov_smirnov(x, lambda v: Folded(Gaussian(0.9, 0.0)).cdf(v, 0.4)) < 2.5


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_target_score_is_the_slope_of_the_exact_log_density_in_units_of_the_data(box: tuple[float, float]) -> None:
    process, (low, high) = ReflectedProcess(*box), box
    for start in (0.0, 1e-3, 0.4, 1.0):
        x0 = torch.tensor([low + start * process.width, high], dtype=torch.float64)
        x = low + process.width * torch.rand(4, 60, 2, dtype=torch.float64, generator=seeded())
        x[:, 0], x[:, 1] = low, high
        sigma = process.width * torch.tensor([0.02, 0.2, 0.4, 2.0], dtype=torch.float64)
        target = process.target_score(x, x0.expand_as(x), sigma)
        for i, s in enumerate(sigma):
            expected = Folded(Gaussian(x0, 0.0), *box).score(x[i], s)
            torch.testing.assert_close(s * target[i], s * expected, rtol=0, atol=1e-8)


# the box


def test_constrain_keeps_the_box_to_the_last_bit() -> None:
    for low, high in BOXES:
        for dtype in DTYPES:
            ends = torch.tensor([low, high], dtype=dtype)
            x = (low + (high - low) * torch.rand(20_000, generator=seeded())).to(dtype).clamp(*ends)
            x = torch.cat([x, ends, torch.nextafter(ends[:1].float(), ends[1:].float()).to(dtype)])
            assert torch.equal(ReflectedProcess(low, high).constrain(x), x)


def exact_fold(x: float, low: float, high: float) -> float:
    u, width = Fraction(x) - Fraction(low), Fraction(high) - Fraction(low)
    u %= 2 * width
    return float(Fraction(low) + min(u, 2 * width - u))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(x=st.floats(-1e30, 1e30), near=st.floats(-40, 40), box=st.sampled_from(BOXES), dtype=st.sampled_from(DTYPES))
@example(x=1.7, near=1.7, box=(-0.3, 1.7), dtype=torch.float32)
@example(x=1.7 + 2e-7, near=-0.3 - 3e-8, box=(-0.3, 1.7), dtype=torch.float32)
@example(x=-1e30, near=5.7, box=(-0.3, 1.7), dtype=torch.float32)
@example(x=0.0, near=-7.6015625, box=(-1.1, 0.2), dtype=torch.float16)  # rounding alone would leave the box
def test_constrain_folds_any_number_and_never_leaves_the_box(x: float, near: float, box, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max / 8
    x = torch.tensor([max(-limit, min(limit, x)), near], dtype=dtype)
    folded = ReflectedProcess(*box).constrain(x)
    assert inside(folded, *box)
    assert folded.dtype == dtype
    error = abs(folded[1].item() - exact_fold(x[1].item(), *box))
    assert error <= 8 * torch.finfo(dtype).eps * (abs(x[1].item()) + abs(box[0]) + abs(box[1]))


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_orientation_is_the_derivative_of_constrain(box: tuple[float, float]) -> None:
    process, (low, high) = ReflectedProcess(*box), box
    x = low + process.width * (9 * torch.rand(5000, dtype=torch.float64, generator=seeded()) - 4)
    x = torch.cat([x, torch.tensor([low, high, (low + high) / 2], dtype=torch.float64)]).requires_grad_()
    (slope,) = torch.autograd.grad(process.constrain(x).sum(), x)
    assert torch.equal(process.orientation(x.detach()), slope)
    assert slope.unique().tolist() == [-1, 1]
    assert (slope[-3:] == 1).all()  # the box is closed


# the prior


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_prior_is_uniform_whatever_sigma_max(box: tuple[float, float]) -> None:
    process, (low, high) = ReflectedProcess(*box), box
    x = process.sample_prior((20_000,), 7.0, seeded())
    assert torch.equal(x, process.sample_prior((20_000,), 0.1, seeded()))
    assert inside(x, low, high)
    assert kolmogorov_smirnov(x, lambda v: (v - low) / (high - low)) < 2.5


def test_prior_is_drawn_from_the_generator_on_its_own_device() -> None:
    process, state = ReflectedProcess(), torch.get_rng_state()
    draws = [process.sample_prior((4, 3), 10.0, seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)
    here, there = seeded(), seeded()
    process.sample_prior((4, 3), 10.0, here, dtype=torch.float16)
    assert process.sample_prior((4, 3), 10.0, there, dtype=torch.float16, device="meta").device.type == "meta"
    assert torch.equal(here.get_state(), there.get_state())  # drawn on the CPU, then moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prior_stays_in_odd_boxes_in_any_dtype(dtype: torch.dtype) -> None:
    for box in BOXES:
        x = ReflectedProcess(*box).sample_prior((50_000,), 1.0, seeded(), dtype=dtype)
        assert x.dtype == dtype
        assert inside(x, *box)


def test_log_prior_is_that_of_the_prior_it_samples() -> None:
    process = ReflectedProcess(-0.3, 1.7)
    x = process.sample_prior((3, 3, 32, 32), 10.0, seeded(), dtype=torch.float64)
    expected = Uniform(*torch.tensor([-0.3, 1.7], dtype=torch.float64)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(process.log_prior(x, 10.0), expected, rtol=1e-13, atol=0)
    x[0, 0, 0, 0], x[1, 2, 31, 31], x[2, 0, 0, 0] = 1.7001, float("nan"), -0.3
    assert process.log_prior(x, 10.0).isfinite().tolist() == [False, False, True]
    assert process.log_prior(x.float(), 10.0).dtype == torch.float32


# refusals


@pytest.mark.parametrize(
    "box", [(1.0, 1.0), (1.0, -1.0), (float("nan"), 1.0), (0.0, float("nan")), (0.0, float("inf"))]
)
def test_a_box_without_inside_is_refused(box: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"the box \[low, high\] = .* is empty or not finite"):
        ReflectedProcess(*box)


def test_data_outside_are_refused_by_name_and_range() -> None:
    process = ReflectedProcess(-0.3, 1.7)
    process.require_inside(torch.tensor([-0.3, 1.7]))
    with pytest.raises(ValueError, match=r"x0 must lie in \[-0.3, 1.7\], it is from -0.5 to 1"):
        process.require_inside(torch.tensor([-0.5, 1.0]))
    with pytest.raises(ValueError, match=r"images must lie in .* to 255"):
        process.require_inside(torch.tensor([0, 255]), "images")
    with pytest.raises(ValueError, match="it is from nan to nan"):
        process.require_inside(torch.tensor([0.5, float("nan")]))


# score matching: what its minimum is


BOX = (-0.3, 1.7)
LAW = Folded(
    Mixture(*(torch.tensor(v).double() for v in ([0.4, 0.6], [[-0.3, 1.5], [1.2, 0.2]], [[0.1, 0.03], [0.05, 0.2]]))),
    *BOX,
    images=6,
)
LEVELS = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)


def exact_eps(x: Tensor, sigma: Tensor) -> Tensor:
    return -along(sigma, x) * LAW.score(x, sigma)


def drawn(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise levels and noisy points."""
    x0, sigma = LAW.sample(n, seeded()), LEVELS.repeat(n // 4)
    return x0, sigma, ReflectedProcess(*BOX).perturb(x0, sigma, seeded(1))


def reflected(network) -> ReflectedModel:
    return ReflectedModel(network, lambda sigma: sigma, ReflectedProcess(*BOX))


def mean_in_standard_errors(v: Tensor) -> float:
    return (v.mean() / v.std() * len(v) ** 0.5).abs().item()


def test_the_exact_score_is_where_the_loss_has_no_gradient() -> None:
    x0, sigma, x = drawn(20_000)
    eps = exact_eps(x, sigma)
    directions = {
        "scale": eps,
        "shift": torch.ones_like(x),
        "slope": x,
        "wave": torch.cos(3 * x),
        "level": along(sigma, x),
    }
    step = torch.zeros(len(x), len(directions), dtype=torch.float64, requires_grad=True)  # a parameter for each sample
    prediction = eps + sum(along(step[:, i], x) * d for i, d in enumerate(directions.values()))
    loss = score_matching_loss(reflected(None), x, x0, sigma, prediction=prediction, weight=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), step)
    for i, name in enumerate(directions):
        assert mean_in_standard_errors(gradient[:, i]) < 4.5, name


def test_another_score_loses_the_square_of_its_distance() -> None:
    x0, sigma, x = drawn(20_000)
    wrong = [lambda x: 0.1 * torch.sin(4 * x), lambda x: 0.05 + 0 * x, lambda x: 0.2 * (x - 0.7)]
    best = score_matching_loss(reflected(exact_eps), x, x0, sigma, weight=1.0)
    for error in wrong:
        loss = score_matching_loss(
            reflected(lambda x, s, error=error: exact_eps(x, s) + error(x)), x, x0, sigma, weight=1.0
        )
        excess = error(x).square().mean(1)
        assert mean_in_standard_errors(loss - best - excess) < 4.5
        assert mean_in_standard_errors(loss - best) > 4.5
        assert loss.mean() > best.mean()


def test_the_models_views_are_those_of_the_law() -> None:
    x0, sigma, x = drawn(40)
    model, score = reflected(exact_eps), LAW.score(x, sigma)
    torch.testing.assert_close(model.score(x, sigma), score)
    torch.testing.assert_close(model(x, 0.5), -0.5 * LAW.score(x, 0.5))
    torch.testing.assert_close(model.score(x, torch.tensor(0.5)), LAW.score(x, 0.5), rtol=1e-6, atol=1e-6)
    target = torch.stack(
        [Folded(Gaussian(a, 0.0), *BOX).score(b[None], s)[0] for a, b, s in zip(x0, x, sigma, strict=True)]
    )
    expected = along(sigma, x) * (score - target)
    torch.testing.assert_close(model.score_error(model(x, sigma), x, x0, sigma), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(model.output_weight(LEVELS), torch.ones_like(LEVELS))


def test_the_weight_of_one_is_the_mean_square_error_of_eps() -> None:
    x0, sigma, x = drawn(40)
    eps = torch.stack(
        [-s * Folded(Gaussian(a, 0.0), *BOX).score(b[None], s)[0] for a, b, s in zip(x0, x, sigma, strict=True)]
    )
    loss = score_matching_loss(reflected(lambda x, s: torch.sin(x)), x, x0, sigma, weight=1.0)
    torch.testing.assert_close(loss, (torch.sin(x) - eps).square().mean(1), rtol=1e-6, atol=1e-8)


def test_conditions_reach_the_network_and_half_precision_is_computed_in_float32() -> None:
    seen = []

    def network(x, time, *, shift):
        seen.append((x.dtype, time.dtype))
        return x + shift

    x = torch.full((3, 2), 0.5)
    score = reflected(network).score(x.bfloat16(), torch.tensor([0.1, 1.0, 2.0]), shift=0.25)
    torch.testing.assert_close(score, torch.tensor([[-7.5] * 2, [-0.75] * 2, [-0.375] * 2]))
    assert seen == [(torch.float32, torch.float32)]
