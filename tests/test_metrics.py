"""Truth: SciPy's matrix square root, and the closed form for Gaussians with known moments."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusers_ext.metrics import frechet_distance


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


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5, 3, 2), (5, 3, 2))])
def test_bad_features_are_refused(shapes):
    with pytest.raises(ValueError, match=r"features|samples"):
        frechet_distance(*(torch.zeros(s) for s in shapes))
