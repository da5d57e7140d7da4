r"""Stock schedulers that sample on the diffusion times [0, T] alone, T <= 1.

    bridge = GaussianBridge.from_pretrained("user/model-bridge")
    scheduler = ShortTimeDDIMScheduler.from_config(pipe.scheduler.config, max_diffusion_time=0.6)

The name of a class is `ShortTime` + the exact name of the stock scheduler that it derives from. Of N trained timesteps
those up to round(N T) - 1 are left. For T < 1 it samples as the stock scheduler of a model does that was trained on
these alone: all `num_inference_steps` lie there. Sampling begins at the highest of them, from a draw of

    x_T = alpha x0 + (1 - alpha^2)^1/2 n

that an auxiliary model makes (see `diffusers_ext.bridges`). Spacing `leading`, which would begin below it, is replaced
by `trailing`. At T = 1 nothing is changed, bit for bit.

Schedulers that work in x = x0 + sigma n (Euler) have for T < 1 `init_noise_sigma` = (1 + sigma_T^2)^1/2 = 1 / alpha_T,
which takes x_T to x: a pipeline that multiplies the start by it, as those of diffusers do with `latents`, can use the
same bridge with every scheduler.

Reference: How Much is Enough? A Study on Diffusion Times in Score-based Generative Models (Franzese, Rossi, Yang,
Finamore, Rossi, Filippone, Michiardi, 2022, arXiv 2206.05173).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from ..interop import NoiseSchedule, require_vp, stock_schedule
from .derived import by_name, derive

TABLES = ("betas", "alphas", "alphas_cumprod", "alpha_t", "sigma_t", "lambda_t")
"""The stock schedulers' tables by trained timestep, which are cut at T."""


class ShortTimeScheduler(SchedulerMixin):
    """Samples on the diffusion times [0, T] alone.

    Args:
        max_diffusion_time: T, from 0 (excluded) to 1; the other arguments are the stock scheduler's.

    Raises:
        ValueError: T is out of range, or T < 1 and the schedule is not variance preserving; and in `set_timesteps`,
            if timesteps are given that begin after T.
    """

    timesteps: Any
    sigmas: Any

    def schedule_of_network(self) -> NoiseSchedule:
        """Return the schedule of the network up to T, for `diffusers_ext.noise_schedule`."""
        whole, max_diffusion_time = stock_schedule(self), self.config.max_diffusion_time
        return whole if max_diffusion_time == 1 else require_vp(whole).shortened(max_diffusion_time)

    def _shorten(self, max_diffusion_time: float) -> None:
        self.register_to_config(max_diffusion_time=max_diffusion_time)
        self._cut: dict[str, Any] = {}
        if max_diffusion_time == 1:
            return
        schedule = require_vp(self.schedule_of_network())
        n = len(schedule.sigmas)
        config = dict(self.config) | {"num_train_timesteps": n}
        if config.get("timestep_spacing") == "leading":
            config["timestep_spacing"] = "trailing"
        self._cut = {name: getattr(self, name)[:n] for name in TABLES if hasattr(self, name)}
        self._cut["_internal_dict"] = FrozenDict(config)
        self._start_scale = (1 + schedule.sigma_max**2) ** 0.5

    @contextmanager
    def _on_short_times(self) -> Iterator[None]:
        """A context in which this is the stock scheduler of a model that was trained on the timesteps up to T alone."""
        whole = {name: getattr(self, name) for name in self._cut}
        self.__dict__.update(self._cut)
        try:
            yield
        finally:
            self.__dict__.update(whole)

    def set_timesteps(self, num_inference_steps: int | None = None, *args: Any, **kwargs: Any) -> None:
        """Set the timesteps as diffusers does, on [0, T].

        Raises:
            ValueError: a grid that was given, or the configuration, goes beyond T; or as diffusers does.
        """
        with self._on_short_times():
            super().set_timesteps(num_inference_steps, *args, **kwargs)
        if self._cut:
            self._require_short_times()
        if self._cut and num_inference_steps is not None and len(self.timesteps) > num_inference_steps:
            self._drop_timestep_below_0(num_inference_steps)

    def _require_short_times(self) -> None:
        """Check the grid that diffusers has made, however it was asked for."""
        first, last = float(self.timesteps.max()), self._cut["_internal_dict"].num_train_timesteps - 1
        if not first <= last:
            raise ValueError(f"timesteps begin at {first:g}, after the last one of [0, T], {last}")
        sigmas, highest = getattr(self, "sigmas", None), (self._start_scale**2 - 1) ** 0.5
        if sigmas is not None and not float(sigmas.max()) <= highest * (1 + 1e-3):
            raise ValueError(f"the noise levels begin at {float(sigmas.max()):g}, above that of T, {highest:g}")

    def _drop_timestep_below_0(self, num_inference_steps: int) -> None:
        """Drop the timestep -1 that diffusers' `trailing` adds by rounding, for 7 steps of 600 trained ones, say."""
        self.timesteps, self.num_inference_steps = self.timesteps[:num_inference_steps], num_inference_steps
        if hasattr(self, "sigmas"):
            self.sigmas = torch.cat([self.sigmas[:num_inference_steps], self.sigmas[-1:]])

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Step as diffusers does, on [0, T]."""
        with self._on_short_times():
            return super().step(*args, **kwargs)


def _make(stock: Any) -> Any:
    kind = derive("ShortTime", ShortTimeScheduler, stock)

    def __init__(self: Any, *args: Any, max_diffusion_time: float = 1.0, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        self._shorten(max_diffusion_time)

    signature = inspect.signature(stock.__init__)
    added = inspect.Parameter("max_diffusion_time", inspect.Parameter.KEYWORD_ONLY, default=1.0, annotation="float")
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore
    kind.__init__ = __init__
    if isinstance(inspect.getattr_static(stock, "init_noise_sigma", None), property):
        kind.init_noise_sigma = property(
            lambda self: self._start_scale if self._cut else stock.init_noise_sigma.fget(self)
        )
    return kind


SHORT_TIME_SCHEDULERS: dict[str, Any] = {
    stock: _make(getattr(diffusers, stock))
    for stock in (
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    )
}
"""The short-time class of each stock scheduler, by the stock scheduler's name."""

globals().update(by_name(SHORT_TIME_SCHEDULERS))


def short_time_class(name: str) -> Any:
    """Return the short-time class of a stock scheduler, by its name; a short-time class's own name gives that class.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    stock = name.removeprefix("ShortTime")
    if stock not in SHORT_TIME_SCHEDULERS:
        raise ValueError(f"there is no short-time {stock}; there are those of {', '.join(SHORT_TIME_SCHEDULERS)}")
    return SHORT_TIME_SCHEDULERS[stock]
