"""Every class of networks of the list, tiny and with random weights. Truth: its own forward pass, called with the time
and the sign that its pipeline uses (`test_networks` reads both in the pipeline's source), and diffusers' scheduler."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from test_calibration import seeded, table

from diffusers_ext import calibrate_denoiser, denoiser_from, noise_schedule
from diffusers_ext.networks import CONVENTIONS

B, WIDTH = 2, 8
BLOCK = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
DOWN_UP = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
ONE_STREAM = ATTENTION | {"attention_head_dim": 8, "num_single_layers": 1}
ROPE = {"axes_dims_rope": (2, 2, 4)}
PATCH = ATTENTION | {"in_channels": 4, "patch_size": 2, "sample_size": 8}
IMAGE, VIDEO, TOKENS = (4, 8, 8), (4, 2, 8, 8), (16, 4)


def noise(*shape, seed: int = 1):
    return torch.randn(*shape, generator=seeded(seed))


def text(length: int = 3, width: int = WIDTH) -> dict:
    return {"encoder_hidden_states": noise(B, length, width)}


def mask(length: int = 3) -> dict:
    return {"encoder_attention_mask": torch.ones(B, length, dtype=torch.long)}


def ids(axes: int = 3, length: int = 3) -> dict:
    return {"txt_ids": torch.zeros(length, axes), "img_ids": torch.arange(16.0)[:, None].repeat(1, axes)}


def pooled(width: int = 5) -> dict:
    return {"pooled_projections": noise(B, width)}


def crops() -> dict:
    return {
        name: torch.full((B, 2), v) for name, v in (("original_size", 8.0), ("target_size", 8.0), ("crop_coords", 0.0))
    }


def cross(kind: str) -> dict:
    """The blocks of a UNet with cross attention."""
    down, up = (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"), (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}")
    return BLOCK | {"cross_attention_dim": WIDTH, "down_block_types": down, "up_block_types": up}


# Of each class: its settings, the conditions of a call, the shape of a sample, and whether it is a flow.
CASES = {
    "UNet2DModel": (
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_class_embeds": 3, **BLOCK, **DOWN_UP},
        {"class_labels": torch.tensor([0, 2])},
        IMAGE,
        False,
    ),
    "UNet2DConditionModel": ({"attention_head_dim": 4, **cross("2D")}, text(), IMAGE, False),
    "UNet3DConditionModel": ({"attention_head_dim": 4, **cross("3D")}, text(), VIDEO, False),
    "UNetMotionModel": (
        {"num_attention_heads": 2, "motion_num_attention_heads": 2, **cross("Motion")},
        {"encoder_hidden_states": noise(2 * B, 3, WIDTH)},  # for each frame
        VIDEO,
        False,
    ),
    "UNetControlNetXSModel": (
        {
            "sample_size": 8,
            "cross_attention_dim": WIDTH,
            "num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "ctrl_conditioning_embedding_out_channels": (2, 2),
            "ctrl_block_out_channels": (4, 8),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
            "use_linear_projection": False,
        },
        text() | {"controlnet_cond": noise(B, 3, 16, 16)},
        IMAGE,
        False,
    ),
    "DiTTransformer2DModel": (
        {"num_embeds_ada_norm": 5, "out_channels": 8, **PATCH},
        {"class_labels": torch.tensor([0, 2])},
        IMAGE,
        False,
    ),
    "PixArtTransformer2DModel": (
        {"cross_attention_dim": 8, "caption_channels": WIDTH, "out_channels": 8, **PATCH},
        text() | mask() | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        IMAGE,
        False,
    ),
    "HunyuanDiT2DModel": (
        {
            **PATCH,
            "hidden_size": 8,
            "cross_attention_dim": WIDTH,
            "cross_attention_dim_t5": WIDTH,
            "pooled_projection_dim": 4,
            "text_len": 3,
            "text_len_t5": 2,
            "use_style_cond_and_image_meta_size": False,
            "attention_head_dim": 4,
            "activation_fn": "gelu-approximate",
        },
        text()
        | {
            "text_embedding_mask": torch.ones(B, 3),
            "encoder_hidden_states_t5": noise(B, 2, WIDTH),
            "text_embedding_mask_t5": torch.ones(B, 2),
            "image_rotary_emb": (torch.ones(16, 4), torch.zeros(16, 4)),
        },
        IMAGE,
        False,
    ),
    "LatteTransformer3DModel": (
        {
            **PATCH,
            "out_channels": 8,
            "cross_attention_dim": 8,
            "caption_channels": WIDTH,
            "video_length": 2,
            "norm_type": "ada_norm_single",
            "attention_bias": True,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
        text(),
        VIDEO,
        False,
    ),
    "AllegroTransformer3DModel": (
        {
            **ATTENTION,
            "attention_head_dim": 24,
            "cross_attention_dim": 48,
            "caption_channels": WIDTH,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
        },
        text()
        | mask()
        | {
            "attention_mask": torch.ones(B, 2, 8, 8),
            "image_rotary_emb": (
                tuple((torch.ones(32, 8), torch.zeros(32, 8)) for _ in range(3)),
                tuple(torch.zeros(1, 32, dtype=torch.long) for _ in range(3)),
            ),
        },
        VIDEO,
        False,
    ),
    "CogVideoXTransformer3DModel": (
        {
            **ATTENTION,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": WIDTH,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 3,
        },
        text(),
        (2, 4, 8, 8),
        False,
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **PATCH,
            "out_channels": 4,
            "attention_head_dim": 8,
            "text_embed_dim": WIDTH,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
        },
        text() | crops(),
        IMAGE,
        False,
    ),
    "CogView4Transformer2DModel": (
        {
            **PATCH,
            "out_channels": 4,
            "attention_head_dim": 8,
            "text_embed_dim": WIDTH,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "rope_axes_dim": (8, 8),
        },
        text() | crops(),
        IMAGE,
        True,
    ),
    "SD3Transformer2DModel": (
        {
            **PATCH,
            "out_channels": 4,
            "joint_attention_dim": WIDTH,
            "caption_projection_dim": 8,
            "pooled_projection_dim": 5,
            "pos_embed_max_size": 8,
        },
        text() | pooled(),
        IMAGE,
        True,
    ),
    "BriaTransformer2DModel": (
        {**ONE_STREAM, "in_channels": 4, "joint_attention_dim": WIDTH, "axes_dims_rope": [2, 2, 4]},
        text() | ids(),
        TOKENS,
        True,
    ),
    "FluxTransformer2DModel": (
        {
            **ONE_STREAM,
            **ROPE,
            "in_channels": 4,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": 5,
            "guidance_embeds": True,
        },
        text() | pooled() | ids() | {"guidance": torch.full((B,), 3.5)},
        TOKENS,
        True,
    ),
    "Flux2Transformer2DModel": (
        {
            **ONE_STREAM,
            "axes_dims_rope": (2, 2, 2, 2),
            "in_channels": 4,
            "joint_attention_dim": WIDTH,
            "timestep_guidance_channels": 8,
        },
        text() | ids(4) | {"guidance": torch.full((B,), 3.5)},
        TOKENS,
        True,
    ),
    "ChromaTransformer2DModel": (
        {
            **ONE_STREAM,
            **ROPE,
            "in_channels": 4,
            "joint_attention_dim": WIDTH,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
        text() | ids() | {"attention_mask": torch.ones(B, 19, dtype=torch.bool)},
        TOKENS,
        True,
    ),
    "LongCatImageTransformer2DModel": (
        {
            **ONE_STREAM,
            "axes_dims_rope": [2, 2, 4],
            "in_channels": 4,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": 5,
        },
        text() | ids(),
        TOKENS,
        True,
    ),
    "OvisImageTransformer2DModel": (
        {**ONE_STREAM, **ROPE, "in_channels": 4, "out_channels": 4, "joint_attention_dim": WIDTH},
        text() | ids(),
        TOKENS,
        True,
    ),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "caption_projection_dim": 8,
            "pos_embed_max_size": 16,
        },
        text(),
        IMAGE,
        True,
    ),
    "QwenImageTransformer2DModel": (
        {
            **ATTENTION,
            **ROPE,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 1,
            "joint_attention_dim": WIDTH,
        },
        text() | {"encoder_hidden_states_mask": torch.ones(B, 3, dtype=torch.long), "img_shapes": [[(1, 4, 4)]] * B},
        TOKENS,
        True,
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            **ATTENTION,
            **ROPE,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 1,
            "joint_attention_dim": WIDTH,
            "moe_enabled": False,
        },
        text() | {"encoder_hidden_states_mask": torch.ones(B, 3, dtype=torch.bool), "img_shapes": [(1, 4, 4)] * B},
        TOKENS,
        True,
    ),
    "Krea2Transformer2DModel": (
        {
            **ATTENTION,
            **ROPE,
            "attention_head_dim": 8,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "in_channels": 4,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
        },
        {"encoder_hidden_states": noise(B, 3, 2, 8), "position_ids": torch.arange(19.0)[:, None].repeat(1, 3)},
        TOKENS,
        True,
    ),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": WIDTH,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [4, 4],
        },
        text(),
        IMAGE,
        True,
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (2, 2, 4),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": WIDTH,
        },
        text() | {"encoder_attention_mask": torch.ones(B, 3).bool()},
        IMAGE,
        True,
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **ONE_STREAM,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": 5,
            "rope_axes_dim": (2, 2, 4),
        },
        text() | mask() | pooled() | {"guidance": torch.full((B,), 6000.0)},
        VIDEO,
        True,
    ),
    "LTXVideoTransformer3DModel": (
        {**ATTENTION, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 8, "caption_channels": WIDTH},
        text() | mask() | {"num_frames": 1, "height": 4, "width": 4},
        TOKENS,
        True,
    ),
    "SkyReelsV2Transformer3DModel": (
        {
            **ATTENTION,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": WIDTH,
            "freq_dim": 8,
            "ffn_dim": 8,
            "rope_max_seq_len": 32,
        },
        text(),
        VIDEO,
        True,
    ),
    "WanTransformer3DModel": (
        {
            **ATTENTION,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": WIDTH,
            "freq_dim": 8,
            "ffn_dim": 8,
            "rope_max_seq_len": 32,
        },
        text(),
        VIDEO,
        True,
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": WIDTH,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 2,
            "gist_min_text_len": 2,
            "gist_max_text_len": 8,
            "axes_dims": (2, 2, 4),
            "axes_lens": (64, 32, 32),
        },
        {"encoder_hidden_states": noise(B, 2, 4, WIDTH), "encoder_attention_mask": torch.ones(B, 4, dtype=torch.bool)},
        IMAGE,
        True,
    ),
}


def test_the_cases_are_those_of_the_list() -> None:
    assert set(CASES) == set(CONVENTIONS)


def made(name: str):
    config, conditions, shape, flow = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = getattr(diffusers, name)(**config).eval()
        for parameter in network.parameters():  # what is initialised with zeros would hide the condition and the time
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
    return network, conditions, shape, scheduler


def x0_of_the_scheduler(scheduler, output, t, sample):
    """Of one sample each, as `step` returns or uses it."""
    if isinstance(scheduler, DDIMScheduler):
        scheduler.set_timesteps(1000)
        return scheduler.step(output, int(t), sample).pred_original_sample
    return sample - t / scheduler.config.num_train_timesteps * output


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_x0_is_what_the_pipeline_computes(name: str) -> None:
    network, conditions, shape, scheduler = made(name)
    sample, told = noise(B, *shape, seed=2), CONVENTIONS[name]
    for t in (200.0, 700.0):
        time = torch.full((B,), t)
        given = {"timestep": told.told(time, 1000), "return_dict": False}
        output = told.sign * network(sample, **given, **conditions)[0]
        if output.shape[1] == 2 * shape[0]:  # a learned variance
            output = output[:, : shape[0]]
        assert output.shape == sample.shape
        expected = x0_of_the_scheduler(scheduler, output, t, sample)
        denoiser, schedule = denoiser_from(network, scheduler), noise_schedule(scheduler)
        sigma = schedule.sigma(time)
        scale = schedule.scale(sigma).reshape(B, *[1] * len(shape))
        ours = denoiser(sample / scale, sigma, **conditions)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
        other = denoiser(sample / scale, schedule.sigma(time - 100), **conditions)
        assert (other - ours).abs().max() > 1e-3  # it is told the time


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_hook_subtracts_in_the_networks_own_sign_and_time(name: str) -> None:
    network, conditions, shape, scheduler = made(name)
    sample, told = noise(B, *shape, seed=2), CONVENTIONS[name]
    calibration = table(scheduler, shape, size=0.3)
    time = torch.full((B,), 400.0)
    given = {"timestep": told.told(time, 1000), "return_dict": False}
    before = network(sample, **given, **conditions)[0]
    calibrate_denoiser(network, calibration)
    after = network(sample, **given, **conditions)[0]
    offset = calibration.offset(calibration.schedule.sigma(time), torch.ones(1))
    channels = slice(None) if before.shape == sample.shape else slice(shape[0])
    torch.testing.assert_close(told.sign * (before - after)[:, channels], offset, rtol=1e-3, atol=1e-3)


def test_an_output_of_another_shape_is_refused() -> None:
    def with_text(x, t):
        return torch.cat([x, x[:, :3]], 1)

    with pytest.raises(ValueError, match=r"maps \(2, 16, 4\) to \(2, 19, 4\): it predicts no noise"):
        denoiser_from(with_text, FlowMatchEulerDiscreteScheduler())(noise(B, 16, 4), torch.ones(B))
