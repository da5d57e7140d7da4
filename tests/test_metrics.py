"""Truth: SciPy's matrix square root and k-d tree, closed forms for Gaussians with known moments, loops over pairs,
points placed by hand."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_ext import metrics
from diffusers_ext.metrics import (
    copies,
    frechet_distance,
    jackknife,
    kernel_distance,
    nearest,
    precision_recall,
    pseudo_values,
    student_interval,
)

BLOCKS = (1, 7, 100, 640)  # entries of a block: one row, one row, some rows, which do not divide the sets


@pytest.fixture(params=BLOCKS)
def blocks(request, monkeypatch):
    """Small blocks, and a function that computes in one block."""

    def whole(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "_ENTRIES", 10**9)
            return function(*args)

    monkeypatch.setattr(metrics, "_ENTRIES", request.param)
    return whole


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


def test_precision_and_recall_do_not_depend_on_the_blocks(blocks):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(53, 4, generator=generator), 0.7 * torch.randn(61, 4, generator=generator)
    found = precision_recall(b, a)
    assert found == blocks(precision_recall, b, a)
    assert 0.5 < found[1] < found[0] < 1


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


def test_paired_values_cover_a_change_that_two_intervals_cannot_tell() -> None:
    """The second side has a part of its own beside the noise that both share. At 95% fewer than 30 of 36 have a
    probability of 0.5%."""
    covered = told = told_apart = 0
    for seed in range(36):
        x, reference, before = gaussians(8, 500, seed)
        own = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1000 + seed))
        y = 0.95 * x + 0.05 * own - 0.05  # of variance .905
        scales = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
        after = 8 * (0.1 + 0.05) ** 2 + (scales - 0.905**0.5).square().sum().item()
        values = [pseudo_values(frechet_distance, features, reference) for features in (x, y)]
        one, other = map(student_interval, values)
        found = student_interval(values[1] - values[0])
        covered += found.low <= after - before <= found.high
        told += found.low > 0
        told_apart += one.high < other.low
    assert covered >= 30
    assert told >= 30
    assert told_apart <= 6


def test_the_jackknife_of_a_mean_is_the_usual_interval() -> None:
    """With groups of one sample pair, or means of groups: Student's interval of the group means."""
    x = torch.randn(60, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = jackknife(lambda a, b: a.mean().item(), x, x, groups=12, level=0.9)
    group = torch.randperm(60, generator=torch.Generator().manual_seed(0)) % 12
    means = torch.stack([x[group == j].mean() for j in range(12)])
    half = 1.7958848 * means.std().item() / 12**0.5  # 95% quantile of t with 11 degrees of freedom, from a table
    assert found.estimate == pytest.approx(x.mean().item())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-4)


@pytest.mark.parametrize(("n", "groups"), [(10, 1), (19, 10)])
def test_too_few_samples_for_the_jackknife_are_refused(n, groups) -> None:
    with pytest.raises(ValueError, match=f"{groups} groups of {n} samples|groups must be at least 2"):
        jackknife(frechet_distance, torch.zeros(n, 2), torch.zeros(n, 2), groups=groups)


def kernel_distance_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(z):
        return np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 1), (9, 14, 3), (23, 17, 40)])
def test_kernel_distance_equals_loops_over_pairs(blocks, n, m, d):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator)
    y = 1.5 * torch.randn(m, d, generator=generator) + 0.2
    truth = kernel_distance_by_loops(x.double().numpy(), y.double().numpy())
    assert kernel_distance(x, y) == pytest.approx(truth, rel=1e-10)
    assert kernel_distance(y, x) == pytest.approx(truth, rel=1e-10)
    order = torch.randperm(n, generator=generator)
    assert kernel_distance(x[order], y.flip(0)) == pytest.approx(truth, rel=1e-10)


def test_kernel_distance_equals_that_of_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y, _ = gaussians(20, 90, seed=3)
    assert kernel_distance(x, y) == pytest.approx(kid.poly_mmd(x, y).item(), rel=1e-9)


def mean_kernel(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """E (x.y/d + 1)^3 of independent Gaussians: E (x.y)^r contracts their moment tensors of order r."""

    def moments(m, c):
        third = np.einsum("i,j,k->ijk", m, m, m)
        for axes in ("i,jk->ijk", "j,ik->ijk", "k,ij->ijk"):
            third = third + np.einsum(axes, m, c)
        return m, np.outer(m, m) + c, third

    d = len(mean_1)
    first, second, third = ((a * b).sum() for a, b in zip(moments(mean_1, cov_1), moments(mean_2, cov_2), strict=True))
    return 1 + 3 * first / d + 3 * second / d**2 + third / d**3


def kernel_truth(d: int, apart: bool) -> float:
    """Of the laws of `gaussians`."""
    one = np.zeros(d), np.eye(d)
    two = (np.full(d, 0.1), np.diag(np.linspace(0.5, 1.5, d) ** 2)) if apart else one
    return mean_kernel(*one, *one) + mean_kernel(*two, *two) - 2 * mean_kernel(*one, *two)


MORE = [pytest.param(6, True, marks=pytest.mark.slow), pytest.param(40, False, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("d", "apart"), [(1, True), (6, False), (40, True), *MORE])
def test_kernel_distance_is_unbiased_even_of_few_samples(d, apart):
    """On average over 4000 pairs of sets of 5 samples, within 4 errors."""
    a, b, _ = gaussians(d, 20_000, 0, apart)
    found = torch.tensor([kernel_distance(p, q) for p, q in zip(a.split(5), b.split(5), strict=True)])
    assert found.mean().item() == pytest.approx(kernel_truth(d, apart), abs=4 * found.std().item() / 4000**0.5)
    assert (found < 0).any()


@pytest.mark.parametrize(("d", "apart"), [(6, False), (40, True), *MORE])
def test_the_jackknife_of_the_kernel_distance_covers_the_truth(d, apart):
    """At 95% fewer than 30 of 36 have a probability of 0.5%. The half width is within a factor of 2 of the 2.26 errors
    that it should be, also between samples of one law, where it is too wide."""
    truth, covered, errors, widths = kernel_truth(d, apart), 0, [], []
    for seed in range(36):
        a, b, _ = gaussians(d, 500, seed, apart)
        found = jackknife(kernel_distance, a, b)
        covered += found.low <= truth <= found.high
        errors.append(found.estimate - truth)
        widths.append(found.high - found.low)
    errors = torch.tensor(errors)
    assert covered >= 30
    assert errors.mean().abs() < 3 * errors.std() / 6
    assert 0.5 < sum(widths) / 36 / 2 / (2.26 * errors.std()) < 2


def test_the_nearest_sample_is_that_of_scipys_tree(blocks):
    generator = torch.Generator().manual_seed(0)
    reference, x = torch.randn(61, 5, generator=generator), torch.randn(43, 5, generator=generator)
    distances, indices = scipy.spatial.cKDTree(reference.double().numpy()).query(x.double().numpy())
    found = nearest(x, reference)
    assert found.distances.dtype == torch.float64
    assert found.distances.numpy() == pytest.approx(distances, rel=1e-12)
    assert (found.indices.numpy() == indices).all()
    assert nearest(reference, reference).distances.tolist() == [0] * 61
    assert nearest(reference, reference.flip(0)).indices.tolist() == list(range(60, -1, -1))


def test_a_sample_far_from_the_origin_is_at_distance_zero_of_itself():
    """In single precision, or by |x|^2 + |y|^2 - 2 x.y, it is not."""
    x = 1e6 + torch.randn(20, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert nearest(x, x).distances.tolist() == [0] * 20
    assert nearest(x, x).indices.tolist() == list(range(20))
    assert nearest(x[:1] + 1e-6, x).distances.item() == pytest.approx(1e-6 * 300**0.5, rel=1e-3)


def test_copies_of_points_on_a_line():
    """Training samples at 0, 10, 20; held-out ones at distances 1, 2, 3, 4, of which 1/4 is 1, 1/2 is 2 and 3/4 is 4
    (ranks 1.25, 2.5 and 3.75 of 5, rounded, 2.5 to the even one)."""
    training, held_out = torch.tensor([[0.0], [10], [20]]), torch.tensor([[12.0], [-4], [19], [7]])
    samples = torch.tensor([[0.0], [9.5], [21], [21.5], [12], [13], [-50], [15]])
    assert copies(samples, training, held_out, level=0.25) == 3 / 8
    assert copies(samples, training, held_out, level=0.5) == 5 / 8
    assert copies(samples, training, held_out, level=0.75) == 6 / 8
    assert copies(training, training, training, level=0.5) == 1


@pytest.mark.parametrize(("level", "n"), [(0.01, 300), (0.01, 100), (0.1, 300), (0.1, 10)])
def test_of_new_samples_about_the_level_count_as_copies(level, n):
    """On average over 60 sets of held-out and drawn samples, within 3 errors."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(60):
        training, held_out = (torch.randn(k, 2, generator=generator) for k in (200, n))
        found.append(copies(torch.randn(500, 2, generator=generator), training, held_out, level))
    found = torch.tensor(found)
    expected = round(level * (n + 1)) / (n + 1)
    assert expected == pytest.approx(level, rel=0.1)
    assert found.mean().item() == pytest.approx(expected, abs=3 * found.std().item() / 60**0.5)


def test_the_share_of_copies_is_found():
    training, held_out, new = (torch.randn(1000, 30, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert copies(training[:200], training, held_out) == 1
    assert copies(training[:200] + 0.001, training, held_out) == 1
    mixed = torch.cat([training[:300], new[:700]])
    assert copies(mixed, training, held_out) == pytest.approx(0.3 + 0.7 * 0.01, abs=0.01)


@pytest.mark.parametrize(
    ("n", "level", "message"), [(99, 0.01, "at least 100 held-out"), (9, 0.0, "above 0"), (9, 1.0, "below 1")]
)
def test_bad_input_of_copies_is_refused(n, level, message):
    with pytest.raises(ValueError, match=message):
        copies(torch.zeros(5, 2), torch.zeros(5, 2), torch.zeros(n, 2), level)


@pytest.mark.parametrize("function", [kernel_distance, nearest])
def test_bad_features_of_the_other_measures_are_refused(function):
    with pytest.raises(ValueError, match="one d"):
        function(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="at least"):
        function(torch.zeros(5, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="at least 2 samples"):
        kernel_distance(torch.zeros(5, 3), torch.zeros(1, 3))


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation gives."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.entries = max([self.entries, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("function", [kernel_distance, nearest, precision_recall])
def test_no_matrix_of_all_pairs_is_in_memory(monkeypatch, function):
    monkeypatch.setattr(metrics, "_ENTRIES", 5000)
    a, b, _ = gaussians(4, 400, seed=0)
    with Largest() as largest:
        function(a, b)
    assert 1600 < largest.entries <= 5000


def test_the_jackknife_takes_sorted_samples():
    """Ten classes far apart, one law, sorted by class: dealt out in turn or in runs, groups would not be alike."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(10, 8, generator=generator)
    labels = [torch.randint(10, (600,), generator=generator).sort().values for _ in range(2)]
    a, b = (centres[y] + torch.randn(600, 8, generator=generator) for y in labels)
    found = jackknife(frechet_distance, a, b)
    assert found.low < 0 < found.high
    assert found.high - found.low < 30  # of a trace of 800
