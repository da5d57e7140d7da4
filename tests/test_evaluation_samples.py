"""What is drawn, counted and kept. Truth: the exact network of Gaussian pixels: DDIM is linear in the noise."""

from dataclasses import replace
from itertools import pairwise
from math import erf, exp, log, log2, pi, sqrt

import numpy as np
import pytest
import scipy.stats
import stranger
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from oracles import Gaussian
from test_models import tiny_unet

from diffusers_ext import (
    Calibration,
    ClassConditionalPipeline,
    GaussianBridge,
    ReflectedPipeline,
    ReflectedScheduler,
    noise_schedule,
    short_time_pipeline,
)
from diffusers_ext.data.batches import Images
from diffusers_ext.errors import InputError
from diffusers_ext.evaluation import (
    Drawing,
    LikelihoodSettings,
    Manifold,
    likelihood,
    pipeline_fingerprint,
    quality,
    read_schedulers,
    steps_for,
    swap_scheduler,
)
from diffusers_ext.evaluation.schedulers import clipping_advice
from diffusers_ext.extractors import Extractor
from diffusers_ext.interop import stored_scheduler
from diffusers_ext.schedulers import save_tables
from diffusers_ext.subjects import subject_of

MEAN, STD = 0.2, 0.4


class ExactUNet(UNet2DModel):
    """The perfect network of independent pixels N(MEAN, std^2)."""

    std = STD

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        sigma = noise_schedule(SCHEDULER).sigma(torch.as_tensor(timestep).double()).reshape(-1, 1, 1, 1)
        x = sample * (1 + sigma**2).sqrt()
        gain = self.std**2 / (self.std**2 + sigma**2)  # E[x0 | x] = MEAN + gain (x - MEAN)
        return UNet2DOutput(sample=((1 - gain) * (x - MEAN) / sigma).to(sample))


SCHEDULER = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")


def exact_pipeline(scheduler=SCHEDULER, **config):
    unet = ExactUNet.from_config(tiny_unet(sample_size=4, **config).config)
    pipeline = ClassConditionalPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawing(pipeline, steps=5, n=2000, batch_size=500, **options):
    weights = pipeline_fingerprint(pipeline)
    return Drawing("exact", pipeline, weights, pipeline.scheduler, steps, n, batch_size, **options)


def gain(steps):
    """Of the noise in the samples of DDIM: x = (alpha, s) -> alpha' x0 + s' eps, from alpha_T^2 = abar_T on."""
    scheduler = DDIMScheduler.from_config(SCHEDULER.config)
    scheduler.set_timesteps(steps)
    mean, factor = 0.0, 1.0  # of the sample, as mean + factor noise
    times = [*scheduler.timesteps.tolist(), None]
    for now, then in pairwise(times):
        abar = scheduler.alphas_cumprod[now].double().item()
        below = 1.0 if then is None else scheduler.alphas_cumprod[then].double().item()
        k = sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)  # x0 = MEAN + k (x - abar^1/2 MEAN)
        slope = sqrt(below) * k + sqrt(1 - below) * (1 - sqrt(abar) * k) / sqrt(1 - abar)
        shift = sqrt(below) * MEAN * (1 - k * sqrt(abar)) - sqrt(1 - below) * sqrt(abar) * MEAN * (
            1 - k * sqrt(abar)
        ) / sqrt(1 - abar)
        mean, factor = slope * mean + shift, slope * factor
    return mean, factor


@pytest.mark.parametrize("steps", [3, 20])
def test_an_oracle_gets_the_oracles_numbers(tmp_path, steps):
    one = drawing(exact_pipeline(), steps)
    one.draw(tmp_path)
    images = torch.cat(list(one.images(tmp_path))).float() / 127.5 - 1
    counted = one.counted(tmp_path)
    mean, std = gain(steps)
    inside = [0.5 * (1 + erf((edge - mean) / std / sqrt(2))) for edge in (-1 - 1 / 255, 1 + 1 / 255)]
    assert counted.nfe == steps
    assert counted.out_of_range == pytest.approx(1 - (inside[1] - inside[0]), abs=0.003)
    assert counted.seconds > 0

    generator = torch.Generator().manual_seed(1)
    real = MEAN + STD * torch.randn(images.shape, generator=generator)
    pixels = Extractor("values", lambda images: images.flatten(1))
    found = quality(pixels(images), Manifold.of(pixels(real), pixels(real), pixels(real[:500]), 500))
    clamped = torch.distributions.Normal(mean, std).sample((10**6,)).clamp(-1, 1).double()
    truth = 16 * ((clamped.mean() - MEAN) ** 2 + (clamped.std() - STD) ** 2).item()
    assert found.frechet.low <= truth <= found.frechet.high
    assert found.frechet.high - found.frechet.low < 0.1 + truth / 2
    for values, distance in ((found.frechet_values, found.frechet), (found.kernel_values, found.kernel)):
        low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        np.testing.assert_allclose((np.mean(values), low, high), distance, rtol=0, atol=1e-4 * (high - low))


@pytest.mark.parametrize("max_diffusion_time", [None, 0.6])
def test_likelihood_of_the_exact_model_is_that_of_its_law(max_diffusion_time):
    """From T = 1, and from the bridge of x_T, which is the exact one but for its own estimate."""
    generator = torch.Generator().manual_seed(0)
    x0 = (MEAN + STD * torch.randn(600, 1, 4, 4, generator=generator)).clamp(-1, 1)
    x0 = (x0 * 127.5 + 127.5).round() / 127.5 - 1
    pipeline = exact_pipeline()
    if max_diffusion_time is not None:
        seen = MEAN + STD * torch.randn(20_000, 1, 4, 4, generator=generator)
        bridge = GaussianBridge.fit([seen], SCHEDULER, max_diffusion_time, progress=False)
        pipeline = short_time_pipeline(pipeline, max_diffusion_time, bridge)
    images, settings = Images(x0, torch.full((600,), -1), []), LikelihoodSettings(600, evaluations=64, ode_images=60)
    found = likelihood(subject_of(pipeline), images, settings, batch_size=100, progress=False)

    law, sigma_min = Gaussian(torch.tensor(MEAN), torch.tensor(STD**2)), noise_schedule(pipeline.scheduler).sigma_min
    truth = -law.log_prob(x0.reshape(-1, 1), sigma_min).reshape(600, 16).mean(1) / log(2) - log2(2 / 256)
    assert found.bound.estimate == pytest.approx(truth.mean().item(), abs=0.02)  # dequantised, 64 evaluations
    assert found.ode.estimate == pytest.approx(truth[:60].mean().item(), abs=0.02)
    half = 2.001 * truth[:60].std().item() / 60**0.5  # Student's t
    assert (found.ode.high - found.ode.low) / 2 == pytest.approx(half, rel=0.05)
    assert found.bound.high - found.bound.low > 2 * 1.964 * truth.std().item() / 600**0.5  # and its own noise
    entropy = 0.5 * log2(2 * pi * exp(1) * STD**2) - log2(2 / 256)
    assert truth.mean().item() == pytest.approx(entropy, abs=0.05)
    assert len(found.sigmas) == len(found.eps_mse) > 3


def test_guidance_evaluates_twice_and_classes_are_drawn_at_random(tmp_path):
    seen = []

    class Labelled(ExactUNet):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            seen.append(class_labels.tolist())
            return super().forward(sample, timestep)

    unet = Labelled.from_config(tiny_unet(sample_size=4, num_class_embeds=4).config)
    pipeline = ClassConditionalPipeline(unet, SCHEDULER, null_class=3)
    pipeline.set_progress_bar_config(disable=True)
    one = drawing(pipeline, 2, n=300, batch_size=300, guidance_scale=2.0)
    one.draw(tmp_path)
    assert one.counted(tmp_path).nfe == 4
    classes = torch.tensor(seen[0][:300])
    assert seen[0][300:] == [3] * 300
    assert (classes.bincount() / 300 - 1 / 3).abs().max() < 0.1
    assert classes[:-1].eq(classes[1:]).float().mean() > 0.2  # not in turn


def test_nothing_is_drawn_twice_and_no_batch_depends_on_the_others(tmp_path, monkeypatch):
    drawn = []
    inner = Drawing._draw
    monkeypatch.setattr(Drawing, "_draw", lambda self, batch: drawn.append(batch) or inner(self, batch))
    pipeline = exact_pipeline()
    whole = drawing(pipeline, n=40, batch_size=10)
    whole.draw(tmp_path / "a")
    assert drawn == [0, 1, 2, 3]
    images = torch.cat(list(whole.images(tmp_path / "a")))
    assert len(images.flatten(1).unique(dim=0)) == 40  # each batch has noise of its own

    for rank in (1, 0):  # two processes
        whole.draw(tmp_path / "b", rank, 2)
    assert torch.equal(torch.cat(list(whole.images(tmp_path / "b"))), images)

    drawn.clear()
    whole.file(tmp_path / "b", 2).unlink()  # killed in between
    drawing(pipeline, n=35, batch_size=10).draw(tmp_path / "b")
    assert drawn == [2]
    fewer = torch.cat(list(drawing(pipeline, n=35, batch_size=10).images(tmp_path / "b")))
    assert torch.equal(fewer, images[:35])


def test_all_that_decides_the_images_is_in_the_name():
    pipeline = exact_pipeline()
    other = exact_pipeline()
    other.unet.conv_in.weight.data += 1
    trailing = exact_pipeline(DDIMScheduler(clip_sample=False))
    base = drawing(pipeline)
    names = [base.name, *(drawing(p).name for p in (other, trailing)), drawing(pipeline, steps=6).name]
    names += [drawing(pipeline, **more).name for more in ({"seed": 1}, {"guidance_scale": 2.0}, {"batch_size": 7})]
    assert len(set(names)) == len(names)
    assert drawing(pipeline, n=3000).name == base.name  # more of the same


def test_the_same_noise_whatever_the_model(tmp_path):
    """DDIM is linear in the noise: another law of the same pixels has the same images, scaled and shifted."""
    other = exact_pipeline()
    other.unet.std = STD / 4
    a, b = (drawing(p, 5, n=500, batch_size=500) for p in (exact_pipeline(), other))
    a.draw(tmp_path / "a")
    b.draw(tmp_path / "b")
    first, second = (next(one.images(folder)).double() for one, folder in ((a, tmp_path / "a"), (b, tmp_path / "b")))
    inside = (first > 0) & (first < 255) & (second > 0) & (second < 255)
    assert inside.sum() > 1000
    both = torch.stack([first[inside], second[inside]])
    assert both.corrcoef()[0, 1] > 0.97  # 8 bits


def test_images_are_rounded_to_8_bits(tmp_path):
    class Known(ClassConditionalPipeline):
        def __call__(self, **options):
            output = super().__call__(**options)
            output.images[:] = np.array([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255]).reshape(1, 1, 4, 1)
            return output

    pipeline = Known(exact_pipeline().unet, SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    one = drawing(pipeline, 1, n=2, batch_size=2)
    one.draw(tmp_path)
    assert next(one.images(tmp_path))[0, 0, 0].tolist() == [0, 0, 1, 255]


def test_values_that_are_not_finite_are_out_of_range(tmp_path):
    pipeline = exact_pipeline()
    pipeline.unet.forward = lambda x, t, **_: UNet2DOutput(sample=x * float("nan"))
    one = drawing(pipeline, 2, n=2, batch_size=2)
    one.draw(tmp_path)
    assert one.counted(tmp_path).out_of_range == 1.0


def test_a_pipeline_is_known_alike_in_every_process_and_otherwise_by_all_its_parts(tmp_path):
    """diffusers keeps the names of defaults in a set, whose order changes from process to process."""
    ClassConditionalPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path)
    code = (
        "import sys, diffusers_ext; from diffusers import DiffusionPipeline; from diffusers_ext.evaluation import *;"
        "p = DiffusionPipeline.from_pretrained(sys.argv[1]);"
        "print(Drawing('a', p, pipeline_fingerprint(p), swap_scheduler(p, 'DPMSolverMultistep'), 3, 10, 10).name)"
    )
    names = {stranger.run(code, tmp_path).stdout}  # strangers have a hash seed that is not ours
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    swapped = swap_scheduler(pipe, "DPMSolverMultistep")
    names.add(f"{Drawing('a', pipe, pipeline_fingerprint(pipe), swapped, 3, 10, 10).name}\n")
    assert len(names) == 1

    pipeline = exact_pipeline()
    known = {pipeline_fingerprint(pipeline)}
    pipeline.unet.register_to_config(sample_size=8)
    known.add(pipeline_fingerprint(pipeline))
    known.add(pipeline_fingerprint(ClassConditionalPipeline(tiny_unet(num_class_embeds=4), SCHEDULER, null_class=3)))
    known.add(pipeline_fingerprint(ClassConditionalPipeline(tiny_unet(num_class_embeds=4), SCHEDULER)))
    assert len(known) == 4


def test_samplers_that_draw_without_the_generator_are_reproducible(tmp_path):
    """diffusers' LDM passes none to its scheduler; the global state is left alone."""

    class Careless(ClassConditionalPipeline):
        def __call__(self, **options):
            output = super().__call__(**options)
            output.images[:] = torch.rand(output.images.shape).numpy()
            return output

    pipeline = Careless(exact_pipeline().unet, SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    one = drawing(pipeline, 1, n=4, batch_size=2)
    one.draw(tmp_path / "a")
    before = torch.random.get_rng_state()
    torch.rand(1)
    one.draw(tmp_path / "b", 1, 2)
    one.draw(tmp_path / "b", 0, 2)
    assert torch.equal(torch.cat(list(one.images(tmp_path / "a"))), torch.cat(list(one.images(tmp_path / "b"))))
    torch.random.set_rng_state(before)


def test_copies_are_as_near_to_training_images_as_held_out_ones_are():
    """Held-out images are 0.001 from the nearest training image, few training images are near a held-out one."""
    training = torch.cat([torch.zeros(399, 1), torch.tensor([[5.001]])]).double()
    held_out = torch.full((100, 1), 5.0).double()
    real = Manifold.of(training, training, held_out, 20)
    assert real.copy_distance == pytest.approx(0.001, rel=1e-3)
    assert Manifold.of(training, training, held_out[:99], 20).copy_distance is None  # too few to tell


# schedulers


@pytest.mark.parametrize(
    ("name", "nfe", "steps"),
    [("DDIM", 10, 10), ("HeunDiscrete", 10, 5), ("HeunDiscrete", 9, 5), ("PNDM", 20, 11), ("DPMSolverMultistep", 7, 7)],
)
def test_steps_make_at_most_so_many_evaluations(tmp_path, name, nfe, steps):
    pipeline = exact_pipeline()
    pipeline.scheduler = swap_scheduler(pipeline, name)
    assert steps_for(pipeline.scheduler, nfe) == steps
    one = drawing(pipeline, steps, n=2, batch_size=2)
    one.draw(tmp_path)
    assert one.counted(tmp_path).nfe <= nfe


def test_settings_take_the_place_of_the_pipelines():
    """The noise levels are those of a scheduler that was made with them."""
    pipeline = exact_pipeline()
    swapped = swap_scheduler(pipeline, "DPMSolverMultistep", use_karras_sigmas=True, solver_order=3)
    made = DPMSolverMultistepScheduler.from_config(SCHEDULER.config, use_karras_sigmas=True, solver_order=3)
    for scheduler in (swapped, made):
        scheduler.set_timesteps(7)
    assert torch.equal(swapped.sigmas, made.sigmas)
    assert swapped.config.solver_order == 3
    stock = drawing(pipeline, 3)
    other = replace(stock, scheduler=swapped)
    assert (stock.scheduler_name, other.scheduler_name) == ("DDIM", "DPMSolverMultistep")
    assert replace(other, scheduler=swap_scheduler(pipeline, "DPMSolverMultistep")).name != other.name
    own = swap_scheduler(pipeline, "own", clip_sample_range=0.5, clip_sample=True)
    assert type(own) is type(pipeline.scheduler)
    assert (own.config.clip_sample_range, pipeline.scheduler.config.clip_sample) == (0.5, False)
    with pytest.raises(InputError, match=r"DDIMScheduler has no setting clip, order; it has .*clip_sample"):
        swap_scheduler(pipeline, "DDIM", order=3, clip=True)
    with pytest.raises(InputError, match="cannot take DPMSolverMultistepScheduler"):
        swap_scheduler(pipeline, "DPMSolverMultistep", algorithm_type="none")


def test_what_fails_in_a_step_is_said_before_anything_is_drawn():
    """The levels of Karras on the cosine schedule: diffusers looks for one beyond the end of its table."""
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    with pytest.raises(InputError, match=r"no image with 10 evaluations .*IndexError.*another of --schedulers"):
        steps_for(scheduler, 10)
    assert steps_for(DPMSolverMultistepScheduler(beta_schedule="linear", use_karras_sigmas=True), 10) == 10


@pytest.mark.parametrize(
    "setting", [{"prediction_type": "sample"}, {"beta_schedule": "scaled_linear"}, {"beta_end": 0.1}]
)
def test_settings_that_change_what_the_network_means_are_refused(setting):
    with pytest.raises(InputError, match=f"{next(iter(setting))} of DDIMScheduler: that is a fact about the model"):
        swap_scheduler(exact_pipeline(), "DDIM", **setting)


def test_schedulers_that_need_more_than_a_number_of_steps_are_tried_with_it():
    assert steps_for(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 5) == 5
    assert steps_for(DDPMScheduler(variance_type="learned_range"), 5) == 5


def test_a_scheduler_that_the_pipeline_cannot_take_is_refused_with_a_list():
    pipeline = exact_pipeline()
    for name, message in (
        ("EDMEuler", "cannot take EDMEulerScheduler.*vp model"),
        ("Foo", "there is no FooScheduler.*DPMSolverMultistepScheduler"),
        ("FlowMatchEulerDiscrete", "cannot take"),
    ):
        with pytest.raises(InputError, match=message):
            swap_scheduler(pipeline, name)
    reflected = ReflectedPipeline(tiny_unet(), ReflectedScheduler())
    with pytest.raises(InputError, match="cannot take DDIMScheduler"):
        swap_scheduler(reflected, "DDIM")
    edm = ClassConditionalPipeline(tiny_unet(), EDMEulerScheduler())
    with pytest.raises(InputError, match="cannot take DDIMScheduler"):
        swap_scheduler(edm, "DDIM")
    assert type(swap_scheduler(edm, "EDMDPMSolverMultistep")).__name__ == "EDMDPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("words", "advised"),
    [
        ("DDIM", None),  # it clips
        ("DPMSolverMultistep", "DPMSolverMultistep:thresholding=true"),
        ("DPMSolverMultistep:solver_order=3", "DPMSolverMultistep:solver_order=3:thresholding=true"),
        ("DPMSolverMultistep:thresholding=true", None),
        ("DDIM:clip_sample=false", None),  # whoever says so knows
        ("PNDM", None),  # it cannot clip
    ],
)
def test_a_sampler_of_pixels_that_does_not_clip_is_told_how_to(words, advised):
    pipeline = DDIMPipeline(tiny_unet(), DDIMScheduler())
    ((name, settings),) = read_schedulers([words]).values()
    scheduler = swap_scheduler(pipeline, name, **settings)
    found = clipping_advice(scheduler, words)
    assert (found is None) == (advised is None)
    assert advised is None or f"compare {advised}, too" in found


def test_another_scheduler_keeps_the_noise_levels():
    """Heun's default betas are not those of DDIM: a model would be sampled at levels that it never saw."""
    pipeline = exact_pipeline(DDIMScheduler())
    swapped = swap_scheduler(pipeline, "HeunDiscrete")
    assert torch.equal(swapped.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_a_short_time_pipeline_keeps_its_time():
    x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bridge = GaussianBridge.fit([x0], SCHEDULER, 0.6, progress=False)
    pipeline = short_time_pipeline(ClassConditionalPipeline(tiny_unet(), SCHEDULER), 0.6, bridge)
    swapped = swap_scheduler(pipeline, "DPMSolverMultistep")
    assert type(swapped).__name__ == "ShortTimeDPMSolverMultistepScheduler"
    assert swapped.config.max_diffusion_time == 0.6
    without = short_time_pipeline(ClassConditionalPipeline(pipeline.unet, SCHEDULER), 0.6)
    names = {Drawing("a", p, pipeline_fingerprint(p), swapped, 3, 10, 10).name for p in (pipeline, without)}
    assert len(names) == 2


def test_a_calibrated_scheduler_finds_its_tables_or_says_what_to_do(tmp_path):
    pipeline = DDIMPipeline(tiny_unet(), SCHEDULER)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no tables.*calibrate\.py"):
        swap_scheduler(pipeline, "CalibratedDDIM", str(tmp_path))
    schedule = noise_schedule(SCHEDULER)
    levels = [schedule.sigma_min, schedule.sigma_max]
    calibration = Calibration([1, 8, 8], levels, scheduler=stored_scheduler(SCHEDULER))
    save_tables(calibration, tmp_path / "scheduler")
    assert swap_scheduler(pipeline, "CalibratedDDIM", str(tmp_path)).calibration is not None


def test_pipelines_that_sample_wrongly_with_some_schedulers_are_replaced():
    unet = tiny_unet()
    for kind in (DDPMPipeline, DDIMPipeline):
        found = subject_of(kind(unet, SCHEDULER)).sampler()
        assert type(found) is ClassConditionalPipeline
        assert found.unet is unet
    other = exact_pipeline()
    assert subject_of(other).sampler() is other
