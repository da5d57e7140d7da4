r"""Sampling a model of a reflected process: the chain starts from the uniform law of the box and never leaves it.

The chain follows the fixed grids of `ReflectedScheduler`, or an adaptive solver of the probability flow,

    dx/du = sigma eps(x, sigma),        u = ln sigma.

A learned score may have some flux through a face; beyond the face the flow is continued by its mirror image. Guidance
is that of `ClassConditionalPipeline`: it combines scores linearly, or, of a network that predicts a point, points of
the box, and the result is clamped to the box again. No scale of it leads out of the box.

Reference: Reflected Diffusion Models (Lou, Ermon, 2023, arXiv 2304.04740).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from math import log
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from torch import Tensor

from ..ranges import require
from ..schedulers import ReflectedScheduler
from ..score import reflected_output, reflected_point
from .pipeline_class_conditional import ClassConditionalPipeline

MAX_STEPS = 1000


class ReflectedPipeline(ClassConditionalPipeline):
    """Images from a `UNet2DModel` of a reflected process, unconditional or class-conditional.

    Args:
        unet: the network; class-conditional if its `num_class_embeds` is set.
        scheduler: the box, the noise levels and the sampler.
        null_class: the label that stands for "no class", needed for guidance; `None` if the model was trained without.
    """

    def __init__(self, unet: UNet2DModel, scheduler: ReflectedScheduler, null_class: int | None = None) -> None:
        super().__init__(unet, scheduler, null_class)

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
        rtol: float | None = None,
        atol: float | None = None,
        **step_options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels, batch_size, guidance_scale, generator, eta, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, step_options: as in `ClassConditionalPipeline`.
            num_inference_steps: steps of the scheduler; the adaptive solver ignores it.
            latents: points of the box (batch_size, channels, height, width) to start from, uniform ones by default.
            rtol, atol: with one of them or both, solve the probability flow adaptively (Dormand-Prince, of torchdiffeq)
                to this relative and absolute tolerance; where one is missing it equals the other. The solver takes as
                many steps as it needs, at most 1000, and calls no callback.

        Raises:
            ImportError: the adaptive solver needs torchdiffeq.
            ValueError: an argument contradicts the model or another argument; the message says how.
        """
        if not isinstance(self.scheduler, ReflectedScheduler):
            raise ValueError(f"a model of a reflected process needs a ReflectedScheduler, not {self.scheduler!r:.60}")
        if latents is not None:
            self.scheduler.process.require_inside(latents, "latents")
        if rtol is None and atol is None:
            return super().__call__(
                class_labels=class_labels,
                batch_size=batch_size,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generator,
                latents=latents,
                eta=eta,
                output_type=output_type,
                return_dict=return_dict,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                **step_options,
            )
        require("rtol", rtol, above=0)
        require("atol", atol, above=0)
        tolerances = [tolerance for tolerance in (rtol, atol) if tolerance is not None]
        if step_options:
            raise ValueError(f"the adaptive solver makes no steps of the scheduler: it takes no {sorted(step_options)}")
        if callback_on_step_end is not None:
            raise ValueError("the adaptive solver has no steps to call back from: callback_on_step_end must be None")
        labels, n = self._batch(class_labels, batch_size, guidance_scale)
        self._check(n, generator, latents, output_type, callback_on_step_end_tensor_inputs)
        x = self._flow(
            self._start(n, labels, generator, latents), labels, guidance_scale, tolerances[0], tolerances[-1]
        )
        return self._finish(x, output_type, return_dict)

    def _start(self, n: int, labels: Tensor | None, generator: Any, latents: Tensor | None) -> Tensor:
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        if latents is not None:
            return latents.to(device, dtype)
        config, process = self.scheduler.config, self.scheduler.process
        prior = partial(process.sample_prior, sigma_max=config.sigma_max, device=device, dtype=dtype)
        if isinstance(generator, list):
            return torch.cat([prior(self._shape(1), generator=g) for g in generator])
        return prior(self._shape(n), generator=generator)

    def _bounded(self, output: Tensor, sample: Tensor, t: Any) -> Tensor:
        schedule, process = self.scheduler.schedule, self.scheduler.process
        if schedule.prediction_type != "point":
            return output
        sigma, x = schedule.sigma(torch.as_tensor(t, device=sample.device)), process.constrain(sample)
        return reflected_output(process, reflected_point(process, output.to(x.dtype), x, sigma), x, sigma)

    def _in_unit_range(self, sample: Tensor) -> Tensor:
        return (sample - self.scheduler.process.low) / self.scheduler.process.width

    def _flow(self, x: Tensor, labels: Tensor | None, guidance_scale: float, rtol: float, atol: float) -> Tensor:
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError("the adaptive solver needs torchdiffeq: pip install torchdiffeq") from error
        scheduler, process = self.scheduler, self.scheduler.process

        with self.progress_bar(count()) as bar:  # of unknown length

            def slope(u: Tensor, y: Tensor) -> Tensor:
                bar.update()
                sigma, inside = u.exp(), process.constrain(y)
                output = self._predict(inside, scheduler.schedule.time(sigma), labels, guidance_scale)
                return process.orientation(y) * sigma * scheduler.eps(output, inside, sigma)

            config = scheduler.config
            ends = torch.tensor([config.sigma_max, config.sigma_min], dtype=x.dtype, device=x.device).log()
            shortest = {"min_step": log(config.sigma_max / config.sigma_min) / MAX_STEPS}
            return process.constrain(odeint(slope, x, ends, rtol=rtol, atol=atol, options=shortest)[-1])
