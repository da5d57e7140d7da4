"""Calibrated stock pipelines, with tiny random weights. Truth: a pipeline's own loop written out by hand with one call
of the network for each branch, other pipelines of diffusers, and what comes back from a folder."""

import inspect
import os

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FluxPipeline,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from precision import assert_same_images
from test_calibration import output_offset, seeded, table, tiny_dit, tiny_flux, tiny_text_unet, tiny_unet
from torch import Tensor

from diffusers_ext import ClassConditionalPipeline, calibrate_denoiser, calibrate_pipeline
from diffusers_ext.calibration import stop_calibrating
from diffusers_ext.evaluation.schedulers import swap_scheduler
from diffusers_ext.interop import live_config
from diffusers_ext.schedulers.scheduling_calibrated import CALIBRATED_SCHEDULERS, calibrated_class
from diffusers_ext.schedulers.scheduling_short_time import SHORT_TIME_SCHEDULERS, short_time_class

BOTH = ("conditional", "unconditional")
CLASSES = ("0", "1", "2", "3", "unconditional")


def tiny_vae(latent_channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(5)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 4), "norm_num_groups": 2, "sample_size": 16, "shift_factor": 0.1}
    return AutoencoderKL(latent_channels=latent_channels, **blocks, **sizes).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable(kind=StableDiffusionPipeline, scheduler=None, unet=None):
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    scheduler = scheduler or DDIMScheduler(clip_sample=False, steps_offset=1)
    unet = unet or tiny_text_unet()
    return quiet(kind(vae=tiny_vae(), unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts))


def prompts(*widths: int) -> list[Tensor]:
    return [torch.randn(1, 3, w, generator=seeded(i)) for i, w in enumerate(widths)]


def text(guidance_scale: float = 5.0, **options) -> dict:
    embeds, negative = prompts(6, 6)
    options = {"output_type": "np", "num_inference_steps": 4, "generator": seeded()} | options
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "guidance_scale": guidance_scale, **options}


def sdxl():
    torch.manual_seed(6)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "sample_size": 8}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    width = {"cross_attention_dim": 6, "projection_class_embeddings_input_dim": 6 * 4 + 5}
    unet = UNet2DConditionModel(**blocks, **added, **sizes, **width).eval()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    return StableDiffusionXLPipeline(
        vae=tiny_vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **dict.fromkeys(names)
    )


def sd3():
    torch.manual_seed(7)
    sizes = {"sample_size": 8, "patch_size": 2, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    width = {"joint_attention_dim": 6, "caption_projection_dim": 16, "pooled_projection_dim": 5}
    transformer = SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=8, **sizes, **width)
    names = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        vae=tiny_vae(), transformer=transformer.eval(), scheduler=scheduler, **dict.fromkeys(names)
    )


def flux():
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(vae=tiny_vae(), transformer=tiny_flux(), scheduler=scheduler, **dict.fromkeys(names))


def pooled(**options) -> dict:
    embeds, negative = torch.randn(2, 1, 5, generator=seeded(8))
    return text(**options) | {"pooled_prompt_embeds": embeds, "negative_pooled_prompt_embeds": negative}


IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
SIZE = {"height": 16, "width": 16}
STOCK = {
    "text to image": (stable, lambda: text(**SIZE), (4, 8, 8), 5.0),
    "no guidance": (stable, lambda: text(1.0, **SIZE), (4, 8, 8), 1.0),
    "image to image": (
        lambda: stable(StableDiffusionImg2ImgPipeline),
        lambda: text(image=IMAGE, strength=0.6, num_inference_steps=6),
        (4, 8, 8),
        5.0,
    ),
    "inpainting": (
        lambda: stable(StableDiffusionInpaintPipeline, unet=tiny_text_unet(9)),
        lambda: text(image=IMAGE, mask_image=MASK, strength=0.8, **SIZE),
        (4, 8, 8),
        5.0,
    ),
    "SDXL": (sdxl, lambda: pooled(**SIZE), (4, 8, 8), 5.0),
    "SD3": (sd3, lambda: pooled(**SIZE), (4, 8, 8), 5.0),
    "Flux": (
        flux,
        lambda: {k: v for k, v in pooled(**SIZE).items() if "negative" not in k},
        (16, 16),
        1.0,
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_pipeline_is_calibrated_saved_and_loaded(name, tmp_path) -> None:
    make, call, shape, guidance_scale = STOCK[name]
    pipe = quiet(make())
    plain = pipe(**call()).images
    calibration = table(pipe.scheduler, shape, rows=BOTH if guidance_scale != 1 else ("all",), size=0.3)
    assert calibrate_pipeline(pipe, calibration, guidance_scale) is pipe
    assert type(pipe.scheduler).__name__.startswith("Calibrated")
    images = pipe(**call()).images
    assert abs(images - plain).max() > 0.002
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, **absent))
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):  # model_index names the class
        assert type(loaded) is type(pipe)
    assert type(loaded.scheduler) is type(pipe.scheduler)
    assert loaded.scheduler.guidance_scale == guidance_scale
    assert_same_images(loaded(**call()).images, images)
    # by the other route the same, up to rounding
    hooked = quiet(make())
    if name == "SD3":  # with skip-layer guidance it calls its network twice
        with pytest.raises(ValueError, match="is not known of a StableDiffusion3Pipeline"):
            calibrate_pipeline(hooked, calibration, guidance_scale, route="model")
        return
    calibrate_pipeline(hooked, calibration, guidance_scale, route="model")
    assert abs(hooked(**call()).images - images).max() < 1e-3
    assert abs(images - plain).max() > 5 * abs(hooked(**call()).images - images).max()


@pytest.mark.skipif("TAESD" not in os.environ, reason="TAESD names no folder of the tiny autoencoder")
def test_with_the_latents_of_a_real_autoencoder() -> None:
    pipe = stable()
    pipe.vae = diffusers.AutoencoderTiny.from_pretrained(os.environ["TAESD"])
    pipe.vae_scale_factor = 8
    plain = pipe(**text(height=64, width=64)).images
    calibrate_pipeline(pipe, table(pipe.scheduler, (4, 8, 8), rows=BOTH, size=0.3), 5.0)
    images = pipe(**text(height=64, width=64)).images
    assert images.shape == (1, 64, 64, 3)
    assert abs(images - plain).max() > 0.01


def by_hand(pipe, calibration, guidance_scale: float, rescale: float, steps: int = 4) -> Tensor:
    """StableDiffusionPipeline's loop, each branch by itself and calibrated by itself."""
    call, scheduler = text(), pipe.scheduler
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    for t in scheduler.timesteps:
        branch = [
            pipe.unet(x, t, encoder_hidden_states=call[key]).sample
            - output_offset(calibration, scheduler, int(t), row).float()
            for row, key in enumerate(("prompt_embeds", "negative_prompt_embeds"))
        ]
        guided = branch[1] + guidance_scale * (branch[0] - branch[1])
        std = [v.std(dim=(1, 2, 3), keepdim=True) for v in (branch[0], guided)]
        output = (rescale * std[0] / std[1] + 1 - rescale) * guided
        x = scheduler.step(output, t, x).prev_sample
    return x


@torch.no_grad()
def test_guidance_rescale_is_exact_with_a_hook_on_the_model() -> None:
    pipe = stable()
    calibration = table(pipe.scheduler, (4, 8, 8), rows=BOTH, size=0.3)
    latents = torch.randn(1, 4, 8, 8, generator=seeded())
    call = text(output_type="latent", guidance_rescale=0.7, latents=latents, **SIZE)
    expected, plain = by_hand(pipe, calibration, 5.0, 0.7), pipe(**call).images
    swapped = stable(unet=pipe.unet)
    calibrate_pipeline(swapped, calibration, 5.0)
    by_scheduler = swapped(**call).images
    calibrate_pipeline(pipe, calibration, 5.0, route="model")
    torch.testing.assert_close(pipe(**call).images, expected, rtol=0, atol=1e-4)
    assert (plain - expected).abs().max() > 0.05
    assert (by_scheduler - expected).abs().max() > 0.01  # why there is a second route
    # and without it both are
    call["guidance_rescale"] = 0.0
    stop_calibrating(pipe.unet)
    expected = by_hand(pipe, calibration, 5.0, 0.0)
    torch.testing.assert_close(swapped(**call).images, expected, rtol=0, atol=1e-4)


# the choice of the route


def class_pipeline(scheduler=None) -> ClassConditionalPipeline:
    return quiet(ClassConditionalPipeline(tiny_unet(5), scheduler or DDIMScheduler(), null_class=4))


def drawn(pipe, **options) -> Tensor:
    return pipe(num_inference_steps=4, output_type="pt", generator=seeded(), **options).images


def is_hooked(pipe) -> bool:
    network = getattr(pipe, "unet", None) or pipe.transformer
    return len(network._forward_hooks) == 1


@pytest.mark.parametrize(
    ("rows", "guidance_scale", "scheduler", "by_scheduler"),
    [
        (("all",), 1.0, DDIMScheduler(), True),
        (BOTH, 1.0, DDIMScheduler(), True),
        (BOTH, 3.0, DDIMScheduler(), True),
        (CLASSES, 1.0, DDIMScheduler(), False),
        (CLASSES, 3.0, DDIMScheduler(), False),
        (BOTH, 3.0, diffusers.DDIMParallelScheduler(), False),
    ],
)
def test_the_scheduler_is_swapped_wherever_that_is_exact(rows, guidance_scale, scheduler, by_scheduler) -> None:
    pipe = class_pipeline(scheduler)
    null_class = None if rows == ("all",) else 4
    calibration = table(scheduler, (2, 8, 8), rows=rows, size=0.2, null_class=null_class)
    options = {"class_labels": [1, 3], "guidance_scale": guidance_scale}
    plain = drawn(pipe, **options)
    assert calibrate_pipeline(pipe, calibration, guidance_scale) is pipe
    assert is_hooked(pipe) != by_scheduler
    assert type(pipe.scheduler).__name__.startswith("Calibrated") == by_scheduler
    images = drawn(pipe, **options)
    reference = class_pipeline(scheduler)
    calibrate_denoiser(reference.unet, calibration)
    torch.testing.assert_close(images, drawn(reference, **options), rtol=0, atol=1e-4)
    assert (images - plain).abs().max() > 0.01


def test_nothing_is_subtracted_twice() -> None:
    calibration = table(DDIMScheduler(), (2, 8, 8), size=0.2)
    once = drawn(calibrate_pipeline(class_pipeline(), calibration), class_labels=[1, 3])
    pipe = class_pipeline()
    for route in ("scheduler", "scheduler", "model", "model", "scheduler", "model"):
        assert calibrate_pipeline(pipe, calibration, route=route) is pipe
        assert is_hooked(pipe) == (route == "model")
        torch.testing.assert_close(drawn(pipe, class_labels=[1, 3]), once, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [DDIMPipeline, diffusers.PNDMPipeline])
def test_a_pipeline_that_drops_subclasses_comes_back_as_one_that_does_not(kind) -> None:
    if kind is DDIMPipeline:
        pipe, reference = (quiet(kind(tiny_unet(), DDIMScheduler())) for _ in range(2))
    else:
        pipe, reference = (quiet(kind(tiny_unet(), PNDMScheduler())) for _ in range(2))
    own = pipe.scheduler
    calibration = table(own, (2, 8, 8), size=0.2)
    options = {"num_inference_steps": 4, "generator": seeded(), "output_type": "np", "batch_size": 2}
    plain = reference(**options | {"generator": seeded()}).images
    result = quiet(calibrate_pipeline(pipe, calibration))
    assert type(result) is ClassConditionalPipeline
    assert result.unet is pipe.unet
    assert pipe.scheduler is own  # the one that was given is as it was
    images = result(**options).images
    assert calibrate_pipeline(reference, calibration, route="model") is reference
    expected = reference(**options | {"generator": seeded()}).images
    assert abs(images - expected).max() < 1e-4
    assert abs(images - plain).max() > 0.01


def test_ddpm_and_dit_pipelines_work_as_they_are(tmp_path) -> None:
    pipe = quiet(DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler()))
    assert calibrate_pipeline(pipe, table(pipe.scheduler, (2, 8, 8))) is pipe
    pipe.save_pretrained(tmp_path)
    assert DDPMPipeline.from_pretrained(tmp_path).scheduler.calibration is not None
    dit = tiny_dit()
    dit.register_to_config(num_embeds_ada_norm=5)
    pipe = quiet(diffusers.DiTPipeline(dit, tiny_vae(2), DDIMScheduler()))
    calibrate_pipeline(pipe, table(DDIMScheduler(), (2, 8, 8), rows=CLASSES, null_class=4), 4.0)
    assert is_hooked(pipe)


def test_the_configuration_of_the_scheduler_is_left_alone() -> None:
    pipe = stable()
    pipe.scheduler = DDIMScheduler(clip_sample=False)  # Stable Diffusion would change steps_offset on construction
    config = {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}
    calibrate_pipeline(pipe, table(pipe.scheduler, (4, 8, 8)))
    assert {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"} == config
    assert config["steps_offset"] == 0


def test_a_pipeline_of_two_networks_is_refused() -> None:
    pipe = stable()
    pipe.unet_2 = tiny_text_unet()
    own = pipe.scheduler
    with pytest.raises(ValueError, match="a StableDiffusionPipeline has two networks, each with"):
        calibrate_pipeline(pipe, table(own, (4, 8, 8)))
    assert pipe.scheduler is own


def without_private(config) -> dict:
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_a_live_scheduler_is_copied_as_it_is(name) -> None:
    """Stable Diffusion changes `steps_offset` and `clip_sample` of a scheduler that has other ones."""
    pipe = stable(scheduler=getattr(diffusers, name)())
    own = pipe.scheduler
    kind = calibrated_class(name)
    plain = pipe(**text(**SIZE)).images
    pipe.scheduler = kind.from_scheduler(own, None)
    assert without_private(pipe.scheduler.config) == without_private(own.config)
    assert (plain == pipe(**text(**SIZE)).images).all()
    assert without_private(swap_scheduler(pipe, name).config) == without_private(own.config)
    if name in SHORT_TIME_SCHEDULERS:
        short = short_time_class(name).from_config(live_config(own), max_diffusion_time=1.0)
        assert without_private(short.config) == without_private(own.config) | {"max_diffusion_time": 1.0}


@pytest.mark.parametrize("name", list(CALIBRATED_SCHEDULERS))
def test_another_class_keeps_the_model_and_its_own_defaults(name) -> None:
    """Heun's default betas, for one, are those of Stable Diffusion, and DDIM's are not."""
    kind = calibrated_class(name)
    own = DDIMScheduler(timestep_spacing="trailing")
    try:
        made = kind.from_scheduler(own, table(own, (2, 8, 8)))
    except ValueError as error:
        # CogVideoX's schedulers shift the betas by a setting that others do not have
        reason = "betas" if "CogVideoX" in name else "family"
        assert reason in str(error) or "short-time" in str(error)  # noqa: PT017
        return
    set_by_hand = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing")
    takes = inspect.signature(kind.__init__).parameters
    fresh = kind(**{k: own.config[k] for k in set_by_hand if k in takes})
    assert {k: made.config[k] for k in takes if k in made.config} == {
        k: v for k, v in fresh.config.items() if k in takes
    }


# errors leave the pipeline as it was


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route": "both"}, "route 'both' is not one of auto, scheduler, model"),
        ({"calibration": table(DDIMScheduler(beta_end=0.01), (2, 8, 8))}, "belongs to another model"),
        ({"calibration": table(DDIMScheduler(beta_end=0.01), (2, 8, 8)), "route": "model"}, "belongs to another model"),
        ({"guidance_scale": 3.0}, "a row 'unconditional' in"),
        ({"guidance_scale": 3.0, "route": "scheduler"}, "needs the rows"),
        ({"calibration": table(DDIMScheduler(), (2, 8, 8), rows=CLASSES), "route": "scheduler"}, "needs the rows"),
        (
            {
                "pipeline": class_pipeline(diffusers.DDIMParallelScheduler()),
                "calibration": table(diffusers.DDIMParallelScheduler(), (2, 8, 8)),
                "route": "scheduler",
            },
            "no calibrated DDIMParallelScheduler",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, message) -> None:
    given = {"pipeline": class_pipeline(), "calibration": table(DDIMScheduler(), (2, 8, 8))} | change
    pipe = given["pipeline"]
    own = pipe.scheduler
    with pytest.raises(ValueError, match=message):
        calibrate_pipeline(**given)
    assert pipe.scheduler is own
    assert not is_hooked(pipe)


class Dropping(DiffusionPipeline):
    """Makes a plain scheduler of what it is given, around a network that only it knows how to call."""

    def __init__(self, transformer, scheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=DDIMScheduler.from_config(scheduler.config))


class Headless(DiffusionPipeline):
    def __init__(self, vae, scheduler) -> None:
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)


def test_a_pipeline_without_a_place_for_it_is_refused() -> None:
    calibration = table(DDIMScheduler(), (2, 8, 8))
    pipe = Dropping(tiny_dit(), DDIMScheduler())
    with pytest.raises(ValueError, match="Dropping does not keep a CalibratedDDIMScheduler: use route='model'"):
        calibrate_pipeline(pipe, calibration)
    assert calibrate_pipeline(pipe, calibration, route="model") is pipe
    assert is_hooked(pipe)
    with pytest.raises(ValueError, match="Headless has neither a `unet` nor a `transformer`"):
        calibrate_pipeline(Headless(tiny_vae(), DDIMScheduler()), calibration)
