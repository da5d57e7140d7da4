"""Text-to-image pipelines: which condition each family gives its network for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import InputError
from ..pipelines.short_time_text import STOCK, short_time_text_class
from .base import Condition, ImageFormat, Rows, Subject


class TextToImage(Subject):
    """A pipeline with `encode_prompt`; the subclasses know the conditions of their families."""

    takes_captions = True

    def image_format(self, resolution: int | None = None) -> ImageFormat:
        network: Any = self.network
        size = network.config.sample_size * self.factor if resolution is None else resolution
        if size % self.factor:
            raise InputError(f"--resolution {size} is no multiple of {self.factor}")
        return ImageFormat(self.autoencoder.config.in_channels, size)

    def conditions(self, rows: Rows) -> Condition:
        prompts = [""] * len(rows.images) if rows.captions is None else list(rows.captions)
        with torch.no_grad():
            return self._conditions(prompts, rows.images.shape[-1])

    def null_condition(self, resolution: int) -> Condition | None:
        with torch.no_grad():
            return self._conditions([""], resolution)

    def _conditions(self, prompts: list[str], resolution: int) -> Condition:
        raise InputError(
            f"the conditions of a {type(self.pipeline).__name__} are not known here: measure it with "
            f"diffusers_ext.estimate_calibration, which takes them as they are"
        )

    def _encoded(self, *prompts: list[str] | None) -> tuple[Tensor, ...]:
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return self.pipeline.encode_prompt(*prompts, device=self.pipeline.device, **options)

    def on_short_times(self, scheduler: Any, bridge: Any) -> DiffusionPipeline:
        if (name := type(self.pipeline).__name__.removeprefix("ShortTime")) not in STOCK:
            return super().on_short_times(scheduler, bridge)
        return short_time_text_class(name)(**self._arguments(scheduler=scheduler, bridge=bridge))

    def call(
        self,
        n: int,
        *,
        labels: Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        resolution: int | None = None,
    ) -> dict[str, Any]:
        size = {} if resolution is None else {"height": resolution, "width": resolution}
        return {"prompt": [""] * n if captions is None else list(captions), "guidance_scale": guidance_scale} | size


class StableDiffusion(TextToImage):
    """Stable Diffusion 1 and 2: the condition is the embedding of the prompt."""

    def _conditions(self, prompts: list[str], resolution: int) -> Condition:
        embeddings, _ = self._encoded(prompts)
        return {"encoder_hidden_states": embeddings}


class StableDiffusionXL(TextToImage):
    """Stable Diffusion XL: the condition adds pooled embeddings, and the size and crop of the image."""

    def _conditions(self, prompts: list[str], resolution: int) -> Condition:
        embeddings, _, pooled, _ = self._encoded(prompts, None)
        if self.pipeline.config.get("force_zeros_for_empty_prompt", False) and not any(prompts):
            embeddings, pooled = torch.zeros_like(embeddings), torch.zeros_like(pooled)
        size = (resolution, resolution)
        times = torch.tensor([*size, 0, 0, *size], dtype=embeddings.dtype, device=embeddings.device)
        added = {"text_embeds": pooled, "time_ids": times.expand(len(prompts), -1)}
        return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}


class StableDiffusion3(TextToImage):
    """Stable Diffusion 3 and 3.5: the condition adds pooled embeddings."""

    def _conditions(self, prompts: list[str], resolution: int) -> Condition:
        embeddings, _, pooled, _ = self._encoded(prompts, None, None)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


FAMILIES = {  # the name of the pipeline's class begins with the key; longer keys come first
    "StableDiffusion3": StableDiffusion3,
    "StableDiffusionXL": StableDiffusionXL,
    "StableDiffusion": StableDiffusion,
}
