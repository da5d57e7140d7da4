"""Text-to-image on the diffusion times [0, T] alone: stock pipelines whose latents start from a draw of a bridge.

    pipe = short_time_pipeline(pipe, 0.6, bridge)              # a ShortTimeStableDiffusionPipeline
    image = pipe("a red bicycle", num_inference_steps=10).images[0]

A class is called `ShortTime` + the exact name of the stock pipeline. It is that pipeline with one more component, the
bridge, and another `prepare_latents`: where the call names no latents they are x_T ~ nu, and the stock method scales
them by the scheduler's `init_noise_sigma` as it does with all latents. The bridge is a model of the latents of one
size. The classes are made when they are first asked for: Stable Diffusion's import transformers' models.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..bridges import Bridge
from ..stock import class_names
from .pipeline_short_time import draw_start

STOCK = class_names("Pipeline", "PixArtAlpha PixArtSigma StableDiffusion StableDiffusionXL")
"""The stock pipelines, of which the tests have verified where their latents come from."""

NAMES = frozenset(f"ShortTime{name}" for name in STOCK)
"""The names of the classes."""


class ShortTimeText(DiffusionPipeline):
    """The methods that are added to a stock pipeline."""

    bridge: Bridge | None

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Any,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Return the latents that sampling starts from, scaled for the scheduler.

        Raises:
            ValueError: the bridge belongs to another scheduler, T or size of the images.
        """
        one_each = not isinstance(generator, list) or len(generator) == batch_size
        if latents is None and self.bridge is not None and one_each:  # otherwise diffusers says what is wrong
            shape = (num_channels_latents, *(int(side) // self.vae_scale_factor for side in (height, width)))
            self.bridge.check(self.scheduler, shape=shape)
            latents = draw_start(self.bridge, batch_size, generator).to(device, dtype)
        return super().prepare_latents(
            batch_size, num_channels_latents, height, width, dtype, device, generator, latents
        )


@functools.cache
def short_time_text_class(name: str) -> Any:
    """Return the short-time class of a stock pipeline of the list, by the name of that pipeline."""
    stock = getattr(diffusers, name)
    own = inspect.Parameter("bridge", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Bridge | None)

    def __init__(self: Any, *args: Any, bridge: Bridge | None = None, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        if bridge is not None and bridge.config.num_classes is not None:
            raise ValueError(f"the bridge has {bridge.config.num_classes} classes, and prompts are none")
        self.register_modules(bridge=bridge)

    signature = inspect.signature(stock.__init__)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore
    members = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"`{name}` on the diffusion times [0, T], from a bridge. See `{__name__}`.",
        "_optional_components": [*stock._optional_components, "bridge"],
        "_exclude_from_cpu_offload": [*stock._exclude_from_cpu_offload, "bridge"],
    }
    return type(f"ShortTime{name}", (ShortTimeText, stock), members)


def __getattr__(name: str) -> Any:
    """Return one of the classes `NAMES`."""
    if name in NAMES:
        return short_time_text_class(name.removeprefix("ShortTime"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
