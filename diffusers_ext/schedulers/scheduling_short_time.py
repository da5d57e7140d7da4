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

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from ..interop import NoiseSchedule, VPSchedule, require_vp, stock_schedule
from ..stock import VP_SCHEDULERS, require_known, swapped_in
from .derived import by_name, derive

TABLES = ("betas", "alphas", "alphas_cumprod", "alpha_t", "sigma_t", "lambda_t")
"""The stock schedulers' tables by trained timestep, which are cut at T."""


class ShortTimeScheduler(SchedulerMixin):
    """Samples on the diffusion times [0, T] alone.

    Args:
        max_diffusion_time: T, from 0 (excluded) to 1; the other arguments are the stock scheduler's.

    Raises:
        ValueError: T is out of range, or T < 1 and the schedule is not variance preserving; and in `set_timesteps`,
            if the timesteps begin after T, or, where they were not given, before it.
    """

    timesteps: Any
    sigmas: Any
    order: int
    num_inference_steps: int
    _short: VPSchedule | None = None
    _whole_config: Any = None

    def schedule_of_network(self) -> NoiseSchedule:
        """Return the schedule of the network up to T, for `diffusers_ext.noise_schedule`."""
        return stock_schedule(self) if self._short is None else self._short

    def _shorten(self, max_diffusion_time: float) -> None:
        """Cut the tables at T, once; the configuration stays that of the whole model."""
        self.register_to_config(max_diffusion_time=max_diffusion_time)
        if max_diffusion_time == 1:
            return
        self._short = require_vp(stock_schedule(self)).shortened(max_diffusion_time)
        for name in TABLES:
            if hasattr(self, name):
                setattr(self, name, getattr(self, name)[: len(self._short.sigmas)])
        self._start_scale = (1 + self._short.sigma_max**2) ** 0.5

    @contextmanager
    def _on_short_times(self) -> Iterator[None]:
        """A context in which the configuration, too, is that of a model that was trained on [0, T] alone."""
        whole = self.config
        if self._short is None:
            yield
            return
        if self._whole_config is not whole:  # pipelines change it
            spacing = {"timestep_spacing": "trailing"} if whole.get("timestep_spacing") == "leading" else {}
            self._short_config = FrozenDict({**whole, "num_train_timesteps": len(self._short.sigmas), **spacing})
            self._whole_config = whole
        self._internal_dict = self._short_config
        try:
            yield
        finally:  # what diffusers has changed meanwhile (DPMSolverSinglestep does) holds
            short = self._short_config
            changed = {name: value for name, value in self.config.items() if value is not short.get(name)}
            self._internal_dict = FrozenDict({**whole, **changed}) if changed else whole

    def set_timesteps(self, num_inference_steps: int | None = None, *args: Any, **kwargs: Any) -> None:
        """Set the timesteps as diffusers does, on [0, T].

        Raises:
            ValueError: the grid goes beyond T, or, if it was not given, does not begin there; or as diffusers does.
        """
        with self._on_short_times():
            super().set_timesteps(num_inference_steps, *args, **kwargs)
        if self._short is not None:
            self._drop_timesteps_below_0()
            whole_grid = num_inference_steps is not None and kwargs.get("strength", 1.0) == 1.0
            self._require_short_times(whole_grid)

    def _require_short_times(self, whole_grid: bool) -> None:
        """Check the grid that diffusers has made, however it was asked for.

        Args:
            whole_grid: only a number of steps was given, so that the grid must begin at T.
        """
        assert self._short is not None
        first, last = float(self.timesteps.max()), len(self._short.sigmas) - 1
        if not first <= last:
            raise ValueError(f"timesteps begin at {first:g}, after the last one of [0, T], {last}")
        sigmas, highest = getattr(self, "sigmas", None), self._short.sigma_max
        if sigmas is not None and not float(sigmas.max()) <= highest * (1 + 1e-3):
            raise ValueError(f"the noise levels begin at {float(sigmas.max()):g}, above that of T, {highest:g}")
        if whole_grid and not first >= last - 0.5:
            raise ValueError(
                f"timesteps begin at {first:g}, before the last one of [0, T], {last}, where x_T is: use "
                f"timestep_spacing='trailing', or, with original_inference_steps, one that divides {last + 1}"
            )

    def _drop_timesteps_below_0(self) -> None:
        """Drop the timestep -1 that diffusers' `trailing` adds by rounding, for 7 steps of 600 trained ones, say."""
        if (n := int((self.timesteps < 0).sum())) == 0:
            return
        if self.order != 1:
            raise ValueError(
                f"{self.num_inference_steps} steps of {len(self._short.sigmas)} trained ones are rounded to a timestep "  # type: ignore[union-attr]
                f"below 0: use another number of steps, or timestep_spacing='linspace'"
            )
        self.timesteps = self.timesteps[:-n]
        self.num_inference_steps = min(self.num_inference_steps, len(self.timesteps))
        if hasattr(self, "sigmas"):
            self.sigmas = torch.cat([self.sigmas[: len(self.timesteps)], self.sigmas[-1:]])

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
            lambda self: self._start_scale if self._short is not None else stock.init_noise_sigma.fget(self)
        )
    return kind


SHORT_TIME_SCHEDULERS: dict[str, Any] = {name: _make(stock) for name, stock in swapped_in(VP_SCHEDULERS).items()}
"""The short-time class of each stock scheduler, by the stock scheduler's name."""

globals().update(by_name(SHORT_TIME_SCHEDULERS))


def short_time_class(name: str) -> Any:
    """Return the short-time class of a stock scheduler, by its name; a short-time class's own name gives that class.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    stock = name.removeprefix("ShortTime")
    require_known(stock, "short-time", SHORT_TIME_SCHEDULERS)
    return SHORT_TIME_SCHEDULERS[stock]
