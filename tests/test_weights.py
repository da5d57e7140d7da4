"""Samples of weights. Truth: networks that were changed in a way that is known, or not at all."""

import copy

import pytest
import torch
from peft import LoraConfig
from test_calibration import table
from tiny_pipelines import tiny

from diffusers_ext import Calibration, calibrate_denoiser, calibrate_pipeline, estimate_calibration
from diffusers_ext.weights import adapters, other_weights, sample_of

BOTH = ("conditional", "unconditional")


def lora(pipe, name: str = "style", seed: int = 0, size: float = 0.1):
    """Give the pipeline's UNet a LoRA."""
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in pipe.unet.named_parameters():
        if f".{name}." in key:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    return pipe


def samples(model):
    return sample_of(model), sample_of(model, lora=True)


@pytest.fixture
def pipe():
    return tiny("sd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_weights_are_the_same_in_every_precision(pipe, dtype, tmp_path) -> None:
    before = samples(pipe.unet)
    assert before[0].shape == (len(list(pipe.unet.parameters())), 4)
    pipe.unet.to(dtype).save_pretrained(tmp_path)
    assert other_weights(type(pipe.unet).from_pretrained(tmp_path), *before) is None
    assert other_weights(pipe.unet, *before) is None
    assert other_weights(torch.compile(pipe.unet, backend="eager"), *before) is None


def test_a_changed_parameter_is_named(pipe) -> None:
    before = samples(pipe.unet)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    dict(pipe.unet.named_parameters())[name].data.mul_(1.01)
    said = f"1 of {len(before[0])} parameters of the UNet2DConditionModel have other values, the first is {name}"
    assert other_weights(pipe.unet, *before).startswith(said)


def test_a_lora_is_seen_while_it_is_active_and_when_it_is_fused(pipe) -> None:
    before = samples(pipe.unet)
    lora(pipe)
    assert adapters(pipe.unet) == ["style"]
    assert other_weights(pipe.unet, *before) == (
        "the UNet2DConditionModel has an active LoRA, style, and that one had none"
    )
    with_style = samples(pipe.unet)
    pipe.unet.disable_adapters()
    assert adapters(pipe.unet) == []
    assert other_weights(pipe.unet, *before) is None
    assert other_weights(pipe.unet, *with_style).endswith("has no LoRA, and that one had one")
    pipe.unet.enable_adapters()
    assert other_weights(pipe.unet, *with_style) is None
    assert other_weights(lora(tiny("sd"), "other", seed=1).unet, *with_style).endswith("has another LoRA, other")
    pipe.unet.fuse_lora()
    assert "parameters of the UNet2DConditionModel have other values" in other_weights(pipe.unet, *before)


def test_where_nothing_can_be_read_nothing_is_said(pipe) -> None:
    before = samples(pipe.unet)
    nothing = sample_of(lambda x, t: x)
    assert nothing.shape == (0, 4)
    assert other_weights(pipe.unet, nothing, nothing) is None
    assert other_weights(lambda x, t: x, *before) is None
    assert other_weights(copy.deepcopy(pipe.unet).to("meta"), *before) is None
    assert "parameters, that one had" in other_weights(tiny("sdxl").unet, *before)


@pytest.fixture
def warnings(monkeypatch):
    from diffusers_ext import calibration

    said = []
    monkeypatch.setattr(calibration.logger, "warning", said.append)
    return said


def measured(pipe) -> Calibration:
    x0 = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = {"encoder_hidden_states": torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(1))}
    null = {"encoder_hidden_states": torch.zeros(1, 3, 8)}
    data = [(x0, condition)]
    return estimate_calibration(pipe.unet, pipe.scheduler, data, num_levels=2, unconditional=null, progress=False)


def test_a_table_warns_of_another_model_by_both_routes_and_from_a_folder(pipe, warnings, tmp_path) -> None:
    calibration = measured(pipe)
    calibration.save_pretrained(tmp_path)
    loaded = Calibration.from_pretrained(tmp_path)
    assert torch.equal(loaded.weights_sample, sample_of(pipe.unet))
    for table_ in (calibration, loaded):
        calibrate_pipeline(pipe, table_)
        calibrate_denoiser(pipe.unet, table_)
    assert warnings == []
    lora(pipe)
    calibrate_pipeline(pipe, loaded)
    calibrate_denoiser(pipe.unet, loaded)
    assert len(warnings) == 2
    assert all("other weights: the UNet2DConditionModel has an active LoRA, style" in said for said in warnings)
    of_both = measured(pipe)
    assert len(of_both.lora_sample) > 0
    calibrate_pipeline(pipe, of_both)
    assert len(warnings) == 2
    pipe.unet.delete_adapters("style")
    calibrate_pipeline(pipe, of_both)
    assert "has no LoRA" in warnings[2]


def test_tables_without_a_sample_say_nothing(pipe, warnings) -> None:
    calibrate_pipeline(pipe, table(pipe.scheduler, (4, 8, 8), BOTH))
    assert warnings == []
