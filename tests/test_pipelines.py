"""`ClassConditionalPipeline`. Truth: diffusers' own `DDIMPipeline` bit for bit, the exact probability-flow map of
Gaussian data under every scheduler, and sampling loops written out by hand."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import stranger
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from hub_server import HubServer
from oracles import Gaussian, network_of
from PIL import Image
from precision import assert_same_images
from torch import Tensor, nn

from diffusers_ext import (
    ClassConditionalPipeline,
    GaussianBridge,
    ReflectedPipeline,
    ReflectedScheduler,
    ShortTimeDDIMScheduler,
    ShortTimePipeline,
)
from diffusers_ext.interop import stored_scheduler
from diffusers_ext.pipelines.pipeline_class_conditional import READ_VARIANCE

REPOSITORY = Path(__file__).parent.parent
SHAPE = (1, 4, 4)
VARIANCE = 0.04 + 0.03 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
LAW = Gaussian(0.2 * torch.linspace(-1, 1, 16).reshape(SHAPE), VARIANCE)
FINE = {"clip_sample": False, "timestep_spacing": "trailing"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OracleUNet(diffusers.ModelMixin, ConfigMixin):
    """The perfect network of a scheduler for Gaussian images, where a UNet should be."""

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 1, num_class_embeds: int | None = None) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        return UNet2DOutput(sample=self.network(sample, timestep).to(sample.dtype))


def oracle_pipeline(scheduler) -> ClassConditionalPipeline:
    unet = OracleUNet()
    unet.network = network_of(LAW, scheduler)
    return quiet(ClassConditionalPipeline(unet, scheduler))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(num_class_embeds: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, num_class_embeds=num_class_embeds, **blocks, **sizes
    )
    return unet.eval()


def class_pipeline(scheduler=None, null_class: int | None = 4) -> ClassConditionalPipeline:
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    return quiet(ClassConditionalPipeline(tiny_unet(num_class_embeds=5), scheduler, null_class=null_class))


def images(pipe, *args, steps: int = 4, **kwargs) -> Tensor:
    return pipe(*args, num_inference_steps=steps, output_type="pt", **kwargs).images


# the images are the right ones


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_ddim_pipeline_bit_for_bit(batch_size: int, eta: float) -> None:
    unet, scheduler = tiny_unet(), DDIMScheduler()
    options = {"batch_size": batch_size, "num_inference_steps": 5, "output_type": "np", "eta": eta}
    ours = quiet(ClassConditionalPipeline(unet, scheduler))(generator=seeded(), **options).images
    theirs = quiet(DDIMPipeline(unet, scheduler))(generator=seeded(), **options).images
    assert np.array_equal(ours, theirs)


DETERMINISTIC = {
    "DDIM": (DDIMScheduler(**FINE), 157.4, 1000),
    "Euler": (EulerDiscreteScheduler(timestep_spacing="trailing"), 157.4, 1000),
    "Heun": (diffusers.HeunDiscreteScheduler(timestep_spacing="trailing"), 157.4, 1000),
    "UniPC": (UniPCMultistepScheduler(timestep_spacing="trailing"), 157.4, 500),
    "EDM": (EDMEulerScheduler(sigma_data=0.4), (80**2 + 1) ** 0.5, 500),
    "flow": (FlowMatchEulerDiscreteScheduler(), None, 500),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_noise_is_carried_along_the_exact_probability_flow(name: str) -> None:
    scheduler, sigma_max, steps = DETERMINISTIC[name]
    noise = torch.randn(8, *SHAPE, generator=seeded())
    result = images(oracle_pipeline(scheduler), batch_size=8, latents=noise, steps=steps)
    if sigma_max is None:  # pure noise at the start of flow matching
        exact = LAW.mean + LAW.variance.sqrt() * noise
    else:
        exact = LAW.flow(noise.double() * sigma_max, sigma_max, 0.0)
    torch.testing.assert_close(result.double(), (exact / 2 + 0.5).clamp(0, 1), rtol=0, atol=5e-3)


def test_euler_and_ddim_draw_the_same_images_from_the_same_network() -> None:
    noise = torch.randn(8, *SHAPE, generator=seeded())
    ddim, euler = (
        images(oracle_pipeline(DETERMINISTIC[name][0]), batch_size=8, latents=noise, steps=20)
        for name in ("DDIM", "Euler")
    )
    torch.testing.assert_close(euler, ddim, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(clip_sample=False), DDIMScheduler(**FINE)], ids=["DDPM", "eta=1"])
def test_stochastic_samplers_draw_the_law_of_the_data(scheduler) -> None:
    n = 2000
    x = 2 * images(oracle_pipeline(scheduler), batch_size=n, steps=1000, eta=1.0, generator=seeded()).double() - 1
    z = (x - LAW.mean) / LAW.variance.sqrt()
    assert (z.mean(0) * n**0.5).abs().max() < 5
    assert abs(z.square().mean().item() - 1) < 0.06  # 0.008 of sampling error, the rest is the solver's


@pytest.mark.parametrize("name", ["DDIM", "Euler", "EDM", "flow"])
def test_guidance_is_two_passes_combined_linearly(name: str) -> None:
    pipe = class_pipeline(DETERMINISTIC[name][0])
    unet, scheduler, w = pipe.unet, DETERMINISTIC[name][0], 2.5
    labels, noise = torch.tensor([0, 3]), torch.randn(2, 3, 8, 8, generator=seeded())
    scheduler.set_timesteps(4)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            conditional = unet(given, t, class_labels=labels).sample
            null = unet(given, t, class_labels=torch.tensor([4, 4])).sample
            x = scheduler.step(w * conditional + (1 - w) * null, t, x).prev_sample
    ours = images(pipe, labels, guidance_scale=w, latents=noise)
    torch.testing.assert_close(ours, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert (ours - images(pipe, labels, latents=noise)).abs().max() > 1e-3  # guidance does something


def test_guidance_scale_1_is_the_conditional_model_and_0_the_null_class() -> None:
    pipe, noise = class_pipeline(), torch.randn(2, 3, 8, 8, generator=seeded())
    assert_same_images(
        images(pipe, [0, 3], latents=noise), images(pipe, [0, 3], guidance_scale=1.0 + 1e-9, latents=noise)
    )
    assert_same_images(images(pipe, [4, 4], latents=noise), images(pipe, [0, 3], guidance_scale=0.0, latents=noise))
    without_null = class_pipeline(null_class=None)
    assert torch.equal(images(without_null, [0, 3], latents=noise), images(pipe, [0, 3], latents=noise))


@pytest.mark.parametrize("labels", [2, [2], torch.tensor(2), torch.tensor([2, 2, 2]), (2, 2, 2)], ids=str)
def test_one_label_serves_all_images_and_a_list_each(labels) -> None:
    pipe, noise = class_pipeline(), torch.randn(3, 3, 8, 8, generator=seeded())
    expected = torch.cat([images(pipe, 2, latents=noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(images(pipe, labels, batch_size=3, latents=noise), expected, rtol=0, atol=1e-4)


def test_each_image_has_the_label_at_its_place() -> None:
    pipe, noise = class_pipeline(), torch.randn(3, 3, 8, 8, generator=seeded())
    expected = torch.cat([images(pipe, k, latents=noise[i : i + 1]) for i, k in enumerate([1, 0, 3])])
    torch.testing.assert_close(images(pipe, [1, 0, 3], latents=noise), expected, rtol=0, atol=1e-4)


# randomness


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DDPMScheduler(), EulerDiscreteScheduler()], ids=type)
def test_a_list_of_generators_gives_the_images_of_single_runs(scheduler) -> None:
    pipe = quiet(ClassConditionalPipeline(tiny_unet(), scheduler))
    together = images(pipe, batch_size=3, generator=[seeded(s) for s in (5, 6, 7)], eta=1.0)
    for i, s in enumerate((5, 6, 7)):
        torch.testing.assert_close(together[i : i + 1], images(pipe, generator=seeded(s), eta=1.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DDPMScheduler()], ids=["DDIM eta=1", "DDPM"])
def test_all_randomness_is_the_generators(scheduler) -> None:
    pipe, state = quiet(ClassConditionalPipeline(tiny_unet(), scheduler)), torch.get_rng_state()
    first, again, other = (images(pipe, generator=seeded(s), eta=1.0) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_latents_are_the_noise_that_the_generator_would_have_given() -> None:
    pipe = quiet(ClassConditionalPipeline(tiny_unet(), EulerDiscreteScheduler()))
    noise = torch.randn(2, 3, 8, 8, generator=seeded())
    assert torch.equal(images(pipe, batch_size=2, latents=noise), images(pipe, batch_size=2, generator=seeded()))


# callbacks, outputs, dtypes


def test_callback_sees_every_step_and_may_replace_the_sample() -> None:
    pipe, seen = class_pipeline(), []

    def watch(owner, i, t, tensors):
        seen.append((owner is pipe, i, int(t), tensors["latents"]))
        return {}

    plain = images(pipe, 1, generator=seeded())
    assert torch.equal(images(pipe, 1, generator=seeded(), callback_on_step_end=watch), plain)
    assert [s[:3] for s in seen] == [(True, i, int(t)) for i, t in enumerate(pipe.scheduler.timesteps)]
    torch.testing.assert_close((seen[-1][3] / 2 + 0.5).clamp(0, 1), plain)

    def replace(owner, i, t, tensors):
        return {"latents": torch.full_like(tensors["latents"], 0.5)}

    assert (images(pipe, 1, generator=seeded(), callback_on_step_end=replace) == 0.75).all()


def test_output_types_hold_the_same_image() -> None:
    pipe = class_pipeline()
    as_tensor = images(pipe, [0, 1], generator=seeded())
    as_array = pipe([0, 1], num_inference_steps=4, generator=seeded(), output_type="np").images
    assert np.array_equal(as_array, as_tensor.permute(0, 2, 3, 1).numpy())
    (as_pil,) = pipe([0, 1], num_inference_steps=4, generator=seeded(), return_dict=False)
    assert all(isinstance(image, Image.Image) for image in as_pil)
    for image, array in zip(as_pil, as_array, strict=True):
        assert np.abs(np.asarray(image) / 255 - array).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["DDIM", "EDM", "Euler", "flow"])
def test_low_precision_gives_nearly_the_same_images(name: str, dtype: torch.dtype) -> None:
    pipe, noise = class_pipeline(DETERMINISTIC[name][0]), torch.randn(1, 3, 8, 8, generator=seeded())
    exact = images(pipe, 1, guidance_scale=1.5, latents=noise)
    rounded = images(pipe.to(dtype), 1, guidance_scale=1.5, latents=noise)
    assert rounded.dtype == dtype
    error = (rounded.float() - exact).square().mean().sqrt().item()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)  # 8 times less


def test_low_precision_reaches_numpy_and_pil() -> None:
    pipe = class_pipeline().to(torch.bfloat16)
    assert pipe(1, num_inference_steps=2, output_type="np").images.dtype == np.float32
    assert pipe(1, num_inference_steps=2).images[0].size == (8, 8)


# saving and loading


def test_a_saved_pipeline_loads_by_its_name_and_draws_the_same_images(tmp_path) -> None:
    pipe = class_pipeline(EulerDiscreteScheduler(prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ClassConditionalPipeline"
    assert (index["unet"], index["scheduler"]) == (
        ["diffusers", "UNet2DModel"],
        ["diffusers", "EulerDiscreteScheduler"],
    )
    assert "diffusers_ext." not in json.dumps(index)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is ClassConditionalPipeline
    assert loaded.config.null_class == 4
    options = {"guidance_scale": 2.0, "generator": seeded()}
    expected = images(pipe, [0, 1], guidance_scale=2.0, generator=seeded())
    assert_same_images(images(loaded, [0, 1], **options), expected)


def test_another_process_that_imports_the_package_loads_it(tmp_path) -> None:
    pipe = class_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    script = (
        "import sys, diffusers_ext, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "latents = torch.load(sys.argv[2])\n"
        "images = pipe([0], num_inference_steps=2, guidance_scale=2.0, latents=latents, output_type='pt').images\n"
        "torch.save((type(pipe).__name__, images), sys.argv[2])\n"
    )
    latents, file = torch.randn(1, 3, 8, 8, generator=seeded()), tmp_path / "exchange.pt"
    torch.save(latents, file)
    done = stranger.run(script, tmp_path / "model", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name, theirs = torch.load(file)
    assert name == "ClassConditionalPipeline"
    assert_same_images(theirs, images(pipe, [0], steps=2, guidance_scale=2.0, latents=latents))


def short_bridge() -> GaussianBridge:
    d = 3 * 8 * 8
    return GaussianBridge.from_moments(torch.zeros(3, 8, 8), torch.eye(d), DDIMScheduler(), 0.6, rank=2)


OPEN = """
import sys
from diffusers import DiffusionPipeline

def load(name):
    try:
        pipe = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)
    except (ImportError, ValueError) as error:
        return f"{type(error).__name__} {error}"
    return f"{type(pipe).__name__} {type(pipe.scheduler).__name__}"

places = ["tester/class_conditional", "tester/reflected", "reflected", "tester/short_time"]
sys.modules["diffusers_ext"] = None  # a machine that has no such package
print(*map(load, places), sep="\\n")
del sys.modules["diffusers_ext"]
print(*map(load, places), sep="\\n")
"""


def test_with_the_file_beside_it_a_pipeline_opens_without_an_import(tmp_path) -> None:
    reflected = ReflectedPipeline(tiny_unet(5), ReflectedScheduler(), null_class=4)
    with HubServer() as hub:
        short_time = ShortTimePipeline(tiny_unet(), ShortTimeDDIMScheduler(max_diffusion_time=0.6), short_bridge())
        for name, pipe in (
            ("class_conditional", class_pipeline()),
            ("reflected", reflected),
            ("short_time", short_time),
        ):
            pipe.save_pretrained(tmp_path / name)
            shutil.copytree(REPOSITORY / "pipelines" / name, tmp_path / name, dirs_exist_ok=True)
            files = [p for p in (tmp_path / name).rglob("*.*") if p.is_file() and "__pycache__" not in p.parts]
            hub.create(f"tester/{name}")
            hub._repositories[f"tester/{name}"].commit(
                "pushed", {p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in files}
            )
        environment = hub.environment(tmp_path / "home", token=None)
        done = stranger.run(OPEN, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ModuleNotFound", "ImportError")) and "diffusers_ext" in line for line in lines[:4])
    assert lines[4] == "ClassConditionalPipeline DDIMScheduler"
    assert lines[5:7] == ["ReflectedPipeline ReflectedScheduler"] * 2
    assert lines[7:] == ["ShortTimePipeline ShortTimeDDIMScheduler"]


def test_a_component_of_ours_is_stored_under_the_name_of_the_package(tmp_path, monkeypatch) -> None:
    import diffusers_ext

    class Own(DDIMScheduler):
        pass

    Own.__module__ = "diffusers_ext.schedulers.scheduling_own"
    monkeypatch.setattr(diffusers_ext, "Own", Own, raising=False)
    class_pipeline(Own(clip_sample=False, beta_end=0.01)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers_ext", "Own"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is Own
    assert torch.equal(loaded.scheduler.alphas_cumprod, Own(beta_end=0.01).alphas_cumprod)


@pytest.mark.parametrize(("classes", "null_class", "count"), [(None, None, None), (5, None, 5), (5, 4, 4), (5, 0, 4)])
def test_number_of_classes_does_not_count_the_null_class(classes, null_class, count) -> None:
    pipe = ClassConditionalPipeline(tiny_unet(classes), DDIMScheduler(), null_class=null_class)
    assert pipe.num_classes == count


def test_a_rectangular_model_draws_rectangles() -> None:
    unet = tiny_unet()
    unet.register_to_config(sample_size=(4, 8))
    pipe = quiet(ClassConditionalPipeline(unet, DDIMScheduler()))
    assert pipe(num_inference_steps=1).images[0].size == (8, 4)


# refusals

CONDITIONAL = [
    ({}, "pass class_labels, each from 0 to 4"),
    ({"class_labels": 5}, r"from 0 to 4, got \[5\]"),
    ({"class_labels": [0, -1]}, r"from 0 to 4, got \[0, -1\]"),
    ({"class_labels": []}, "from 0 to 4"),
    ({"class_labels": [0, 1], "batch_size": 3}, "2 class_labels for batch_size=3"),
    ({"class_labels": 0, "batch_size": 0}, "batch_size|class_labels"),
    ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2 images"),
    ({"class_labels": 0, "latents": torch.zeros(2, 3, 8, 8)}, r"\(2, 3, 8, 8\), the model needs \(1, 3, 8, 8\)"),
    ({"class_labels": 0, "output_type": "jpg"}, "'jpg' is not one of pil, np, pt, latent"),
    ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["noise"]}, "noise.*latents"),
]


@pytest.mark.parametrize(("options", "message"), CONDITIONAL)
def test_a_contradiction_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_pipeline()(num_inference_steps=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 0}, "this model is unconditional"),
        ({"guidance_scale": 2.0}, "this model is unconditional"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_an_unconditional_model_refuses_what_it_does_not_know(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(ClassConditionalPipeline(tiny_unet(), DDIMScheduler()))(num_inference_steps=1, **options)


def test_guidance_without_a_null_class_is_refused_until_it_is_named() -> None:
    pipe = class_pipeline(null_class=None)
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a null class.*register_to_config"):
        pipe(0, num_inference_steps=1, guidance_scale=2.0)
    pipe.register_to_config(null_class=4)
    noise = torch.randn(1, 3, 8, 8, generator=seeded())
    expected = images(class_pipeline(), 0, guidance_scale=2.0, latents=noise)
    assert torch.equal(images(pipe, 0, guidance_scale=2.0, latents=noise), expected)


# --- what users of diffusers' pipelines expect ------------------------------------------------------------------------


def test_a_latent_is_the_schedulers_last_sample() -> None:
    pipe = class_pipeline()
    latent = pipe([0, 1], num_inference_steps=3, generator=seeded(), output_type="latent").images
    image = pipe([0, 1], num_inference_steps=3, generator=seeded(), output_type="pt").images
    assert latent.abs().max() > 1
    torch.testing.assert_close((latent / 2 + 0.5).clamp(0, 1), image)


def test_a_callback_may_end_the_steps() -> None:
    pipe, steps = class_pipeline(), []

    def interrupt(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    early = pipe([0], num_inference_steps=5, generator=seeded(), output_type="latent", callback_on_step_end=interrupt)
    assert (steps, pipe.num_timesteps, pipe.interrupt) == ([0, 1], 5, True)
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    pipe([0], num_inference_steps=5, generator=seeded(), callback_on_step_end=keep)
    assert len(seen) == 5
    assert torch.equal(early.images, seen[1])


def test_a_callback_may_change_the_guidance_of_the_next_steps() -> None:
    pipe, scales = class_pipeline(), [3.0, 3.0, 1.0, 0.5]

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = scales[min(step + 1, 3)]
        return {}

    options = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent"}
    ours = pipe([0, 1], guidance_scale=3.0, callback_on_step_end=change, **options).images
    assert pipe.guidance_scale == 0.5
    scheduler, x = pipe.scheduler, torch.randn(2, *ours.shape[1:], generator=seeded())
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t, w in zip(scheduler.timesteps, scales, strict=True):
            given, null = (pipe.unet(x, t, class_labels=torch.tensor(y)).sample for y in ([0, 1], [4, 4]))
            x = scheduler.step(null + w * (given - null), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


def test_options_of_the_step_reach_it_as_in_diffusers() -> None:
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=0.3)
    options = {"batch_size": 2, "num_inference_steps": 4, "use_clipped_model_output": True}
    stock = quiet(DDIMPipeline(tiny_unet(), scheduler))(generator=seeded(), output_type="np", **options).images
    pipe = quiet(ClassConditionalPipeline(tiny_unet(), scheduler))
    assert np.array_equal(pipe(generator=seeded(), output_type="np", **options).images, stock)
    without = pipe(generator=seeded(), output_type="np", **options | {"use_clipped_model_output": False}).images
    assert np.abs(without - stock).max() > 0.01


@pytest.mark.parametrize("option", ["use_cliped_model_output", "sample", "model_output"])
def test_an_unknown_option_is_refused_with_those_there_are(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}.*DDIMScheduler.step, which takes use_clipped_model_output, varia"):
        class_pipeline()(0, num_inference_steps=1, **{option: True})


class LearnedVariance(OracleUNet):
    """A network of C channels that returns 2 C: the prediction, and a variance that depends on the class."""

    @register_to_config
    def __init__(self, in_channels: int = 3, out_channels: int = 6, num_class_embeds: int = 3, sample_size: int = 8):
        diffusers.ModelMixin.__init__(self)
        self.dummy = nn.Parameter(torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> UNet2DOutput:
        y = class_labels.reshape(-1, 1, 1, 1)
        prediction, variance = (0.5 + 0.1 * y) * sample, 0.1 + 0.1 * y + 0.2 * sample.sin() ** 2
        if self.config.out_channels == self.config.in_channels:
            return UNet2DOutput(sample=prediction)
        return UNet2DOutput(sample=torch.cat([prediction, variance], 1))


def learned(scheduler, channels: int, out: int) -> ClassConditionalPipeline:
    return quiet(ClassConditionalPipeline(LearnedVariance(channels, out), scheduler, null_class=2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("kind", [DDPMScheduler, diffusers.DDPMParallelScheduler])
def test_ddpm_reads_the_variance_of_the_conditional_model(kind, variance_type, guidance_scale, channels) -> None:
    scheduler = kind(variance_type=variance_type, clip_sample=False)
    pipe = learned(scheduler, channels, 2 * channels)
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "output_type": "latent"}
    ours = pipe([0, 1], generator=seeded(), **options).images

    x, generator, y = torch.randn(2, channels, 8, 8, generator=(g := seeded())), g, torch.tensor([0, 1])
    stock = kind(variance_type=variance_type, clip_sample=False)
    stock.set_timesteps(3)
    for t in stock.timesteps:
        (given, variance), null = pipe.unet(x, t, y).sample.chunk(2, 1), pipe.unet(x, t, y * 0 + 2).sample[:, :channels]
        output = torch.cat([null + guidance_scale * (given - null), variance], 1)
        x = stock.step(output, t, x, generator=generator).prev_sample
    assert ours.shape == (2, channels, 8, 8)
    torch.testing.assert_close(ours, x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDIMScheduler(),
        EulerDiscreteScheduler(),
        UniPCMultistepScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.DPMSolverMultistepScheduler(variance_type="learned_range"),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__} {scheduler.config.get('variance_type')}",
)
def test_other_schedulers_get_the_prediction_alone(scheduler, channels: int) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 2.5, "output_type": "latent"}
    both, alone = (
        learned(scheduler, channels, out)([0, 1], generator=seeded(), **options).images
        for out in (2 * channels, channels)
    )
    assert both.shape == (2, channels, 8, 8)
    assert torch.equal(both, alone)


def test_schedulers_that_read_the_variance_are_those_of_which_the_source_says_so() -> None:
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    kinds = [getattr(diffusers, name) for name in names if not name.startswith(("Calibrated", "ShortTime"))]
    kinds = [kind for kind in kinds if hasattr(kind, "step")]
    reads = {kind.__name__ for kind in kinds if "predicted_variance" in inspect.getsource(kind.step)}
    assert reads == {kind.__name__ for kind in READ_VARIANCE}


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"variance_type='learned' needs a UNet that predicts.* with 6 output channels"
    ):
        learned(DDPMScheduler(variance_type="learned"), 3, 3)(0, num_inference_steps=1)
    with pytest.raises(ValueError, match="takes 3 channels and returns 4: it is no model of images"):
        learned(DDPMScheduler(), 3, 4)(0, num_inference_steps=1)


@pytest.mark.parametrize("kind", [ClassConditionalPipeline, ShortTimePipeline, ReflectedPipeline])
def test_callbacks_of_each_pipeline_are_those_of_diffusers(kind) -> None:
    """They may read every tensor that is offered, replace the sample, and raise the scale of guidance."""
    scheduler = {ShortTimePipeline: ShortTimeDDIMScheduler(), ReflectedPipeline: ReflectedScheduler()}
    pipe = quiet(kind(tiny_unet(5), scheduler.get(kind, DDIMScheduler()), null_class=4))
    offered = kind._callback_tensor_inputs

    def raise_and_clear(pipe, step, timestep, tensors):
        assert tensors.keys() == set(offered)
        pipe._guidance_scale += 1.0
        last = step == pipe.num_timesteps - 1
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if last else {}

    drawn = pipe(
        [0, 1],
        guidance_scale=2.0,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=raise_and_clear,
        callback_on_step_end_tensor_inputs=list(offered),
    ).images
    assert (drawn == 0.25).all()
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_the_precision_of_a_pipeline_is_that_of_its_network(tmp_path) -> None:
    """A bridge stays in float32, where its directions are orthonormal."""
    scheduler = ShortTimeDDIMScheduler(max_diffusion_time=0.6)
    bridge = GaussianBridge((3, 8, 8), 0.6, stored_scheduler(scheduler), 4)
    pipe = ShortTimePipeline(tiny_unet(), scheduler, bridge)
    assert pipe.dtype == torch.float32
    pipe.save_pretrained(tmp_path)
    for half in (pipe.to(torch.float16), ShortTimePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)):
        assert (half.dtype, half.unet.dtype) == (torch.float16, torch.float16)
        assert half.bridge.directions.dtype == torch.float32
    options = {"batch_size": 2, "num_inference_steps": 2, "output_type": "pt"}
    exact = quiet(ShortTimePipeline.from_pretrained(tmp_path))(generator=seeded(), **options).images
    torch.testing.assert_close(quiet(half)(generator=seeded(), **options).images.float(), exact, rtol=0, atol=0.01)
