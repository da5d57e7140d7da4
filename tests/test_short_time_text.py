"""Text-to-image on short diffusion times. Truth: the stock pipeline, given the bridge's draw as its `latents`, and what
its network is called with."""

import diffusers
import pytest
import stranger
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from precision import assert_same_images
from tiny_pipelines import LENGTH, SIZE, tiny

import diffusers_ext
from diffusers_ext import GaussianBridge, calibrate_pipeline, short_time_pipeline
from diffusers_ext.interop import live_config, stored_scheduler
from diffusers_ext.pipelines.short_time_text import NAMES, STOCK
from diffusers_ext.schedulers.scheduling_short_time import short_time_class

T = 0.6
FAMILIES = {
    "sd": "StableDiffusion",
    "sd-v": "StableDiffusion",
    "sdxl": "StableDiffusionXL",
    "pixart": "PixArtSigma",
    "pixart-alpha": "PixArtAlpha",
}
SCHEDULERS = [None, DDIMScheduler, EulerDiscreteScheduler]  # None: the pipeline's own


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(name: str, n: int = 2, **options) -> dict:
    binning = {"use_resolution_binning": False} if "pixart" in name else {}
    length = {"max_sequence_length": LENGTH} if name == "pixart" else {}
    options = {"num_inference_steps": 3, "output_type": "latent", "height": SIZE, "width": SIZE} | options
    return {"prompt": ["a bike", "cat 7"][:n], "generator": seeded()} | binning | length | options


def pipeline_of(name: str, scheduler=None):
    pipe = tiny(name)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        if "clip_sample" in pipe.scheduler.config:  # Stable Diffusion switches it off
            pipe.scheduler.register_to_config(clip_sample=False)
    return pipe


def bridge_of(pipe, shape=(4, 8, 8), **options) -> GaussianBridge:
    classes = options.get("num_classes", 1)
    mean = torch.linspace(-1, 1, 256)[: shape[0] * shape[1] * shape[2]].reshape(shape)
    mean, covariance = mean.repeat(classes, 1, 1, 1), 0.1 * torch.eye(mean.numel()).repeat(classes, 1, 1)
    if classes == 1:
        mean, covariance = mean[0], covariance[0]
    return GaussianBridge.from_moments(mean, covariance, pipe.scheduler, T, rank=8, **options)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_there_is_a_class_of_every_pipeline_of_the_list() -> None:
    assert {name.removesuffix("Pipeline") for name in STOCK} == set(FAMILIES.values())
    for name in NAMES:
        kind = getattr(diffusers, name)
        assert kind is getattr(diffusers_ext, name)
        assert kind.__mro__[2].__name__ == name.removeprefix("ShortTime")
        assert (kind.__name__, kind.__module__) == (name, "diffusers_ext.pipelines.short_time_text")
    for module in (diffusers, diffusers_ext):
        with pytest.raises(AttributeError, match="ShortTimeNonePipeline"):
            module.ShortTimeNonePipeline  # noqa: B018


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_is_that_of_the_stock_pipeline_from_the_bridges_draw(name: str, scheduler) -> None:
    pipe = pipeline_of(name, scheduler)
    bridge = bridge_of(pipe)
    short = quiet(short_time_pipeline(pipe, T, bridge))
    assert type(short).__name__ == f"ShortTime{FAMILIES[name]}Pipeline"
    ours = short(**call(name, num_images_per_prompt=2)).images

    kind = short_time_class(type(pipe.scheduler).__name__)
    pipe.scheduler = kind.from_config(live_config(pipe.scheduler), max_diffusion_time=T)
    generator = seeded()
    theirs = call(name, num_images_per_prompt=2, generator=generator) | {"latents": bridge.sample(4, generator)}
    assert torch.equal(ours, pipe(**theirs).images)
    assert not torch.equal(ours, pipe(**call(name, num_images_per_prompt=2)).images)  # from N(0, I)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_sees_x_T_first_at_the_timestep_of_T(name: str, scheduler) -> None:
    """Divided by alpha and scaled by the scheduler, a sample x0 + sigma n of Euler is x_T again."""
    pipe = pipeline_of(name, scheduler)
    bridge, seen = bridge_of(pipe), []
    short = quiet(short_time_pipeline(pipe, T, bridge))
    network = getattr(short, "unet", None) or short.transformer
    forward = network.forward
    network.forward = lambda sample, *args, **kwargs: (
        seen.append((sample, kwargs.get("timestep", args[0] if args else None))) or forward(sample, *args, **kwargs)
    )
    short(**call(name))
    sample, timestep = seen[0]
    assert timestep.flatten()[0].item() == 599
    torch.testing.assert_close(sample[:2], bridge.sample(2, seeded()), rtol=0, atol=1e-5)
    assert all(time.max() < 599 for _, time in seen[2:])


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_saved_with_its_bridge_and_its_settings(name: str, tmp_path) -> None:
    pipe = pipeline_of(name)
    if name == "sdxl":
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    short = quiet(short_time_pipeline(pipe, T, bridge_of(pipe)))
    short.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is type(short)
    assert loaded.config.get("force_zeros_for_empty_prompt", False) is False
    assert loaded.config.get("requires_safety_checker", False) is False
    assert torch.equal(loaded(**call(name)).images, short(**call(name)).images)
    assert loaded.components.keys() == pipe.components.keys() | {"bridge"}


LOAD = """
import sys, diffusers_ext, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
options = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt"}
images = pipe(["a bike", "cat 7"], generator=torch.Generator().manual_seed(0), **options).images
torch.save((type(pipe).__name__, type(pipe.bridge).__name__, images), sys.argv[2])
"""


def test_a_stranger_opens_it_by_the_stock_line(tmp_path) -> None:
    pipe = pipeline_of("sd")
    short = quiet(short_time_pipeline(pipe, T, bridge_of(pipe)))
    short.save_pretrained(tmp_path / "model")
    done = stranger.run(LOAD, tmp_path / "model", tmp_path / "images.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *names, images = torch.load(tmp_path / "images.pt")
    assert names == ["ShortTimeStableDiffusionPipeline", "GaussianBridge"]
    assert_same_images(images, short(**call("sd", output_type="pt")).images)


def test_each_image_has_its_generator_and_latents_come_first() -> None:
    pipe = pipeline_of("sd")
    short = quiet(short_time_pipeline(pipe, T, bridge_of(pipe)))
    both = short(**call("sd", generator=[seeded(3), seeded(4)])).images
    for i, seed in enumerate((3, 4)):
        alone = short(**call("sd", generator=seeded(seed)) | {"prompt": ["a bike", "cat 7"][i]}).images
        torch.testing.assert_close(both[i : i + 1], alone)
    with pytest.raises(ValueError, match="generators of length 3"):
        short(**call("sd", generator=[seeded()] * 3))
    x = torch.randn(2, 4, 8, 8, generator=seeded(5))
    short.bridge, given = None, short(**call("sd", latents=x)).images
    assert torch.equal(given, short(**call("sd", latents=x)).images)


def test_half_precision_and_calibration_go_with_it() -> None:
    from test_calibration import table

    pipe = pipeline_of("sd", DDIMScheduler)
    short = quiet(short_time_pipeline(pipe, T, bridge_of(pipe)))
    calibration = table(pipe.scheduler, (4, 8, 8), ("conditional", "unconditional"))
    plain = short(**call("sd")).images
    calibrated = calibrate_pipeline(short, calibration)
    assert type(calibrated).__name__ == "ShortTimeStableDiffusionPipeline"
    assert type(calibrated.scheduler).__name__ == "CalibratedShortTimeDDIMScheduler"
    assert not torch.equal(calibrated(**call("sd")).images, plain)
    half = short_time_pipeline(pipeline_of("sd", DDIMScheduler), T, bridge_of(pipe)).to(torch.bfloat16)
    assert half.bridge.directions.dtype == torch.float32
    drawn = quiet(half)(**call("sd")).images
    assert drawn.dtype == torch.bfloat16
    assert (drawn.float() - plain).square().mean().sqrt() < 0.05 * plain.std()


def test_what_does_not_fit_is_refused() -> None:
    pipe = pipeline_of("sd")
    short = short_time_pipeline(pipe, T, bridge_of(pipe))
    with pytest.raises(ValueError, match=r"samples have the shape \(4, 12, 8\), it was fitted with \(4, 8, 8\)"):
        short(**call("sd", height=24))
    with pytest.raises(ValueError, match="the bridge has 2 classes, and prompts are none"):
        short_time_pipeline(pipe, T, bridge_of(pipe, num_classes=2))
    with pytest.raises(ValueError, match=r"it was fitted at 0\.6"):
        short_time_pipeline(pipe, 0.5, bridge_of(pipe))
    with pytest.raises(ValueError, match=r"no short-time FlowMatchEulerDiscreteScheduler.*not variance-preserving"):
        short_time_pipeline(tiny("sd3"), T)


def test_other_pipelines_are_refused_with_the_line_that_works() -> None:
    stock = pipeline_of("sd")
    other = diffusers.StableDiffusionPAGPipeline(**stock.components, requires_safety_checker=False)
    line = r"Give the pipeline a ShortTimePNDMScheduler.*latents=bridge.sample\(n, generator\).*init_noise_sigma"
    with pytest.raises(ValueError, match=rf"no class of StableDiffusionPAGPipeline that starts from a bridge. {line}"):
        short_time_pipeline(other, T, bridge_of(stock))


def test_the_stored_scheduler_is_the_whole_models() -> None:
    pipe = pipeline_of("sd")
    assert bridge_of(pipe).config.scheduler == stored_scheduler(pipe.scheduler)
