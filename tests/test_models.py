"""Truth: what plain diffusers loads and samples, and arithmetic on weights."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_ext import ClassConditionalPipeline
from diffusers_ext.errors import InputError
from diffusers_ext.reports.pictures import image_grid
from diffusers_ext.training import TrainingArguments
from diffusers_ext.training.build import build_subject


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
    return build_subject(TrainingArguments(model_config_name_or_path=str(tmp_path), **kwargs), num_classes).pipeline


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
    pipelines = [build_subject(args, None).pipeline for args in arguments]
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
        build_subject(TrainingArguments(**kwargs), None)


def test_a_pretrained_pipeline_keeps_its_null_class(tmp_path):
    pipeline = ClassConditionalPipeline(tiny_unet(num_class_embeds=4), DDPMScheduler(), null_class=3)
    pipeline.save_pretrained(tmp_path)
    args = TrainingArguments(pretrained_model_name_or_path=str(tmp_path))
    assert build_subject(args, None).pipeline.config.null_class == 3


def test_the_grid_shows_every_image_in_its_place():
    images = np.zeros((5, 2, 2, 1))
    for i in range(5):
        images[i] = i / 4
    grid = np.asarray(image_grid(images, columns=3, min_size=4))
    assert grid.shape == (8, 12, 3)
    tiles = [grid[r * 4 : r * 4 + 4, c * 4 : c * 4 + 4] for r in range(2) for c in range(3)]
    assert [t.min() for t in tiles] == [t.max() for t in tiles] == [0, 64, 128, 191, 255, 255]
