"""Latents of an autoencoder of diffusers: their law, which does not change, and draws from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


def law_of(autoencoder: Any, images: Tensor) -> dict[str, Tensor]:
    """Return the law of the latents of images: the `moments` of a normal one, or the `latents` if there is none."""
    encoded = autoencoder.encode(images)
    has_law = hasattr(encoded, "latent_dist")
    return {"moments": encoded.latent_dist.parameters} if has_law else {"latents": encoded.latents}


def draw(autoencoder: Any, law: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Return latents as networks see them, drawn from what `law_of` returned: shifted and scaled."""
    config, latents = autoencoder.config, law.get("latents")
    if latents is None:
        latents = DiagonalGaussianDistribution(law["moments"]).sample(generator)
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
