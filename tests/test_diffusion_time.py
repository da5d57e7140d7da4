"""`diffusion_time`. Truth: log densities of the oracles, closed forms of Gaussian divergences, quadrature, `elbo`."""

import json
import re
import sys
from math import erf, log, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from oracles import Gaussian, Mixture, along, image_mixture
from scipy.integrate import quad
from torch import Tensor

from diffusers_ext import ReflectedScheduler, denoiser_from, dequantize, diffusion_time_report, elbo, noise_schedule
from diffusers_ext.diffusion_time import LEGEND, MOMENT_SAMPLES, STANDARD_NORMAL
from diffusers_ext.process import GaussianProcess

TIMES = (0.2, 0.4, 0.6, 0.8, 1.0)
SCHEDULER = DDPMScheduler()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def units(T: float) -> tuple[float, float]:
    """(a, b) of x_T = a x0 + b n, from the table of the betas."""
    abar = float(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[round(1000 * T) - 1])
    return sqrt(abar), sqrt(1 - abar)


def network(law: Mixture, kind: str = "epsilon", error: float = 0.0):
    """The perfect network for `law`, at fractional times too; `error` is added to E[x0 | x]."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    table = np.log((1 - abar) / abar) / 2

    def predict(h: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = torch.as_tensor(np.exp(np.interp(time.double().numpy(), np.arange(1000), table)))
        a, b = ((1 + sigma**2) ** -0.5, (1 + sigma**-2) ** -0.5)
        shift = 0.0 if class_labels is None else shift_of(class_labels, h)  # the law of x0 is moved
        x0 = law.posterior_mean(h - along(a, h) * shift, a, b) + shift + error
        a, b = along(a, h), along(b, h)
        noise = (h - a * x0) / b
        return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - b * x0}[kind].to(h.dtype)

    return predict


def shift_of(labels: Tensor, x: Tensor) -> Tensor:
    return along(2.0 * labels, x)


class Law:
    """A bridge from an oracle: the law of x_T where x0 is of `law`; wider by `widen`, and moved."""

    def __init__(self, law: Mixture, T: float, shift: float = 0.0, widen: float = 1.0) -> None:
        self.law, self.shift, self.widen = law, shift, widen
        self.config, self.checked = SimpleNamespace(max_diffusion_time=T), []
        self.a, self.b = units(T)

    def log_prob(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        moved = 0.0 if class_labels is None else self.a * shift_of(class_labels, x)
        y = (x.double() - self.shift - moved) / self.widen
        return self.law.log_prob(y, self.b, self.a) - x[0].numel() * log(self.widen)

    def check(self, scheduler, *, max_diffusion_time=None, shape=None) -> None:
        self.checked.append((scheduler, max_diffusion_time, shape))


def batched(x: Tensor, size: int = 512, **conditions: Tensor):
    for i in range(0, len(x), size):
        yield x[i : i + size], {name: value[i : i + size] for name, value in conditions.items()}


def report_of(law, x, bridges=None, times=TIMES, *, error=0.0, kind="epsilon", n=12, seed=0, **options):
    model, scheduler = network(law, kind, error), DDPMScheduler(prediction_type=kind)
    options = {"generator": seeded(seed), "progress": False} | options
    return diffusion_time_report(model, scheduler, batched(x), bridges, times, n=n, **options)


def gaussian(*shape: int, spread: float = 1.0) -> Gaussian:
    g = seeded(3)
    return Gaussian(spread * torch.randn(*shape, generator=g), 0.1 + torch.rand(*shape, generator=g))


def gaussian_kl(mean, variance, mean_2, variance_2) -> float:
    """KL[N(mean, variance) || N(mean_2, variance_2)], diagonal."""
    ratio = torch.as_tensor(variance / variance_2)
    return 0.5 * float((ratio - 1 - ratio.log() + (mean - mean_2) ** 2 / variance_2).sum())


def moments_at(law: Gaussian, T: float) -> tuple[Tensor, Tensor]:
    a, b = units(T)
    return a * law.mean, a**2 * law.variance + b**2


def close(found, expected: float, sigmas: float = 4.0) -> bool:
    return abs(found.mean - expected) < sigmas * found.std_error


def noisy(law: Mixture, n: int, sigma: float, seed: int = 1) -> Tensor:
    g = seeded(seed)
    x = law.sample(n, g)
    return x + sigma * torch.randn(x.shape, dtype=x.dtype, generator=g)


# the bound


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("law", [gaussian(3), image_mixture(1, 2, 2)], ids=["gaussian", "mixture"])
def test_with_exact_score_and_bridges_every_time_gives_the_log_density(law: Mixture, kind: str) -> None:
    sigma_min = 0.05
    x = noisy(law, 4000, sigma_min)
    bridges = {"law": [Law(law, T) for T in TIMES]}
    report = report_of(law, x, bridges, kind=kind, n=32, sigma_min=sigma_min, levels=256)  # x is the point at sigma_min
    truth = -law.log_prob(x, sigma_min)
    for i, T in enumerate(TIMES):
        errors = report.start_terms[:, i, 1] + report.score_terms[:, i] - truth
        assert abs(errors.mean()) < 4 * errors.std() / 4000**0.5
        assert errors.std() / 4000**0.5 < 0.05
        terms = report.terms(T, "law")
        assert terms.negative_bound.mean == pytest.approx(terms.start_term.mean + terms.score_term.mean, abs=1e-9)
        dims = x[0].numel()
        assert terms.bits_per_dim.mean == pytest.approx((terms.negative_bound.mean / dims - log(2 / 256)) / log(2))
        assert terms.bits_per_dim.std_error == pytest.approx(terms.negative_bound.std_error / dims / log(2))


def test_each_term_has_its_closed_form() -> None:
    law, sigma_min = gaussian(3), 0.3
    report = report_of(law, law.sample(6000, seeded(1)), {"law": [Law(law, T) for T in TIMES]}, sigma_min=sigma_min)
    at_min = 0.5 * (2 * np.pi * np.e * (law.variance + sigma_min**2)).log().sum().item()  # entropy of x
    for T in TIMES:
        mean, variance = moments_at(law, T)
        entropy = 0.5 * (2 * np.pi * np.e * variance).log().sum().item()
        normal = entropy + gaussian_kl(mean, variance, torch.zeros(3), torch.ones(3))
        exact, other = report.terms(T, "law"), report.terms(T)
        assert close(exact.start_term, entropy)
        assert close(other.start_term, normal)
        assert close(exact.score_term, at_min - entropy)
        assert exact.score_term == other.score_term
        assert close(exact.negative_bound, at_min)
        assert exact.bits_per_dim.mean == pytest.approx(exact.negative_bound.mean / 3 / log(2))
        assert exact.start_term.std_error < 0.05
        assert exact.negative_bound.std_error < 0.05


@pytest.mark.parametrize("start", [None, "bridge"])
def test_at_one_time_it_is_elbo(start) -> None:
    law, T, sigma_min = image_mixture(1, 2, 2), 1.0 if start is None else 0.6, 0.02
    x, (a, b) = noisy(law, 50, sigma_min), units(T)
    bridge = Law(law, T, shift=0.2)
    bridges = None if start is None else {start: [bridge]}
    report = report_of(law, x, bridges, (T,), sigma_min=sigma_min, levels=2, n=7)

    def log_prior(y: Tensor, sigma: float) -> Tensor:
        density = GaussianProcess().log_prior(a * y, 1.0) if start is None else bridge.log_prob(a * y)
        return density + 4 * log(a)

    model = denoiser_from(network(law), SCHEDULER)
    bound = elbo(model, x, sigma_min, b / a, n=7, generator=seeded(), log_prior=log_prior)
    found = report.start_terms[:, 0, -1] + report.score_terms[:, 0]
    torch.testing.assert_close(found, -bound.total, rtol=1e-5, atol=1e-5)  # the tables of the two are float32 and 64
    torch.testing.assert_close(report.score_terms[:, 0], -bound.diffusion - 4 * log(a), rtol=1e-5, atol=1e-5)


def test_a_time_is_the_same_whatever_the_others() -> None:
    law = image_mixture(1, 2, 2)
    x = law.sample(2000, seeded(1))
    many, one = report_of(law, x, n=20), report_of(law, x, times=(0.4,), n=20, seed=1)
    for name in ("start_term", "score_term"):
        found, alone = getattr(many.terms(0.4), name), getattr(one.terms(0.4), name)
        assert abs(found.mean - alone.mean) < 4 * (found.std_error**2 + alone.std_error**2) ** 0.5
    assert one.reference is None
    assert one.terms(0.4).kl is None


# what a wrong start and a wrong score cost


def test_the_divergence_of_a_wrong_bridge_is_the_analytic_one() -> None:
    law, shift, widen = gaussian(3), 0.3, 1.5
    bridges = {
        "wrong": [Law(law, T, shift, widen) for T in (0.4, 0.8, 1.0)],
        "right": [Law(law, T) for T in (0.2, 0.4, 0.8, 1.0)],
    }
    report = report_of(law, law.sample(4000, seeded(1)), bridges)
    for T in (0.4, 0.8, 1.0):
        mean, variance = moments_at(law, T)
        expected = gaussian_kl(mean, variance, widen * mean + shift, widen**2 * variance)
        assert close(report.difference((T, "wrong"), (T, "right")), expected)
        assert close(report.terms(T, "wrong").kl, expected)  # that of T = 1 is 1e-5
        assert report.terms(T, "wrong").kl.std_error < 0.1 * expected
        assert report.terms(T, "wrong").kl_expansion is None
    assert (0.2, "wrong") not in report.cells
    with pytest.raises(KeyError, match=r"no \(T, start\) = \(0.2, 'wrong'\)"):
        report.terms(0.2, "wrong")


@pytest.mark.parametrize("spread", [2.0, 0.0])  # the first term of the expansion leads, or the second
def test_the_divergence_of_the_normal_law_is_the_closed_one_and_its_expansion(spread: float) -> None:
    law = gaussian(3, spread=spread)
    report = report_of(law, law.sample(6000, seeded(1)))
    for T in TIMES:
        mean, variance = moments_at(law, T)
        expected = gaussian_kl(mean, variance, torch.zeros(3), torch.ones(3))
        assert close(report.terms(T).kl, expected) or T == 1
        assert T == 1 or report.terms(T).kl.std_error < 0.1
        abar = units(T)[0] ** 2
        second = abar * law.mean.square().sum() / 2 + abar**2 * (law.variance - 1).square().sum() / 4
        assert report.terms(T).kl_expansion == pytest.approx(second.item(), rel=0.06, abs=2e-3 * abar)  # |E x0|^2: .004
        assert T < 0.6 or second.item() == pytest.approx(expected, rel=0.03)
    assert spread == 0 or report.terms(0.2).kl.mean > 50 * report.terms(0.2).kl.std_error
    assert report.terms(1.0).kl == (0.0, 0.0)


def test_the_moments_are_without_bias() -> None:
    law, runs = gaussian(3), 4000
    data = law.sample(runs * 6, seeded(1)).reshape(runs, 6, 3)
    from diffusers_ext.diffusion_time import _moments

    found = torch.tensor([_moments(x) for x in data], dtype=torch.float64)
    expected = torch.stack([law.mean.square().sum(), (law.variance - 1).square().sum()])
    error = found.std(0) / runs**0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.1 * expected).all()


def test_a_wrong_score_costs_its_analytic_square_and_lowers_the_divergence() -> None:
    law, sigma_min, error = gaussian(3), 0.3, 0.4
    x, bridges = law.sample(3000, seeded(1)), {"law": [Law(law, T) for T in TIMES]}
    right, wrong = (report_of(law, x, bridges, sigma_min=sigma_min, error=e) for e in (0.0, error))

    def lost(T: float) -> float:  # the score is off by error / sigma^2
        return quad(lambda sigma: 3 * error**2 / sigma**3, sigma_min, units(T)[1] / units(T)[0])[0]

    for i, T in enumerate(TIMES):
        extra = wrong.score_terms[:, i] - right.score_terms[:, i]
        assert abs(extra.mean() - lost(T)) < 4 * extra.std() / 3000**0.5
        assert extra.std() / 3000**0.5 < 0.03 * lost(T)
        assert torch.equal(wrong.start_terms[:, i], right.start_terms[:, i])
        low = wrong.terms(T, "law").kl  # the bridge has none
        assert abs(low.mean - lost(T) + lost(1.0)) < 4 * low.std_error + 1e-3
    assert wrong.terms(0.2, "law").kl.mean < -4 * wrong.terms(0.2, "law").kl.std_error


# errors


def test_standard_errors_cover() -> None:
    law, runs, sigma_min = gaussian(2), 250, 0.1
    at_min = 0.5 * (2 * np.pi * np.e * (law.variance + sigma_min**2)).log().sum().item()
    cells = [(0.4, "law"), (1.0, STANDARD_NORMAL)]
    places = []
    for seed in range(runs):
        x = law.sample(40, seeded(10_000 + seed))
        report = report_of(law, x, {"law": [Law(law, 0.4)]}, (0.4, 1.0), n=4, sigma_min=sigma_min, seed=seed)
        bounds = [report.terms(*cell).negative_bound for cell in cells]
        kl = report.terms(0.4, "law").kl
        places.append([*((b.mean - at_min) / b.std_error for b in bounds), kl.mean / kl.std_error])
    z = torch.tensor(places)
    assert (z.mean(0).abs() < 4 / runs**0.5).all()
    assert ((z.std(0) - 1).abs() < 0.2).all()  # of Student's law with 39 degrees of freedom 1.03
    assert ((z.abs() < 1).double().mean(0) - erf(0.5**0.5)).abs().max() < 0.12


def test_differences_are_paired() -> None:
    law = gaussian(3)
    report = report_of(law, law.sample(500, seeded(1)), {"law": [Law(law, 0.6)]})
    one, other = report.terms(0.6, "law").negative_bound, report.terms(0.6).negative_bound
    difference = report.difference((0.6, "law"), (0.6, STANDARD_NORMAL))
    assert difference.mean == pytest.approx(one.mean - other.mean, abs=1e-9)
    assert difference.std_error < 0.3 * (one.std_error**2 + other.std_error**2) ** 0.5


# the best time


def test_the_verdict_names_the_best_time_and_its_noise() -> None:
    law = gaussian(3)
    x = law.sample(600, seeded(1))
    flawed = report_of(law, x, {"law": [Law(law, 0.2), Law(law, 1.0)]}, (0.2, 1.0), error=0.3, sigma_min=0.3)
    assert flawed.best == (0.2, "law")
    gain = flawed.difference((1.0, STANDARD_NORMAL), (0.2, "law"))
    assert gain.mean > 5 * gain.std_error
    assert "T = 0.2, started from law: better than T = 1" in flawed.verdict()
    assert "is distinguishable from it (2.4 standard errors" in flawed.verdict()  # .05 / 3, two-sided
    exact = report_of(law, x, {"law": [Law(law, T) for T in TIMES]})
    assert exact.best[1] == "law" or exact.best == (1.0, STANDARD_NORMAL)
    assert "not distinguishable" in exact.verdict() or "no shorter" in exact.verdict()
    assert "no shorter time and no bridge is better" in report_of(law, x, times=(0.2, 1.0)).verdict()
    assert "nothing to compare" in report_of(law, x, times=(0.2,)).verdict()


# what reaches the network and the bridges


def test_labels_reach_the_network_and_the_bridges_in_their_order() -> None:
    law, sigma_min = gaussian(1, 2, 2), 0.1
    labels = torch.randint(0, 3, (2000,), generator=seeded(2))
    x = law.sample(2000, seeded(1)) + along(2.0 * labels, torch.zeros(1, 1, 1, 1))
    bridges = {"law": [Law(law, T) for T in (0.2, 0.6)]}
    batches = batched(x, 300, class_labels=labels)
    report = diffusion_time_report(
        network(law), SCHEDULER, batches, bridges, n=12, sigma_min=sigma_min, generator=seeded(), progress=False
    )
    entropy = 0.5 * (2 * np.pi * np.e * (law.variance + sigma_min**2)).log().sum().item()
    for T in (0.2, 0.6):
        assert close(report.terms(T, "law").negative_bound, entropy)
        assert report.terms(T, "law").negative_bound.std_error < 0.1
        assert close(report.terms(T, "law").kl, 0)


def test_bridges_are_checked_with_their_time_and_the_shape() -> None:
    law = gaussian(1, 2, 2)
    bridges = {"a": [Law(law, 0.2), Law(law, 0.6)], "b": [Law(law, 0.6)]}
    report = report_of(law, law.sample(8, seeded(1)), bridges)
    for bridge in (*bridges["a"], *bridges["b"]):
        (scheduler, T, shape), *rest = bridge.checked
        assert (T, shape, rest) == (bridge.config.max_diffusion_time, (1, 2, 2), [])
        assert noise_schedule(scheduler).num_train_timesteps == 1000
    normal = [(T, STANDARD_NORMAL) for T in TIMES]
    assert sorted(report.cells) == sorted([*normal, (0.2, "a"), (0.6, "a"), (0.6, "b")])


def test_the_generator_is_the_only_source_of_randomness() -> None:
    law, state = image_mixture(1, 2, 2), torch.get_rng_state()
    x = law.sample(8, seeded(1))
    first, again, other = (report_of(law, x, seed=s) for s in (1, 1, 2))
    default, same = (report_of(law, x, generator=None) for _ in range(2))
    assert torch.equal(first.score_terms, again.score_terms)
    assert torch.equal(first.start_terms, again.start_terms)
    assert (first.score_terms != other.score_terms).all()
    assert (first.start_terms != other.start_terms).all()
    assert torch.equal(default.score_terms, same.score_terms)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_pass_with_n_evaluations_and_one_transfer(monkeypatch) -> None:
    law, calls, waits = gaussian(3), [], []
    x = law.sample(40, seeded(1)).float()
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)
        counted = lambda *a, _o=original, _n=name: (waits.append(_n), _o(*a))[1]  # noqa: E731
        monkeypatch.setattr(Tensor, name, counted)

    def model(h: Tensor, time: Tensor) -> Tensor:
        calls.append(len(h))
        return h

    counts = []
    for size in (40, 4):
        waits.clear(), calls.clear()
        diffusion_time_report(model, SCHEDULER, batched(x, size), n=9, generator=seeded(), progress=False)
        assert calls == [size] * 9 * (40 // size)
        counts.append(list(waits))
    assert counts[0] == counts[1]


def test_half_precision_and_many_samples() -> None:
    x = torch.randn(MOMENT_SAMPLES + 100, 2, generator=seeded()).half()
    report = diffusion_time_report(lambda h, t: h, SCHEDULER, batched(x, 400), n=5, progress=False)
    assert report.score_terms.shape == (MOMENT_SAMPLES + 100, 5)
    assert report.score_terms.dtype == torch.float64
    assert report.score_terms.isfinite().all()


def test_discrete_data() -> None:
    images = torch.randint(0, 4, (400, 1, 2, 2), generator=seeded()) * (2 / 3) - 1
    x = dequantize(images, seeded(1), levels=4).double()
    law = Gaussian(torch.zeros(1, 2, 2), x.var())  # not the law of x
    report = report_of(law, x, {"law": [Law(law, 0.6)]}, (0.6, 1.0), sigma_min=0.05, levels=4, low=-1.0, high=1.0)
    terms = report.terms(0.6, "law")
    expected = (-law.log_prob(x, 0.05).mean().item() / 4 - log(2 / 4)) / log(2)
    assert close(terms.bits_per_dim, expected)
    assert expected > 2  # what these data have


# what is written


def test_the_table_the_file_and_the_picture_hold_the_numbers(tmp_path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    law = gaussian(3)
    report = report_of(law, law.sample(50, seeded(1)), {"law": [Law(law, 0.2), Law(law, 0.6)]})
    lines = report.table().splitlines()
    count = 2 + len(report.cells)
    assert [line.startswith("|") for line in lines[: count + 1]] == [True] * count + [False]
    assert "\n".join(lines[count + 1 :]) == LEGEND
    head, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in (lines[0], *lines[2:count]))
    assert {n.removesuffix(", nats") for n in head if n.endswith(", nats")} == set(re.findall(r"\*([^*]+)\*", LEGEND))
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        terms = report.terms(float(cells["T"]), cells["start"])
        for name, estimate in (("-log start", terms.start_term), ("score", terms.score_term), ("KL", terms.kl)):
            mean, error = map(float, cells[f"{name}, nats"].split("±"))
            assert abs(mean - estimate.mean) <= 0.051 * estimate.std_error + 5e-4
            assert abs(error - estimate.std_error) <= 0.051 * estimate.std_error

    report.save(tmp_path / "new" / "report.json")
    stored = json.loads((tmp_path / "new" / "report.json").read_text())
    assert [(row["T"], row["start"]) for row in stored["rows"]] == list(report.cells)
    terms = report.terms(0.6, "law")
    row = next(row for row in stored["rows"] if (row["T"], row["start"]) == (0.6, "law"))
    assert row["negative_bound"] == list(terms.negative_bound)
    assert row["timestep"] == 599
    assert (stored["num_samples"], stored["verdict"]) == (50, report.verdict())

    drawn, original = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), original(f, *a, **k))[1])
    report.plot(tmp_path / "report.png")
    (path,) = tmp_path.glob("*.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob(".partial*"))
    panels = drawn[0].axes
    line = next(c for c in panels[2].containers if c.get_label() == "law")
    expected = [report.terms(T, "law").kl for T in (0.2, 0.6)]
    assert line.lines[0].get_ydata() == pytest.approx([v.mean for v in expected])
    low, high = (cap.get_ydata() for cap in line.lines[1])
    assert (high - low) / 4 == pytest.approx([v.std_error for v in expected])


def test_a_picture_needs_matplotlib_and_is_whole_or_absent(tmp_path, monkeypatch) -> None:
    law = gaussian(3)
    report = report_of(law, law.sample(8, seeded(1)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot(tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


def test_a_start_that_fails_is_shown_and_never_the_best() -> None:
    law, broken = gaussian(3), Law(gaussian(3), 0.6)
    broken.log_prob = lambda x, class_labels=None: x.flatten(1).sum(1) * torch.nan
    report = report_of(law, law.sample(8, seeded(1)), {"broken": [broken]})
    assert (0.6, "broken") in report.cells
    assert report.best[1] == STANDARD_NORMAL
    assert "nan" in report.table()


# wrong input


def refusing(T: float) -> Law:
    bridge = Law(gaussian(3), T)

    def check(scheduler, *, max_diffusion_time=None, shape=None) -> None:
        raise ValueError("another schedule")

    bridge.check = check
    return bridge


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": ReflectedScheduler(num_train_timesteps=100)}, "family vp, this one is reflected"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "family vp, this one is flow"),
        ({"times": (0.0, 1.0)}, "must be in"),
        ({"times": (0.5, 1.2)}, "must be in"),
        ({"times": ()}, "one or more"),
        ({"times": (0.5, 0.5001)}, r"of a timestep each: \(0.5, 0.5001\) are timesteps \(499, 499\)"),
        ({"n": 4}, "at least 5, the number of times"),
        ({"sigma_min": 0.9}, "sigma_min < sigma_max"),
        ({"times": (0.001, 1.0)}, "sigma_min < sigma_max"),
        ({"batches": []}, "0 held-out samples are too few"),
        ({"batches": [(torch.zeros(3, 3), {})]}, "3 held-out samples are too few"),
        ({"batches": [(torch.zeros(3, 3), {}), (torch.zeros(3, 4), {})]}, r"one shape, got \(3,\) and \(4,\)"),
        ({"bridges": {"a": [Law(gaussian(3), 0.5)]}}, "bridge 'a' of T=0.5: its T must be one of"),
        ({"bridges": {"a": [Law(gaussian(3), 0.2)] * 2}}, "bridge 'a' of T=0.2: .* once for a name"),
        ({"bridges": {STANDARD_NORMAL: [Law(gaussian(3), 0.2)]}}, "which is not 'N"),
        ({"bridges": {"a": [refusing(0.2)]}}, "another schedule"),
    ],
)
def test_wrong_input_is_refused(changes, message) -> None:
    arguments = {
        "scheduler": SCHEDULER,
        "batches": [(torch.zeros(5, 3), {})],
        "bridges": None,
        "times": TIMES,
        "n": 5,
    } | changes
    with pytest.raises(ValueError, match=message):
        diffusion_time_report(lambda h, t: h, progress=False, **arguments)


def test_any_variance_preserving_scheduler_in_any_order_of_times() -> None:
    x = gaussian(3).sample(8, seeded(1)).float()
    scheduler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    reports = [
        diffusion_time_report(lambda h, t: h, s, batched(x), times=times, n=5, progress=False)
        for s, times in ((scheduler, (1.0, 0.2, 0.6)), (SCHEDULER, (0.2, 0.6, 1.0)))
    ]
    assert reports[0].times == (0.2, 0.6, 1.0)
    torch.testing.assert_close(reports[0].start_terms, reports[1].start_terms, rtol=1e-4, atol=1e-4)
