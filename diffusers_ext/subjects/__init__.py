"""What a pipeline trains: `subject_of(pipeline)` decides it, once for the whole package."""

from __future__ import annotations

from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel

from ..conditions import Condition
from ..errors import InputError
from .base import ImageFormat, Rows, Subject
from .labelled import Labelled, LatentTransformer, LatentUNet, Pixels
from .loading import load_lora, load_pipeline
from .lora import Lora
from .text import FAMILIES, Flux, PixArt, StableDiffusion, StableDiffusion3, StableDiffusionXL, TextToImage

__all__ = [
    "Condition",
    "Flux",
    "ImageFormat",
    "Labelled",
    "LatentTransformer",
    "LatentUNet",
    "Lora",
    "PixArt",
    "Pixels",
    "Rows",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Subject",
    "TextToImage",
    "load_lora",
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
    network = getattr(pipeline, name)
    if hasattr(pipeline, "encode_prompt"):
        kinds = (kind.__name__ for kind in type(pipeline).__mro__)
        return next((FAMILIES[kind] for kind in kinds if kind in FAMILIES), TextToImage)(pipeline, name)
    if isinstance(network, UNet2DModel):
        pixels = Subject(pipeline, name).autoencoder is None
        return Pixels(pipeline, name) if pixels else LatentUNet(pipeline, name)
    if isinstance(network, DiTTransformer2DModel):
        return LatentTransformer(pipeline, name)
    return Subject(pipeline, name)
