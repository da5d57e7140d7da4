"""Complete text-to-image pipelines of diffusers with random weights, a few thousand in each network: real tokenizers,
text encoders, networks and autoencoders, made without a download. They draw images of 16 x 16 pixels, of latents of
8 x 8. Weights depend on the name alone."""

import string

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIZE, LENGTH = 16, 16  # of the images; of the longest prompt, in tokens
CLIP_WIDTH, T5_WIDTH, POOLED = 8, 6, 5


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase), *(f"{i}</w>" for i in range(10))]
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab, [], model_max_length=LENGTH)


def clip_encoder(projected: bool = False):
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=CLIP_WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=POOLED,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocab += [(c, -1.0 - i / 100) for i, c in enumerate(["▁", *string.ascii_lowercase, *string.digits])]
    return T5Tokenizer(vocab, extra_ids=0, model_max_length=LENGTH)


def t5_encoder(width: int = T5_WIDTH) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=64, **sizes)).eval()


def autoencoder(channels: int = 4, **options) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 4), "norm_num_groups": 2, "sample_size": SIZE}
    return AutoencoderKL(latent_channels=channels, **blocks, **sizes, **options).eval()


def unet(width: int, **options) -> UNet2DConditionModel:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    return UNet2DConditionModel(**blocks, **sizes, cross_attention_dim=width, attention_head_dim=4, **options).eval()


def stable_diffusion(prediction_type: str = "epsilon"):
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(CLIP_WIDTH),
        scheduler=diffusers.PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(2 * CLIP_WIDTH, projection_class_embeddings_input_dim=6 * 4 + POOLED, **added),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
        add_watermarker=False,
    )


def stable_diffusion_3():
    sizes = {"sample_size": 8, "patch_size": 2, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    width = {"joint_attention_dim": 2 * CLIP_WIDTH, "caption_projection_dim": 16, "pooled_projection_dim": 2 * POOLED}
    encoders = {"text_encoder": clip_encoder(projected=True), "text_encoder_2": clip_encoder(projected=True)}
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_3": t5_tokenizer()}
    return diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(shift_factor=0.1),
        transformer=SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=8, **sizes, **width).eval(),
        text_encoder_3=t5_encoder(2 * CLIP_WIDTH),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **encoders,
        **tokenizers,
    )


def flux(guidance_embeds: bool = True):
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    width = {"joint_attention_dim": T5_WIDTH, "pooled_projection_dim": CLIP_WIDTH, "axes_dims_rope": (2, 2, 4)}
    return diffusers.FluxPipeline(
        vae=autoencoder(shift_factor=0.1),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(in_channels=16, guidance_embeds=guidance_embeds, **sizes, **width).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def pixart(kind: str = "Sigma", sample_size: int = 8):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "patch_size": 2}
    width = {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 24, "caption_channels": T5_WIDTH}
    kinds = {"norm_type": "ada_norm_single", "sample_size": sample_size}
    return getattr(diffusers, f"PixArt{kind}Pipeline")(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=PixArtTransformer2DModel(**sizes, **width, **kinds).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


MAKERS = {
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "flux-schnell": lambda: flux(guidance_embeds=False),
    "pixart": pixart,
    "pixart-alpha": lambda: pixart("Alpha"),
    "pixart-1024": lambda: pixart("Alpha", sample_size=128),
}


def tiny(name: str):
    """Make one; see `MAKERS`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sorted(MAKERS).index(name))
        pipeline = MAKERS[name]()
        for component in pipeline.components.values():  # what is initialised with zeros would hide mistakes
            for parameter in component.parameters() if isinstance(component, torch.nn.Module) else ():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
