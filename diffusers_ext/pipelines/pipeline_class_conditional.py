r"""Sampling from a pixel-space UNet with any scheduler, with or without class labels.

diffusers' own `DDPMPipeline` and `DDIMPipeline` take no class labels, and `DDPMPipeline` samples wrongly with
schedulers that scale their samples (Euler, EDM): it ignores `init_noise_sigma` and `scale_model_input`.

Classifier-free guidance: output = output_null + guidance_scale (output_class - output_null); 1 is the conditional
model.

A model with learned variance has twice as many output channels as input channels. The second half goes to schedulers
whose `step` reads it (DDPM), as the conditional model predicts it, without guidance; the others get the first half.

The network may be in half precision, `pipe.dtype`: the chain is kept in float32.

Reference: Classifier-Free Diffusion Guidance (Ho, Salimans, 2022, arXiv 2207.12598); its weight w is
guidance_scale - 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UnCLIPScheduler,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..ranges import require

READ_VARIANCE = (DDPMScheduler, DDPMParallelScheduler, UnCLIPScheduler)
"""The schedulers whose `step` reads the variance channels, where their `variance_type` is a learned one."""


def reads_variance(scheduler: Any) -> bool:
    """Return whether a scheduler's `step` reads the variance channels of the network."""
    return scheduler.config.get("variance_type") in ("learned", "learned_range") and isinstance(
        scheduler, READ_VARIANCE
    )


_OF_EACH_STEP = {"self", "model_output", "timestep", "sample", "generator", "eta", "return_dict"}


class ClassConditionalPipeline(DiffusionPipeline):
    """Images from a `UNet2DModel`, unconditional or class-conditional, with any scheduler.

    Args:
        unet: the network; class-conditional if its `num_class_embeds` is set.
        scheduler: any diffusers scheduler with `set_timesteps` and `step`.
        null_class: the label that stands for "no class", needed for guidance; `None` if the model was trained without.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, null_class: int | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        embeddings = unet.config.num_class_embeds
        if null_class is not None and (embeddings is None or not 0 <= null_class < embeddings):
            raise ValueError(f"null_class={null_class} is not one of the {embeddings or 0} classes of the UNet")
        self.register_to_config(null_class=null_class)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network."""
        return self.unet.dtype

    @property
    def num_classes(self) -> int | None:
        """The number of classes, the null class not counted; `None` for an unconditional model."""
        embeddings = self.unet.config.num_class_embeds
        return embeddings if embeddings is None or self.config.null_class is None else embeddings - 1

    @property
    def guidance_scale(self) -> float:
        """The scale of the present call, or of the last one."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the present call, or of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the steps of the call."""
        return self._interrupt

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the present call evaluates the null class, too."""
        return self._guidance_scale != 1

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **step_options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: one label for all images, or one for each; class-conditional models need it (the null class
                gives unconditional images).
            batch_size: number of images; by default the number of labels, or 1.
            num_inference_steps: steps of the scheduler.
            guidance_scale: 1 samples the conditional model; other values need a `null_class`.
            generator: one generator, or a list with one for each image.
            latents: standard normal noise (batch_size, channels, height, width) to start from; the pipeline scales it
                by the scheduler's `init_noise_sigma`.
            eta: passed on to schedulers whose `step` takes it (DDIM).
            output_type: `pil`, `np` (batch, height, width, channels) or `pt` (batch, channels, height, width), in
                [0, 1]; `latent`: the scheduler's last sample as it is.
            return_dict: return an `ImagePipelineOutput` and not a tuple.
            callback_on_step_end: called after each step as (pipeline, step, timestep, tensors); returns a dict, which
                may hold new `latents`. It may change `pipeline._guidance_scale` for the next steps, and end the steps
                by `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: the names of the tensors that the callback gets; there is `latents`.
            step_options: more arguments of the scheduler's `step`: `use_clipped_model_output`, `s_churn`, ...

        Raises:
            ValueError: an argument contradicts the model or another argument; the message says how.
        """
        require("num_inference_steps", num_inference_steps, at_least=1)
        require("eta", eta, at_least=0)
        labels, n = self._batch(class_labels, batch_size, guidance_scale)
        self._check(n, generator, latents, output_type, callback_on_step_end_tensor_inputs)
        self._check_step(step_options)

        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        sample = self._start(n, labels, generator, latents)
        offered = {"generator": generator, "eta": eta}
        takes = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in offered.items() if name in takes} | step_options
        self._num_timesteps, self._interrupt = len(self.scheduler.timesteps), False
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self._interrupt:
                break
            output = self._predict(sample, t, labels, self._guidance_scale)
            sample = self.scheduler.step(output.to(sample.dtype), t, sample, **options).prev_sample
            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, sample)
                sample = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", sample)

        return self._finish(sample, output_type, return_dict)

    def _start(self, n: int, labels: Tensor | None, generator: Any, latents: Tensor | None) -> Tensor:
        """Make the chain's first sample, in float32 at least: in half precision a large sigma would drown the image."""
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            latents = randn_tensor(self._shape(n), generator, device, dtype)
        precise = torch.promote_types(dtype, torch.float32)
        return latents.to(device, precise) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _finish(self, sample: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
        if output_type == "latent":
            self.maybe_free_model_hooks()
            return ImagePipelineOutput(images=sample) if return_dict else (sample,)
        images: Any = self._in_unit_range(sample).clamp(0, 1)
        images = images.to(self.unet.dtype) if output_type == "pt" else images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _in_unit_range(self, sample: Tensor) -> Tensor:
        return sample / 2 + 0.5

    def _predict(self, sample: Tensor, t: Any, labels: Tensor | None, guidance_scale: float) -> Tensor:
        scale = getattr(self.scheduler, "scale_model_input", lambda x, _: x)
        model_input = scale(sample, t).to(self.unet.dtype)
        if guidance_scale == 1.0 or labels is None:
            output, variance = self._split(self.unet(model_input, t, class_labels=labels).sample)
        else:
            both = torch.cat([labels, torch.full_like(labels, self.config.null_class)])
            outputs, variance = self._split(self.unet(torch.cat([model_input] * 2), t, class_labels=both).sample)
            output, null = (self._bounded(one, sample, t) for one in outputs.chunk(2))
            output = null + guidance_scale * (output - null)
        return torch.cat([output, variance[: len(output)]], 1) if self._reads_variance else output

    def _bounded(self, output: Tensor, sample: Tensor, t: Any) -> Tensor:
        """Return what guidance combines of an output of the network at (sample, t); a subclass may bound it."""
        return output

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Split the channels of the network's output into the prediction and the variance, which may be empty."""
        channels = self.unet.config.in_channels
        return output[:, :channels], output[:, channels:]

    @property
    def _reads_variance(self) -> bool:
        return reads_variance(self.scheduler)

    def _shape(self, n: int) -> tuple[int, ...]:
        size = self.unet.config.sample_size
        height_width = (size, size) if isinstance(size, int) else tuple(size)
        return (n, self.unet.config.in_channels, *height_width)

    def _batch(self, class_labels: Any, batch_size: int | None, guidance_scale: float) -> tuple[Tensor | None, int]:
        """Return the labels, `None` for an unconditional model, and the number of images."""
        require("guidance_scale", guidance_scale)
        self._guidance_scale = guidance_scale
        require("batch_size", batch_size, at_least=1)
        labels = self._labels(class_labels, batch_size, guidance_scale)
        return labels, len(labels) if labels is not None else batch_size if batch_size is not None else 1

    def _labels(
        self, class_labels: int | Sequence[int] | Tensor | None, batch_size: int | None, guidance_scale: float
    ) -> Tensor | None:
        embeddings, null_class = self.unet.config.num_class_embeds, self.config.null_class
        if embeddings is None:
            if class_labels is not None or guidance_scale != 1.0:
                raise ValueError("this model is unconditional: it takes no class_labels, and guidance_scale must be 1")
            return None
        if class_labels is None:
            raise ValueError(f"this model is class-conditional: pass class_labels, each from 0 to {embeddings - 1}")
        if guidance_scale != 1.0 and null_class is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a null class, and this model was trained without one; if it "
                f"has one, say so: pipe.register_to_config(null_class=...)"
            )
        labels = torch.as_tensor(class_labels).reshape(-1)
        if len(labels) and labels.is_floating_point():
            raise ValueError(f"class_labels must be integers, got {class_labels}")
        labels = labels.long()
        if len(labels) == 1 and batch_size is not None:
            labels = labels.expand(batch_size)
        if batch_size is not None and batch_size != len(labels):
            raise ValueError(f"{len(labels)} class_labels for batch_size={batch_size}")
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= embeddings:
            raise ValueError(f"class_labels must be from 0 to {embeddings - 1}, got {labels.tolist()}")
        return labels.to(self._execution_device)

    def _check(
        self, n: int, generator: Any, latents: Tensor | None, output_type: str, callback_tensors: Sequence[str]
    ) -> None:
        if isinstance(generator, list) and len(generator) != n:
            raise ValueError(f"{len(generator)} generators for {n} images: pass one, or one for each")
        if latents is not None and tuple(latents.shape) != self._shape(n):
            raise ValueError(f"latents have shape {tuple(latents.shape)}, the model needs {self._shape(n)}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is not one of pil, np, pt, latent")
        if unknown := set(callback_tensors) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: {sorted(unknown)} unknown, there is only latents")
        taken, given = self.unet.config.in_channels, self.unet.config.get("out_channels", self.unet.config.in_channels)
        if given not in (taken, 2 * taken):
            raise ValueError(f"the UNet takes {taken} channels and returns {given}: it is no model of images")
        if self._reads_variance and given == taken:
            raise ValueError(
                f"the scheduler's variance_type={self.scheduler.config.variance_type!r} needs a UNet that predicts the "
                f"variance, with {2 * taken} output channels, and it has {given}: use variance_type='fixed_small'"
            )

    def _check_step(self, step_options: Mapping[str, Any]) -> None:
        takes = inspect.signature(self.scheduler.step).parameters.keys() - _OF_EACH_STEP
        if unknown := step_options.keys() - takes:
            raise ValueError(
                f"{sorted(unknown)} are no arguments of this pipeline, nor of {type(self.scheduler).__name__}.step, "
                f"which takes {', '.join(sorted(takes)) or 'no more'}"
            )
