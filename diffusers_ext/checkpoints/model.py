"""What a converted checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel

from ..pipelines import ClassConditionalPipeline, ReflectedPipeline
from ..score_unet import ScoreUNet2DModel


@dataclass
class Converted:
    """A network and its scheduler.

    Args:
        unet, scheduler: of the pipeline.
        null_class: the label of "no class", where there is one.
        described: what the file held, in words.
        dropped: what of the file the pipeline does not have, in words.
        told: what the file does not say, and whoever converts it does.
        assumed: what neither says.
    """

    unet: UNet2DModel = field(repr=False)
    scheduler: Any = field(repr=False)
    null_class: int | None
    described: str
    dropped: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """Return what it is, and what was dropped, told and assumed, for people."""
        size, images = sum(p.numel() for p in self.unet.parameters()) / 1e6, self.unet.config.sample_size
        found = [
            f"The file held {self.described}. It is a {type(self.unet).__name__} of {size:.1f} million parameters now, "
            f"for images of {images} x {images}, with {type(self.scheduler).__name__}."
        ]
        if (classes := self.unet.config.num_class_embeds) is not None:
            last = classes - 1 - (self.null_class is not None)
            null = "" if self.null_class is None else f"; label {self.null_class} is no class, for guidance"
            found.append(f"Labels 0 to {last} are its classes{null}.")
        if self.dropped:
            found.append(f"Dropped: {'; '.join(self.dropped)}.")
        if self.told:
            found.append(f"Not in the file, and told: {'; '.join(self.told)}.")
        if self.assumed:
            found.append(f"Not in the file, and assumed: {'; '.join(self.assumed)}.")
        return found

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline; a stock one where that samples this model rightly."""
        name = type(self.scheduler).__name__
        if name == "ReflectedScheduler":
            return ReflectedPipeline(self.unet, self.scheduler, self.null_class)
        stock = {"DDIMScheduler": DDIMPipeline, "DDPMScheduler": DDPMPipeline}.get(name)
        ours = isinstance(self.unet, ScoreUNet2DModel) or self.unet.config.num_class_embeds is not None
        if stock is None or ours or self.scheduler.config.get("variance_type") == "learned_range":
            return ClassConditionalPipeline(self.unet, self.scheduler, self.null_class)
        return stock(self.unet, self.scheduler)
