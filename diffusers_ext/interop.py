r"""From a diffusers model and its scheduler to (x, sigma), and back: the only place that knows timesteps.

A scheduler's configuration says three things about a network: the scale of its input, what its output predicts, and the
time it is given (which some pipelines change on the way, see `networks`). With x = x0 + sigma n,

    family   scheduler's sample      time given to the network                                 sigma at that time
    vp       x / (1 + sigma^2)^1/2   index in the noise table, interpolated in log sigma      ((1 - abar_t)/abar_t)^1/2
    flow     x / (1 + sigma)         N sigma/(1 + sigma), N = num_train_timesteps             t / (N - t)
    edm      x                       ln(sigma) / 4                                            exp(4 t)
    reflected  x                     (N-1) ln(sigma/sigma_min) / ln(sigma_max/sigma_min)      the inverse

(abar = `alphas_cumprod`). The last timestep of a schedule with zero terminal SNR, and time N of flow matching, are
sigma = infinity: they have no (x, sigma) and are left out. A scheduler's `shift` moves the times that a sampler
visits, not what the network means at a time, so it does not enter here.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import inf
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .networks import Network, NetworkConvention
from .noise_levels import log_linear_sigmas, log_normal_sigmas
from .process import GaussianProcess, Process, ReflectedProcess
from .randomness import randint
from .ranges import require
from .score import REFLECTED_PREDICTIONS, Denoiser, ReflectedModel, ScoreModel, preconditioning
from .stock import EDM_SCHEDULERS, FLOW_SCHEDULERS, VP_SCHEDULERS


class NoiseSchedule(ABC):
    """The noise levels and times of a network, as its scheduler's configuration says; made by `noise_schedule`.

    Args:
        prediction_type: diffusers' name, `flow_prediction` for flow matching.
        num_train_timesteps: N of the table above.
        sigma_min, sigma_max: the range that the network was trained for.

    Attributes:
        family: the row of the table above.
        process: how noise is added.
        sigma_data: standard deviation of the data, where the network's preconditioning has one (edm).
        max_diffusion_time: T in (0, 1], where the network is used on [0, T] alone (`ShortTimeScheduler`).
        coefficients: sigma -> the network's row of the table of `score`.

    Raises:
        ValueError: the table of `score` has no row for this prediction type.
    """

    family: ClassVar[str]
    process: Process = GaussianProcess()
    sigma_data: float | None = None
    max_diffusion_time: float = 1.0

    def __init__(self, prediction_type: str, num_train_timesteps: int, sigma_min: float, sigma_max: float) -> None:
        self.prediction_type, self.num_train_timesteps = prediction_type, num_train_timesteps
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.coefficients = preconditioning(prediction_type, self.sigma_data)

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """Return the time that the network is given at `sigma`, of its shape; beyond a table, that of its end."""

    def sigma(self, time: Tensor) -> Tensor:
        """Return the noise level at a (fractional) time, of its shape, floating point: the inverse of `time`."""
        return self._sigma(time if time.is_floating_point() else time.float())

    @abstractmethod
    def _sigma(self, time: Tensor) -> Tensor: ...

    def scale(self, sigma: Tensor) -> Tensor:
        """Return the scale of the scheduler's samples, which are scale x: alpha for vp, 1 - t/N for flow, else 1."""
        return torch.ones_like(sigma)

    @abstractmethod
    def draw_sigmas(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw from the usual training law, (n,): log-normal (edm), else uniform over the trained timesteps."""


class EDMSchedule(NoiseSchedule):
    """A schedule whose network takes any noise level.

    Args:
        prediction_type, num_train_timesteps, sigma_min, sigma_max, sigma_data: of `NoiseSchedule`.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max < inf, or not 0 < sigma_data < inf; or as `NoiseSchedule`.
    """

    family = "edm"

    def __init__(
        self,
        prediction_type: str,
        num_train_timesteps: int,
        sigma_min: float,
        sigma_max: float,
        sigma_data: float,
    ) -> None:
        if not 0 < sigma_min < sigma_max < inf:
            raise ValueError(f"sigma_min must be above 0 and below sigma_max, got {sigma_min} and {sigma_max}")
        require("sigma_data", sigma_data, above=0)
        self.sigma_data = sigma_data
        super().__init__(prediction_type, num_train_timesteps, sigma_min, sigma_max)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def _sigma(self, time: Tensor) -> Tensor:
        return (4 * time).exp()

    def draw_sigmas(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        return log_normal_sigmas(n, generator=generator, device=device)


class TableSchedule(NoiseSchedule):
    """A schedule whose network is trained at a table of noise levels; times between them are interpolated in log sigma.

    Args:
        sigmas: noise level of each trained timestep, increasing, float64.
        prediction_type, num_train_timesteps: of `NoiseSchedule`.

    Raises:
        ValueError: fewer than two levels, or such that are not positive, finite and increasing; or as `NoiseSchedule`.
    """

    def __init__(self, prediction_type: str, num_train_timesteps: int, sigmas: Tensor) -> None:
        increase = (sigmas[:1] > 0).all() & sigmas.isfinite().all() & (sigmas.diff() > 0).all()
        if not (len(sigmas) >= 2 and bool(increase)):
            raise ValueError(
                "the noise levels of the timesteps must be positive, finite and increasing: betas (beta_start, "
                "beta_end, trained_betas) must be above 0 and below 1, but for a last one of 1"
            )
        super().__init__(prediction_type, num_train_timesteps, sigmas[0].item(), sigmas[-1].item())
        self.sigmas = sigmas
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def time(self, sigma: Tensor) -> Tensor:
        table = self._log_sigmas(sigma)
        log_sigma = sigma.log().contiguous()
        low = (torch.searchsorted(table, log_sigma, right=True) - 1).clamp(0, len(table) - 2)
        # `take`, because `table[low]` of a `low` of shape () would wait for the device.
        fraction = (log_sigma - table.take(low)) / (table.take(low + 1) - table.take(low))
        return low + fraction.clamp(0, 1)

    def _sigma(self, time: Tensor) -> Tensor:
        table = self._log_sigmas(time)
        low = time.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table.take(low), table.take(low + 1), (time - low).clamp(0, 1)).exp()

    def draw_sigmas(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        index = randint(len(self.sigmas), (n,), generator, device=device)
        return self._log_sigmas(torch.empty(0, device=device))[index].exp()

    def _log_sigmas(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self.sigmas.log().to(like)
        return self._tables[key]


class VPSchedule(TableSchedule):
    """A variance-preserving schedule, which may be cut at T = `max_diffusion_time`; see `shortened`."""

    family = "vp"

    def scale(self, sigma: Tensor) -> Tensor:
        return self.coefficients(sigma).c_in

    def last_timestep(self, max_diffusion_time: float) -> int:
        """Return the last trained timestep of [0, T], T = `max_diffusion_time` in (0, 1]: round(N T) - 1.

        Raises:
            ValueError: T is outside (0, 1], or below half a timestep, or beyond that of this schedule.
        """
        if not 0 < max_diffusion_time <= 1 or round(self.num_train_timesteps * max_diffusion_time) < 1:
            raise ValueError(f"max_diffusion_time must be in (0, 1], and reach a timestep: got {max_diffusion_time}")
        if max_diffusion_time > self.max_diffusion_time:
            raise ValueError(f"{max_diffusion_time=} is beyond that of the scheduler, {self.max_diffusion_time}")
        return min(round(self.num_train_timesteps * max_diffusion_time), len(self.sigmas)) - 1

    def shortened(self, max_diffusion_time: float) -> VPSchedule:
        """Return this schedule on [0, T] alone. Raises as `last_timestep`."""
        sigmas = self.sigmas[: self.last_timestep(max_diffusion_time) + 1]
        short = VPSchedule(self.prediction_type, self.num_train_timesteps, sigmas)
        short.max_diffusion_time = max_diffusion_time
        return short


class FlowSchedule(TableSchedule):
    """The schedule of flow matching, with the timesteps 1 to N - 1."""

    family = "flow"

    def __init__(self, num_train_timesteps: int) -> None:
        t = torch.arange(1, num_train_timesteps, dtype=torch.float64)
        super().__init__("flow_prediction", num_train_timesteps, t / (num_train_timesteps - t))

    def time(self, sigma: Tensor) -> Tensor:
        return self.num_train_timesteps * sigma / (1 + sigma)

    def _sigma(self, time: Tensor) -> Tensor:
        return time / (self.num_train_timesteps - time)

    def scale(self, sigma: Tensor) -> Tensor:
        return self.coefficients(sigma).c_in


class ReflectedSchedule(TableSchedule):
    """The schedule of a reflected process in the box of `process`; the network predicts `epsilon` or a `point`.

    Its `coefficients` are those of epsilon: `score.reflected_eps` says what a network's output means.

    Raises:
        ValueError: the prediction type is another one, or as `TableSchedule`.
    """

    family = "reflected"

    def __init__(
        self,
        num_train_timesteps: int,
        sigma_min: float,
        sigma_max: float,
        process: ReflectedProcess,
        prediction_type: str = "epsilon",
    ) -> None:
        if prediction_type not in REFLECTED_PREDICTIONS:
            known = " or ".join(REFLECTED_PREDICTIONS)
            raise ValueError(f"the network of a reflected process predicts {known}, not {prediction_type!r}")
        super().__init__(
            "epsilon", num_train_timesteps, log_linear_sigmas(num_train_timesteps, sigma_min, sigma_max).flip(0)
        )
        self.prediction_type = prediction_type
        self.sigma_min, self.sigma_max, self.process = sigma_min, sigma_max, process  # the table's ends are rounded


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """Return a scheduler's noise schedule: what its method `schedule_of_network()` returns, or, for a stock scheduler
    of diffusers, what its configuration says.

    Raises:
        TypeError: it is no scheduler.
        ValueError: the tables of this module and of `score` do not have the scheduler, or one of its settings.
    """
    if not isinstance(scheduler, SchedulerMixin):
        raise TypeError(f"the scheduler must be an instance of a diffusers scheduler, got {scheduler!r:.80}")
    if hasattr(scheduler, "schedule_of_network"):
        return scheduler.schedule_of_network()
    return stock_schedule(scheduler)


def require_vp(schedule: NoiseSchedule) -> VPSchedule:
    """Return the schedule, after checking that it is variance-preserving.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(schedule, VPSchedule):
        raise ValueError(f"diffusion up to a time T < 1 needs a schedule of family vp, this one is {schedule.family}")
    return schedule


# What makes the noise levels and the prediction of a model: another class of scheduler must not use its own defaults.
OF_THE_MODEL = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "sigma_data"),
)


def live_config(scheduler: Any) -> dict[str, Any]:
    """Return the configuration of a scheduler as it is now, for `from_config` of any class.

    diffusers' `from_config` takes the new class's defaults for all entries that were left at their defaults once. It
    then loses what a pipeline has changed since (Stable Diffusion sets `steps_offset` and `clip_sample`), and the noise
    levels of the model where the defaults of the two classes differ (those of `HeunDiscreteScheduler` do). Here only
    the entries that still have their defaults, and are not the model's, are left to the new class.
    """
    config, defaults = dict(scheduler.config), inspect.signature(type(scheduler).__init__).parameters
    left = config.get("_use_default_values", [])
    config["_use_default_values"] = [
        name
        for name in left
        if name not in OF_THE_MODEL and name in defaults and config.get(name) == defaults[name].default
    ]
    return config


def stored_scheduler(scheduler: Any) -> dict[str, Any]:
    """Return what a fitted model stores of a scheduler: its nearest class in diffusers, and its configuration without
    the entries that diffusers adds."""
    name = next(c.__name__ for c in type(scheduler).__mro__ if hasattr(diffusers, c.__name__))
    return {"_class_name": name, **{k: v for k, v in scheduler.config.items() if not k.startswith("_")}}


def stored_schedule(stored: Mapping[str, Any]) -> NoiseSchedule:
    """Return the noise schedule of what `stored_scheduler` returned."""
    config = dict(stored)
    return noise_schedule(getattr(diffusers, config.pop("_class_name")).from_config(config))


def stock_schedule(scheduler: Any) -> NoiseSchedule:
    """Return the schedule of a stock scheduler of diffusers or a subclass, by its class's name and its configuration.

    Raises:
        ValueError: as `noise_schedule`.
    """
    config, names = scheduler.config, {cls.__name__ for cls in type(scheduler).__mro__}
    if names & EDM_SCHEDULERS:
        bounds = (config.sigma_min, config.sigma_max)
        return EDMSchedule(config.prediction_type, config.num_train_timesteps, *bounds, config.sigma_data)
    n, vp = config.get("num_train_timesteps", 1000), names & VP_SCHEDULERS
    flow = names & FLOW_SCHEDULERS or (vp and config.prediction_type == "flow_prediction")
    if vp and bool(flow) != config.get("use_flow_sigmas", False):
        raise ValueError(
            f"the settings of this {type(scheduler).__name__} contradict each other: prediction_type="
            f"{config.prediction_type!r} and use_flow_sigmas={config.get('use_flow_sigmas', 'not known to it')}; flow "
            f"matching needs flow_prediction and use_flow_sigmas=True, all else neither"
        )
    if flow and not config.get("invert_sigmas", False):
        return FlowSchedule(n)
    if not vp or config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(_unsupported(scheduler))
    abar = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
    sigmas = ((1 - abar) / abar).sqrt()
    # The last level may be infinite; for a zero terminal SNR some schedulers put a tiny abar for 0.
    last_is_infinite = config.get("rescale_betas_zero_snr", False) or bool(sigmas[-1] == inf)
    return VPSchedule(config.prediction_type, n, sigmas[:-1] if last_is_infinite else sigmas)


def scheduler_above(scheduler: Any, sigma_min: float) -> Any:
    """Return a scheduler of the same class whose lowest noise level is `sigma_min`, so that its last step ends with the
    network's x0 there: one of `sigma_min` (edm), or one with the betas of the levels above it alone (vp). The numbers
    of the timesteps of the latter are others.

    Raises:
        ValueError: it has no levels above, or it is one of flow matching or of a reflected process.
    """
    schedule = noise_schedule(scheduler)
    if not 0 < sigma_min < schedule.sigma_max:
        raise ValueError(f"sigma_min must be above 0 and below that of the scheduler's, {schedule.sigma_max:g}")
    if abs(schedule.sigma_min / sigma_min - 1) < 1e-4:
        return scheduler
    config = live_config(scheduler)
    if schedule.family == "edm":
        changed: dict[str, Any] = {"sigma_min": sigma_min}
    elif isinstance(schedule, VPSchedule) and schedule.max_diffusion_time == 1:
        sigmas = torch.cat([torch.tensor([sigma_min]).double(), schedule.sigmas[schedule.sigmas > sigma_min]])
        abar = 1 / (1 + sigmas**2)
        if len(schedule.sigmas) < schedule.num_train_timesteps:  # the last level is infinite
            abar = torch.cat([abar, torch.zeros(1).double()])
        betas = 1 - abar / torch.cat([torch.ones(1).double(), abar[:-1]])
        changed = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
        # With other spacings DDIM and DDPM step, in the end, to timestep 0 and not to x0, unless the steps divide N.
        changed |= {"timestep_spacing": "leading", "steps_offset": 0}
    else:
        raise ValueError(f"the levels of a {type(scheduler).__name__} cannot end at {sigma_min:g}")
    config["_use_default_values"] = [name for name in config["_use_default_values"] if name not in changed]
    return type(scheduler).from_config({**config, **changed})


def _unsupported(scheduler: Any) -> str:
    known = ", ".join(sorted(VP_SCHEDULERS | FLOW_SCHEDULERS | EDM_SCHEDULERS))
    return (
        f"{type(scheduler).__name__} cannot be written as x0 + sigma * noise with a known preconditioning. Supported "
        f"schedulers, and subclasses of them: {known}; not supported: EulerDiscreteScheduler with timestep_type="
        f"'continuous', flow matching with invert_sigmas=True."
    )


def score_model_from(model: Any, scheduler: Any, convention: NetworkConvention | None = None) -> ScoreModel:
    """Turn a diffusers model and its scheduler into a function of (x, sigma): a `ReflectedModel` or a `Denoiser`.

    Args, Raises: as `denoiser_from`.
    """
    schedule = noise_schedule(scheduler)
    if isinstance(schedule.process, ReflectedProcess):
        network = Network(model, schedule.num_train_timesteps, convention)
        return ReflectedModel(network, schedule.time, schedule.process, schedule.prediction_type)
    return denoiser_from(model, scheduler, convention)


def denoiser_from(model: Any, scheduler: Any, convention: NetworkConvention | None = None) -> Denoiser:
    """Turn a diffusers model and its scheduler into the denoiser D(x, sigma, **cond).

    Args:
        model: the network, wrapped (DDP, compiled, ...) or not; see `networks.Network`.
        scheduler: the stock scheduler that belongs to it, or a subclass.
        convention: what the network is told at a timestep and what its output means; by default that of its class,
            see `diffusers_ext.networks`.

    Raises:
        ValueError: the scheduler or its prediction type is not supported, or the convention of the network is not
            known; the message names those that are.
    """
    schedule = noise_schedule(scheduler)
    if isinstance(schedule.process, ReflectedProcess):
        raise ValueError("a model of a reflected process has a score and no denoiser: use score_model_from")
    network = Network(model, schedule.num_train_timesteps, convention)
    return Denoiser(network, schedule.coefficients, schedule.time)
