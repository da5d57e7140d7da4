"""Truth: SciPy's matrix square root, the closed form for Gaussians with known moments, points placed by hand."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusers_ext.metrics import frechet_distance, jackknife, precision_recall


@pytest.mark.parametrize(("n_1", "n_2", "d"), [(100, 80, 10), (40, 300, 64), (30, 20, 64)])
def test_frechet_distance_equals_scipys_square_root(n_1, n_2, d):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n_1, d, generator=generator)
    b = torch.randn(n_2, d, generator=generator) @ torch.randn(d, d, generator=generator) / d**0.5 + 0.3
    c_a, c_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = scipy.linalg.sqrtm(c_a @ c_b).real
    truth = (a.double().mean(0) - b.double().mean(0)).square().sum().item() + np.trace(c_a + c_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-4)


def test_frechet_distance_of_shifted_and_scaled_features_is_the_closed_form():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    variances = x.var(0)
    shift = torch.tensor([1.0, -2.0, 0, 0, 0.5, 0])
    truth = ((3 - 1) ** 2 * variances.sum() + (3 * x.mean(0) + shift - x.mean(0)).square().sum()).item()
    assert frechet_distance(x, 3 * x + shift) == pytest.approx(truth, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_of_points_on_a_line():
    """Real at 0, 1, 3, 7: with k = 1 the radii are 1, 1, 2, 4, and the balls cover [-1, 11]; with k = 2 they are 3, 2,
    3, 6, and cover [-3, 13]. Generated at 2, 2.5, -2, 12: the radii with k = 1 are .5, .5, 4, 9.5, and the balls cover
    [-6, 2] (around -2), [2, 3] and [2.5, 21.5]; so do those of k = 2, which are larger."""
    real = torch.tensor([[0.0], [1], [3], [7]])
    generated = torch.tensor([[2.0], [2.5], [-2], [12]])
    assert precision_recall(generated, real, k=1) == (0.5, 1)
    assert precision_recall(generated, real, k=2) == (1, 1)
    assert precision_recall(real, generated, k=1) == (1, 0.5)


def test_precision_falls_without_quality_and_recall_without_variety():
    """In the plane, real samples on two squares far apart, one square in each corner."""
    square = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    real = torch.cat([square, square + 100])
    assert precision_recall(square, real) == (1, 0.5)  # one mode is missing
    assert precision_recall(torch.cat([real, square + 50, square - 50]), real) == (0.5, 1)  # half is of no mode
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 3, real) == (0, 0)


@pytest.mark.parametrize(
    ("shapes", "k", "message"),
    [(((5, 3), (5, 4)), 3, "one d"), (((3, 2), (9, 2)), 3, "at least 4 samples"), (((9, 2), (9, 2)), 0, "k must be")],
)
def test_bad_input_of_precision_is_refused(shapes, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(*(torch.zeros(s) for s in shapes), k=k)


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5, 3, 2), (5, 3, 2))])
def test_bad_features_are_refused(shapes):
    with pytest.raises(ValueError, match=r"features|samples"):
        frechet_distance(*(torch.zeros(s) for s in shapes))


def gaussians(d: int, n: int, seed: int, apart: bool = True) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Two samples of diagonal Gaussians, and their distance |m|^2 + sum (s - 1)^2."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, d, dtype=torch.float64, generator=g)
    scales = torch.linspace(0.5, 1.5, d, dtype=torch.float64) if apart else torch.ones(d, dtype=torch.float64)
    shift = 0.1 if apart else 0.0
    return a, b * scales + shift, d * shift**2 + (scales - 1).square().sum().item()


@pytest.mark.parametrize(("d", "apart"), [(16, True), (64, True), (64, False)])
def test_the_jackknife_covers_the_truth_where_the_plain_distance_is_far_off(d, apart) -> None:
    """At 95% fewer than 30 of 36 have a probability of 0.5%. The estimate is right on average, within 3 errors."""
    covered, errors, plain = 0, [], []
    for seed in range(36):
        a, b, truth = gaussians(d, 1000, seed, apart)
        found = jackknife(frechet_distance, a, b)
        covered += found.low <= truth <= found.high
        errors.append(found.estimate - truth)
        plain.append(frechet_distance(a, b) - truth)
    errors = torch.tensor(errors)
    assert covered >= 30
    assert errors.mean().abs() < 3 * errors.std() / 6 + 0.01 * truth
    assert sum(plain) / 36 > (0.1 if d == 16 else 1.5)


def test_the_jackknife_of_a_mean_is_the_usual_interval() -> None:
    """With groups of one sample pair, or means of groups: Student's interval of the group means."""
    x = torch.randn(60, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = jackknife(lambda a, b: a.mean().item(), x, x, groups=12, level=0.9)
    means = x.reshape(5, 12).mean(0)
    half = 1.7958848 * means.std().item() / 12**0.5  # 95% quantile of t with 11 degrees of freedom, from a table
    assert found.estimate == pytest.approx(x.mean().item())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-4)


@pytest.mark.parametrize(("n", "groups"), [(10, 1), (19, 10)])
def test_too_few_samples_for_the_jackknife_are_refused(n, groups) -> None:
    with pytest.raises(ValueError, match=f"{groups} groups of {n} samples"):
        jackknife(frechet_distance, torch.zeros(n, 2), torch.zeros(n, 2), groups=groups)
