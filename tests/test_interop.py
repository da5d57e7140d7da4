"""`interop`. Truth: what diffusers' schedulers themselves compute (their predicted x0, their noised samples, their
sigmas at each timestep), exact laws seen through every convention, and a direct call of each network."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import along, host_units, image_mixture, network_of
from torch import Tensor, nn

from diffusers_ext import denoiser_from, euler, noise_schedule, sample, score_matching_loss
from diffusers_ext.interop import require_vp
from diffusers_ext.networks import Network
from diffusers_ext.stock import EDM_SCHEDULERS, FLOW_SCHEDULERS, VP_SCHEDULERS

LAW = image_mixture(2, 3)
TRAILING = {"timestep_spacing": "trailing"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def field(model_input: Tensor, time: Tensor) -> Tensor:
    """Not the perfect network of anything: a smooth function that depends on all of its arguments."""
    return torch.sin(2 * model_input + along(0.01 * torch.as_tensor(time), model_input)) + 0.2


# our x0 is the scheduler's x0

SCALED = ["DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "CogVideoXDDIMScheduler"]
UNSCALED = {
    "EulerDiscreteScheduler": ["epsilon", "v_prediction", "sample"],
    "EulerAncestralDiscreteScheduler": ["epsilon", "v_prediction"],
    "HeunDiscreteScheduler": ["epsilon", "v_prediction", "sample"],
    "LMSDiscreteScheduler": ["epsilon", "v_prediction", "sample"],
    "KDPM2DiscreteScheduler": ["epsilon", "v_prediction"],
    "KDPM2AncestralDiscreteScheduler": ["epsilon", "v_prediction"],
    "EDMEulerScheduler": ["epsilon", "v_prediction"],
}
CONVERTERS = ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"]


def assert_same_x0(ours: Tensor, theirs: Tensor, sigma: Tensor | float) -> None:
    """To the float32 of the scheduler's tables, which x0 = x - sigma eps multiplies by sigma."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=3e-6 * (1 + float(sigma)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", SCALED)
def test_x0_is_that_of_a_scheduler_of_scaled_samples(name: str, prediction_type: str) -> None:
    options = {} if "CogVideoX" in name else {"clip_sample": False}
    scheduler = getattr(diffusers, name)(prediction_type=prediction_type, **options)
    scheduler.set_timesteps(25)
    denoiser = denoiser_from(field, scheduler)
    for t in scheduler.timesteps:
        h = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=seeded(int(t)))
        theirs = scheduler.step(field(h, t), t, h).pred_original_sample
        a, b = host_units(scheduler, t)
        assert_same_x0(denoiser(h / a, b / a), theirs, b / a)


@pytest.mark.parametrize(
    ("name", "prediction_type"), [(name, kind) for name, kinds in UNSCALED.items() for kind in kinds]
)
def test_x0_is_that_of_a_scheduler_of_unscaled_samples(name: str, prediction_type: str) -> None:
    start = getattr(diffusers, name)(prediction_type=prediction_type)
    if "timestep_spacing" in start.config:
        start = type(start).from_config(start.config, **TRAILING)
    start.set_timesteps(20)
    denoiser = denoiser_from(field, start)
    for i in range(0, 20, start.order):
        scheduler = deepcopy(start)
        scheduler.set_begin_index(i)
        sigma, t = scheduler.sigmas[i].double(), scheduler.timesteps[i]
        x = (1 + sigma) * torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=seeded(i))
        output = field(scheduler.scale_model_input(x, t), t)
        theirs = scheduler.step(output, t, x).pred_original_sample
        assert_same_x0(denoiser(x, sigma), theirs, sigma)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("name", CONVERTERS)
def test_x0_is_that_of_a_multistep_solver(name: str, prediction_type: str) -> None:
    options = {"use_flow_sigmas": True} if prediction_type == "flow_prediction" else TRAILING
    if "timestep_spacing" in options and "Singlestep" in name:
        options = {}
    scheduler = getattr(diffusers, name)(prediction_type=prediction_type, **options)
    scheduler.set_timesteps(25)
    denoiser = denoiser_from(field, scheduler)
    flow = (
        prediction_type == "flow_prediction"
    )  # the solver truncates these timesteps to integers; its sigmas are exact
    times = 1000 * scheduler.sigmas[:-1].double() if flow else scheduler.timesteps
    for i, t in list(enumerate(times))[1:]:
        scheduler._step_index = i
        h = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=seeded(i))
        theirs = scheduler.convert_model_output(field(h, t), sample=h)
        a, b = host_units(scheduler, t)
        assert_same_x0(denoiser(h / a, b / a), theirs, b / a)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x0_is_that_of_the_edm_multistep_solver(prediction_type: str) -> None:
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(prediction_type=prediction_type, sigma_data=0.8)
    scheduler.set_timesteps(10)
    denoiser = denoiser_from(field, scheduler)
    for i, t in enumerate(scheduler.timesteps):
        scheduler._step_index = i
        sigma = scheduler.sigmas[i].double()
        x = (1 + sigma) * torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=seeded(i))
        theirs = scheduler.convert_model_output(field(scheduler.precondition_inputs(x, sigma), t), sample=x)
        assert_same_x0(denoiser(x, sigma), theirs, sigma)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_x0_is_where_one_flow_matching_step_to_zero_ends(shift: float) -> None:
    denoiser = denoiser_from(field, FlowMatchEulerDiscreteScheduler(shift=shift))
    for u in (0.999, 0.7, 0.5, 0.1, 0.002):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[u])
        t = scheduler.timesteps[0]
        h = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=seeded())
        theirs = scheduler.step(field(h, t), t, h).prev_sample
        a, b = host_units(scheduler, t)
        torch.testing.assert_close(denoiser(h / a, b / a), theirs.double(), rtol=0, atol=1e-5)


# one law, every convention

CONVENTIONS = {
    "epsilon": DDIMScheduler(prediction_type="epsilon"),
    "sample": DDPMScheduler(prediction_type="sample"),
    "v": EulerDiscreteScheduler(prediction_type="v_prediction"),
    "cosine epsilon": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "flow solver": diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "edm": EDMEulerScheduler(sigma_data=0.7),
    "edm v": EDMEulerScheduler(sigma_data=0.7, prediction_type="v_prediction"),
}


def on_grid(scheduler) -> Tensor:
    """Noise levels, decreasing, where the scheduler's network is defined: all of them for flow and EDM."""
    if hasattr(scheduler, "alphas_cumprod") and scheduler.config.prediction_type != "flow_prediction":
        abar = scheduler.alphas_cumprod.double()[torch.tensor([900, 700, 400, 200, 50, 3])]
        return ((1 - abar) / abar).sqrt()
    return torch.tensor([20.0, 5.0, 1.3, 0.6, 0.2, 0.03], dtype=torch.float64)


@pytest.mark.parametrize("scheduler", CONVENTIONS.values(), ids=CONVENTIONS.keys())
def test_the_perfect_network_of_every_convention_is_the_posterior_mean(scheduler) -> None:
    denoiser, sigmas = denoiser_from(network_of(LAW, scheduler), scheduler), on_grid(scheduler)
    x0, noise = LAW.sample(6, seeded()), torch.randn(6, 2, 3, dtype=torch.float64, generator=seeded(1))
    x = x0 + along(sigmas, x0) * noise
    torch.testing.assert_close(denoiser(x, sigmas), LAW.denoiser(x, sigmas), rtol=0, atol=1e-7)
    loss = score_matching_loss(denoiser, x, x0, sigmas, weight=1.0)
    expected = ((LAW.denoiser(x, sigmas) - x0) / along(sigmas, x)).square().mean((1, 2))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scheduler", CONVENTIONS.values(), ids=CONVENTIONS.keys())
def test_every_convention_draws_the_same_samples(scheduler) -> None:
    sigmas = on_grid(scheduler)
    x = sigmas[0] * torch.randn(4, 2, 3, dtype=torch.float64, generator=seeded())
    ours = sample(denoiser_from(network_of(LAW, scheduler), scheduler), x, sigmas, euler)
    for sigma, lower in pairwise(sigmas):  # Euler on the exact ODE dx/dsigma = -sigma score
        y = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(LAW.log_prob(y, sigma.item()).sum(), y)
        x = x - (lower - sigma) * sigma * score
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-6)


# time

SCHEDULES = {
    "linear": DDPMScheduler(),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "stable diffusion": EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "100 steps": DDIMScheduler(num_train_timesteps=100),
    "zero terminal": DDIMScheduler(rescale_betas_zero_snr=True),
    "flow": FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_trained_timestep_has_its_own_noise_level_and_back(name: str) -> None:
    scheduler, schedule = SCHEDULES[name], noise_schedule(SCHEDULES[name])
    last = scheduler.config.num_train_timesteps - (2 if name == "zero terminal" else 1)
    time = torch.arange(1 if name == "flow" else 0, last + 1)
    a, b = host_units(scheduler, time)
    torch.testing.assert_close(schedule.sigma(time.double()), b / a, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.time(b / a), time.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.sigmas, b / a, rtol=1e-12, atol=0)
    assert (schedule.sigma_min, schedule.sigma_max) == pytest.approx(((b / a)[0].item(), (b / a)[-1].item()))


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(fraction=st.floats(0, 1))
def test_fractional_times_round_trip(name: str, fraction: float) -> None:
    schedule = noise_schedule(SCHEDULES[name])
    first = 0.5 if name == "flow" else 0.0
    last = schedule.num_train_timesteps - (2.0 if name == "zero terminal" else 1.0)
    time = torch.tensor([first + fraction * (last - first)], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.sigma(time)), time, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sigma=st.floats(1e-4, 1e4))
def test_edm_times_round_trip_and_are_the_schedulers_own(sigma: float) -> None:
    scheduler, level = EDMEulerScheduler(), torch.tensor([sigma], dtype=torch.float64)
    schedule = noise_schedule(scheduler)
    torch.testing.assert_close(schedule.time(level), scheduler.precondition_noise(level))
    torch.testing.assert_close(schedule.sigma(schedule.time(level)), level)


def test_fractional_times_are_those_that_the_karras_grid_of_euler_visits() -> None:
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(30)
    ours = noise_schedule(scheduler).time(scheduler.sigmas[:-1].double())
    assert (ours - ours.round()).abs().max() > 0.1  # fractional indeed
    torch.testing.assert_close(ours, scheduler.timesteps.double(), rtol=0, atol=2e-3)


def test_time_is_held_at_the_ends_of_the_noise_table() -> None:
    schedule = noise_schedule(DDIMScheduler())
    outside = torch.tensor([1e-9, 1e9], dtype=torch.float64)
    assert schedule.time(outside).tolist() == [0, 999]


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
def test_scale_turns_x_into_the_sample_that_the_scheduler_noises(kind: str) -> None:
    scheduler, schedule = SCHEDULES[kind], noise_schedule(SCHEDULES[kind])
    t = torch.tensor([1, 100, 250, 499])
    x0, noise = LAW.sample(4, seeded()), torch.randn(4, 2, 3, dtype=torch.float64, generator=seeded(1))
    if kind == "flow":
        a, b = host_units(scheduler, t)
        theirs = along(a, x0) * x0 + along(b, x0) * noise
    else:
        theirs = scheduler.add_noise(x0, noise, t)
    sigma = schedule.sigma(t.double())
    x = x0 + along(sigma, x0) * noise
    torch.testing.assert_close(along(schedule.scale(sigma), x) * x, theirs, rtol=0, atol=1e-6)


def test_the_last_timestep_of_a_short_diffusion() -> None:
    schedule = noise_schedule(DDPMScheduler())
    assert [schedule.last_timestep(t) for t in (1, 0.6, 0.2, 0.0006)] == [999, 599, 199, 0]
    assert noise_schedule(SCHEDULES["zero terminal"]).last_timestep(1.0) == 998
    assert noise_schedule(SCHEDULES["100 steps"]).last_timestep(0.4) == 39
    for wrong in (0, -0.5, 1.001, float("nan"), 0.0004):
        with pytest.raises(ValueError, match=f"in \\(0, 1\\].*{wrong}"):
            schedule.last_timestep(wrong)
    with pytest.raises(ValueError, match="flow"):
        require_vp(noise_schedule(SCHEDULES["flow"]))


def test_an_edm_sample_is_not_scaled() -> None:
    assert noise_schedule(EDMEulerScheduler()).scale(torch.tensor([0.01, 80.0])).tolist() == [1.0, 1.0]


def test_zero_terminal_snr_leaves_out_its_infinite_noise_level() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0  # the premise
    schedule = noise_schedule(scheduler)
    assert schedule.sigmas.isfinite().all()
    assert schedule.draw_sigmas(20_000, seeded()).isfinite().all()
    assert schedule.time(torch.tensor(1e9)).item() == 998


@pytest.mark.parametrize("kind", ["linear", "zero terminal", "100 steps", "flow"])
def test_training_draws_every_timestep_equally_often(kind: str) -> None:
    schedule = noise_schedule(SCHEDULES[kind])
    n, levels = 200_000, len(schedule.sigmas)
    drawn = schedule.time(schedule.draw_sigmas(n, seeded()).double()).round().long()
    counts = torch.bincount(drawn - (1 if kind == "flow" else 0), minlength=levels).double()
    assert len(counts) == levels
    chi2 = ((counts - n / levels) ** 2 / (n / levels)).sum().item()
    assert abs(chi2 - (levels - 1)) < 5 * (2 * (levels - 1)) ** 0.5


def test_training_draws_of_edm_are_log_normal() -> None:
    z = noise_schedule(EDMEulerScheduler()).draw_sigmas(100_000, seeded()).log()
    assert abs(z.mean().item() + 1.2) < 5 * 1.2 / len(z) ** 0.5
    assert abs(z.std().item() / 1.2 - 1) < 5 / (2 * len(z)) ** 0.5


# which schedulers


@pytest.mark.parametrize("name", sorted(VP_SCHEDULERS | FLOW_SCHEDULERS | EDM_SCHEDULERS))
def test_every_named_scheduler_and_a_subclass_of_it_is_read_as_its_own_noising(name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)()
    mine = type("Mine", (type(scheduler),), {})()
    x = LAW.sample(3, seeded())
    if name in EDM_SCHEDULERS:
        sigma = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
        time = scheduler.precondition_noise(sigma)
    else:
        time = torch.tensor([10.0, 500.0, 990.0], dtype=torch.float64)
        a, b = host_units(scheduler, time)
        sigma = b / a
    for each in (scheduler, mine):
        torch.testing.assert_close(noise_schedule(each).time(sigma), time, rtol=0, atol=1e-6)
        perfect = denoiser_from(network_of(LAW, each), each)
        torch.testing.assert_close(perfect(x, sigma), LAW.denoiser(x, sigma), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffusers.UnCLIPScheduler(),
        lambda: diffusers.RePaintScheduler(),
        lambda: diffusers.ScoreSdeVeScheduler(),
        lambda: diffusers.CMStochasticIterativeScheduler(),
        lambda: diffusers.IPNDMScheduler(),
        lambda: EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ],
    ids=["UnCLIP", "RePaint", "ScoreSdeVe", "CMStochastic", "IPNDM", "Euler continuous", "flow inverted"],
)
def test_other_schedulers_are_refused_with_the_names_of_supported_ones(make: Callable) -> None:
    scheduler = make()
    with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} cannot .*DDIMScheduler.*FlowMatchEuler.*"):
        denoiser_from(field, scheduler)


def test_an_unknown_prediction_type_is_refused() -> None:
    for scheduler in (DDIMScheduler(prediction_type="noise"), EDMEulerScheduler(prediction_type="noise")):
        for read in (noise_schedule, lambda s: denoiser_from(field, s)):
            with pytest.raises(ValueError, match="'noise' is not one of epsilon"):
                read(scheduler)


# which networks

TINY = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def tiny_unet(**options) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    return UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **TINY, **blocks, **options).eval()


def tiny_conditional_unet() -> UNet2DConditionModel:
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 8}
    kinds |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4}
    return UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=3, **TINY, **kinds).eval()


def tiny_dit(out_channels: int) -> DiTTransformer2DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    return DiTTransformer2DModel(in_channels=3, out_channels=out_channels, **sizes).eval()


LABELS = {"class_labels": torch.tensor([1, 4, 0])}
TEXT = {"encoder_hidden_states": torch.linspace(-1, 1, 3 * 5 * 8).reshape(3, 5, 8)}
NETWORKS = {
    "UNet2DModel": (tiny_unet, {}),
    "UNet2DModel with classes": (lambda: tiny_unet(num_class_embeds=5), LABELS),
    "UNet2DConditionModel": (tiny_conditional_unet, TEXT),
    "DiTTransformer2DModel": (lambda: tiny_dit(3), LABELS),
    "DiTTransformer2DModel with learned variance": (lambda: tiny_dit(6), LABELS),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_diffusers_network_is_called_as_its_own_pipeline_calls_it(name: str) -> None:
    make, cond = NETWORKS[name]
    network, scheduler = make(), DDIMScheduler(clip_sample=False)
    t = torch.tensor([3, 400, 900])
    h = torch.randn(3, 3, 8, 8, generator=seeded())
    a, b = host_units(scheduler, t)
    x, sigma = h / along(a, h).float(), (b / a).float()
    with torch.no_grad():
        ours = denoiser_from(network, scheduler)(x, sigma, **cond)
        outputs = network(h, timestep=t, **cond).sample[:, :3]
    for i in range(3):
        scheduler.set_timesteps(10)
        theirs = scheduler.step(outputs[i : i + 1], t[i], h[i : i + 1]).pred_original_sample[0]
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=float(3e-5 * (1 + sigma[i])))


@pytest.mark.parametrize("name", [n for n, (_, cond) in NETWORKS.items() if cond])
def test_the_condition_matters(name: str) -> None:
    make, cond = NETWORKS[name]
    denoiser, x = denoiser_from(make(), DDIMScheduler()), torch.randn(3, 3, 8, 8, generator=seeded())
    sigma = torch.tensor([0.5, 1.0, 2.0])
    other = {key: value.flip(0) for key, value in cond.items()}
    with torch.no_grad():
        assert (denoiser(x, sigma, **cond) - denoiser(x, sigma, **other)).abs().max() > 1e-4


@pytest.mark.parametrize("wrap", [lambda network: network, nn.DataParallel], ids=["bare", "wrapped"])
def test_flux_is_told_a_time_from_0_to_1(wrap: Callable) -> None:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)}
    network = FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes).eval()
    cond = {"encoder_hidden_states": torch.ones(2, 3, 8), "pooled_projections": torch.ones(2, 8)}
    cond |= {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3)}
    u = torch.tensor([0.3, 0.8])
    h = torch.randn(2, 6, 4, generator=seeded())
    with torch.no_grad():
        flow = network(hidden_states=h, timestep=u, return_dict=False, **cond)[0]  # as FluxPipeline: t / 1000
        x = h / (1 - along(u, h)).float()
        ours = denoiser_from(wrap(network), FlowMatchEulerDiscreteScheduler(shift=3.0))(x, u / (1 - u), **cond)
    torch.testing.assert_close(ours, h - along(u, h).float() * flow, rtol=0, atol=1e-5)


def test_aura_flow_is_told_a_time_from_0_to_1() -> None:
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    sizes |= {"joint_attention_dim": 8, "caption_projection_dim": 16, "pos_embed_max_size": 64}
    network = AuraFlowTransformer2DModel(sample_size=8, in_channels=4, out_channels=4, **sizes).eval()
    cond = {"encoder_hidden_states": torch.ones(2, 3, 8)}
    u = torch.tensor([0.3, 0.8])
    h = torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        flow = network(hidden_states=h, timestep=u, return_dict=False, **cond)[0]  # as AuraFlowPipeline: t / 1000
        x = h / (1 - along(u, h)).float()
        ours = denoiser_from(network, FlowMatchEulerDiscreteScheduler())(x, u / (1 - u), **cond)
    torch.testing.assert_close(ours, h - along(u, h).float() * flow, rtol=0, atol=1e-5)


class Recorder(nn.Module):
    """A network in low precision that notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.bfloat16))
        self.seen: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.seen += [sample, timestep]
        return self.gain * sample


def test_a_low_precision_network_gets_its_own_dtype_and_only_its_output_is_rounded() -> None:
    network, scheduler = Recorder(), DDIMScheduler()
    t = torch.tensor([5, 501, 997])  # 501 and 997 are no bfloat16 numbers
    a, b = host_units(scheduler, t)
    x, sigma = torch.randn(3, 2, 4, 4, generator=seeded()), (b / a).float()
    denoised = denoiser_from(network, scheduler)(x, sigma)
    given, time = network.seen
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(time.double(), t.double(), rtol=0, atol=1e-2)
    assert denoised.dtype == torch.float32
    exact = x - along(sigma, x).float() * 0.7 * along(a, x).float() * x
    assert ((denoised - exact).abs() <= along(sigma, x) * 2**-6 * x.abs() + 1e-6).all()  # not 2**-8 * x: the skip is x
    denoised.sum().backward()
    assert network.gain.grad is not None
    assert Network(network)(x, t).dtype == torch.float32


def test_a_wrapped_model_is_read_through_its_wrapper() -> None:
    inner = tiny_unet(num_class_embeds=5)
    h, t = torch.randn(3, 3, 8, 8, generator=seeded()), torch.tensor([1.0, 2.0, 3.0])
    with torch.no_grad():
        for wrapped in (nn.DataParallel(inner), torch.compile(inner, backend="eager")):
            torch.testing.assert_close(Network(wrapped)(h, t, **LABELS), inner(h, t, **LABELS).sample)


def test_double_channels_are_cut_only_when_they_are_a_learned_variance() -> None:
    def doubled(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, 99 + x], 1)

    h = torch.randn(2, 3, 4, 4, generator=seeded())
    assert torch.equal(Network(doubled)(h, torch.zeros(2)), h)
    assert torch.equal(Network(lambda x, t: 2 * x)(h, torch.zeros(2)), 2 * h)


# --- settings that contradict each other ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: DDIMScheduler(beta_start=0.0, beta_end=0.0), "must be positive, finite and increasing"),
        (lambda: DDIMScheduler(trained_betas=[0.1, 0.0, 0.1]), "must be positive, finite and increasing"),
        (lambda: DDIMScheduler(beta_end=1.5), "must be positive, finite and increasing"),
        (lambda: DDIMScheduler(trained_betas=[0.1, float("nan"), 0.1]), "must be positive, finite and increasing"),
        (lambda: DDIMScheduler(trained_betas=[0.1]), "must be positive, finite and increasing"),
        (lambda: DDIMScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=not known to it"),
        (lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=False"),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True),
            "prediction_type='epsilon' and use_flow_sigmas=True",
        ),
        (lambda: EDMEulerScheduler(sigma_min=2.0, sigma_max=1.0), "sigma_min must be above 0 and below sigma_max"),
        (lambda: EDMEulerScheduler(sigma_min=0.0), "sigma_min must be above 0"),
        (lambda: EDMEulerScheduler(sigma_data=-0.5), "sigma_data must be above 0"),
    ],
)
def test_settings_that_contradict_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        noise_schedule(scheduler())


def test_a_last_beta_of_one_is_a_level_without_an_end():
    levels = noise_schedule(DDIMScheduler(trained_betas=[0.1, 0.5, 1.0])).sigmas
    torch.testing.assert_close(levels, torch.tensor([1 / 9, 0.55 / 0.45], dtype=torch.float64).sqrt())
