"""ShortTimePipeline. Truth: the exact network and bridge of a Gaussian law give its samples; what the network sees
first is a draw of the bridge, with any scheduler."""

import json

import pytest
import stranger
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, EDMEulerScheduler
from hub_server import TOKEN, HubServer
from oracles import Gaussian, network_of
from precision import assert_same_images
from test_calibration import seeded
from test_models import tiny_unet
from test_pipelines import OracleUNet

import diffusers_ext
from diffusers_ext import ClassConditionalPipeline, GaussianBridge, ShortTimePipeline, short_time_pipeline

SHAPE = (1, 8, 8)


def bridge_of(time: float = 0.6, scheduler=None, shape=SHAPE, mean: float = 0.3, **options) -> GaussianBridge:
    d = shape[0] * shape[1] * shape[2]
    means = torch.full((d,), mean) if options.get("num_classes") is None else options.pop("means")
    return GaussianBridge.from_moments(
        means.reshape(*means.shape[:-1], *shape),
        0.04 * torch.eye(d).expand(*means.shape[:-1], d, d),
        DDIMScheduler() if scheduler is None else scheduler,
        time,
        **options,
    )


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_input(pipe, **options) -> tuple[torch.Tensor, float]:
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda m, args: seen.append((args[0].clone(), float(args[1]))))
    pipe(num_inference_steps=2, output_type="np", **options)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
def test_the_exact_network_and_bridge_give_the_data(name) -> None:
    """At T = 0.2; without the bridge N(0, I) is far from x_T, and the mean shows it."""
    kind = getattr(diffusers_ext, f"ShortTime{name}Scheduler")
    scheduler = kind(
        timestep_spacing="trailing", max_diffusion_time=0.2, **({"clip_sample": False} if name == "DDIM" else {})
    )
    unet = OracleUNet()
    size = unet.config.sample_size
    shape = (unet.config.in_channels, size, size)
    law = Gaussian(torch.full(shape, 0.3).double(), 0.04)
    unet.network = network_of(law, scheduler)
    bridge = bridge_of(0.2, shape=shape)
    for given, means, stds in ((bridge, (0.29, 0.31), (0.19, 0.21)), (None, (0, 0.25), (0.2, 1))):
        pipe = silent(ShortTimePipeline(unet, scheduler, given))
        images = pipe(batch_size=2000, num_inference_steps=100, generator=seeded(), output_type="pt").images
        x = images.double() * 2 - 1
        assert means[0] < x.mean() < means[1]
        assert stds[0] < x.std() < stds[1]


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_the_network_sees_a_draw_of_the_bridge_at_its_timestep(name) -> None:
    bridge = bridge_of()
    scheduler = getattr(diffusers_ext, f"ShortTime{name}Scheduler")(max_diffusion_time=0.6)
    pipe = silent(ShortTimePipeline(tiny_unet(), scheduler, bridge))
    seen, t = first_input(pipe, batch_size=3, generator=seeded())
    torch.testing.assert_close(seen, bridge.sample(3, seeded()), rtol=1e-5, atol=1e-5)
    assert t == bridge.timestep == 599
    seen, _ = first_input(pipe, batch_size=2, generator=[seeded(1), seeded(2)])
    expected = torch.cat([bridge.sample(1, seeded(1)), bridge.sample(1, seeded(2))])
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    latents = torch.randn(2, *SHAPE, generator=seeded())
    torch.testing.assert_close(first_input(pipe, batch_size=2, latents=latents)[0], latents, rtol=1e-5, atol=1e-5)
    pipe.register_modules(bridge=None)
    seen, _ = first_input(pipe, batch_size=2, generator=seeded())
    torch.testing.assert_close(seen, latents, rtol=1e-5, atol=1e-5)


def test_each_image_starts_from_its_class_with_guidance_too() -> None:
    means = torch.stack([torch.full((64,), float(k)) for k in range(3)])
    bridge = bridge_of(0.2, num_classes=3, means=means)
    scheduler = diffusers_ext.ShortTimeDDIMScheduler(max_diffusion_time=0.2)
    pipe = silent(ShortTimePipeline(tiny_unet(num_class_embeds=4), scheduler, bridge, null_class=3))
    labels = [2, 0, 1]
    expected = bridge.sample(3, seeded(), torch.tensor(labels))
    assert expected.mean((1, 2, 3)).argsort().tolist() == [1, 2, 0]
    for scale in (1.0, 3.0):
        seen, _ = first_input(pipe, class_labels=labels, guidance_scale=scale, generator=seeded())
        torch.testing.assert_close(seen[:3], expected)
    with pytest.raises(ValueError, match="class"):
        pipe(class_labels=[3], num_inference_steps=2)


def test_it_is_saved_with_its_bridge(tmp_path) -> None:
    scheduler = diffusers_ext.ShortTimeEulerDiscreteScheduler(max_diffusion_time=0.6)
    pipe = silent(ShortTimePipeline(tiny_unet().eval(), scheduler, bridge_of()))
    pipe.save_pretrained(tmp_path / "with")
    loaded = silent(DiffusionPipeline.from_pretrained(tmp_path / "with"))
    assert isinstance(loaded, ShortTimePipeline)
    options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "pt"}
    images = [p(generator=seeded(), **options).images for p in (pipe, loaded)]
    assert_same_images(*images)
    pipe.register_modules(bridge=None)
    pipe.save_pretrained(tmp_path / "without")
    assert DiffusionPipeline.from_pretrained(tmp_path / "without").bridge is None
    index = tmp_path / "without" / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "bridge"}))
    assert DiffusionPipeline.from_pretrained(tmp_path / "without").bridge is None


def test_a_pipeline_of_latents_is_refused() -> None:
    """Its autoencoder would be lost, and latents be shown as images."""
    from diffusers import AutoencoderKL

    class Latent(DDIMPipeline):
        def __init__(self, unet, scheduler, vae):
            super().__init__(unet, scheduler)
            self.register_modules(vae=vae)

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **blocks)
    with pytest.raises(ValueError, match="no class of Latent that starts from a bridge"):
        short_time_pipeline(Latent(tiny_unet(), DDIMScheduler(), vae), 0.6)


def test_a_pretrained_pipeline_becomes_one() -> None:
    unet, bridge = tiny_unet(), bridge_of()
    made = short_time_pipeline(DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")), 0.6, bridge)
    assert made.unet is unet
    assert (made.scheduler.config.max_diffusion_time, made.scheduler.config.prediction_type) == (0.6, "v_prediction")
    classes = ClassConditionalPipeline(tiny_unet(num_class_embeds=4), DDIMScheduler(), null_class=3)
    assert short_time_pipeline(classes, 0.6).config.null_class == 3
    with pytest.raises(
        ValueError,
        match="no short-time EDMEulerScheduler: it is not variance-preserving; there are",
    ):
        short_time_pipeline(ClassConditionalPipeline(unet, EDMEulerScheduler()), 0.6)
    with pytest.raises(ValueError, match=r"max_diffusion_time=0\.5"):
        short_time_pipeline(DDIMPipeline(unet, DDIMScheduler()), 0.5, bridge)


def test_a_bridge_that_does_not_belong_is_refused() -> None:
    scheduler = diffusers_ext.ShortTimeDDIMScheduler(max_diffusion_time=0.6)
    other = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    for bridge, said in (
        (bridge_of(0.5), r"timestep 599, it was fitted at 0\.5, which is timestep 499"),
        (bridge_of(scheduler=other), "noise schedule"),
        (bridge_of(shape=(1, 4, 4)), r"shape \(1, 8, 8\), it was fitted with \(1, 4, 4\)"),
        (bridge_of(num_classes=2, means=torch.zeros(2, 64)), "takes no labels"),
    ):
        with pytest.raises(ValueError, match=said):
            silent(ShortTimePipeline(tiny_unet(), scheduler, bridge))(num_inference_steps=2)


PUSH = """
import pathlib
import diffusers_ext
from diffusers_ext.reports.hub import HubPusher
pusher = HubPusher("tester/short", pathlib.Path("model"), private=None, token=None)
pusher.push(pathlib.Path("model"), "a test")
failure = pusher.finish(60.0)
assert failure is None, failure
"""
LOAD = """
import diffusers_ext, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("tester/short")
options = {"num_inference_steps": 3, "batch_size": 2, "output_type": "pt"}
options["generator"] = torch.Generator().manual_seed(0)
torch.save((type(pipe).__name__, type(pipe.bridge).__name__, pipe(**options).images), "images.pt")
"""


def test_a_stranger_gets_the_same_images_from_the_hub(tmp_path) -> None:
    scheduler = diffusers_ext.ShortTimeDDIMScheduler(max_diffusion_time=0.6)
    pipe = silent(ShortTimePipeline(tiny_unet().eval(), scheduler, bridge_of()))
    pipe.save_pretrained(tmp_path / "model")
    with HubServer() as hub:
        for code, token in ((PUSH, TOKEN), (LOAD, None)):
            done = stranger.run(code, cwd=tmp_path, env=hub.environment(tmp_path / f"home-{token}", token))
            assert done.returncode == 0, done.stderr
        assert "bridge/diffusion_pytorch_model.safetensors" in hub.files("tester/short")
    *names, theirs = torch.load(tmp_path / "images.pt")
    assert names == ["ShortTimePipeline", "GaussianBridge"]
    options = {"num_inference_steps": 3, "batch_size": 2, "output_type": "pt"}
    assert_same_images(theirs, pipe(generator=seeded(), **options).images)
