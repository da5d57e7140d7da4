"""A rehearsal for an accelerator: the hot paths on torch's device `meta`, whose tensors have a shape and no values.

Reading a value there (`.item()`, `float(t)`, a branch on data, a boolean mask) raises, and so does an operation between
`meta` and the CPU. What passes never waits for the device, and makes its tensors where they belong. Numbers are drawn
from CPU generators. Stock schedulers are measured by themselves: ours may read where they do.
"""

from contextlib import nullcontext
from importlib import import_module

import diffusers
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from test_scheduling_calibrated import steps_of
from test_train_consistency import small  # noqa: F401

from diffusers_ext import (
    Calibration,
    FlowBridge,
    GaussianBridge,
    MixtureBridge,
    NoiseLevelDiscriminator,
    ReflectedScheduler,
    ShortTimeDDIMScheduler,
    calibrate_denoiser,
    consistency_loss,
    denoiser_from,
    discriminator_loss,
    heat_kernel_log_prob,
    heat_kernel_score,
    langevin,
    look_ahead_sigma,
    lower_sigma,
    min_snr_weight,
    noise_schedule,
    observation_loss,
    score_matching_loss,
    score_model_from,
)
from diffusers_ext.commands import parse_arguments
from diffusers_ext.interop import stored_scheduler
from diffusers_ext.schedulers.scheduling_calibrated import CALIBRATED_SCHEDULERS
from diffusers_ext.training import Adversary, TrainingLoop
from diffusers_ext.training.adversary import new_discriminator
from diffusers_ext.training.batch import Batch

META, SHAPE = torch.device("meta"), (2, 8, 8)
READS = (RuntimeError, NotImplementedError)

GAUSSIAN = {
    "vp": DDIMScheduler(),
    "vp v": DDIMScheduler(prediction_type="v_prediction"),
    "zero snr": DDIMScheduler(prediction_type="sample", rescale_betas_zero_snr=True),
    "short time": ShortTimeDDIMScheduler(max_diffusion_time=0.6),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "edm": EDMEulerScheduler(),
}
FAMILIES = GAUSSIAN | {"reflected": ReflectedScheduler()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 4) -> torch.Tensor:
    return torch.zeros(n, *SHAPE, device=META)


def labels(n: int = 4) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.long, device=META)


def unet(**options) -> UNet2DModel:
    """On the CPU, then moved; with attention, classes and dropout."""
    kinds = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    sizes = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    sizes |= {"in_channels": SHAPE[0], "out_channels": SHAPE[0], "attention_head_dim": 8, "num_class_embeds": 3}
    return UNet2DModel(**kinds, **sizes, **options).to(META)


def discriminator() -> NoiseLevelDiscriminator:
    return NoiseLevelDiscriminator(SHAPE[0], (8, 16), sigma_data=0.5, num_class_embeds=3, group_size=3).to(META)


def assert_trains(network: torch.nn.Module, loss: torch.Tensor) -> None:
    """The loss of each sample, and gradients of every parameter, on the device."""
    assert (loss.shape, loss.device) == ((4,), META)
    loss.mean().backward()
    assert {p.grad is not None and p.grad.device for p in network.parameters() if p.requires_grad} == {META}


# the rehearsal can fail


@pytest.mark.parametrize(
    "read",
    [
        lambda loss: loss * (1 / loss.mean().item()),
        lambda loss: loss if loss.isfinite().all() else loss.nan_to_num(),
        lambda loss: loss[loss > 0],
        lambda loss: loss * torch.ones(4),
        lambda loss: loss * torch.where(loss.cpu() > 0, 1.0, 2.0),
        lambda loss: loss[torch.multinomial(loss.to(seeded().device), 4, generator=seeded())],
    ],
    ids=["item", "branch", "mask", "made on the CPU", "copied to the CPU", "drawn on the CPU by values"],
)
def test_a_loss_that_reads_a_value_or_mixes_devices_is_caught(read) -> None:
    network, scheduler = unet(), DDIMScheduler()
    loss = score_matching_loss(
        denoiser_from(network, scheduler), batch(), batch(), batch()[:, 0, 0, 0], class_labels=labels()
    )
    with pytest.raises(READS):
        read(loss).mean().backward()


# losses, and what they are fed with


@pytest.mark.parametrize("scheduler", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("drawn_by", [seeded(), None], ids=["generator", "global state"])
def test_noise_levels_are_drawn_and_translated(scheduler, drawn_by) -> None:
    schedule = noise_schedule(scheduler)
    sigma = schedule.draw_sigmas(4, drawn_by, META)
    lower = lower_sigma(sigma, relative=True, generator=drawn_by)
    ahead = look_ahead_sigma(sigma, 0.1, schedule.sigma_min, schedule.sigma_max, generator=drawn_by)
    times = schedule.time(sigma)
    for made in (sigma, lower, ahead, times, schedule.sigma(times), schedule.scale(sigma), min_snr_weight(sigma)):
        assert (made.shape, made.device) == ((4,), META)


@pytest.mark.parametrize("scheduler", FAMILIES.values(), ids=FAMILIES.keys())
def test_score_matching(scheduler) -> None:
    network, schedule, x0 = unet(dropout=0.1), noise_schedule(scheduler), batch()
    model, sigma = score_model_from(network, scheduler), schedule.draw_sigmas(4, seeded(), META)
    x = model.process.perturb(x0, sigma, seeded())
    weight = model.output_weight(sigma)
    assert_trains(network, score_matching_loss(model, x, x0, sigma, weight=weight, class_labels=labels()))


@pytest.mark.parametrize(("family", "rollout"), [("vp", "posterior"), ("flow", "posterior"), ("edm", "euler_maruyama")])
def test_consistency(family: str, rollout: str) -> None:
    scheduler = GAUSSIAN[family]
    network, sigma = unet(dropout=0.1), noise_schedule(scheduler).draw_sigmas(4, seeded(), META)
    denoiser, x = denoiser_from(network, scheduler), batch()
    options = {"steps": 2, "rollout": rollout, "generator": seeded(), "class_labels": labels()}
    denoised = denoiser(x, sigma, class_labels=labels())
    assert_trains(
        network,
        consistency_loss(denoiser, x, sigma, lower_sigma(sigma, generator=seeded()), denoised=denoised, **options),
    )


@pytest.mark.parametrize(("family", "projection"), [("vp", "euler"), ("flow", "euler"), ("edm", "heun")])
def test_observation(family: str, projection: str) -> None:
    scheduler = GAUSSIAN[family]
    network, judge, sigma = unet(), discriminator(), noise_schedule(scheduler).draw_sigmas(4, seeded(), META)
    judge.enable_gradient_checkpointing()
    denoiser, cond = denoiser_from(network, scheduler), {"class_labels": labels()}
    game = {"projection": projection, "discriminator_cond": cond, **cond}
    assert_trains(network, observation_loss(denoiser, judge, batch(), sigma, sigma / 2, **game))
    judged = discriminator_loss(denoiser, judge, batch(), batch(), sigma, sigma / 2, sigma_data=0.5, **game)
    assert_trains(judge, judged.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [heat_kernel_log_prob, heat_kernel_score])
def test_the_heat_kernel(kernel, dtype: torch.dtype) -> None:
    x = batch().to(dtype).requires_grad_()
    for sigma in (0.3, batch()[:, 0, 0, 0] + 0.3):
        made = kernel(x, batch().to(dtype), sigma)
        assert (made.shape, made.device, made.dtype) == (x.shape, META, dtype)
        made.sum().backward()


@pytest.mark.parametrize("scheduler", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_prior_and_the_corrector(scheduler) -> None:
    model, sigma_max = score_model_from(unet(), scheduler), noise_schedule(scheduler).sigma_max
    x = model.process.sample_prior((4, *SHAPE), sigma_max, seeded(), device=META)
    assert model.process.log_prior(x, sigma_max).shape == (4,)
    assert langevin(model, x, batch()[:, 0, 0, 0] + 0.5, generator=seeded(), class_labels=labels()).device == META


# bridges


def bridges() -> dict:
    stored = stored_scheduler(DDIMScheduler())
    made = {"gaussian": GaussianBridge, "mixture": MixtureBridge, "flow": FlowBridge}
    more = {"gaussian": {}, "mixture": {"latent_rank": 3, "num_components": 4}, "flow": {"latent_rank": 3}}
    return {
        f"{name}, {classes} classes": (kind, {"rank": 5, "num_classes": classes, "scheduler": stored, **more[name]})
        for name, kind in made.items()
        for classes in (None, 3)
    }


@pytest.mark.parametrize(("kind", "config"), bridges().values(), ids=bridges().keys())
def test_a_bridge_is_drawn_from_and_evaluated(kind, config, monkeypatch) -> None:
    """The labels of a class-conditional one are on the CPU: the sizes of its matrices depend on them."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # `meta` has none to switch off
    bridge = kind(shape=SHAPE, max_diffusion_time=0.6, **config).to(META)
    of_classes = torch.tensor([2, 0, 2, 1]) if config["num_classes"] else labels()
    for drawn_by in (seeded(), None):
        assert bridge.sample(4, drawn_by, of_classes).device == META
    x = batch().requires_grad_()
    log_prob = bridge.log_prob(x, of_classes)
    assert (log_prob.shape, log_prob.device) == ((4,), META)
    log_prob.sum().backward()
    if config["num_classes"]:
        with pytest.raises(READS):  # labels on the device are waited for
            bridge.sample(4, seeded(), labels())


# calibration


def calibration(scheduler, rows: tuple[str, ...] = ("all",)) -> Calibration:
    sigmas = noise_schedule(scheduler).sigma_min, noise_schedule(scheduler).sigma_max
    return Calibration(SHAPE, sigmas, rows, stored_scheduler(scheduler))


def made(name: str):
    scheduler = getattr(diffusers, name)()
    return scheduler, CALIBRATED_SCHEDULERS[name].from_scheduler(scheduler, calibration(scheduler))


@pytest.mark.parametrize("name", [n for n in CALIBRATED_SCHEDULERS if "DPMSolverSDE" not in n])  # torchsde draws
def test_a_calibrated_scheduler_reads_no_more_than_the_stock_one(name: str) -> None:
    """No stock scheduler reads a sample; timesteps, which many of them read, stay on the CPU here."""
    for scheduler in made(name):
        scheduler.set_timesteps(6)
        sample, step = batch(), steps_of(scheduler)
        for t in scheduler.timesteps[:4]:
            model_output = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            sample = step(model_output, t, sample)
            assert (sample.shape, sample.device) == ((4, *SHAPE), META)


@pytest.mark.parametrize("name", CALIBRATED_SCHEDULERS)
def test_what_a_calibrated_scheduler_adds_does_not_read_timesteps_either(name: str, monkeypatch) -> None:
    stock, ours = made(name)
    monkeypatch.setattr(type(stock), "step", lambda self, model_output, *others: model_output)
    ours.set_timesteps(6)
    ours.timesteps = ours.timesteps.to(META)
    ours._remember_offsets()  # as `set_timesteps` does
    for t in (ours.timesteps[3], ours.timesteps[3] + 0.5):
        for dtype in (torch.float32, torch.float16):
            before = (None,) * ours._timestep_at
            assert ours.step(batch().to(dtype), *before, t, batch()).dtype == dtype


@pytest.mark.parametrize(
    ("rows", "guidance"),
    [(("all",), None), (("0", "1", "2"), None), (("conditional", "unconditional"), "first_half")],
    ids=["all", "classes", "guidance"],
)
def test_the_hook_that_calibrates_a_network(rows, guidance) -> None:
    network = unet()
    calibrate_denoiser(network, calibration(DDIMScheduler(), rows), guidance=guidance)
    for time in (torch.zeros(4, device=META), torch.zeros((), device=META), 7):
        assert network(batch(), time, labels()).sample.device == META


# the reflected sampler


@pytest.mark.parametrize("device", [None, META], ids=["timesteps on the CPU", "timesteps on the device"])
@pytest.mark.parametrize("trained", ["reflected", "point", "the ordinary way"])
@pytest.mark.parametrize("algorithm_type", ["sde", "ode", "heun"])
def test_the_reflected_step(algorithm_type: str, trained: str, device) -> None:
    ordinary = {"beta_schedule": "linear", "prediction_type": "v_prediction"}
    network = {"reflected": {}, "point": {"prediction_type": "point"}}.get(trained, ordinary)
    scheduler = ReflectedScheduler(algorithm_type=algorithm_type, **network)
    scheduler.set_timesteps(3, device)
    sample = batch()
    for t in scheduler.timesteps:
        sample = scheduler.step(scheduler.scale_model_input(sample, t), t, sample, seeded()).prev_sample
        assert (sample.shape, sample.device) == ((4, *SHAPE), META)
    assert scheduler.add_noise(sample, sample, labels()).device == META


# a training step


def test_a_training_step_from_a_ready_batch_to_the_moving_average(small, load_script, tmp_path, monkeypatch) -> None:  # noqa: F811
    """Denoising, consistency and the game against the discriminator, as `train_observation.py` does them. The fused
    AdamW works on `meta`, though torch does not list it."""
    prepare = Accelerator.prepare
    monkeypatch.setattr(Accelerator, "device", META)
    monkeypatch.setattr(
        Accelerator, "prepare", lambda self, *args: prepare(self, *args, device_placement=[False] * len(args))
    )
    monkeypatch.setattr(
        import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices", lambda: ["meta"]
    )
    script = load_script("train_observation")
    options = ("--consistency_weight", "1", "--projection", "euler", "--output_dir", str(tmp_path / "out"))
    args = parse_arguments(script.ObservationArguments, [*map(str, small), *options])
    loop = TrainingLoop(args, "test", ("A paper", "2302.09057"))
    judge = new_discriminator(loop, "8,16").to(META)
    adversary = Adversary(judge, learning_rate=1e-4, betas=(0.0, 0.99), max_logit=100.0)
    loop.keep(adversary)
    with loop.accelerator.accumulate(loop.model):
        script.step(args, loop, loop.denoiser, adversary, Batch(torch.zeros(8, 1, 8, 8, device=META), {}, seeded()))
    loop.lr_scheduler.step()
    loop.ema.step(loop.model.parameters())
    state = [v for group in loop.optimizer.state.values() for v in group.values()]
    assert len(state) == 3 * len(list(loop.model.parameters()))
    assert {t.device for t in (*state, *loop.ema.shadow_params, *judge.parameters(), loop.grad_norm)} == {META}
