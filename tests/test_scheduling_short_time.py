"""Short-time schedulers. Truth: the stock scheduler of a model that has the first timesteps only; the exact network and
the exact law of x_T, whose samples must converge to the data's law; N(0, I) with its analytic error."""

import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from oracles import Gaussian, network_of
from test_calibration import seeded, table
from test_scheduling_calibrated import SEEDED, SHAPE, raw, steps_of, trajectory
from torch import Tensor

import diffusers_ext
from diffusers_ext import CalibratedDDIMScheduler, noise_schedule
from diffusers_ext.schedulers.scheduling_short_time import SHORT_TIME_SCHEDULERS

NAMES = tuple(name.removesuffix("Scheduler") for name in SHORT_TIME_SCHEDULERS)
FIRST_ORDER = ("DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep", "DEISMultistep", "LMSDiscrete")
TRAILING = {"leading": "trailing", "linspace": "linspace", "trailing": "trailing"}
SPACINGS = ("leading", "linspace", "trailing")


def short(name: str, time: float, **config):
    config = SEEDED.get(f"{name}Scheduler", {}) | config
    return getattr(diffusers_ext, f"ShortTime{name}Scheduler")(max_diffusion_time=time, **config)


def stock(name: str, **config):
    return getattr(diffusers, f"{name}Scheduler")(**SEEDED.get(f"{name}Scheduler", {}) | config)


def of_the_first(name: str, n: int, **config):
    """The stock scheduler of a model with n timesteps, whose betas are the first ones of the whole schedule."""
    betas = stock(name).betas[:n].tolist()
    return stock(name, num_train_timesteps=n, trained_betas=betas, **config)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_of_the_stock_class_with_the_same_signatures(name) -> None:
    ours, base = type(short(name, 0.5)), getattr(diffusers, f"{name}Scheduler")
    assert issubclass(ours, base)
    assert ours.__name__ == f"ShortTime{name}Scheduler"
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(ours, method)) == inspect.signature(getattr(base, method))
    added = set(inspect.signature(ours).parameters) - set(inspect.signature(base).parameters)
    assert added == {"max_diffusion_time"}


@pytest.mark.parametrize("config", [{}, {"timestep_spacing": "leading"}, {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize("name", NAMES)
def test_at_time_1_it_is_the_stock_one_bit_for_bit(name, config) -> None:
    if not set(config) <= set(inspect.signature(getattr(diffusers, f"{name}Scheduler")).parameters):
        pytest.skip("it has no such setting")
    plain = stock(name, **config)
    theirs = trajectory(plain)
    for ours in (short(name, 1.0, **config), type(short(name, 1.0)).from_config(stock(name, **config).config)):
        assert all(torch.equal(a, b) for a, b in zip(trajectory(ours), theirs, strict=True))
        assert ours.init_noise_sigma == plain.init_noise_sigma


@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_it_takes_the_steps_of_the_stock_scheduler_of_the_first_timesteps(name, spacing, config) -> None:
    takes, whole = inspect.signature(getattr(diffusers, f"{name}Scheduler")).parameters, len(stock(name).betas)
    if not set(config) <= set(takes):
        pytest.skip("it has no such setting")
    spaced = ({"timestep_spacing": s} if "timestep_spacing" in takes else {} for s in (spacing, TRAILING[spacing]))
    ours_config, theirs_config = ({**config, **each} for each in spaced)
    for time in (0.6, 0.2) if "original_inference_steps" in takes or name == "TCD" else (0.6, 0.2, 0.37):
        ours, n = short(name, time, **ours_config), round(whole * time)
        theirs = of_the_first(name, n, **theirs_config)
        for steps in (5, 10) if name == "PNDM" else (2, 5, 10):
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
            assert torch.equal(ours.timesteps, theirs.timesteps)
            assert abs(float(ours.timesteps[0]) - (n - 1)) < 0.5
            x = torch.randn(2, *SHAPE, generator=seeded())
            a, b, step, its_step = x, x, steps_of(ours, seeded(1)), steps_of(theirs, seeded(1))
            for t in ours.timesteps:
                a = step(raw(ours.scale_model_input(a, t), t), t, a)
                b = its_step(raw(theirs.scale_model_input(b, t), t), t, b)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert ours.config.num_train_timesteps == whole
        assert ours.config.get("timestep_spacing", spacing) == spacing or "timestep_spacing" not in takes


def test_a_grid_that_does_not_begin_at_the_start_is_refused() -> None:
    for wrong, steps in (
        (short("DDIM", 0.6, timestep_spacing="linspace"), 1),
        (short("LCM", 0.37), 4),  # 50 original steps do not divide 370 timesteps
    ):
        with pytest.raises(ValueError, match=r"timesteps begin at .*, before the last one of \[0, T\]"):
            wrong.set_timesteps(steps)
    with pytest.raises(ValueError, match="rounded to a timestep below 0: use another number of steps"):
        short("HeunDiscrete", 0.6, timestep_spacing="trailing").set_timesteps(7)


def test_a_setting_that_diffusers_changes_itself_holds() -> None:
    """An odd number of steps of a second-order solver makes it set `lower_order_final`."""
    ours, theirs = short("DPMSolverSinglestep", 0.6, lower_order_final=False), of_the_first("DPMSolverSinglestep", 600)
    for each in (ours, theirs):
        each.register_to_config(lower_order_final=False)
        each.set_timesteps(5)
    assert ours.config.lower_order_final == theirs.config.lower_order_final is True
    assert ours.config.num_train_timesteps == 1000


def test_settings_that_a_pipeline_changes_hold() -> None:
    """Stable Diffusion switches `clip_sample` off in the configuration of the scheduler that it is given."""
    ours = short("DDIM", 0.6, clip_sample=True)
    clipped = trajectory(ours)[-1]
    ours._internal_dict = type(ours.config)({**ours.config, "clip_sample": False})
    assert torch.equal(trajectory(ours)[-1], trajectory(short("DDIM", 0.6, clip_sample=False))[-1])
    assert not torch.equal(trajectory(ours)[-1], clipped)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_rounding_adds_no_timestep(name) -> None:
    """numpy's arange(600, 0, -600 / 7) has 8 elements."""
    for steps in (7, 14, 28):
        ours = short(name, 0.6, timestep_spacing="trailing")
        ours.set_timesteps(steps)
        assert len(ours.timesteps) == ours.num_inference_steps == steps
        assert ours.timesteps[0] == 599
        assert ours.timesteps[-1] > 10
        assert len(trajectory(ours, steps=steps)) == steps
        if hasattr(ours, "sigmas"):
            assert len(ours.sigmas) == steps + 1
            assert ours.sigmas[-1] < 0.011  # DEIS ends at the first trained level


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize("time", [0.2, 0.6])
def test_the_exact_network_and_start_give_the_data(name, time) -> None:
    """Of N(mean, variance): the error in mean and standard deviation falls with the steps, at least with the solver's
    first order; from N(0, I) at T = 0.2 there remains a bias."""
    law = Gaussian(torch.tensor([[[0.7]]]).double(), 0.25)
    errors = {}
    if name == "DDPM":
        noise = torch.randn(100_000, dtype=torch.float64, generator=seeded())
    else:  # deterministic, and an affine map of the start: any points of mean 0 and standard deviation 1 will do
        noise = torch.linspace(-1, 1, 11, dtype=torch.float64)
        noise = noise / noise.std()
    for steps in (10, 20, 40):
        ours = short(name, time, timestep_spacing="trailing", **({} if name[:2] != "DD" else {"clip_sample": False}))
        sigma = noise_schedule(ours).sigma_max
        alpha = (1 + sigma**2) ** -0.5
        network = network_of(law, ours)
        for start in ("exact", "prior") if steps == 40 else ("exact",):
            x = noise.reshape(-1, 1, 1, 1)
            if start == "exact":
                x = alpha * (law.mean + (law.variance + sigma**2).sqrt() * x)
            result = loop(ours, network, x, steps)
            errors[start, steps] = abs(result.mean() - 0.7).item(), abs(result.std() - 0.5).item()
    for coarse, fine in ((10, 20), (20, 40)):
        assert errors["exact", fine][1] < 0.65 * errors["exact", coarse][1] + 0.002
    assert max(errors["exact", 40]) < (0.05 if name == "DDPM" else 0.022)
    if time == 0.2:
        assert errors["prior", 40][0] > 0.2


def loop(scheduler, network, latents: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x, g = latents * scheduler.init_noise_sigma, seeded(1)
    options = {"generator": g} if type(scheduler).__name__ == "ShortTimeDDPMScheduler" else {}
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x


def test_the_start_of_euler_is_that_of_ddim_in_its_own_scale() -> None:
    """One step of either from the same x_T ends in the same place: they are the same solver."""
    x = torch.randn(3, *SHAPE, generator=seeded())
    ends = {}
    for name in ("DDIM", "EulerDiscrete"):
        ours = short(name, 0.4, timestep_spacing="trailing", **({"clip_sample": False} if name == "DDIM" else {}))
        ours.set_timesteps(4)
        y = x * ours.init_noise_sigma
        for t in ours.timesteps[:2]:
            y = ours.step(raw(ours.scale_model_input(y, t), t), t, y).prev_sample
        ends[name] = y
    sigma = noise_schedule(short("DDIM", 0.4)).sigma(torch.tensor([199.0]))
    torch.testing.assert_close(ends["EulerDiscrete"], ends["DDIM"] * (1 + sigma**2).sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_saved_ones_take_the_same_steps(name, tmp_path) -> None:
    ours = short(name, 0.6)
    expected = trajectory(ours)
    ours.save_pretrained(tmp_path)
    holds_functions = name in ("DPMSolverSDE", "SASolver")  # which cannot be pickled
    for other in (
        copy.deepcopy(ours),
        ours if holds_functions else pickle.loads(pickle.dumps(ours)),
        type(ours).from_pretrained(tmp_path),
        type(ours).from_config(stock(name).config, max_diffusion_time=0.6),
    ):
        assert all(torch.equal(a, b) for a, b in zip(trajectory(other), expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_with_a_calibration_each_step_loses_the_offset(name) -> None:
    """Composed from both families: against the stock scheduler of the first timesteps, given the output less its
    offset; the table of the whole model serves, one that was measured up to a shorter time does not."""
    takes = inspect.signature(getattr(diffusers, f"{name}Scheduler")).parameters
    spacing = {"timestep_spacing": "trailing"} if "timestep_spacing" in takes else {}
    whole, plain = table(stock(name), size=0.2), of_the_first(name, round(len(stock(name).betas) * 0.6), **spacing)
    kind = getattr(diffusers_ext, f"CalibratedShortTime{name}Scheduler")
    ours = kind.from_scheduler(short(name, 0.6, **spacing), whole)
    start = ours.init_noise_sigma / plain.init_noise_sigma
    plain_trajectory = trajectory(plain, lambda o, t: o - ours.offset(float(t), o), steps=5)
    if start == 1:
        for a, b in zip(trajectory(ours, steps=5), plain_trajectory, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    uncalibrated = trajectory(short(name, 0.6, **spacing), steps=5)
    assert (trajectory(ours, steps=5)[-1] - uncalibrated[-1]).abs().max() > 0.02
    with pytest.raises(ValueError, match=r"up to the diffusion time 0\.4 only"):
        kind.from_scheduler(short(name, 0.6), table(short(name, 0.4)))
    kind.from_scheduler(short(name, 0.4), table(short(name, 0.6)))


def test_a_calibrated_scheduler_of_all_times_does_not_take_the_place_of_a_short_one() -> None:
    with pytest.raises(ValueError, match="use CalibratedShortTimeDDIMScheduler"):
        CalibratedDDIMScheduler.from_scheduler(short("DDIM", 0.6), table(short("DDIM", 0.6)))


def test_its_schedule_is_that_of_the_short_times() -> None:
    schedule, whole = noise_schedule(short("DDIM", 0.6)), noise_schedule(stock("DDIM"))
    assert torch.equal(schedule.sigmas, whole.sigmas[:600])
    assert schedule.sigma_max == whole.sigmas[599]
    drawn = schedule.draw_sigmas(4000, seeded())
    assert schedule.sigma_max * 0.98 < drawn.max() <= schedule.sigma_max * (1 + 1e-6)
    sigma = torch.tensor([0.02, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(sigma), whole.time(sigma))


@pytest.mark.parametrize("time", [0.0, -0.1, 1.2, float("nan")])
def test_a_time_out_of_range_is_refused(time) -> None:
    with pytest.raises(ValueError, match=r"max_diffusion_time must be in \(0, 1\]"):
        short("DDIM", time)


def test_what_has_no_short_times_is_refused() -> None:
    with pytest.raises(ValueError, match="family vp"):
        short("DPMSolverMultistep", 0.5, use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"must start before .*: 600"):  # diffusers' own
        short("DDPM", 0.6).set_timesteps(timesteps=[700, 400, 100])
    short("DDPM", 0.6).set_timesteps(timesteps=[599, 400, 100])


BEYOND = [700, 400, 100]


@pytest.mark.parametrize(
    ("name", "grid", "config", "message"),
    [
        ("EulerDiscrete", ((None, None, BEYOND), {}), {}, r"begin at 700, after the last one of \[0, T\], 599"),
        ("EulerDiscrete", ((), {"timesteps": BEYOND}), {}, "begin at 700"),
        ("DPMSolverMultistep", ((None, None, None, BEYOND), {}), {}, "begin at 700"),
        ("EulerDiscrete", ((), {"sigmas": [300.0, 1.0, 0.0]}), {}, r"begin at 300, above that of T, 6\.135"),
        ("EulerDiscrete", ((5,), {}), {"use_karras_sigmas": True, "sigma_max": 80.0}, "begin at 80, above that of T"),
    ],
)
def test_a_grid_beyond_t_is_refused_whichever_way_it_is_set(name, grid, config, message) -> None:
    given, named = grid
    with pytest.raises(ValueError, match=message):
        short(name, 0.6, **config).set_timesteps(*given, **named)


def test_grids_within_t_are_taken_as_they_are() -> None:
    scheduler = short("EulerDiscrete", 0.6)
    scheduler.set_timesteps(timesteps=[599, 400, 100])
    assert scheduler.timesteps.tolist() == [599, 400, 100]
    scheduler.set_timesteps(sigmas=[6.1, 1.0, 0.1, 0.0])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([6.1, 1.0, 0.1, 0.0]))
    scheduler = short("EulerDiscrete", 0.6, use_karras_sigmas=True)
    scheduler.set_timesteps(7)
    assert len(scheduler.timesteps) == 7
    assert scheduler.sigmas[0].item() == pytest.approx(scheduler.schedule_of_network().sigma_max, rel=1e-3)


def tiny_stable_diffusion(scheduler) -> StableDiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_stable_pipeline_starts_from_the_latents_of_the_bridge() -> None:
    """The network sees them, alpha x0 + (1 - alpha^2)^1/2 n, at the bridge's timestep, with DDIM as with Euler."""
    latents, embeds = torch.randn(2, 4, 8, 8, generator=seeded()), torch.randn(2, 3, 16, generator=seeded(1))
    for name in ("DDIM", "EulerDiscrete"):
        for spacing in SPACINGS:
            torch.manual_seed(0)
            pipe = tiny_stable_diffusion(short(name, 0.6, timestep_spacing=spacing))
            seen = []

            def look(module, args, kwargs, seen=seen):
                seen.append((args[0].clone(), float(args[1])))

            pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
            pipe(prompt_embeds=embeds, latents=latents, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
            torch.testing.assert_close(seen[0][0], latents, rtol=1e-5, atol=1e-5)
            assert seen[0][1] == 599
            assert len(seen) == 3


def test_a_saved_pipeline_keeps_its_time(tmp_path) -> None:
    pipe = tiny_stable_diffusion(short("EulerDiscrete", 0.6))
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert type(loaded.scheduler) is type(pipe.scheduler)
    assert loaded.scheduler.config.max_diffusion_time == 0.6


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep"])
def test_clipping_the_end_of_the_whole_schedule_does_not_clip_the_short_one(name) -> None:
    """`lambda_min_clipped` leaves out the last timesteps of a cosine schedule, which lie beyond T."""
    clipped = {"beta_schedule": "squaredcos_cap_v2"} | ({"lambda_min_clipped": -5.1} if name.startswith("DPM") else {})
    ours = short(name, 0.6, timestep_spacing="trailing", **clipped)
    ours.set_timesteps(10)
    assert ours.timesteps.tolist() == list(range(599, 0, -60))
