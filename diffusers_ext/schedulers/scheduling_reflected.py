r"""Sampling a reflected process: an SDE or ODE that never leaves the box.

The reverse process is taken in Euler steps from sigma down to sigma' = sigma_next, in one of three variables r(sigma),

    step_variable    r           v = 2 sigma (dsigma/dr) (r - r')
    log_sigma        ln sigma    2 sigma^2 ln(sigma/sigma')            g^2 h of the paper
    sigma            sigma       2 sigma (sigma - sigma')
    sigma_squared    sigma^2     sigma^2 - sigma'^2

and with eps = -sigma score, F = (dsigma/dr) eps = dx/dr the slope of the probability flow and C the boundary rule,

    sde     x <- C( x - (v/sigma) eps + v^1/2 z ),   z ~ N(0, I)       reflected Euler-Maruyama
    ode     x <- C( x - (v/2 sigma) eps ) = C( x + (r' - r) F )        order 1
    heun    x <- C( x + (r' - r) (F + F') / 2 )                        order 2; F' at the end of the ode step

The true score has no flux through the faces, so the flow needs no boundary term. A learned score has a little flux, so
C is applied all the same: it folds x back (`reflect`) or clamps it (`project`: the projection scheme of the same
process, which converges slowly).

**A network that predicts a point** P (`prediction_type="point"`, see `score`) keeps it for the length of a step, whose
remaining equation is that of the kernel p(x | P) alone:

    sde     x <- a draw of p(x_next | x, x0 = P)                       exact for this P
    ode     x <- the probability flow of p(. | P), from sigma to sigma'

and the last step returns P. There is one evaluation a step; `step_variable` and `boundary` play no part; `heun` is that
above. `ReflectedPipeline` guides by a combination of points of the box, which is clamped again.

The chain starts at sigma_max, where a reflected process is uniform, and ends at sigma_min: there is no denoising step
to 0, because Tweedie's formula is false in a box. (A point is another thing: that of the exact score is the mean of the
data near x where sigma is small.)

**Models trained the ordinary way** (with Gaussian noise) run, too: with the `beta_*` settings of their scheduler in the
configuration, as in `ReflectedScheduler.from_config(pipe.scheduler.config)`, the network gets the scale and time that
it was trained with. `ReflectedPipeline(**pipe.components | {"scheduler": ...})` starts the chain from the uniform law.
The samples stay in the box, and are biased even where the network is exact: its score is that of another process.

Reference: Reflected Diffusion Models (Lou, Ermon, 2023, arXiv 2304.04740).
"""

from __future__ import annotations

import inspect
from math import inf
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..interop import NoiseSchedule, ReflectedSchedule, noise_schedule
from ..noise_levels import karras_sigmas, log_linear_sigmas
from ..process import ReflectedProcess, align
from ..ranges import require
from ..score import reflected_eps, reflected_point

SPACINGS = {"log_linear": log_linear_sigmas, "karras": karras_sigmas}
ALGORITHMS = ("sde", "ode", "heun")
# r(sigma) and dsigma/dr
STEP_VARIABLES = {
    "log_sigma": (torch.log, lambda sigma: sigma),
    "sigma": (lambda sigma: sigma, torch.ones_like),
    "sigma_squared": (torch.square, lambda sigma: 1 / (2 * sigma)),
}
# These settings of a stock scheduler say something about its network; the others are about sampling.
_OF_THE_NETWORK = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "prediction_type"),
)
# Settings that mean another kind of network, unless they have this value.
_UNSUPPORTED = {"timestep_type": "discrete", "snr_shift_scale": 1.0}


def _stock(network: dict[str, Any]) -> DDPMScheduler:
    """Return the stock scheduler of a variance-preserving network."""
    try:
        return DDPMScheduler.from_config(network)
    except NotImplementedError as error:
        raise ValueError(f"diffusers knows no beta_schedule {network.get('beta_schedule')!r}") from error


def _trained(network: dict[str, Any]) -> NoiseSchedule:
    """Return the schedule of a variance-preserving network, or of one of flow matching."""
    if network.get("prediction_type") == "flow_prediction":
        return noise_schedule(FlowMatchEulerDiscreteScheduler(network["num_train_timesteps"]))
    return noise_schedule(_stock(network))


class ReflectedScheduler(SchedulerMixin, ConfigMixin):
    """Samples a reflected process; see the module's docstring. Noise levels and the box are in the units of the data.

    Args:
        num_train_timesteps: N, the size of the table of noise levels; the network is given 0 (sigma_min) to N - 1
            (sigma_max), fractions included, linear in log sigma.
        low, high: the box.
        sigma_min, sigma_max: the end and the start of the chain. The paper's are 0.01 and 5 times the width of the box.
        algorithm_type: `sde`, `ode` (order 1) or `heun` (order 2, two evaluations a step).
        step_variable: `log_sigma`, `sigma` or `sigma_squared`: the variance rule of the SDE, and the variable in which
            the ODE's step is straight.
        boundary: `reflect` or `project`.
        prediction_type: `epsilon` := -sigma score, or `point`; models trained the ordinary way may have another.
        sigma_spacing: `log_linear` or `karras`.
        beta_schedule, beta_start, beta_end, trained_betas, rescale_betas_zero_snr: of a variance-preserving model
            trained the ordinary way; by default the model is one of the reflected process.

    Raises:
        ValueError: a setting is unknown or contradicts another; the message says which.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        low: float = -1.0,
        high: float = 1.0,
        sigma_min: float = 0.02,
        sigma_max: float = 10.0,
        algorithm_type: str = "sde",
        step_variable: str = "log_sigma",
        boundary: str = "reflect",
        prediction_type: str = "epsilon",
        sigma_spacing: str = "log_linear",
        beta_schedule: str | None = None,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        choices = {
            "algorithm_type": (algorithm_type, ALGORITHMS),
            "step_variable": (step_variable, STEP_VARIABLES),
            "boundary": (boundary, ("reflect", "project")),
            "sigma_spacing": (sigma_spacing, SPACINGS),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
        if not 0 < sigma_min < sigma_max < inf:
            raise ValueError(f"0 < sigma_min < sigma_max < inf is needed, got {sigma_min} and {sigma_max}")
        require("num_train_timesteps", num_train_timesteps, at_least=2)
        self.process = ReflectedProcess(low, high)
        if beta_schedule is not None or trained_betas is not None:
            network = {name: self.config[name] for name in _OF_THE_NETWORK}
            self.alphas_cumprod, self.schedule = _stock(network).alphas_cumprod, _trained(network)
        else:
            self.schedule = ReflectedSchedule(num_train_timesteps, sigma_min, sigma_max, self.process, prediction_type)
        rounding = 1 + 1e-6
        if sigma_min * rounding < self.schedule.sigma_min or sigma_max > self.schedule.sigma_max * rounding:
            raise ValueError(
                f"sigma_min {sigma_min} and sigma_max {sigma_max} leave the levels that the network was trained for, "
                f"{self.schedule.sigma_min:.4g} to {self.schedule.sigma_max:.4g}"
            )
        self.init_noise_sigma = sigma_max
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps: int | None = None

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Make a scheduler from a configuration of this class, or of a stock scheduler.

        Of a stock scheduler's configuration it takes the settings that say something about the network. The default
        sigma_min and sigma_max are then limited to the noise levels of its training.

        Raises:
            ValueError: the network of that scheduler is not variance-preserving.
        """
        own = inspect.signature(cls.__init__).parameters
        # A scheduler's `config` does not hold the name of its class.
        if config is not None and "step_variable" not in config and config.keys() - own.keys():
            if unknown := [name for name, usual in _UNSUPPORTED.items() if config.get(name, usual) != usual]:
                raise ValueError(f"a network with {unknown[0]}={config[unknown[0]]!r} cannot be run by {cls.__name__}")
            config = {name: config[name] for name in _OF_THE_NETWORK if config.get(name) is not None}
            if not config.keys() & {"beta_schedule", "trained_betas"}:
                raise ValueError(f"{cls.__name__} cannot run a network whose scheduler has no table of betas")
            trained = _trained(config)
            config["sigma_min"] = max(own["sigma_min"].default, trained.sigma_min)
            config["sigma_max"] = min(own["sigma_max"].default, trained.sigma_max)
        return super().from_config(config, **kwargs)

    def schedule_of_network(self) -> NoiseSchedule:
        """Return the schedule of the network, for `noise_schedule`: reflected, or that of the ordinary model."""
        return self.schedule

    @property
    def order(self) -> int:
        """The number of evaluations of the network in a step."""
        return 2 if self.config.algorithm_type == "heun" else 1

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Divide the way from sigma_max to sigma_min into `num_inference_steps` steps; `sigmas` has one entry more.

        Raises:
            ValueError: it is below 1 or above `num_train_timesteps`.
        """
        require("num_inference_steps", num_inference_steps, at_least=1, at_most=len(self))
        config = self.config
        sigmas = SPACINGS[config.sigma_spacing](num_inference_steps + 1, config.sigma_min, config.sigma_max)
        times = self.schedule.time(sigmas).float()
        visited = torch.stack([times[:-1], times[1:]], 1).flatten() if self.order == 2 else times[:-1]
        self.num_inference_steps = num_inference_steps
        self.sigmas, self.timesteps, self._times = (v.to(device, torch.float32) for v in (sigmas, visited, times))
        self._on_grid = {time: i for i, time in enumerate(times.tolist())}
        self._first: tuple[Tensor, Tensor] | None = None  # x and F of Heun's first stage

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Return the network's input: the sample in the box, and scaled for a model trained the ordinary way."""
        time = torch.as_tensor(timestep, device=sample.device)
        return self.process.constrain(sample) * self.schedule.scale(self.schedule.sigma(time)).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw x at `timesteps`, (B,): original_samples + sigma noise, folded into the box; `noise` is N(0, I).

        Raises:
            ValueError: data lie outside the box, or timesteps outside the table. On an accelerator, which would have to
                wait, this is not checked.
        """
        if timesteps.device.type == "cpu" and not 0 <= timesteps.min() <= timesteps.max() <= len(self) - 1:
            raise ValueError(f"timesteps must be from 0 to {len(self) - 1}, got {timesteps.tolist()}")
        if original_samples.device.type == "cpu":
            self.process.require_inside(original_samples, "original_samples")
        sigma = self.schedule.sigma(timesteps.to(original_samples.device)).expand(len(original_samples))
        return self.process.constrain(original_samples + align(sigma, original_samples) * noise)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take `sample` from `timestep` to the next noise level of the grid.

        Args:
            model_output: the network's output, (B, ...).
            timestep: one of `timesteps`, a number or a tensor.
            sample: (B, ...); a point outside the box is folded into it first.
            generator: the source of the noise of `sde`, or a list with one for each sample.

        Returns:
            The next sample, in the dtype of `sample`; the step is computed in float32 at least. The last step of `ode`
            and `sde` returns the point, where the network predicts one.

        Raises:
            ValueError: the timestep is not one of the grid (this is not checked on an accelerator), or is its end.
        """
        x = self.process.constrain(sample.to(torch.promote_types(sample.dtype, torch.float32)))
        index = self._index(timestep, x.device)
        sigmas = self.sigmas.to(x.device)
        sigma = sigmas[index].to(x.dtype)
        if self.schedule.prediction_type == "point" and self.order == 1:
            x = self._with_point(
                self._output(model_output, x), x, sigma[0], sigmas[index + 1][0].to(x.dtype), generator
            )
            return self._result(x, sample.dtype, return_dict)
        eps = self.eps(model_output, x, sigma)
        r, dsigma_dr = STEP_VARIABLES[self.config.step_variable]
        slope = dsigma_dr(sigma) * eps
        if self._first is not None:
            x, first = self._first
            previous = sigmas[index - 1].to(x.dtype)
            x, self._first = x + (r(sigma) - r(previous)) * (first + slope) / 2, None
            return self._result(x, sample.dtype, return_dict)
        h = r(sigmas[index + 1].to(x.dtype)) - r(sigma)
        if self.config.algorithm_type == "sde":
            v = -2 * sigma * dsigma_dr(sigma) * h
            z = randn_tensor(x.shape, generator, x.device, x.dtype)
            return self._result(x - v / sigma * eps + v.sqrt() * z, sample.dtype, return_dict)
        if self.config.algorithm_type == "heun":
            self._first = x, slope
        return self._result(x + h * slope, sample.dtype, return_dict)

    def _result(self, x: Tensor, dtype: torch.dtype, return_dict: bool) -> SchedulerOutput | tuple[Tensor]:
        low, high = self.process.low, self.process.high
        x = (self.process.constrain(x) if self.config.boundary == "reflect" else x.clamp(low, high)).to(dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _with_point(self, output: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, generator: Any) -> Tensor:
        """Make a step with the point that the network predicts; the last one ends there."""
        point = reflected_point(self.process, output, x, sigma)
        if self.config.algorithm_type == "ode":
            x = self.process.flow(x, point, sigma, sigma_next)
        else:
            noise, other = (randn_tensor(x.shape, generator, x.device, x.dtype) for _ in range(2))
            x = self.process.posterior(x, point, sigma, sigma_next, noise, torch.special.ndtr(other))
        return torch.where(sigma_next <= self.sigmas[-1].to(sigma_next), point, x)

    def eps(self, model_output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return eps = -sigma score, (B, ...), from the network's output at x, without its variance channels; `sigma`
        has shape () or (1,)."""
        output, schedule = self._output(model_output, x), self.schedule
        if isinstance(schedule, ReflectedSchedule):
            return reflected_eps(self.process, schedule.prediction_type, output, x, sigma.reshape(()))
        _, c_skip, c_out = schedule.coefficients(sigma)
        return ((1 - c_skip) * x - c_out * output) / sigma

    @staticmethod
    def _output(model_output: Tensor, x: Tensor) -> Tensor:
        return model_output[:, : x.shape[1]].to(x.dtype)

    def _index(self, timestep: Tensor | float, device: torch.device) -> Tensor:
        """Return the index of a timestep on the grid, (1,), on the device and without a wait for it."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return (self._times - timestep).abs().argmin().reshape(1)
        index = self._on_grid.get(float(timestep))
        if index is None or (index == len(self._times) - 1 and self._first is None):
            raise ValueError(
                f"timestep {float(timestep):g} is not one of the {len(self.timesteps)} from {self.timesteps[0]:g} to "
                f"{self.timesteps[-1]:g} that set_timesteps has laid: take it from `timesteps`"
            )
        return torch.full((1,), index, device=device)
