"""What the network of a text-to-image pipeline is told about a prompt: Stable Diffusion 1 and 2, XL and 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..errors import InputError


def is_text_pipeline(pipeline: DiffusionPipeline) -> bool:
    """Whether images come from prompts."""
    return hasattr(pipeline, "encode_prompt")


def text_image_format(pipeline: DiffusionPipeline, resolution: int | None) -> tuple[int, int]:
    """(channels, resolution) of the images whose latents the network takes; by default the size that it samples."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    size = network.config.sample_size * factor if resolution is None else resolution
    if size % factor:
        raise InputError(f"--resolution {size} is no multiple of {factor}")
    return pipeline.vae.config.in_channels, size


@torch.no_grad()
def text_conditions(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> dict[str, Any]:
    """The keyword arguments of the network for some prompts, first dimension len(prompts).

    Raises:
        InputError: the pipeline is of another family.
    """
    name, device = type(pipeline).__name__, pipeline.device
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if name.startswith("StableDiffusion3"):
        embeddings, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, None, **options)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
    if name.startswith("StableDiffusionXL"):
        embeddings, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, **options)
        if pipeline.config.get("force_zeros_for_empty_prompt", False) and not any(prompts):
            embeddings, pooled = torch.zeros_like(embeddings), torch.zeros_like(pooled)
        size = (resolution, resolution)
        times = torch.tensor([*size, 0, 0, *size], dtype=embeddings.dtype, device=device).expand(len(prompts), -1)
        return {"encoder_hidden_states": embeddings, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
    if name.startswith("StableDiffusion"):
        embeddings, _ = pipeline.encode_prompt(list(prompts), **options)
        return {"encoder_hidden_states": embeddings}
    raise InputError(
        f"the conditions of a {name} are not known here: measure it with diffusers_ext.estimate_calibration, which "
        f"takes them as they are"
    )
