"""Offsets for each channel, for samples of any size. Truth: perfect networks of white data plus an error that is known
in every channel and position; without the error they draw what they should at every size."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from oracles import Gaussian
from test_calibration import OracleNetwork, seeded, stored, table

from diffusers_ext import Calibration, calibrate_denoiser, estimate_calibration
from diffusers_ext.calibration import PER_CHANNEL, PER_POSITION, per_channel_shape
from diffusers_ext.schedulers.scheduling_calibrated import calibrated_class

SCHEDULER = EDMEulerScheduler(sigma_min=0.05, sigma_max=20.0)
SHAPES = {"image": (2, 3, 4), "video": (2, 2, 3, 2), "tokens": (6, 2)}
CHANNELS = torch.tensor([0.3, -0.2], dtype=torch.float64)


def of_channels(shape) -> torch.Tensor:
    """The error of each channel, in the place of the channels."""
    return CHANNELS.reshape(per_channel_shape(shape)).double()


def pattern(shape) -> torch.Tensor:
    """Errors of the positions whose mean is 0 in every channel."""
    noise = torch.randn(*shape, dtype=torch.float64, generator=seeded(5))
    axes = [0] if len(shape) == 2 else list(range(1, len(shape)))
    return noise - noise.mean(axes, keepdim=True)


def network(shape, by_position: float = 0.0, by_channel: float = 1.0, scheduler=SCHEDULER) -> OracleNetwork:
    o = by_channel * of_channels(shape) + (by_position * pattern(shape) if by_position else 0)
    return OracleNetwork().tell(Gaussian(0.0, 0.6), scheduler, lambda sigma, labels: o * (2 + sigma.log() / 3))


def batches(shape, n: int, size: int = 1600, labels: int | None = None):
    for i in range(0, n, size):
        x0 = Gaussian(torch.zeros(shape), 0.6).sample(size, seeded(i)).float()
        yield x0, {} if labels is None else {"class_labels": torch.arange(size) % labels}


def estimate(model, data, **options) -> Calibration:
    return estimate_calibration(
        model, options.pop("scheduler", SCHEDULER), data, num_levels=3, progress=False, **options
    )


@pytest.mark.parametrize("estimator", [{}, {"antithetic": False}], ids=["antithetic", "control variate"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_mean_over_positions_is_as_exact_as_it_says(name: str, estimator: dict) -> None:
    """400 rows are independent estimates of one error, from 32 samples each."""
    shape, rows = SHAPES[name], 400
    model = network(shape, by_position=0.5)
    model.error = (lambda error: lambda sigma, _: error(sigma, None))(model.error)
    data = batches(shape, 32 * rows, 16 * rows, labels=rows)
    made = estimate(model, data, num_classes=rows, shrink=False, **estimator)
    positions = made.offsets[0, 0].numel() // 2
    truth = torch.stack([of_channels(shape) * (2 + torch.tensor(s).log() / 3) for s in made.config.sigmas])[:, None]
    assert made.channel_offsets.shape == (3, rows, *per_channel_shape(shape))
    off = made.channel_offsets.double() - truth
    torch.testing.assert_close(made.channel_offsets, mean_over_positions(made.offsets), rtol=1e-4, atol=1e-5)
    assert (off.mean(1) / (off.std(1) / rows**0.5)).abs().max() < 4.5
    squared = positions * off.flatten(2).square().sum(2)
    ratio = squared / made.channel_noise_floor.double().mean(1, keepdim=True)
    assert ((ratio.mean(1) - 1) / (ratio.std(1) / rows**0.5)).abs().max() < 4
    wrong = made.channel_squared_norm.double() - positions * truth.flatten(2).square().sum(2)
    assert (wrong.mean(1) / (wrong.std(1) / rows**0.5)).abs().max() < 4
    assert (made.channel_noise_floor < made.noise_floor / 1.5).float().mean() > 0.9


def mean_over_positions(offsets):
    axes = [2] if offsets.ndim == 4 else list(range(3, offsets.ndim))
    return offsets.mean(axes, keepdim=True)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("by_position", "by_channel", "share", "chosen"),
    [(0.0, 1.0, 1.0, PER_CHANNEL), (1.0, 0.0, 0.0, PER_POSITION), (0.05, 1.0, None, PER_CHANNEL)],
)
def test_the_share_that_is_kept_decides_the_table(name, by_position, by_channel, share, chosen) -> None:
    shape = SHAPES[name]
    made = estimate(network(shape, by_position, by_channel), batches(shape, 3200))
    assert made.config.per == chosen
    if share is None:
        kept = CHANNELS.square().sum() * made.offsets[0, 0].numel() / 2
        share = (kept / (kept + by_position**2 * pattern(shape).square().sum())).item()
        assert 0.9 < share < 0.999
    assert made.kept_per_channel().item() == pytest.approx(share, abs=0.01)
    assert estimate(network(shape), batches(shape, 1600), per=PER_POSITION).config.per == PER_POSITION


def test_nothing_is_kept_of_nothing() -> None:
    made = estimate(OracleNetwork().tell(Gaussian(0.0, 0.6), SCHEDULER), batches((2, 3, 4), 1600))
    assert made.config.per == PER_POSITION
    assert (made.channel_shrinkage == 0).all()


def test_a_channel_is_done_long_before_its_positions_are() -> None:
    shape, options = (2, 3, 4), {"tolerance": 0.02, "save_every": 1, "control_variate": False, "antithetic": False}
    taken = {}
    for per in (PER_POSITION, PER_CHANNEL):
        made = estimate(network(shape), batches(shape, 16000, 100), per=per, **options)
        assert (made.std_error <= 0.02).all()
        assert made.config.per == per
        taken[per] = made.num_samples.sum().item()
    assert taken[PER_CHANNEL] < taken[PER_POSITION] / 5


OTHER = {"image": (2, 5, 3), "video": (2, 1, 4, 3), "tokens": (4, 2)}
HOSTS = {
    "EDM": SCHEDULER,
    "epsilon": DDIMScheduler(clip_sample=False),
    "v": EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
}


@pytest.mark.parametrize("per", [PER_POSITION, PER_CHANNEL])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", SHAPES)
def test_at_every_size_the_trajectory_is_that_of_the_perfect_model(name: str, host: str, per: str) -> None:
    """By the scheduler and by the hook, of one table, with sizes in any order."""
    scheduler = HOSTS[host]
    made = perfect_table(scheduler, SHAPES[name], per)
    ours = calibrated_class(type(scheduler).__name__).from_scheduler(scheduler, made)
    for shape in (OTHER[name], SHAPES[name], OTHER[name]):
        error = made.config.shape == list(shape) and per == PER_POSITION
        biased = network(shape, by_position=0.1 if error else 0.0, scheduler=scheduler)
        perfect = OracleNetwork().tell(Gaussian(0.0, 0.6), scheduler)
        expected = last(copy.deepcopy(scheduler), perfect, shape)
        assert (last(copy.deepcopy(scheduler), biased, shape) - expected).abs().max() > 0.1
        torch.testing.assert_close(last(ours, biased, shape), expected, rtol=0, atol=1e-3)
        with calibrate(biased, made):
            torch.testing.assert_close(last(copy.deepcopy(scheduler), biased, shape), expected, rtol=0, atol=1e-3)


class calibrate:
    def __init__(self, model, calibration):
        self.handle = calibrate_denoiser(model, calibration)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def perfect_table(scheduler, shape, per: str) -> Calibration:
    """The table of `network`, with both kinds of offsets; per position it has the pattern, too."""
    sigmas = table(scheduler, shape, levels=40).config.sigmas
    made = Calibration(list(shape), sigmas, ("all",), stored(scheduler), per=per, has_channels=True)
    size = (2 + torch.tensor(sigmas).double().log() / 3).reshape(-1, *[1] * (len(shape) + 1))
    made.offsets.copy_(size * (of_channels(shape) + 0.1 * pattern(shape)))
    made.channel_offsets.copy_(size * of_channels(shape))
    made.shrinkage.fill_(1.0)
    made.channel_shrinkage.fill_(1.0)
    return made


def last(sampler, model, shape, steps: int = 10) -> torch.Tensor:
    sampler.set_timesteps(steps)
    x = torch.randn(3, *shape, dtype=torch.float64, generator=seeded()) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        x = sampler.step(model(sampler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x.double()


def test_variances_of_a_grey_model_stay_as_they_are() -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    made = Calibration([1, 4, 4], [0.1, 10.0], ("all",), stored(scheduler), per=PER_CHANNEL, has_channels=True)
    made.channel_offsets.fill_(0.25)
    made.channel_shrinkage.fill_(1.0)
    ours = calibrated_class("DDPMScheduler").from_scheduler(scheduler, made)
    for size in (4, 6):
        output, x = torch.randn(2, 2, size, size, generator=seeded()), torch.randn(2, 1, size, size)
        shifted = torch.cat([output[:, :1] - 0.25, output[:, 1:]], 1)
        expected = scheduler.step(shifted, 500, x, generator=seeded()).prev_sample
        torch.testing.assert_close(ours.step(output, 500, x, generator=seeded()).prev_sample, expected)


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    scheduler = DDIMScheduler()
    old = calibrated_class("DDIMScheduler").from_scheduler(scheduler, table(scheduler, (2, 3, 4)))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), this one has \(2, 8, 8\): measure it again, .* per channel"):
        old.step(torch.zeros(1, 2, 8, 8), 10, torch.zeros(1, 2, 8, 8))
    ours = calibrated_class("DDIMScheduler").from_scheduler(scheduler, perfect_table(scheduler, (2, 3, 4), PER_CHANNEL))
    with pytest.raises(ValueError, match=r"of outputs of shape \(2, 1, 1\), this one has \(3, 8, 8\)"):
        ours.step(torch.zeros(1, 3, 8, 8), 10, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), this one has \(2, 12\)"):
        ours.step(torch.zeros(1, 2, 12), 10, torch.zeros(1, 2, 12))
    for per, channels in (("pixel", True), (PER_CHANNEL, False)):
        with pytest.raises(ValueError, match=f"per='{per}' is no table of those that were measured"):
            Calibration([2, 3, 4], [0.1, 1.0], per=per, has_channels=channels)
    with pytest.raises(ValueError, match="per='pixel' is not one of position, channel"):
        estimate(network((2, 3, 4)), [], per="pixel")


def test_both_tables_are_saved(tmp_path) -> None:
    made = estimate(network((2, 3, 4), by_position=0.1), batches((2, 3, 4), 1600))
    made.save_pretrained(tmp_path)
    loaded = Calibration.from_pretrained(tmp_path)
    assert loaded.config.per == made.config.per
    assert loaded.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_videos_with_their_frames_first_have_no_offsets_per_channel() -> None:
    """CogVideoX: the first axis of its samples is that of the frames."""
    model = type("CogVideoXTransformer3DModel", (torch.nn.Module,), {"forward": lambda self, x, t: 0 * x + 0.1})()
    made = estimate(model, batches((2, 3, 4, 4), 64, 32))
    assert (made.config.has_channels, made.config.per) == (False, PER_POSITION)
