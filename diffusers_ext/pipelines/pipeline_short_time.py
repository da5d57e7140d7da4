r"""Sampling on the diffusion times [0, T] alone: the chain starts from a draw of an auxiliary model ("bridge") of x_T.

    x_T ~ nu,    then any short-time scheduler from the timestep of T down to 0.

Without a bridge the chain starts from N(0, I), the law of x_T at T = 1. Guidance is that of `ClassConditionalPipeline`;
a class-conditional bridge draws the start from the class that is asked for.

Reference: How Much is Enough? A Study on Diffusion Times in Score-based Generative Models (Franzese et al., 2022, arXiv
2206.05173).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin, UNet2DModel
from torch import Tensor

from ..bridges import Bridge
from .pipeline_class_conditional import ClassConditionalPipeline


class ShortTimePipeline(ClassConditionalPipeline):
    """Images from a `UNet2DModel` and an auxiliary model of the diffused data.

    Args:
        unet: the network; class-conditional if its `num_class_embeds` is set.
        scheduler: a short-time scheduler, e.g. `ShortTimeDDIMScheduler`.
        bridge: a bridge that was fitted at the scheduler's `max_diffusion_time`; `None` starts from N(0, I).
        null_class: the label that stands for "no class", needed for guidance; `None` if the model was trained without.

    It is called like a `ClassConditionalPipeline`; `latents` are x_T = alpha x0 + (1 - alpha^2)^1/2 n with every
    scheduler. A call also raises ValueError where the bridge belongs to another scheduler, T or shape, or has no such
    class.
    """

    _exclude_from_cpu_offload: ClassVar = ["bridge"]  # it has no `forward` that could fetch it
    _optional_components: ClassVar = ["bridge"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        bridge: Bridge | None = None,
        null_class: int | None = None,
    ) -> None:
        super().__init__(unet, scheduler, null_class)
        self.register_modules(bridge=bridge)

    def _start(self, n: int, labels: Tensor | None, generator: Any, latents: Tensor | None) -> Tensor:
        if latents is None and self.bridge is not None:
            self.bridge.check(self.scheduler, shape=self._shape(n)[1:])
            classes = self.bridge.config.num_classes
            if classes is not None and labels is None:
                raise ValueError(f"the bridge has {classes} classes, and the UNet takes no labels")
            latents = draw_start(self.bridge, n, generator, labels)
        return super()._start(n, labels, generator, latents)


def draw_start(bridge: Bridge, n: int, generator: Any, labels: Tensor | None = None) -> Tensor:
    """Draw x_T from a bridge, (n, *shape).

    Args:
        generator: one generator, or a list with one for each of the n samples.
        labels: (n,) classes, for a class-conditional bridge.
    """
    if not isinstance(generator, list):
        return bridge.sample(n, generator, labels)
    each = [None] * n if labels is None else labels.split(1)
    return torch.cat([bridge.sample(1, g, y) for g, y in zip(generator, each, strict=True)])
