"""Pipelines without text: networks that take class labels, or nothing, beside the sample and the time.

These are models of pixels (`UNet2DModel`: DDPM, DDIM, `ClassConditionalPipeline` and its subclasses), models of the
latents of an autoencoder by the same network (LDM), and DiT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from diffusers.models.embeddings import LabelEmbedding

from ..conditions import Condition
from ..errors import InputError
from ..networks import Network
from ..pipelines import ClassConditionalPipeline, ShortTimePipeline
from .base import ImageFormat, Rows, Subject


class Labelled(Subject):
    """A pipeline whose network takes class labels, or no condition at all."""

    def image_format(self, resolution: int | None = None) -> ImageFormat:
        network, factor, size = self.network, self.factor, self.network.config.sample_size
        channels = network.config.in_channels if self.autoencoder is None else self.autoencoder.config.in_channels
        if resolution is None and not isinstance(size, int):
            raise InputError(f"the model samples at {size}: name the training size with --resolution")
        resolution = size * factor if resolution is None else resolution
        if channels not in (1, 3):
            raise InputError(
                f"the model takes images with {channels} channels; these scripts train on 1 (grey) or 3 (RGB)"
            )
        self._check_resolution(resolution)
        side = resolution // factor
        probe = torch.zeros(1, network.config.in_channels, side, side, device=network.device)
        labels = {} if self.num_classes is None else {"class_labels": torch.zeros(1, dtype=torch.long).to(probe.device)}
        devices = [probe.device] if probe.device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):  # dropout draws
                Network(network)(probe, torch.ones(1, device=probe.device), **labels)
        except ValueError as error:
            raise InputError(str(error)) from error
        return ImageFormat(channels, resolution)

    def _check_resolution(self, resolution: int) -> None:
        if resolution != (size := self.network.config.sample_size * self.factor):
            raise InputError(f"--resolution {resolution} does not fit the model: it takes {size}")

    def conditions(self, rows: Rows) -> Condition:
        return {} if self.num_classes is None else {"class_labels": rows.labels.to(self.network.device)}

    def null_condition(self, resolution: int) -> Condition | None:
        return (
            None
            if self.null_class is None
            else {"class_labels": torch.full((1,), self.null_class, device=self.network.device)}
        )

    def require_trainable(self) -> None:
        pass

    def call(
        self,
        n: int,
        *,
        labels: Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        resolution: int | None = None,
    ) -> dict[str, Any]:
        if (classes := self.num_classes) is None:
            return {"batch_size": n}
        labels = [i % classes for i in range(n)] if labels is None else list(labels)
        return {"class_labels": labels, "guidance_scale": guidance_scale}


class LabelledUNet(Labelled):
    """A `UNet2DModel`."""

    @property
    def null_class(self) -> int | None:  # type: ignore[override]
        return self.pipeline.config.get("null_class")

    @property
    def num_classes(self) -> int | None:  # type: ignore[override]
        embeddings = self.network.config.num_class_embeds
        return embeddings if embeddings is None else embeddings - (self.null_class is not None)

    def _check_resolution(self, resolution: int) -> None:
        multiple = self.factor * 2 ** (len(self.network.config.block_out_channels) - 1)
        if resolution % multiple:
            below = resolution // multiple * multiple
            sizes = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise InputError(f"--resolution {resolution} does not fit the model: use {sizes}")

    def train_at(self, resolution: int) -> None:
        self.network.register_to_config(sample_size=resolution // self.factor)

    @contextmanager
    def sampling_at(self, resolution: int | None) -> Iterator[None]:
        own = self.network.config.sample_size
        try:
            if resolution is not None:
                self.train_at(resolution)
            yield
        finally:
            self.network.register_to_config(sample_size=own)


class Pixels(LabelledUNet):
    """A `UNet2DModel` of images."""

    of_pixels = True

    def sampler(self) -> DiffusionPipeline:
        if type(self.pipeline) in (DDPMPipeline, DDIMPipeline):
            return ClassConditionalPipeline(self.network, self.pipeline.scheduler)
        return self.pipeline

    def on_short_times(self, scheduler: Any, bridge: Any) -> DiffusionPipeline:
        return ShortTimePipeline(self.network, scheduler, bridge, self.null_class)

    def _keeping(self, scheduler: Any) -> DiffusionPipeline:
        return ClassConditionalPipeline(self.network, scheduler, self.null_class)


class LatentUNet(LabelledUNet):
    """A `UNet2DModel` of an autoencoder's latents (LDM)."""


class LatentTransformer(Labelled):
    """A pipeline with a `DiTTransformer2DModel` of latents."""

    @property
    def null_class(self) -> int | None:  # type: ignore[override]
        return self.network.config.num_embeds_ada_norm

    @property
    def num_classes(self) -> int | None:  # type: ignore[override]
        return self.network.config.num_embeds_ada_norm

    def before_training(self) -> None:
        for module in self.network.modules():
            if isinstance(module, LabelEmbedding):  # the loop drops labels once for all evaluations of a sample
                module.dropout_prob = 0.0

    def refusal_of(self, scheduler: Any) -> str | None:
        if getattr(scheduler, "init_noise_sigma", 1.0) == 1.0:
            return None
        return (
            f"{type(self.pipeline).__name__} samples wrongly with {type(scheduler).__name__}, which scales its samples"
        )
