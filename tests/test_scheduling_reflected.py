"""`ReflectedScheduler`, its place in `interop`, and `langevin`. Truth: the exact law and the exact transport map of a
folded mixture, steps worked out by hand, diffusers' own DDIM, Gaussian data."""

import copy
import inspect
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Folded, Gaussian, along, plain_denoiser, two_bumps
from products import every_value
from test_pipelines import quiet, tiny_unet
from test_reflected_process import inside, kolmogorov_smirnov, seeded
from torch import Tensor

from diffusers_ext import (
    Denoiser,
    ReflectedModel,
    ReflectedProcess,
    ReflectedScheduler,
    denoiser_from,
    euler,
    langevin,
    noise_schedule,
    score_model_from,
)

STEP_VARIABLES, SPACINGS, ALGORITHMS = (
    ("log_sigma", "sigma", "sigma_squared"),
    ("log_linear", "karras"),
    ("ode", "heun"),
)
LAW = Folded(two_bumps(), images=6)  # on [-1, 1], with mass at both faces
LOW, HIGH = 0.05, 4.0
GRID = torch.linspace(-1, 1, 1601, dtype=torch.float64)


def scheduler_of(**settings) -> ReflectedScheduler:
    return ReflectedScheduler(**{"sigma_min": LOW, "sigma_max": HIGH} | settings)


def sigma_at(scheduler: ReflectedScheduler, t) -> float:
    """What the network's time means, by the definition."""
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    return low * (high / low) ** (float(t) / (scheduler.config.num_train_timesteps - 1))


def chain(scheduler: ReflectedScheduler, x: Tensor, steps: int, score, generator=None) -> Tensor:
    """Scalar data, x (B,), from sigma_max to sigma_min."""
    x = x[:, None]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        sigma = sigma_at(scheduler, t)
        eps = -sigma * score(scheduler.scale_model_input(x, t)[:, 0], sigma)[:, None]
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    return x[:, 0]


def tabulated_score(x: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(np.interp(x.numpy(), GRID.numpy(), LAW.score(GRID, sigma).numpy()))


def no_score(x: Tensor, sigma: float) -> Tensor:
    return torch.zeros_like(x)


def uniform(v: Tensor) -> Tensor:
    return (v + 1) / 2


def transport(x: Tensor) -> Tensor:
    """The exact probability flow of scalar data: the monotone map of the law at HIGH to that at LOW."""
    q = LAW.cdf(x, HIGH)
    low, high = torch.full_like(x, -1.0), torch.full_like(x, 1.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = LAW.cdf(middle, LOW) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


# the laws of its samples


@pytest.mark.parametrize("step_variable", STEP_VARIABLES)
def test_noise_alone_keeps_the_uniform_law(step_variable: str) -> None:
    scheduler = scheduler_of(step_variable=step_variable)
    scheduler.set_timesteps(50)
    start = scheduler.init_noise_sigma * torch.randn(40_000, dtype=torch.float64, generator=seeded())
    x = chain(scheduler, start, 50, no_score, seeded(1))
    assert kolmogorov_smirnov(x, uniform) < 2.5
    assert (x - scheduler.process.constrain(start)).abs().mean() > 0.1  # it has moved


def test_projection_heaps_up_at_the_faces_and_slowly_converges() -> None:
    distances = []
    for steps in (50, 400):
        start = scheduler_of().process.sample_prior((20_000,), HIGH, seeded(), dtype=torch.float64)
        x = chain(scheduler_of(boundary="project"), start, steps, no_score, seeded(1))
        distances.append(kolmogorov_smirnov(x, uniform) / 20_000**0.5)
    assert distances[0] > 1.3 * distances[1] > 1.3 * 2.5 / 20_000**0.5


@pytest.mark.parametrize(("step_variable", "boundary"), every_value(STEP_VARIABLES, ["reflect", "project"]))
def test_sde_converges_to_the_exact_law(step_variable: str, boundary: str) -> None:
    n, distances = 20_000, []
    for steps in (10, 160):
        scheduler = scheduler_of(step_variable=step_variable, boundary=boundary)
        start = scheduler.process.sample_prior((n,), HIGH, seeded(), dtype=torch.float64)
        x = chain(scheduler, start, steps, tabulated_score, seeded(1))
        distances.append(kolmogorov_smirnov(x, lambda v: LAW.cdf(v, LOW)) / n**0.5)
    assert distances[1] < distances[0] / 2
    assert distances[1] < (0.02 if boundary == "reflect" else 0.04)  # 0.018 of it can be chance


@pytest.mark.parametrize(("algorithm", "step_variable", "spacing"), every_value(ALGORITHMS, STEP_VARIABLES, SPACINGS))
def test_order_of_convergence_to_the_exact_transport(algorithm: str, step_variable: str, spacing: str) -> None:
    order = {"ode": 1, "heun": 2}[algorithm]
    start = torch.linspace(-0.97, 0.97, 21, dtype=torch.float64)
    exact, counts = transport(start), [64, 128, 256] if order == 1 else [32, 64, 128]
    scheduler = scheduler_of(algorithm_type=algorithm, step_variable=step_variable, sigma_spacing=spacing)
    errors = [(chain(scheduler, start, n, LAW.score) - exact).square().mean().sqrt().item() for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.25 <= slope <= order + 0.5
    assert errors[-1] < 0.1


# one step, by hand: sigma 2 to 1, eps = 1/4, from x = 1/2 in a box too wide to matter


BY_HAND = {  # variance; mean = 1/2 - variance / 2 * 1/4; ode = 1/2 + (r' - r) dsigma/dr 1/4
    "log_sigma": (5.545177, -0.193147, 0.153426),  # 2 * 4 * ln 2; r' - r = -ln 2, dsigma/dr = 2
    "sigma": (4.0, 0.0, 0.25),  # 2 * 2 * (2 - 1); -1, 1
    "sigma_squared": (3.0, 0.125, 0.3125),  # 4 - 1; -3, 1/4
}
WIDE = {"low": -1000.0, "high": 1000.0, "sigma_min": 1.0, "sigma_max": 2.0}


@pytest.mark.parametrize("step_variable", STEP_VARIABLES)
def test_one_step_by_hand(step_variable: str) -> None:
    variance, mean, ode = BY_HAND[step_variable]
    n, settings = 200_000, {"step_variable": step_variable, **WIDE}
    x, eps = torch.full((n, 1), 0.5), torch.full((n, 1), 0.25)
    scheduler = ReflectedScheduler(**settings)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999.0]
    drawn = scheduler.step(eps, 999.0, x, generator=seeded()).prev_sample.double()
    assert abs(drawn.mean().item() - mean) < 5 * (variance / n) ** 0.5
    assert abs(drawn.var().item() / variance - 1) < 5 * (2 / n) ** 0.5
    scheduler = ReflectedScheduler(algorithm_type="ode", **settings)
    scheduler.set_timesteps(1)
    assert scheduler.step(eps[:1], 999.0, x[:1]).prev_sample.item() == pytest.approx(ode, abs=1e-6)


@pytest.mark.parametrize("step_variable", STEP_VARIABLES)
def test_heun_is_the_mean_of_the_slopes_at_both_ends(step_variable: str) -> None:
    scheduler = ReflectedScheduler(algorithm_type="heun", step_variable=step_variable, **WIDE)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999.0, 0.0]
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    middle = scheduler.step(torch.full_like(x, 0.25), 999.0, x).prev_sample
    assert middle.item() == pytest.approx(BY_HAND[step_variable][2], abs=1e-6)
    end = scheduler.step(torch.full_like(x, -1.0), 0.0, middle).prev_sample
    # (slopes of dsigma/dr eps at 2 and at 1) by (r' - r): their mean
    slopes = {"log_sigma": (0.5, -1, -math.log(2)), "sigma": (0.25, -1, -1), "sigma_squared": (0.0625, -0.5, -3)}
    first, second, h = slopes[step_variable]
    assert end.item() == pytest.approx(0.5 + h * (first + second) / 2, abs=1e-6)


@pytest.mark.parametrize("boundary", ["reflect", "project"])
def test_what_leaves_the_box_is_folded_or_projected(boundary: str) -> None:
    scheduler = ReflectedScheduler(algorithm_type="ode", step_variable="sigma", boundary=boundary, sigma_max=2.0)
    scheduler.set_timesteps(1)
    eps = torch.tensor([[-0.5, 0.0, 2.0]]) / 1.98  # x + 1/2, x, x - 2
    x = scheduler.step(eps, 999.0, torch.full((1, 3), 0.7)).prev_sample
    expected = [0.8, 0.7, -0.7] if boundary == "reflect" else [1.0, 0.7, -1.0]
    torch.testing.assert_close(x, torch.tensor([expected]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("boundary", ["reflect", "project"])
@pytest.mark.parametrize("algorithm", ["sde", "ode", "heun"])
def test_a_point_outside_is_folded_before_the_step(algorithm: str, boundary: str) -> None:
    outside = torch.tensor([[1.25, -1.5, 2.75, -7.0]])
    folded, eps = torch.tensor([[0.75, -0.5, -0.75, 1.0]]), torch.tensor([[0.1, -0.2, 0.3, 0.4]])
    results = []
    for x in (outside, folded):
        scheduler = scheduler_of(algorithm_type=algorithm, boundary=boundary)
        scheduler.set_timesteps(40)
        for t in scheduler.timesteps[-2 * scheduler.order : -scheduler.order]:
            x = scheduler.step(eps, t, x, generator=seeded()).prev_sample
        results.append(x)
    assert torch.equal(*results)


# never outside the box


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    exponent=st.floats(-3, 28),
    algorithm=st.sampled_from(["sde", "ode", "heun"]),
    step_variable=st.sampled_from(STEP_VARIABLES),
    boundary=st.sampled_from(["reflect", "project"]),
    box=st.sampled_from([(-1.0, 1.0), (-0.3, 1.7), (0.0, 1.0)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_no_output_of_the_network_leads_out(exponent, algorithm, step_variable, boundary, box, dtype, seed) -> None:
    low, high = box
    scheduler = ReflectedScheduler(
        low=low, high=high, algorithm_type=algorithm, step_variable=step_variable, boundary=boundary
    )
    scheduler.set_timesteps(3)
    g = seeded(seed)
    x = scheduler.init_noise_sigma * torch.randn(2, 3, 4, dtype=torch.float64, generator=g).to(dtype)
    size = min(10**exponent, torch.finfo(dtype).max / 8)
    for t in scheduler.timesteps:
        assert inside(scheduler.scale_model_input(x, t), low, high)
        output = (size * torch.randn(2, 3, 4, dtype=torch.float64, generator=g).clamp(-4, 4)).to(dtype)
        x = scheduler.step(output, t, x, generator=g).prev_sample
        assert x.dtype == dtype
        assert inside(x, low, high)  # not NaN, either


# state and randomness


@pytest.mark.parametrize("algorithm", ["sde", "ode"])
def test_a_step_depends_on_its_arguments_alone(algorithm: str) -> None:
    scheduler, x, eps = scheduler_of(algorithm_type=algorithm), torch.rand(2, 3), torch.randn(2, 3)
    scheduler.set_timesteps(6)

    def step(t) -> Tensor:
        return scheduler.step(eps, t, x, generator=seeded(int(t))).prev_sample

    there = [step(t) for t in scheduler.timesteps]
    back = [step(t.item()) for t in scheduler.timesteps.flip(0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(there, back, strict=True))
    assert len({a.sum().item() for a in there}) == 6


def test_set_timesteps_forgets_a_half_done_heun_step() -> None:
    scheduler, x, eps = scheduler_of(algorithm_type="heun"), torch.rand(2, 3), torch.randn(2, 3)
    scheduler.set_timesteps(4)
    fresh = scheduler.step(eps, scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.step(eps, scheduler.timesteps[0], x).prev_sample, fresh)


def test_randomness_is_the_generators() -> None:
    scheduler, x, eps = scheduler_of(), torch.rand(3, 2, 2), torch.randn(3, 2, 2)
    scheduler.set_timesteps(4)
    t, state = scheduler.timesteps[2], torch.get_rng_state()
    first, again, other = (scheduler.step(eps, t, x, generator=seeded(s)).prev_sample for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    together = scheduler.step(eps, t, x, generator=[seeded(s) for s in (5, 6, 7)], return_dict=False)[0]
    for i, s in enumerate((5, 6, 7)):
        alone = scheduler.step(eps[i : i + 1], t, x[i : i + 1], generator=seeded(s)).prev_sample
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ["sde", "ode", "heun"])
def test_low_precision_rounds_the_sample_and_nothing_else(algorithm: str, dtype: torch.dtype) -> None:
    x, eps = torch.rand(2, 3, generator=seeded()).to(dtype), torch.randn(2, 3, generator=seeded()).to(dtype)
    results = []
    for precision in (dtype, torch.float32):
        scheduler = scheduler_of(algorithm_type=algorithm)
        scheduler.set_timesteps(1000)  # ln sigma and its next neighbour are one number in half precision
        y = x.to(precision)
        for t in scheduler.timesteps[: scheduler.order]:
            y = scheduler.step(eps.to(precision), t, y, generator=seeded()).prev_sample
        results.append(y)
    assert results[0].dtype == dtype
    assert torch.equal(results[0], results[1].to(dtype))


def test_float64_samples_are_computed_in_float64() -> None:
    scheduler, x = scheduler_of(algorithm_type="ode"), torch.rand(2, 3, dtype=torch.float64, generator=seeded())
    scheduler.set_timesteps(4)
    y = scheduler.step(torch.full_like(x, 1e-12), scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(x - y, torch.full_like(x, 4e-12 * math.log(80) / 4), rtol=1e-3, atol=0)


# timesteps


@pytest.mark.parametrize("algorithm", ["ode", "heun"])
def test_an_index_found_on_an_accelerator_is_that_found_on_the_cpu(algorithm: str) -> None:
    class Elsewhere(Tensor):
        @property
        def device(self):
            return torch.device("cuda")

    scheduler = scheduler_of(algorithm_type=algorithm)
    for steps in (1, 7, 1000):
        scheduler.set_timesteps(steps)
        for i, t in enumerate(scheduler.timesteps):
            scheduler._first = (t, t) if i % 2 and algorithm == "heun" else None
            here, there = (scheduler._index(v, torch.device("cpu")) for v in (t, t.as_subclass(Elsewhere)))
            assert here.tolist() == there.tolist() == [(i + 1) // 2 if algorithm == "heun" else i]
        scheduler._first = None


@pytest.mark.parametrize("spacing", SPACINGS)
def test_grid_runs_from_sigma_max_to_sigma_min(spacing: str) -> None:
    scheduler = scheduler_of(sigma_spacing=spacing, num_train_timesteps=100)
    assert len(scheduler) == len(scheduler.timesteps) == 100
    scheduler.set_timesteps(8)
    assert len(scheduler.sigmas) == 9
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == 8
    assert scheduler.sigmas[0].item() == pytest.approx(HIGH)
    assert scheduler.sigmas[-1].item() == pytest.approx(LOW)
    assert (scheduler.sigmas.diff() < 0).all()
    warped = scheduler.sigmas.double() ** (1 / 7) if spacing == "karras" else scheduler.sigmas.double().log()
    torch.testing.assert_close(warped.diff(), warped.diff().mean().expand(8), rtol=1e-5, atol=0)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert sigma_at(scheduler, t) == pytest.approx(sigma.item(), rel=1e-5)


def test_heun_visits_the_inner_levels_twice() -> None:
    scheduler = scheduler_of(algorithm_type="heun")
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == pytest.approx([999, 666, 666, 333, 333, 0])
    assert (scheduler.order, scheduler_of().order) == (2, 1)


def test_the_first_input_of_the_network_is_uniform() -> None:
    scheduler = ReflectedScheduler(low=-0.3, high=1.7)
    scheduler.set_timesteps(5)
    start = scheduler.init_noise_sigma * torch.randn(40_000, generator=seeded())
    given = scheduler.scale_model_input(start, scheduler.timesteps[0])
    assert kolmogorov_smirnov(given, lambda v: (v + 0.3) / 2) < 2.5
    assert torch.equal(scheduler.scale_model_input(given, 17), given)  # no scale, and nothing to fold


def test_add_noise_draws_the_exact_law_at_its_timesteps() -> None:
    scheduler = scheduler_of()
    t = torch.tensor([0, 400, 700, 999])
    x0 = torch.stack([LAW.sample(20_000, seeded(i)) for i in range(4)])
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=seeded(7))
    x = scheduler.add_noise(x0, noise, t)
    for row, sigma in zip(x, [sigma_at(scheduler, time) for time in t], strict=True):
        assert kolmogorov_smirnov(row, lambda v, s=sigma: LAW.cdf(v, s)) < 2.5
    assert torch.equal(scheduler.add_noise(x0, noise, torch.tensor(700))[2], x[2])  # one for all
    between = scheduler.add_noise(x0, noise, torch.tensor(499.5))[0]
    assert kolmogorov_smirnov(between, lambda v: LAW.cdf(v, (LOW * HIGH) ** 0.5)) < 2.5


# its place in interop


@pytest.mark.parametrize("n", [2, 1000])
def test_time_is_linear_in_log_sigma_and_sigma_its_inverse(n: int) -> None:
    scheduler = ReflectedScheduler(num_train_timesteps=n, low=-0.3, high=1.7)
    schedule = noise_schedule(scheduler)
    assert (schedule.family, schedule.process) == ("reflected", ReflectedProcess(-0.3, 1.7))
    assert (schedule.sigma_min, schedule.sigma_max, len(schedule.sigmas)) == (0.02, 10.0, n)
    u = torch.tensor([0.0, 0.1234, 0.5, 0.9, 1.0], dtype=torch.float64)
    sigma = 0.02 * 500**u
    torch.testing.assert_close(schedule.time(sigma), (n - 1) * u, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.sigma((n - 1) * u), sigma)
    assert torch.equal(schedule.scale(sigma), torch.ones_like(sigma))
    drawn = schedule.draw_sigmas(20_000, seeded())
    assert ((drawn.double().log() - math.log(0.02)) / math.log(500)).mean().item() == pytest.approx(0.5, abs=0.02)


def test_network_is_told_what_the_scheduler_tells_it() -> None:
    told = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        told.append((x, time))
        return torch.sin(3 * x)

    scheduler = ReflectedScheduler(low=-0.3, high=1.7)
    model = score_model_from(network, scheduler)
    assert isinstance(model, ReflectedModel)
    assert model.process == ReflectedProcess(-0.3, 1.7)
    scheduler.set_timesteps(9)
    x = model.process.sample_prior((2, 3), 10.0, seeded())
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        eps = model(x, sigma.item())
        assert torch.equal(told[-1][0], scheduler.scale_model_input(x, t))
        assert told[-1][1].tolist() == pytest.approx([t.item()] * 2, abs=2e-3)
        torch.testing.assert_close(scheduler.eps(network(x, t), x, sigma), eps)
        torch.testing.assert_close(model.score(x, sigma), -eps / sigma)


def test_there_is_no_denoiser() -> None:
    with pytest.raises(ValueError, match="has a score and no denoiser: use score_model_from"):
        denoiser_from(torch.sin, ReflectedScheduler())


def test_of_an_ordinary_model_it_gives_the_denoiser() -> None:
    assert isinstance(score_model_from(field, DDIMScheduler()), Denoiser)


# models trained the ordinary way


def field(model_input: Tensor, time: Tensor) -> Tensor:
    return torch.sin(2 * model_input + along(0.01 * torch.as_tensor(time), model_input)) + 0.2


BETAS = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero SNR": {"rescale_betas_zero_snr": True},
    "trained": {"trained_betas": np.linspace(1e-3, 0.05, 200).tolist(), "num_train_timesteps": 200},
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", BETAS)
def test_an_ordinary_model_means_what_it_means_under_ddim(betas: str, prediction_type: str) -> None:
    ddim = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **BETAS[betas])
    scheduler = ReflectedScheduler.from_config(
        ddim.config, low=-40.0, high=40.0, algorithm_type="ode", step_variable="sigma"
    )
    assert torch.equal(scheduler.alphas_cumprod, ddim.alphas_cumprod)
    assert scheduler.config.prediction_type == prediction_type
    assert isinstance(score_model_from(field, scheduler), Denoiser)
    denoiser, x = denoiser_from(field, ddim), torch.randn(3, 2, 4, dtype=torch.float64, generator=seeded())
    scheduler.set_timesteps(12)
    for t, sigma, sigma_next in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        sigma, sigma_next = sigma.double(), sigma_next.double()
        output = field(scheduler.scale_model_input(x, t), t)
        torch.testing.assert_close(scheduler.eps(output, x, sigma), denoiser.eps(x, sigma), rtol=0, atol=2e-4)
        expected = euler(denoiser, x, sigma, sigma_next)
        torch.testing.assert_close(scheduler.step(output, t, x).prev_sample, expected, rtol=0, atol=2e-3)
    abar = ddim.alphas_cumprod[100].double()  # the scale, by DDIM's own table
    given = scheduler.scale_model_input(x, 100)
    torch.testing.assert_close(given, abar.sqrt() * x, rtol=1e-5, atol=1e-5)


def test_an_ordinary_model_with_learned_variance_loses_these_channels() -> None:
    scheduler = ReflectedScheduler.from_config(
        DDPMScheduler(variance_type="learned_range").config, algorithm_type="ode"
    )
    scheduler.set_timesteps(4)
    x, output = torch.rand(2, 3, 4), torch.randn(2, 6, 4)
    t = scheduler.timesteps[1]
    assert torch.equal(scheduler.step(output, t, x).prev_sample, scheduler.step(output[:, :3], t, x).prev_sample)


@pytest.mark.parametrize(
    "origin",
    [
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", beta_schedule="scaled_linear"),
        DPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DDPMScheduler(beta_schedule="sigmoid"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_another_schedulers_settings_of_the_same_name_are_not_taken_for_ours(origin, tmp_path) -> None:
    origin.save_pretrained(tmp_path)
    x = torch.rand(2, 3, dtype=torch.float64, generator=seeded())
    for scheduler in (ReflectedScheduler.from_config(origin.config), ReflectedScheduler.from_pretrained(tmp_path)):
        assert scheduler.config.algorithm_type == "sde"
        for name in ("beta_schedule", "beta_start", "beta_end", "prediction_type", "num_train_timesteps"):
            assert scheduler.config[name] == origin.config[name]
        sigma = torch.tensor(0.7, dtype=torch.float64)
        ours, theirs = noise_schedule(scheduler), noise_schedule(origin)
        torch.testing.assert_close(ours.time(sigma), theirs.time(sigma))
        torch.testing.assert_close(ours.scale(sigma), theirs.scale(sigma))
        output = field(x * theirs.scale(sigma), theirs.time(sigma))
        torch.testing.assert_close(scheduler.eps(output, x, sigma), denoiser_from(field, origin).eps(x, sigma))


def test_levels_are_kept_to_those_of_the_network() -> None:
    config = DDIMScheduler(**BETAS["scaled_linear"]).config  # Stable Diffusion's: 0.0292 to 14.6
    scheduler = ReflectedScheduler.from_config(config)
    assert scheduler.config.sigma_min == pytest.approx(0.02917, abs=1e-4)
    assert scheduler.config.sigma_max == 10.0
    assert ReflectedScheduler.from_config(config, sigma_min=0.1).config.sigma_min == 0.1
    assert torch.equal(ReflectedScheduler.from_config(scheduler.config).sigmas, scheduler.sigmas)
    with pytest.raises(
        ValueError, match=r"sigma_max 20.0 leave the levels that the network was trained for, 0.0291\d to 14.61"
    ):
        ReflectedScheduler.from_config(config, sigma_max=20.0)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (EDMEulerScheduler(), "no table of betas"),
        (FlowMatchEulerDiscreteScheduler(), "no table of betas"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "timestep_type='continuous'",
        ),
        (CogVideoXDDIMScheduler(), "snr_shift_scale=3.0"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_networks_that_it_cannot_run_are_refused(origin, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        ReflectedScheduler.from_config(origin.config)
    origin.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ReflectedScheduler.from_pretrained(tmp_path)


# saving


EVERYTHING = {
    "num_train_timesteps": 500,
    "low": -0.3,
    "high": 1.7,
    "sigma_min": 0.03,
    "sigma_max": 9.0,
    "algorithm_type": "heun",
    "step_variable": "sigma",
    "boundary": "project",
    "prediction_type": "v_prediction",
    "sigma_spacing": "karras",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0008,
    "beta_end": 0.025,
    "trained_betas": None,
    "rescale_betas_zero_snr": True,
}
OWN = {name: v for name, v in EVERYTHING.items() if "beta" not in name and name != "prediction_type"}


@pytest.mark.parametrize(
    "settings",
    [EVERYTHING, OWN, {"trained_betas": [0.01, 0.3], "num_train_timesteps": 2, "sigma_min": 0.2, "sigma_max": 0.6}, {}],
)
def test_copies_do_what_the_original_does(settings: dict, tmp_path) -> None:
    assert set(EVERYTHING) == set(inspect.signature(ReflectedScheduler.__init__).parameters) - {"self"}
    scheduler = ReflectedScheduler(**settings)
    scheduler.save_pretrained(tmp_path)
    copies = {
        "saved": ReflectedScheduler.from_pretrained(tmp_path),
        "config": ReflectedScheduler.from_config(scheduler.config),
        "subclass": type("Own", (ReflectedScheduler,), {}).from_config(scheduler.config),
        "deepcopy": copy.deepcopy(scheduler),
        "pickle": pickle.loads(pickle.dumps(scheduler)),
        "diffusers": diffusers.ReflectedScheduler.from_config(dict(scheduler.config)),
    }
    steps, x, output = min(7, len(scheduler)), torch.rand(2, 3), torch.randn(2, 3)

    def run(s: ReflectedScheduler) -> Tensor:
        s.set_timesteps(steps)
        y = x
        for t in s.timesteps:
            y = s.step(output * s.scale_model_input(y, t), t, y, generator=seeded()).prev_sample
        return y

    for name, other in copies.items():
        assert {k: other.config[k] for k in EVERYTHING} == {k: scheduler.config[k] for k in EVERYTHING}, name
        assert torch.equal(run(other), run(scheduler)), name


def test_a_setting_can_be_changed_on_the_way() -> None:
    scheduler = ReflectedScheduler.from_config(ReflectedScheduler(low=0.0, sigma_max=7.0).config, algorithm_type="heun")
    assert (scheduler.config.low, scheduler.config.sigma_max, scheduler.order) == (0.0, 7.0, 2)


# refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 1.0}, r"\[1.0, 1.0\] is empty"),
        ({"high": -2.0}, r"\[-1.0, -2.0\] is empty"),
        ({"low": float("nan")}, "is empty or not finite"),
        ({"sigma_min": 10.0}, "0 < sigma_min < sigma_max < inf is needed, got 10.0 and 10.0"),
        ({"sigma_min": 0.0}, "0 < sigma_min"),
        ({"sigma_min": -0.02}, "0 < sigma_min"),
        ({"sigma_max": float("nan")}, "0 < sigma_min"),
        ({"sigma_max": float("inf")}, "0 < sigma_min"),
        ({"algorithm_type": "dpmsolver++"}, r"algorithm_type 'dpmsolver\+\+' is not one of sde, ode, heun"),
        ({"step_variable": "t"}, "step_variable 't' is not one of log_sigma, sigma, sigma_squared"),
        ({"boundary": "wrap"}, "boundary 'wrap' is not one of reflect, project"),
        ({"sigma_spacing": "linear"}, "sigma_spacing 'linear' is not one of log_linear, karras"),
        ({"prediction_type": "sample"}, "predicts epsilon or point, not 'sample'"),
        ({"prediction_type": "noise", "beta_schedule": "linear"}, "'noise' is not one of"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps must be at least 2, got 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ],
    ids=str,
)
def test_settings_that_contradict_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReflectedScheduler(**settings)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_the_table_has_not_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps must be at least 1 and at most 1000, got {steps}"):
        ReflectedScheduler().set_timesteps(steps)


@pytest.mark.parametrize("timestep", [998, torch.tensor(500), 0, torch.tensor(0.0), -1, 1000, float("nan")])
def test_a_timestep_off_the_grid_or_at_its_end_is_refused(timestep) -> None:
    scheduler, x = ReflectedScheduler(), torch.zeros(1, 1)
    scheduler.set_timesteps(10)
    with pytest.raises(
        ValueError, match=r"timestep .* is not one of the 10 from 999 to 99.9 that set_timesteps has laid"
    ):
        scheduler.step(x, timestep, x)


def test_add_noise_refuses_what_is_outside() -> None:
    scheduler, x = ReflectedScheduler(), torch.full((2, 3), 0.5)
    with pytest.raises(ValueError, match=r"original_samples must lie in \[-1.0, 1.0\], it is from 0.5 to 255"):
        scheduler.add_noise(x.masked_fill(torch.tensor([True, False, False]), 255), x, torch.tensor([1, 2]))
    for bad in ([-1, 5], [5, 1000], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="timesteps must be from 0 to 999, got"):
            scheduler.add_noise(x, x, torch.tensor(bad))


# stock pipelines


def test_ddpm_pipeline_stays_in_the_box() -> None:
    pipe, seen = quiet(DDPMPipeline(tiny_unet(), ReflectedScheduler())), []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *a, **k: seen.append(step(*a, **k)) or seen[-1]
    images = pipe(batch_size=2, num_inference_steps=8, output_type="pt", generator=seeded()).images
    assert len(seen) == 8
    assert all(inside(s.prev_sample, -1.0, 1.0) for s in seen)
    assert torch.equal(images, seen[-1].prev_sample / 2 + 0.5)
    assert torch.equal(images, pipe(batch_size=2, num_inference_steps=8, output_type="pt", generator=seeded()).images)


@pytest.mark.parametrize("algorithm", ["sde", "heun"])
def test_stable_diffusion_keeps_it_and_stays_in_the_box(algorithm: str) -> None:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        **blocks,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    )
    missing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    origin = DDIMScheduler(**BETAS["scaled_linear"], clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler = ReflectedScheduler.from_config(origin.config, low=-3.0, high=3.0, algorithm_type=algorithm)
    pipe = quiet(StableDiffusionPipeline(vae, **missing, unet=unet, scheduler=scheduler, requires_safety_checker=False))
    assert type(pipe.scheduler) is ReflectedScheduler
    seen = []

    def watch(owner, i, t, tensors) -> dict:
        seen.append(tensors["latents"])
        return {}

    text = torch.randn(2, 2, 5, 8, generator=seeded())
    latents = pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        guidance_scale=100.0,
        num_inference_steps=4,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=watch,
    ).images
    assert len(seen) == 4 * scheduler.order
    assert all(inside(s, -3.0, 3.0) for s in [*seen, latents])


# the corrector


def of_law(law) -> ReflectedModel:
    return ReflectedModel(lambda x, s: -along(s, x) * law(x, s[0].item()), lambda s: s.expand(1), ReflectedProcess())


@pytest.mark.parametrize("sigma", [0.05, 0.3, 3.0])
def test_langevin_keeps_the_folded_law(sigma: float) -> None:
    start = LAW.sample(20_000, seeded(), sigma)
    x = langevin(of_law(tabulated_score), start, sigma, steps=20, generator=seeded(1))
    assert kolmogorov_smirnov(x, lambda v: LAW.cdf(v, sigma)) < 2.5
    assert (x - start).abs().mean() > 0.2 * sigma**0.5 / 4  # it has moved


def test_langevin_keeps_a_gaussian_law() -> None:
    law = Gaussian(0.3, 0.25)
    model = plain_denoiser(law.denoiser)
    x = law.sample(20_000, seeded()) + 0.5 * torch.randn(20_000, dtype=torch.float64, generator=seeded(1))
    x = langevin(model, x, 0.5, steps=20, generator=seeded(2))
    assert kolmogorov_smirnov(x, lambda v: law._cdf(v, 0.5)) < 2.5
    assert abs(x.var().item() / 0.5 - 1) < 0.05


def test_langevin_repairs_a_wrong_law_to_the_level_of_the_step() -> None:
    process, n = ReflectedProcess(), 20_000
    x = process.sample_prior((n,), 10.0, seeded(), dtype=torch.float64)
    distances = []
    for seed in range(4):
        distances.append(kolmogorov_smirnov(x, lambda v: LAW.cdf(v, 0.5)) / n**0.5)
        x = langevin(of_law(tabulated_score), x, 0.5, steps=20, step_size=0.3, generator=seeded(seed))
    assert distances[0] > 2 * distances[1] > 2 * distances[2]
    assert distances[-1] < 0.03
    assert distances[0] > 0.1


def test_langevin_needs_a_step() -> None:
    for step_size in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="step_size must be above 0"):
            langevin(of_law(tabulated_score), torch.zeros(2, 1), 0.5, step_size=step_size)
