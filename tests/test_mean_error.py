"""`mean_error`. Truth: perfect networks of exact laws with an error added to their eps, so that the mean error is known
at every level, coordinate and condition. Rows serve as independent repetitions: one run measures hundreds of them."""

import os
from math import sqrt
from types import SimpleNamespace

import pytest
import stranger
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from oracles import Gaussian, along, image_mixture
from products import every_value
from safetensors.torch import load_file
from test_calibration import OracleNetwork, buffers, tiny_unet
from torch import Tensor

from diffusers_ext import ReflectedScheduler, calibrate_denoiser, denoiser_from, estimate_calibration

SHAPE, D = (2, 4), 8
PLAIN = {"control_variate": False, "antithetic": False}
CONTROL = {"control_variate": True, "antithetic": False}
ANTITHETIC = {"control_variate": True, "antithetic": True}
ESTIMATORS = {"antithetic": ANTITHETIC, "control variate": CONTROL, "plain": PLAIN}
LAW = image_mixture(*SHAPE)
ISOTROPIC = Gaussian(torch.zeros(SHAPE), 0.6)
SCHEDULER = EDMEulerScheduler(sigma_min=0.05, sigma_max=20.0)  # a network that is told the exact level
SIGMAS = (0.05, 1.0, 20.0)
PATTERN = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(sigma, labels=None) -> Tensor:
    """A mean error that depends on the level and the position, and on the label where there is one."""
    o = 0.1 * PATTERN * (2 + sigma.log() / 3)
    return o if labels is None else o * (1 + labels.double().remainder(3).reshape(-1, 1, 1))


def network(law=LAW, error=error, scheduler=SCHEDULER) -> OracleNetwork:
    return OracleNetwork().tell(law, scheduler, error)


def batches(law=LAW, n: int = 64, size: int = 16, labels=None, seed: int = 1):
    """n samples in batches; `labels` in turn."""
    for i in range(0, n, size):
        at = torch.arange(i, min(i + size, n))
        x0 = law.sample(len(at), seeded(1000 * seed + i)).float()
        yield x0, {} if labels is None else {"class_labels": at % labels}


def estimate(model, data, scheduler=SCHEDULER, num_levels: int = 3, **options):
    return estimate_calibration(model, scheduler, data, num_levels=num_levels, progress=False, **options)


def repeated(rows: int, n: int, law=LAW, error=lambda sigma, _: error(sigma), **options):
    """`rows` independent estimates from n samples each of one model that does not look at its labels."""
    data = batches(law, rows * n, rows * 16, labels=rows, seed=7)
    return estimate(network(law, error), data, num_classes=rows, **options)


def truth(sigmas=SIGMAS) -> Tensor:
    """(levels, 1, *shape)"""
    return torch.stack([error(torch.tensor(s).double()) for s in sigmas])[:, None]


def standard_error(values: Tensor) -> Tensor:
    return values.std(-1) / values.shape[-1] ** 0.5


# the estimate is right, and as exact as it says


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_error_is_the_noise_floor_and_the_norm_has_no_bias(name) -> None:
    made = repeated(400, 64, shrink=False, **ESTIMATORS[name])
    assert made.config.sigmas == pytest.approx(SIGMAS)
    assert made.num_samples.unique().tolist() == [64]
    off = made.offsets.double() - truth()
    squared = off.flatten(2).square().sum(2)
    floor = made.noise_floor.double()
    # the estimate is the error, in each coordinate, on average over the rows
    z = off.mean(1) / (off.std(1) / 400**0.5)
    assert z.abs().max() < 4.5
    # E |o^ - o|^2 = noise_floor, at each level
    ratio = squared / floor.mean(1, keepdim=True)
    assert ((ratio.mean(1) - 1) / standard_error(ratio)).abs().max() < 4
    assert ((ratio.mean(1) - 1).abs() < 0.15).all()
    # E squared_norm = |o|^2
    wrong = made.squared_norm.double() - truth().flatten(2).square().sum(2)
    assert (wrong.mean(1) / standard_error(wrong)).abs().max() < 4


@pytest.mark.parametrize("name", ESTIMATORS)
def test_intervals_of_coordinates_cover_at_the_stated_rate(name) -> None:
    made = repeated(400, 64, ISOTROPIC, shrink=False, **ESTIMATORS[name])
    inside = (made.offsets.double() - truth()).abs() < 1.959964 * made.std_error[..., None, None]
    count = 400 * D
    assert (inside.double().mean((1, 2, 3)) - 0.95).abs().max() < 4 * sqrt(0.95 * 0.05 / count) + 0.002


def test_the_plain_average_is_the_mean_of_the_networks_outputs_on_noised_data() -> None:
    scheduler, seen = DDPMScheduler(), []
    model = tiny_unet()
    x0 = torch.randn(48, 2, 8, 8, generator=seeded())

    def recorded(sample, timestep, **cond):
        output = model(sample, timestep).sample
        seen.append((timestep[0].item(), sample, output))
        return output

    data = [(x0[:24], {}), (x0[24:], {})]
    made = estimate(recorded, data, scheduler, shrink=False, **PLAIN)
    times = sorted({t for t, *_ in seen})
    assert times[0] == 0
    assert times[-1] == 999
    for level, t in enumerate(times):
        inputs, outputs = (torch.cat([each[i] for each in seen if each[0] == t]) for i in (1, 2))
        torch.testing.assert_close(made.offsets[level, 0], outputs.mean(0), rtol=0, atol=2e-4 if level == 0 else 1e-5)
        sigma = made.config.sigmas[level]
        noise = (inputs * (1 + sigma**2) ** 0.5 - x0) / sigma
        assert abs(noise.mean() * 6144**0.5) < 4
        assert abs(noise.square().mean() - 1) < 4 * (2 / 6144) ** 0.5
        assert (noise @ x0.transpose(2, 3)).mean().abs() < 0.1


RATIOS = {0.05: (0.95, 0.95), 1.0: (2.2, 2.6), 20.0: (200, 200)}  # measured: 1.01 and 1.02, 2.8 and 3.3, 341 and 342


def test_fewer_samples_are_needed() -> None:
    floors = {
        name: estimate(network(), batches(n=2000, size=500), shrink=False, **options).noise_floor[:, 0]
        for name, options in ESTIMATORS.items()
    }
    for i, (sigma, least) in enumerate(RATIOS.items()):
        for name, bound in zip(("control variate", "antithetic"), least, strict=True):
            assert floors["plain"][i] / floors[name][i] > bound, (sigma, name)


@pytest.mark.parametrize("name", ["antithetic", "plain"])
def test_the_loss_falls_by_what_is_predicted_on_held_out_data(name) -> None:
    model = network()
    made = estimate(model, batches(n=192, size=96), **ESTIMATORS[name])
    held_out = LAW.sample(6000, seeded(99))
    for level, sigma in enumerate(SIGMAS):
        noise = torch.randn(held_out.shape, dtype=torch.float64, generator=seeded(level))
        noise = torch.cat([noise, -noise])
        x0 = torch.cat([held_out, held_out])

        def loss(x=x0 + sigma * noise, sigma=sigma, noise=noise):
            eps = denoiser_from(model, SCHEDULER).eps(x, sigma)
            pairs = 0.5 * (eps - noise).flatten(1).square().sum(1)
            return (pairs[:6000] + pairs[6000:]) / 2

        before = loss()
        handle = calibrate_denoiser(model, made)
        fell = before - loss()
        handle.remove()
        o, subtracted = truth()[level, 0], made.offsets[level, 0].double() * made.shrinkage[level, 0]
        predicted = 0.5 * (o.square().sum() - (subtracted - o).square().sum())
        assert abs(fell.mean() - predicted) < 4 * standard_error(fell) + 1e-5
        assert predicted > 0.02  # else nothing was to be seen


# what is subtracted


def false_subtractions(law, significance: float, rows: int, **estimator) -> Tensor:
    made = repeated(rows, 64, law, None, significance=significance, num_levels=2, **estimator)
    return (made.shrinkage > 0).double().mean(1)


NARROW = Gaussian(torch.zeros(SHAPE), torch.tensor([1e-6, *[1e6] * 7]).reshape(SHAPE))


# in isotropic noise, and where 99% of its variance lies in one coordinate
@pytest.mark.parametrize(("law", "name"), every_value([ISOTROPIC, NARROW, LAW], ["antithetic", "plain"]))
def test_of_a_perfect_model_something_is_subtracted_as_often_as_stated(law, name) -> None:
    if law is NARROW and name == "plain":
        floors = repeated(40, 64, law, None, shrink=False, num_levels=2, **PLAIN).offsets.square().mean(1).flatten(1)
        assert (floors[:, 0] > 0.99 * floors.sum(1)).all()  # it is dominated
    rate, n = 0.05, 200
    measured = false_subtractions(law, rate, n, **ESTIMATORS[name])
    assert (measured - rate).max() < 3.5 * sqrt(rate * (1 - rate) / n)
    assert measured.min() > rate / 3


def test_of_a_perfect_model_nothing_is_subtracted_by_default() -> None:
    made = repeated(150, 64, NARROW, None, num_levels=2, **PLAIN)
    assert (made.shrinkage > 0).sum() <= 3  # 0.3 expected


def test_what_passes_is_shrunk_by_its_share_of_noise() -> None:
    weak = {"error": lambda sigma, _: 0.4 * error(sigma), "significance": 0.05, **PLAIN}
    made = repeated(60, 64, **weak)
    used, norm = made.shrinkage > 0, made.offsets.flatten(2).square().sum(2)
    assert 0 < used.double().mean() < 1
    torch.testing.assert_close(made.shrinkage[used], (1 - made.noise_floor / norm)[used].clamp(min=0))
    kept = repeated(60, 64, shrink=False, **weak)
    assert torch.equal(kept.offsets, made.offsets)
    assert torch.equal(kept.shrinkage, torch.ones_like(kept.shrinkage))


def test_a_strong_error_is_found_at_the_smallest_significance_and_one_without_noise_too() -> None:
    strong = estimate(network(ISOTROPIC), batches(ISOTROPIC, 320, 32), significance=2.0**-15)
    assert (strong.shrinkage > 0.9).all()
    torch.testing.assert_close(strong.offsets, truth().float(), rtol=0, atol=0.15)
    constant = estimate(lambda x, t: torch.full_like(x, 0.3), batches(), DDIMScheduler())
    torch.testing.assert_close(constant.offsets[0], torch.full((1, *SHAPE), 0.3), rtol=0, atol=2e-4)
    assert (constant.shrinkage[1:] > 0.9).all()
    assert (constant.std_error < 1e-4).all()  # a number, though its square is a difference of equal sums
    assert estimate(lambda x, t: x * 0 + 0.3, batches(), DDIMScheduler(), tolerance=1e-4).num_samples.max() == 64
    silent = estimate(lambda x, t: torch.zeros_like(x), batches(), DDIMScheduler(), **PLAIN)
    assert (silent.offsets * silent.shrinkage[..., None, None]).abs().max() < 1e-3


# conditions


def test_each_class_has_its_row_and_so_has_the_null_class() -> None:
    def by_label(sigma, labels):
        return error(sigma, labels) * (labels != 4).double().reshape(-1, 1, 1)

    # labels repeat as regularly as the groups do
    data = batches(n=4 * 2000, size=1600, labels=4)
    made = estimate(network(error=by_label), data, num_classes=4, null_class=4, shrink=False)
    assert made.config.rows == ["0", "1", "2", "3", "unconditional"]
    assert made.config.null_class == 4
    assert made.num_samples[0].tolist() == [2000] * 4 + [8000]
    factors = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0]).reshape(1, 5, 1, 1)
    z = (made.offsets.double() - truth() * factors).flatten(2).square().sum(2) / made.noise_floor
    assert (z < 6).all()
    assert z.mean() < 2


def test_few_samples_of_each_class_are_enough_however_the_labels_are_ordered() -> None:
    regular = estimate(network(), batches(n=64, size=8, labels=2), num_classes=2)
    assert regular.num_samples.tolist() == [[32, 32]] * 3
    x0 = LAW.sample(64, seeded()).float()
    sorted_labels = [(x0[i : i + 8], {"class_labels": torch.full((8,), int(i >= 32))}) for i in range(0, 64, 8)]
    assert estimate(network(), sorted_labels, num_classes=2).num_samples.tolist() == [[32, 32]] * 3


class Texted(OracleNetwork):
    def forward(self, sample, timestep, context=None, added=None, return_dict=True):
        context = added["context"] if context is None else context
        return super().forward(sample, timestep, context[:, 0], return_dict)


@pytest.mark.parametrize("place", [lambda v: {"context": v}, lambda v: {"added": {"context": v}}], ids=["flat", "tree"])
def test_with_conditions_there_is_a_row_with_and_one_without(place) -> None:
    model = Texted().tell(LAW, SCHEDULER, lambda sigma, context: error(sigma) * along(context, PATTERN[None]))
    x0 = LAW.sample(4000, seeded()).float()
    context = torch.rand(4000, 5, dtype=torch.float64, generator=seeded(1))
    data = [(x0[i : i + 1000], place(context[i : i + 1000])) for i in range(0, 4000, 1000)]
    made = estimate(model, data, unconditional=place(torch.full((1, 5), 2.0)), shrink=False)
    assert made.config.rows == ["conditional", "unconditional"]
    expected = torch.cat([truth() * context[:, 0].mean(), truth() * 2.0], 1)
    z = (made.offsets.double() - expected).flatten(2).square().sum(2) / made.noise_floor
    assert (z < 5).all()


def test_without_conditions_the_calibration_says_what_it_is_of() -> None:
    made = estimate(network(), batches(), measured_on={"model": "a/b", "seed": "overwritten"}, seed=3)
    assert made.config.rows == ["all"]
    assert made.config.measured_on["model"] == "a/b"
    assert made.config.measured_on["seed"] == 3
    assert made.config.measured_on["num_samples"] == 64
    assert made.schedule.prediction_type == "epsilon"
    assert tuple(made.config.shape) == SHAPE

    class Own(DDIMScheduler):
        pass

    own = estimate(lambda x, t: x, batches(), Own(beta_end=0.01))
    own.check(estimate(lambda x, t: x, batches(), DDIMScheduler(beta_end=0.01)).schedule)


# noise


def same(a, b) -> bool:
    return all(torch.equal(value, buffers(b)[name]) for name, value in buffers(a).items())


def test_the_seed_decides_and_global_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    first = estimate(network(), batches(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12345)
    assert same(estimate(network(), batches(), seed=1), first)
    for other in (0, 2, 1 + 2**32, 1 << 16):
        assert not torch.equal(estimate(network(), batches(), seed=other).offsets, first.offsets)


def test_batches_and_levels_have_noise_of_their_own() -> None:
    x0, seen = torch.zeros(16, *SHAPE), []

    def recorded(sample, timestep):
        seen.append(sample)
        return sample * 0

    estimate(recorded, [(x0, {})] * 3, num_levels=2, **PLAIN)
    noise = torch.stack([s / s.std() for s in seen]).flatten(1)
    correlations = noise @ noise.T / noise.shape[1]
    assert (correlations - torch.eye(6)).abs().max() < 5 / noise.shape[1] ** 0.5


def test_more_data_change_nothing_of_what_has_been_measured() -> None:
    short = estimate(network(), batches(n=64))
    assert same(estimate(network(), batches(n=160), max_samples=64, save_every=3), short)
    assert same(estimate(network(), batches(n=160), max_samples=50), short)  # a batch is taken whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_data_of_another_precision_are_noised_in_float32_at_least(dtype) -> None:
    data = [(x0.half(), cond) for x0, cond in batches()]
    made = estimate(network(), [(x0.to(dtype), cond) for x0, cond in data], shrink=False)
    exact = estimate(network(), [(x0.float(), cond) for x0, cond in data], shrink=False)
    if dtype == torch.float16:
        assert same(made, exact)
    else:  # other noise: torch draws float64 in its own way
        assert ((made.offsets - exact.offsets).flatten(2).square().sum(2) < 5 * made.noise_floor).all()


def test_a_model_in_half_precision_is_measured_as_well() -> None:
    x0 = torch.randn(64, 2, 8, 8, generator=seeded())
    data = [(x0[i : i + 32], {}) for i in (0, 32)]
    exact = estimate(tiny_unet(), data, DDIMScheduler(), shrink=False)
    half = estimate(tiny_unet().to(torch.bfloat16), data, DDIMScheduler(), shrink=False)
    size = exact.offsets[1:].flatten(2).norm(dim=2)
    assert ((half.offsets - exact.offsets)[1:].flatten(2).norm(dim=2) < 0.03 * size).all()


# stopping


def test_a_level_stops_when_it_is_exact_enough_and_then_it_is() -> None:
    taken = []

    def counted(rows: int):
        for batch in batches(ISOTROPIC, 200 * 16 * 40, 200 * 16, labels=rows):
            taken.append(1)
            yield batch

    flat = network(ISOTROPIC, lambda sigma, _: error(sigma))
    tolerance = 0.05
    made = estimate(flat, counted(200), num_classes=200, tolerance=tolerance, save_every=2, shrink=False)
    assert (made.std_error <= tolerance).all()
    n = made.num_samples[:, 0]
    assert n[1] > n[0] >= 32  # at the ends the levels are easier
    assert n[1] > n[2] >= 32
    assert len(taken) == n.max() // 16 < 40
    reached = (made.offsets.double() - truth()).square().mean((1, 2, 3)).sqrt()
    assert (reached < tolerance * 1.03).all()
    # what a level has got does not depend on when others stop
    other = estimate(flat, counted(200), num_classes=200, max_samples=int(n[1]) * 200, shrink=False)
    assert torch.equal(other.offsets[1], made.offsets[1])


@pytest.mark.parametrize("data", [[], [(torch.zeros(4, *SHAPE), {})], batches(n=31, size=31)], ids=["0", "4", "31"])
def test_too_few_samples_are_refused(data) -> None:
    data = list(data)
    n = sum(len(x0) for x0, _ in data)
    with pytest.raises(ValueError, match="needs 32 at every level, and one has " + str(n) if n else "no data"):
        estimate(network(), data)


def test_arguments_out_of_range_and_reflected_models_are_refused_before_anything_is_run() -> None:
    def never():
        pytest.fail("the data were read")
        yield

    for options in ({"num_levels": 1}, {"significance": 1e-6}, {"significance": 1.5}, {"save_every": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            estimate(network(), never(), **options)
    for tolerance in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="tolerance must be above 0"):
            estimate(network(), never(), tolerance=tolerance)
    with pytest.raises(ValueError, match="reflected process"):
        estimate(network(), never(), ReflectedScheduler())


# being killed


def killed(data, after: int):
    for i, batch in enumerate(data):
        if i == after:
            raise KeyboardInterrupt
        yield batch


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.04}, CONTROL, {"max_samples": 128}], ids=str)
def test_a_killed_run_goes_on_to_the_same_result(options, tmp_path) -> None:
    options = options | {"state_path": tmp_path / "deep" / "sums.safetensors", "save_every": 3}

    def data():
        return batches(n=160)

    whole = estimate(network(), data(), **options | {"state_path": None})
    if "tolerance" in options:
        assert whole.num_samples.unique().numel() > 1
    for after in (1, 4, 5, 7):
        with pytest.raises(KeyboardInterrupt):
            estimate(network(), killed(data(), after), **options)
    saved = load_file(options["state_path"])
    assert saved["batches"] == 6
    assert [p.name for p in options["state_path"].parent.iterdir()] == ["sums.safetensors"]
    assert same(estimate(network(), data(), **options), whole)
    again = estimate(network(), data(), **options)  # it was done, and killed before it was saved
    assert same(again, whole)


def test_what_was_measured_is_not_measured_again(tmp_path) -> None:
    calls = []

    def model(x, t):
        calls.append(len(x))
        return x

    options = {"state_path": tmp_path / "sums", "save_every": 1, "num_levels": 2}
    estimate(model, batches(n=64), DDIMScheduler(), **options)
    assert len(calls) == 4 * 2 * 2
    estimate(model, batches(n=96), DDIMScheduler(), **options)
    assert len(calls) == 6 * 2 * 2


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"antithetic": False}, "estimator"),
        ({"num_levels": 4}, "sigmas"),
        ({"num_classes": 1}, "rows"),
        ({"scheduler": DDIMScheduler(prediction_type="sample")}, "scheduler"),
        ({"data": batches(size=8, labels=1)}, "batch, data"),
        ({"data": batches(labels=1, seed=2)}, "data"),
        ({"data": batches(labels=2)}, "data"),
        ({"model": "other weights"}, "model"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_sums_of_another_run_are_refused(change, name, tmp_path) -> None:
    model = network()
    fixed = {"scheduler": DDIMScheduler(), "state_path": tmp_path / "sums", "save_every": 1}
    model.tell(LAW, fixed["scheduler"])
    model.forward = lambda sample, timestep, class_labels=None: (sample,)
    estimate(model, batches(labels=1), **fixed)
    if "model" in change:
        model.dummy.data.fill_(0.25)
    given = {"data": batches(labels=1)} | fixed | change | {"model": model}
    with pytest.raises(ValueError, match=f"another run, with other {name}: delete it"):
        estimate(**given)


def test_values_that_are_not_finite_are_refused_and_leave_the_sums_as_they_were(tmp_path) -> None:
    calls = []

    def overflows(x, t):
        calls.append(1)
        return x / (t[0] < 500 or len(calls) <= 12)  # two levels, with n and -n: from the fourth batch on, at one level

    options = {"state_path": tmp_path / "sums", "save_every": 3, "num_levels": 2}
    with pytest.raises(ValueError, match=r"not finite at sigma = 157: "):
        estimate(overflows, batches(n=160), DDIMScheduler(), **options)
    saved = load_file(tmp_path / "sums")
    assert saved["batches"] == 3
    assert all(value.isfinite().all() for name, value in saved.items() if name != "slopes")
    with pytest.raises(ValueError, match="not finite"):
        estimate(lambda x, t: x * torch.nan, batches(), DDIMScheduler())


# several processes


def part_of(rank: int, world: int = 2):
    """An accelerator that shows one process what it would have alone."""
    identity = {"reduce": lambda value, how: value, "gather": lambda value: value, "wait_for_everyone": lambda: None}
    return SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"), **identity)


def test_each_process_has_noise_of_its_own_and_counts_the_samples_of_all() -> None:
    first, other = (estimate(network(), batches(n=96), accelerator=part_of(rank)) for rank in (0, 1))
    assert (first.offsets != other.offsets).flatten(2).any(2).all()
    short = estimate(network(), batches(n=96), accelerator=part_of(0), max_samples=64)
    assert short.num_samples.unique().tolist() == [32]


DRIVER = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
from test_mean_error import batches, estimate, killed, network, shard
accelerator, out = Accelerator(), Path(sys.argv[1])
rank = accelerator.process_index
assert accelerator.num_processes == 2
for name, options in {"all": {}, "tolerance": {"tolerance": 0.03}}.items():
    options |= {"accelerator": accelerator, "save_every": 2, "state_path": out / f"{name}.safetensors"}
    try:
        estimate(network(), killed(shard(rank), 5), **options)
    except KeyboardInterrupt:
        pass
    resumed = estimate(network(), shard(rank), **options)
    save_file(resumed.state_dict(), out / f"{name}-{rank}")
    whole = estimate(network(), shard(rank), **options | {"state_path": None})
    same = all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    print(f"resumed {same}", flush=True)
try:
    if rank == 1:
        (out / "all-1-of-2.safetensors").unlink()
    accelerator.wait_for_everyone()
    estimate(network(), shard(rank), **options | {"state_path": out / "all.safetensors"})
except ValueError as error:
    print(f"refused {error}", flush=True)
"""


def shard(rank: int):
    return (batch for i, batch in enumerate(batches(n=320)) if i % 2 == rank)


def test_two_processes_add_up_and_resume(tmp_path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    done = stranger.ranks(2, tmp_path / "driver.py", tmp_path, os.path.dirname(__file__))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed True") == 4
    assert done.stdout.count("refused the processes were stopped after different numbers of batches, [10, 0]") == 2
    both = {name: [load_file(tmp_path / f"{name}-{rank}") for rank in (0, 1)] for name in ("all", "tolerance")}
    for one, other in both.values():
        assert all(torch.equal(value, other[name]) for name, value in one.items())

    alone = [estimate(network(), shard(rank), accelerator=part_of(rank), shrink=False) for rank in (0, 1)]
    n = 160
    together = both["all"][0]
    assert together["num_samples"].unique().tolist() == [2 * n]
    assert both["tolerance"][0]["num_samples"].unique().numel() > 1
    means = [a.offsets.double() for a in alone]
    torch.testing.assert_close(together["offsets"].double(), sum(means) / 2, rtol=0, atol=1e-6)
    # variance within both parts and between their means
    within = sum(a.noise_floor.double() * (n - 1) * n for a in alone)
    between = n / 2 * (means[0] - means[1]).flatten(2).square().sum(2)
    floor = (within + between) / (2 * n - 1) / (2 * n)
    torch.testing.assert_close(together["noise_floor"].double(), floor, rtol=1e-4, atol=1e-9)
    assert not torch.equal(means[0], means[1])


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["vp", "flow"])
def test_the_levels_are_those_that_the_network_was_trained_for(scheduler) -> None:
    made = estimate(lambda x, t: x, batches(), scheduler, num_levels=5, shrink=False)
    sigmas = made.schedule.sigmas
    assert made.config.sigmas[0] == sigmas[0].item()
    assert made.config.sigmas[-1] == sigmas[-1].item()
    steps = torch.tensor(made.config.sigmas).log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(4))
