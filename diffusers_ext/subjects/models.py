"""The pipeline that a training script trains, and how it is saved.

A pipeline here is anything with one network that takes (noisy sample, time) and at most class labels: stock pixel
pipelines (DDPM, DDIM, ...), latent ones (DiT, LDM) and `ClassConditionalPipeline`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from torch import Tensor

from ..errors import InputError
from ..interop import Network
from ..pipelines import ClassConditionalPipeline


def load_pipeline(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """A pretrained pipeline, its networks in `dtype`.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return DiffusionPipeline.from_pretrained(
            name, revision=revision, variant=variant, cache_dir=cache_dir, torch_dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"the pipeline {name!r} could not be loaded; it must be the name of a diffusers pipeline on the Hub or a "
            f"folder with a model_index.json: {error}"
        ) from error


def network_of(pipeline: DiffusionPipeline) -> tuple[str, Any]:
    """The network that is trained, and the name of its component.

    Raises:
        InputError: the pipeline has none that is unconditional or class-conditional.
    """
    for name, kind in (("unet", UNet2DModel), ("transformer", DiTTransformer2DModel)):
        network = getattr(pipeline, name, None)
        if isinstance(network, kind):
            return name, network
    raise InputError(
        f"{type(pipeline).__name__} cannot be trained here: it needs a UNet2DModel (`unet`) or a DiTTransformer2DModel "
        f"(`transformer`), unconditional or conditioned on class labels"
    )


def null_class_of(pipeline: DiffusionPipeline) -> int | None:
    """The label that means "no class", if the model has one."""
    _, network = network_of(pipeline)
    if isinstance(network, DiTTransformer2DModel):
        return network.config.num_embeds_ada_norm
    return pipeline.config.get("null_class")


def classes_of(pipeline: DiffusionPipeline) -> int | None:
    """Number of classes beside the null class; `None` if the network takes no labels."""
    _, network = network_of(pipeline)
    if isinstance(network, DiTTransformer2DModel):
        return network.config.num_embeds_ada_norm
    if network.config.num_class_embeds is None:
        return None
    return network.config.num_class_embeds - (null_class_of(pipeline) is not None)


def _autoencoder(pipeline: DiffusionPipeline) -> Any:
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


@torch.no_grad()
def encode(pipeline: DiffusionPipeline, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What the network is trained on: images (B, C, H, W), or their latents where the pipeline has an autoencoder."""
    autoencoder = _autoencoder(pipeline)
    if autoencoder is None:
        return images
    encoded = autoencoder.encode(images)
    latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - (autoencoder.config.get("shift_factor") or 0.0)) * autoencoder.config.scaling_factor


def image_format(pipeline: DiffusionPipeline, resolution: int | None) -> tuple[int, int]:
    """(channels, resolution) of the images to train on; by default the resolution that the pipeline samples.

    A pixel model that is trained at another resolution samples at that one from then on.

    Raises:
        InputError: the network does not take images of this size or number of channels.
    """
    _, network = network_of(pipeline)
    autoencoder = _autoencoder(pipeline)
    factor = 1 if autoencoder is None else 2 ** (len(autoencoder.config.block_out_channels) - 1)
    channels = network.config.in_channels if autoencoder is None else autoencoder.config.in_channels
    size = network.config.sample_size
    if resolution is None and not isinstance(size, int):
        raise InputError(f"the model samples at {size}: name the training size with --resolution")
    resolution = size * factor if resolution is None else resolution
    if channels not in (1, 3):
        raise InputError(f"the model takes images with {channels} channels; these scripts train on 1 (grey) or 3 (RGB)")
    if isinstance(network, UNet2DModel):
        multiple = factor * 2 ** (len(network.config.block_out_channels) - 1)
        if resolution % multiple:
            below = resolution // multiple * multiple
            sizes = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise InputError(f"--resolution {resolution} does not fit the model: use {sizes}")
        network.register_to_config(sample_size=resolution // factor)
    elif resolution != size * factor:
        raise InputError(f"--resolution {resolution} does not fit the model: it takes {size * factor}")
    probe = torch.zeros(1, network.config.in_channels, resolution // factor, resolution // factor)
    labels = {} if classes_of(pipeline) is None else {"class_labels": torch.zeros(1, dtype=torch.long)}
    with torch.no_grad():
        output = Network(network)(probe, torch.ones(1), **labels)
    if output.shape != probe.shape:
        raise InputError(f"the network maps {tuple(probe.shape)} to {tuple(output.shape)}: it predicts no noise")
    return channels, resolution


# --- the trained pipeline ---------------------------------------------------------------------------------------------


def with_weights(
    pipeline: DiffusionPipeline, state: dict[str, Tensor], average: Sequence[Tensor] | None = None
) -> DiffusionPipeline:
    """A copy of the pipeline with these weights in its network, or with the moving average of its parameters; shares
    what is not trained.

    The network is built anew: accelerate replaces `forward` of the one it wraps, and a deep copy would keep calling it.
    """
    name, network = network_of(pipeline)
    with torch.random.fork_rng(devices=[]):
        trained = type(network).from_config(network.config)
    trained.load_state_dict(state)
    trained.to(network.device)
    if average is not None:
        for parameter, averaged in zip(trained.parameters(), average, strict=True):
            parameter.data.copy_(averaged)
    components = dict(pipeline.components) | {name: trained.eval(), "scheduler": copy.deepcopy(pipeline.scheduler)}
    if isinstance(pipeline, ClassConditionalPipeline):
        components["null_class"] = pipeline.config.null_class
    copied = type(pipeline)(**components)
    copied.set_progress_bar_config(disable=True)
    return copied


def sample_images(
    pipeline: DiffusionPipeline,
    n: int,
    num_inference_steps: int = 50,
    seed: int = 0,
    class_labels: list[int] | None = None,
) -> np.ndarray:
    """(n, H, W, C) in [0, 1]; class-conditional models without guidance, by default the classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    classes = classes_of(pipeline)
    if classes is None:
        what: dict[str, Any] = {"batch_size": n}
    else:
        what = {"class_labels": class_labels or [i % classes for i in range(n)], "guidance_scale": 1.0}
    return pipeline(**what, num_inference_steps=num_inference_steps, generator=generator, output_type="np").images
