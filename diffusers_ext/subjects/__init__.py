"""What a pipeline trains: `subject_of(pipeline)` decides it, once for the whole package."""

from __future__ import annotations

from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel

from ..errors import InputError
from .base import Condition, ImageFormat, Rows, Subject
from .labelled import Labelled, LatentTransformer, LatentUNet, Pixels
from .loading import load_pipeline
from .text import FAMILIES, StableDiffusion, StableDiffusion3, StableDiffusionXL, TextToImage

__all__ = [
    "Condition",
    "ImageFormat",
    "Labelled",
    "LatentTransformer",
    "LatentUNet",
    "Pixels",
    "Rows",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Subject",
    "TextToImage",
    "load_pipeline",
    "subject_of",
]


def subject_of(pipeline: DiffusionPipeline) -> Subject:
    """Return the subject of a pipeline. Only this function asks what a pipeline is.

    Raises:
        InputError: the pipeline has neither a `unet` nor a `transformer`.
    """
    name = next((n for n in ("unet", "transformer") if getattr(pipeline, n, None) is not None), None)
    if name is None:
        raise InputError(f"{type(pipeline).__name__} has neither a `unet` nor a `transformer`")
    network, kind = getattr(pipeline, name), type(pipeline).__name__
    if hasattr(pipeline, "encode_prompt"):
        return next((family for start, family in FAMILIES.items() if kind.startswith(start)), TextToImage)(
            pipeline, name
        )
    if isinstance(network, UNet2DModel):
        pixels = Subject(pipeline, name).autoencoder is None
        return Pixels(pipeline, name) if pixels else LatentUNet(pipeline, name)
    if isinstance(network, DiTTransformer2DModel):
        return LatentTransformer(pipeline, name)
    return Subject(pipeline, name)
