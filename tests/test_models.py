"""Truth: what plain diffusers loads and samples, and arithmetic on weights."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from diffusers_ext import ClassConditionalPipeline
from diffusers_ext.errors import InputError
from diffusers_ext.files import save_pipeline
from diffusers_ext.reports.pictures import image_grid
from diffusers_ext.subjects.models import encode, image_format, sample_images, with_weights
from diffusers_ext.training import TrainingArguments
from diffusers_ext.training.build import build_pipeline


def tiny_unet(**kwargs):
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**config | kwargs)


def from_scratch(tmp_path, num_classes=None, **kwargs):
    tiny_unet().save_config(tmp_path)
    return build_pipeline(TrainingArguments(model_config_name_or_path=str(tmp_path), **kwargs), num_classes)


@pytest.mark.parametrize(
    ("scheduler", "conditional", "expected"),
    [
        ("DDIMScheduler", False, DDIMPipeline),
        ("DDPMScheduler", False, DDPMPipeline),
        ("FlowMatchEulerDiscreteScheduler", False, DDPMPipeline),
        ("EulerDiscreteScheduler", False, ClassConditionalPipeline),
        ("EDMEulerScheduler", False, ClassConditionalPipeline),
        ("DDIMScheduler", True, ClassConditionalPipeline),
    ],
)
def test_a_stock_pipeline_is_chosen_where_one_samples_the_model_rightly(tmp_path, scheduler, conditional, expected):
    pipeline = from_scratch(tmp_path, 3, scheduler=scheduler, class_conditional=conditional)
    assert type(pipeline) is expected
    if conditional:
        assert (pipeline.num_classes, pipeline.config.null_class) == (3, 3)


def test_new_weights_follow_the_seed_and_leave_the_global_state_alone(tmp_path):
    tiny_unet().save_config(tmp_path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    arguments = [TrainingArguments(model_config_name_or_path=str(tmp_path), seed=seed) for seed in (1, 1, 2)]
    pipelines = [build_pipeline(args, None) for args in arguments]
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (p.unet.conv_in.weight for p in pipelines)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "name the model: --pretrained_model_name_or_path, --model_config_name_or_path or --preset"),
        ({"pretrained_model_name_or_path": "no/such-model"}, "could not be loaded"),
        ({"preset": "digits", "scheduler": "NoScheduler"}, "diffusers has no scheduler 'NoScheduler'"),
        ({"preset": "digits", "scheduler": "UnCLIPScheduler"}, "Supported schedulers"),
        ({"preset": "digits", "prediction_type": "noise"}, "prediction_type 'noise' is not one of"),
        ({"preset": "digits", "scheduler": "EDMEulerScheduler", "beta_schedule": "linear"}, "takes no beta_schedule"),
        ({"preset": "digits", "class_conditional": True}, "needs data with labels"),
    ],
)
def test_impossible_models_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        build_pipeline(TrainingArguments(**kwargs), None)


def test_a_text_conditioned_pipeline_is_refused(tmp_path):
    from diffusers import LMSDiscreteScheduler
    from diffusers import UNet2DConditionModel as Unet

    class TextPipeline(DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    unet = Unet(8, 4, 4, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, **blocks)
    with pytest.raises(InputError, match="TextPipeline cannot be trained here"):
        image_format(TextPipeline(unet, LMSDiscreteScheduler()), None)


@pytest.mark.parametrize(("resolution", "message"), [(9, "use 8 or 10"), (1, "use 2")])
def test_a_size_that_the_network_cannot_take_is_refused_with_one_that_it_can(resolution, message):
    pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
    with pytest.raises(InputError, match=f"--resolution {resolution} does not fit the model: {message}"):
        image_format(pipeline, resolution)


def test_more_classes_in_the_data_than_in_the_model_are_refused(tmp_path):
    pipeline = ClassConditionalPipeline(tiny_unet(num_class_embeds=4), DDPMScheduler(), null_class=3)
    pipeline.save_pretrained(tmp_path)
    args = TrainingArguments(pretrained_model_name_or_path=str(tmp_path))
    assert build_pipeline(args, 3).config.null_class == 3
    with pytest.raises(InputError, match="labels of 3 classes, the data have 4 classes"):
        build_pipeline(args, 4)
    with pytest.raises(InputError, match="labels of 3 classes, the data have no labels"):
        build_pipeline(args, None)


def test_training_at_another_resolution_samples_at_it():
    pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
    assert image_format(pipeline, 12) == (1, 12)
    assert sample_images(pipeline, 2, num_inference_steps=2).shape == (2, 12, 12, 1)


def test_with_weights_makes_a_copy_that_training_does_not_touch():
    pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    averaged = with_weights(pipeline, before, [p + 2 for p in pipeline.unet.parameters()])
    copied = with_weights(pipeline, {k: v + 1 for k, v in before.items()})
    copied.scheduler.set_timesteps(3)
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(5)
    for name, value in before.items():
        torch.testing.assert_close(copied.unet.state_dict()[name], value + 1)
        torch.testing.assert_close(averaged.unet.state_dict()[name], value + 2)
    assert pipeline.unet.training
    assert not copied.unet.training
    assert pipeline.scheduler.num_inference_steps is None


def test_a_save_replaces_the_last_one_and_leaves_other_files(tmp_path):
    (tmp_path / "logs").mkdir()
    for value in (1.0, 2.0):
        pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
        torch.nn.init.constant_(pipeline.unet.conv_in.bias, value)
        save_pipeline(pipeline, tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert loaded.unet.conv_in.bias.eq(value).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "model_index.json", "scheduler", "unet"]


def test_a_failed_save_keeps_the_last_one(tmp_path, monkeypatch):
    pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
    save_pipeline(pipeline, tmp_path)
    weight = pipeline.unet.conv_in.weight.clone()
    torch.nn.init.zeros_(pipeline.unet.conv_in.weight)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline.unet, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pipeline(pipeline, tmp_path)
    assert torch.equal(DiffusionPipeline.from_pretrained(tmp_path).unet.conv_in.weight, weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model_index.json", "scheduler", "unet"]


def test_latents_are_scaled_to_what_the_decoder_undoes():
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.25, **blocks)

    class Latent:
        pass

    pipeline = Latent()
    pipeline.vae = vae
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = encode(pipeline, images, torch.Generator().manual_seed(0))
    mode = vae.encode(images).latent_dist
    noise = torch.randn(mode.mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, 0.25 * (mode.mean + mode.std * noise))
    assert torch.equal(encode(DDIMPipeline(tiny_unet(), DDIMScheduler()), images), images)


def test_the_grid_shows_every_image_in_its_place():
    images = np.zeros((5, 2, 2, 1))
    for i in range(5):
        images[i] = i / 4
    grid = np.asarray(image_grid(images, columns=3, min_size=4))
    assert grid.shape == (8, 12, 3)
    tiles = [grid[r * 4 : r * 4 + 4, c * 4 : c * 4 + 4] for r in range(2) for c in range(3)]
    assert [t.min() for t in tiles] == [t.max() for t in tiles] == [0, 64, 128, 191, 255, 255]
