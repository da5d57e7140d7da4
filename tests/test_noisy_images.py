"""Training from images with noise. Truth: closed forms of Gaussian data, the laws that were said, by their distribution
functions, and what diffusers' own schedulers answer in their last step."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from scipy import stats
from test_models import tiny_unet

from diffusers_ext import denoised_copies, denoiser_from, noise_schedule
from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.batches import Images
from diffusers_ext.data.images import ExactTransform
from diffusers_ext.data.noise import require_noise
from diffusers_ext.errors import InputError
from diffusers_ext.evaluation.measures import loss_by_sigma
from diffusers_ext.interop import scheduler_above
from diffusers_ext.randomness import Seeds, Stream
from diffusers_ext.subjects import subject_of
from diffusers_ext.training import TrainingLoop

S = 0.5


@pytest.fixture
def script(load_script):
    return load_script("train_consistency")


def images_of(n, noise, seed=0, side=8):
    """Grey squares with noise, black at -1 and white at 1; (n, side, side)."""
    rng = np.random.default_rng(seed)
    flat = np.repeat(rng.uniform(-1, 1, (n, 1, 1)), side, 1).repeat(side, 2)
    return (flat + noise * rng.normal(size=flat.shape)).astype(np.float32)


def write_folder(folder, n=24, noise=S, column=None):
    """Images of floating point numbers, and a column of their noise."""
    (folder / "train").mkdir(parents=True)
    for i, image in enumerate(images_of(n, noise)):
        Image.fromarray(image).save(folder / "train" / f"{i:02d}.tiff")
    if column is not None:
        with open(folder / "train" / "metadata.csv", "w") as file:
            csv.writer(file).writerows([("file_name", "noise"), *((f"{i:02d}.tiff", s) for i, s in enumerate(column))])
    return folder


@pytest.fixture
def small(tmp_path):
    """Arguments of a run of 2 steps of a tiny model on such images."""
    tiny_unet().save_config(tmp_path / "config")
    return [
        *("--model_config_name_or_path", tmp_path / "config", "--resolution", 8, "--value_range=-1,1"),
        *("--train_batch_size", 8, "--max_train_steps", 2, "--max_validation_samples", 8, "--report_to", "none"),
        *("--num_validation_images", 2, "--num_inference_steps", 3, "--logging_steps", 1),
    ]


# --- where the sampler ends -------------------------------------------------------------------------------------------

SCHEDULERS = [
    DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
    DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False),
    DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False),
    EDMEulerScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_the_lowest_level_is_the_noise_and_the_last_step_answers_x0(scheduler):
    whole, above = noise_schedule(scheduler), scheduler_above(scheduler, S)
    cut = noise_schedule(above)
    assert type(above) is type(scheduler)
    assert cut.sigma_min == pytest.approx(S, rel=1e-5)
    assert cut.sigma_max == pytest.approx(whole.sigma_max, rel=1e-4)
    if cut.family == "vp":  # its other levels are those of before
        kept = whole.sigmas[whole.sigmas > S]
        torch.testing.assert_close(cut.sigmas[1:], kept, rtol=1e-4, atol=0)
    for steps in (1, 5, 7, 10, 20, 30, 50):
        generator = torch.Generator().manual_seed(0)
        above.set_timesteps(steps)
        x, output = torch.randn(2, 2, 3, generator=generator).double()
        for t in above.timesteps:
            step = above.step(output, t, x, generator=generator)
            x = step.prev_sample
        torch.testing.assert_close(x, step.pred_original_sample)
    assert scheduler_above(above, S) is above


def test_a_zero_terminal_snr_stays():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    above = scheduler_above(scheduler, S)
    assert above.alphas_cumprod[-1] < 1e-7
    assert noise_schedule(above).sigma_max == pytest.approx(noise_schedule(scheduler).sigma_max, rel=1e-3)


@pytest.mark.parametrize("sigma", [0, -1, math.nan, 1e9])
def test_levels_that_are_not_there_are_refused(sigma):
    with pytest.raises(ValueError, match="sigma_min"):
        scheduler_above(DDIMScheduler(), sigma)


def test_flow_matching_is_refused():
    with pytest.raises(ValueError, match="FlowMatchEuler"):
        scheduler_above(FlowMatchEulerDiscreteScheduler(), S)


# --- what is trained on -----------------------------------------------------------------------------------------------


def loop_of(script, small, folder, *more):
    argv = [*small, "--train_data_dir", folder, *more, "--output_dir", folder.with_name(f"{folder.name}-out")]
    return TrainingLoop(parse_arguments(script.ConsistencyArguments, [*map(str, argv)]), "test", script.PAPER)


def test_levels_are_half_near_the_noise_and_half_log_uniform(script, small, tmp_path):
    loop = loop_of(script, small, write_folder(tmp_path / "data"), "--data_noise", S)
    high, generator = loop.schedule.sigma_max, torch.Generator().manual_seed(0)
    sigma = loop.levels.draw_above(torch.full((20_000,), S), generator).double().numpy()

    def law(x):
        near = stats.norm.cdf(np.log(np.sqrt(np.maximum(x**2 - S**2, 1e-20)) / (0.8 * S)))
        return (near + np.log(x / S) / math.log(high / S)) / 2

    assert sigma.min() >= S
    assert sigma.max() <= high * (1 + 1e-5)
    assert stats.kstest(sigma, law).pvalue > 1e-3


def test_levels_of_clean_images_are_as_ever(script, small, tmp_path):
    loop = loop_of(script, small, write_folder(tmp_path / "data"), "--data_noise", S)
    noise = torch.tensor([0.0, S] * 500)
    found = loop.levels.draw_above(noise, torch.Generator().manual_seed(3))
    usual = loop.levels.draw(1000, torch.Generator().manual_seed(3), torch.device("cpu"))
    assert torch.equal(found[::2], usual[::2])
    assert (found[1::2] >= S).all()


def test_the_loss_of_the_first_step_by_hand(script, small, tmp_path):
    """x at sigma has x_n, of noise s, in it, so that its noise is drawn to the rest of the variance."""
    folder = write_folder(tmp_path / "data")
    loop = loop_of(script, small, folder, "--data_noise", S)
    batch = next(iter(loop))
    generator = torch.Generator().set_state(batch.generator.get_state())
    sigma = loop.levels.draw_above(torch.full((8,), S), generator)
    align = sigma.double().reshape(-1, 1, 1, 1)
    z = torch.randn(batch.x0.shape, generator=generator).double()
    x = batch.x0.double() + (align**2 - S**2).clamp(min=0).sqrt() * z
    denoised = loop.denoiser(x.float(), sigma).double()
    mean = S**2 / align**2 * x + (1 - S**2 / align**2) * denoised
    square = (mean - batch.x0).square().flatten(1).mean(1)
    loss = square / (1 - S**2 / sigma.double() ** 2).clamp(min=0.02) / sigma.double() ** 2 * loop.weight(sigma)
    script.run(*small, "--train_data_dir", folder, "--data_noise", S, "--output_dir", tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out" / "logs" / "log.jsonl").read_text().splitlines()]
    assert log[1]["ambient"] == pytest.approx(loss.mean().item(), rel=1e-4)


def test_the_result_opens_in_diffusers_and_ends_at_the_noise(script, small, tmp_path):
    folder = write_folder(tmp_path / "data")
    script.run(*small, "--train_data_dir", folder, "--data_noise", S, "--output_dir", tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert noise_schedule(pipeline.scheduler).sigma_min == pytest.approx(S, rel=1e-5)
    assert pipeline(batch_size=2, num_inference_steps=3, output_type="np").images.shape == (2, 8, 8, 1)
    again = [*small[2:], "--pretrained_model_name_or_path", tmp_path / "out", "--train_data_dir", folder]
    script.run(*again, "--data_noise", S, "--output_dir", tmp_path / "more")
    with pytest.raises(SystemExit, match="another table"):
        script.run(*again, "--data_noise", 0.4, "--output_dir", tmp_path / "other")


def test_a_column_says_the_noise_of_each_image(script, small, tmp_path):
    noise = [0.0, 0.25, S] * 8
    loop = loop_of(script, small, write_folder(tmp_path / "data", column=noise), "--data_noise_column", "noise")
    assert noise_schedule(loop.pipeline.scheduler).sigma_min < 0.02  # there are clean images
    batch = next(iter(loop))
    whole = images_of(24, S)
    for x, s in zip(batch.x0, batch.data_noise.tolist(), strict=True):
        (i,) = np.flatnonzero(np.abs(whole - x[0].numpy()).max((1, 2)) < 1e-5)
        assert s == noise[i]
    rest = write_folder(tmp_path / "rest", column=[0.25, S] * 12)
    loop = loop_of(script, small, rest, "--data_noise_column", "noise")
    assert noise_schedule(loop.pipeline.scheduler).sigma_min == pytest.approx(0.25, rel=1e-5)


def test_images_are_neither_rounded_nor_cut_off():
    image = images_of(1, 1.0)[0]
    transform = ExactTransform(8, 1, value_range=(-1.0, 1.0))
    found = transform(Image.fromarray(image), torch.Generator())
    np.testing.assert_allclose(found[0].numpy(), image, atol=1e-6)
    assert np.abs(image).max() > 2
    wide = images_of(1, 1.0, side=12)[0][:8]
    crop, (height, width, top, left) = ExactTransform(8, 1, False, True, (-1.0, 1.0)).placed(
        Image.fromarray(wide), torch.Generator().manual_seed(5)
    )
    assert (height, width, top) == (8, 12, 0)
    mirrored = wide[:, ::-1][:, left : left + 8]
    assert any(np.allclose(crop[0].numpy(), one, atol=1e-6) for one in (mirrored, wide[:, left : left + 8]))
    image[2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        transform(Image.fromarray(image), torch.Generator())
    with pytest.raises(ValueError, match="resized"):
        transform(Image.fromarray(images_of(1, 1.0, side=16)[0]), torch.Generator())


def test_noise_that_is_not_there_is_found():
    noisy = torch.from_numpy(images_of(64, S))[:, None]
    s = torch.full((64,), S)
    require_noise(noisy, s)
    require_noise(noisy[..., :7, :7], s)
    halves = torch.nn.functional.avg_pool2d(torch.from_numpy(images_of(64, S, side=16))[:, None], 2)
    for spoilt in (noisy.clamp(-1, 1) * 0.8, halves, 0 * noisy, noisy / 2, noisy * math.nan):
        with pytest.raises(InputError, match="less noise"):
            require_noise(spoilt, s)


# --- below the noise --------------------------------------------------------------------------------------------------


class Gaussian(torch.nn.Module):
    """The exact denoiser of N(0, v)."""

    network = torch.nn.Identity()

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma).reshape(-1, *[1] * (x.ndim - 1))
        return self.v / (self.v + sigma**2) * x


def test_copies_follow_the_flow_of_gaussian_data_and_keep_its_variance():
    v, low = 0.3, 0.01
    x = (v + S**2) ** 0.5 * torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.full((4000,), S).double()
    exact = x * ((v + low**2) / (v + S**2)) ** 0.5 * v / (v + low**2)
    errors = []
    for steps in (10, 20):
        copies, kept = denoised_copies(Gaussian(v), x, noise, low, steps=steps)
        errors.append((copies - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # Euler's order
    assert kept.item() == pytest.approx((v + low**2) ** -1 * v, rel=0.1)


def test_copies_train_half_of_the_batch_below_the_noise(script, small, tmp_path, monkeypatch):
    seen = []
    plain = script.ambient_loss

    def spy(denoised, x, noisy, noise, sigma, **options):
        seen.append((noise.clone(), sigma.clone()))
        return plain(denoised, x, noisy, noise, sigma, **options)

    monkeypatch.setattr(script, "ambient_loss", spy)
    monkeypatch.setattr(script, "LEAST_VARIANCE", -math.inf)
    folder = write_folder(tmp_path / "data")
    argv = [*small, "--train_data_dir", folder, "--data_noise", S, "--below_noise", "rollout"]
    script.run(*argv, "--max_train_steps", 10, "--output_dir", tmp_path / "out")
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "out").scheduler
    low = noise_schedule(scheduler).sigma_min
    assert low < 0.02  # it does not end at the noise
    before, after = seen[:3], seen[3:]
    assert all((noise == S).all() and (sigma >= S).all() for noise, sigma in before)
    for noise, sigma in after:
        assert noise.tolist() == pytest.approx([0.0] * 4 + [S] * 4)
        assert (sigma[:4] < S).all()
        assert (sigma[:4] >= low * (1 - 1e-5)).all()
        assert (sigma[4:] >= S).all()


def test_copies_that_have_lost_variance_are_not_trained_on(script, small, tmp_path, monkeypatch):
    """With a bound that none reaches, their rows have loss 0."""
    monkeypatch.setattr(script, "LEAST_VARIANCE", math.inf)
    argv = [*small, "--train_data_dir", write_folder(tmp_path / "data"), "--data_noise", S, "--below_noise", "rollout"]
    loop = TrainingLoop(
        parse_arguments(script.ConsistencyArguments, [*map(str, argv), "--output_dir", str(tmp_path / "o")]),
        "test",
        script.PAPER,
    )
    batch = next(iter(loop))
    sigma = torch.full((8,), 1.0)
    state = batch.generator.get_state()
    _, _, levels, kept = script.below(loop, batch, batch.data_noise, sigma)
    batch.generator.set_state(state)  # the source of its random numbers
    assert torch.equal(script.below(loop, batch, batch.data_noise, sigma)[2], levels)
    assert kept.tolist() == [0.0] * 4 + [1.0] * 4
    assert (levels[4:] == 1).all()


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data_noise_column", "height"), "have the columns"),
        (("--data_noise", 0.9), "less noise"),
        (("--data_noise", 0.5, "--scheduler", "FlowMatchEulerDiscreteScheduler"), "cannot end"),
        (("--data_noise", 0.5, "--dataset_name", "digits", "--preset", "digits"), "no noise|have none|be found"),
        (("--data_noise_column", "noise", "--streaming"), "not streamed"),
    ],
)
def test_what_cannot_be_is_refused_before_training(script, small, tmp_path, options, message):
    folder = write_folder(tmp_path / "data", column=[S] * 24)
    data = () if "--dataset_name" in options else ("--train_data_dir", folder)
    with pytest.raises(SystemExit, match=message):
        script.run(*small, *data, *options, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "unet").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data_noise", 0.5, "--data_noise_column", "noise"), "both say"),
        (("--data_noise_column", "noise", "--below_noise", "rollout"), "all have noise"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(script, small, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        script.run(*small, "--train_data_dir", tmp_path, *options, "--output_dir", tmp_path / "out")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["-0.1", "nan", "inf", "much"])
def test_a_column_of_noise_holds_numbers(script, small, tmp_path, wrong):
    folder = write_folder(tmp_path / "data", column=[*["0.5"] * 23, wrong])
    with pytest.raises(SystemExit, match="data_noise_column noise"):
        script.run(*small, "--train_data_dir", folder, "--data_noise_column", "noise", "--output_dir", tmp_path / "out")


def test_black_and_white_must_be_said(script, small, tmp_path):
    argv = [word for word in small if word != "--value_range=-1,1"]
    folder = write_folder(tmp_path / "data")
    with pytest.raises(SystemExit, match="--value_range=0,1"):
        script.run(*argv, "--train_data_dir", folder, "--data_noise", S, "--output_dir", tmp_path / "out")


def test_the_denoiser_of_a_pipeline_that_ends_at_the_noise_knows_its_levels():
    """The time that the network is given at the noise is that of the first entry of the table."""
    above = scheduler_above(DDIMScheduler(), S)
    schedule = noise_schedule(above)
    assert schedule.time(torch.tensor([S])).item() == pytest.approx(0, abs=0.05)
    assert denoiser_from(tiny_unet(), above)(torch.zeros(1, 1, 8, 8), torch.tensor([S])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(("options", "weight"), [((), 10), (("--data_noise", "0.5"), 0)])
def test_the_consistency_loss_is_off_by_default_where_images_have_noise(script, options, weight):
    argv = ["--consistency_weight", "3"]
    assert parse_arguments(script.ConsistencyArguments, [*options]).consistency_weight == weight
    assert parse_arguments(script.ConsistencyArguments, [*options, *argv]).consistency_weight == 3


def test_the_held_out_loss_is_the_ambient_one_by_hand():
    pipeline = DDPMPipeline(tiny_unet(), scheduler_above(DDIMScheduler(), S))
    noisy = torch.from_numpy(images_of(4, S))[:, None]
    images = Images(noisy, torch.full((4,), -1), [], data_noise=torch.full((4,), S))
    found = loss_by_sigma(subject_of(pipeline), images, (S, 4.0), seeds=Seeds(0), batch_size=4)
    denoiser = denoiser_from(pipeline.unet, pipeline.scheduler)
    z = torch.randn(noisy.shape, generator=Seeds(0).generator(Stream.VALIDATION))
    assert found["sigmas"][-1] == pytest.approx(S)
    for sigma, loss in zip(found["sigmas"], found["eps_mse"], strict=True):
        level = max(sigma, 1.1 * S)
        r, x = S**2 / level**2, noisy + (level**2 - S**2) ** 0.5 * z
        with torch.no_grad():
            mean = r * x + (1 - r) * denoiser(x, torch.full((4,), level))
        assert loss == pytest.approx((mean - noisy).square().mean().item() / ((1 - r) * level**2), rel=1e-4)
