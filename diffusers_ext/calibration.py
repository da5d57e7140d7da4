r"""The mean error of a pretrained model, measured once, to be subtracted whenever it is used.

For Gaussian noise the score has mean 0 at every noise level: E eps(x, sigma) = E[n] = 0 for x = x0 + sigma n, where
eps = (x - D) / sigma and D is the denoiser. The mean of a trained network's eps is not 0. With

    o(sigma) = E eps(x, sigma),        the loss of eps - o is smaller by |o|^2,

so the likelihood bound rises by int |o|^2 dln(sigma) nats. Per condition y the same holds over q(x | y). Offsets are
kept and interpolated as eps, linearly in ln sigma, and are converted to what the network predicts, F with D = c_skip x
+ c_out F: its offset is -sigma o / c_out. Guidance is linear, so it has the offset o_u + guidance_scale (o_c - o_u).

**Estimate.** A plain average of eps over m samples has the error E|o^ - o|^2 = tr(Cov eps) / m, about d / m, which can
be far above |o|^2: it adds a pattern of noise to every step. The average of eps - c n has the same mean, because E[n] =
0, with c by regression, and a far smaller variance where noise is strong (where D is nearly constant). Each sample is
used with n and -n (antithetic), which removes all that is linear in n. What remains is estimated,

    noise_floor = E|o^ - o|^2,        squared_norm = |o^|^2 - noise_floor,

the latter without bias: o^ is scaled by squared_norm / |o^|^2 (James, Stein). Where few directions dominate the noise,
that alone leaves a remainder half of the time, so it is scaled by 0 unless it passes a test. Without a mean error the
sum of each of 16 groups of samples has either sign with the same probability, whatever its covariance: o^ is kept where
at most a share `significance` of the 2^15 ways to choose the signs makes |o^|^2 as large as it is.

**Other sizes.** The mean P o of o over the positions (the pixels of an image), one number for each channel, is the mean
error of samples of every size, if what the model does wrong is not tied to a place. It keeps the share |P o|^2 / |o|^2,
and its noise is smaller by far: where it keeps nearly all, it is the better table at the measured size, too. Both are
measured at once, and each has a noise floor, a test and a factor of its own.

Shapes: o is (rows, *shape) at each level, with one row for each condition: of all data, or of each class, and one more
of the unconditional model where it is used for guidance. `shape` is (C, H, W) of images, (C, F, H, W) of videos,
(tokens, C) of packed latents. P o has length 1 in place of the positions.

This does not hold for a reflected process, whose score has another mean.

References: On Calibrating Diffusion Probabilistic Models (Pang, Lu, Du, Lin, Yan, Deng, 2023, arXiv 2302.10688);
everything under "Estimate" is ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import inf, log, prod
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import logging
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .interop import NoiseSchedule, VPSchedule, stored_schedule
from .networks import NetworkConvention, convention_of, unwrap
from .process import GaussianProcess
from .ranges import require
from .weights import VALUES, other_weights

logger = logging.get_logger(__name__)

ALL, CONDITIONAL, UNCONDITIONAL = "all", "conditional", "unconditional"

PER_POSITION, PER_CHANNEL = "position", "channel"

_HANDLE = "_mean_error_hook"


def position_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the axes of the positions in a sample of this shape, without the batch dimension."""
    return (0,) if len(shape) == 2 else tuple(range(1, len(shape)))


def per_channel_shape(shape: Sequence[int]) -> list[int]:
    """Return the shape of the mean over positions."""
    return [1 if axis in position_axes(shape) else length for axis, length in enumerate(shape)]


class Calibration(ModelMixin, ConfigMixin):
    """The offsets of one model by noise level and condition; `estimate_calibration` makes it.

    Args:
        shape: the shape of the network's input without the batch dimension, (C, H, W) for images.
        sigmas: the noise levels, increasing.
        rows: the conditions: `("all",)`; `("conditional", "unconditional")`, the former averaged over the conditions;
            or the classes as `"0"`, `"1"`, ..., and perhaps `"unconditional"`.
        scheduler: class name and configuration of the scheduler that belongs to the model.
        null_class: the class label that stands for "no class", where there is one.
        measured_on: a note for people on how it was measured: model, data, seed, settings.
        guidance_scale: that of the scheduler beside which the tables are saved.
        per: which table is used at the measured size: `position`, or `channel`, the mean over positions.
        has_channels: whether the mean over positions was measured, too; other sizes need it.
        sampled_weights: the numbers of parameters in the two samples of the network's weights (`weights`).

    Attributes:
        offsets: o^ in eps, (levels, rows, *shape).
        shrinkage: the factors of the offsets when they are used, (levels, rows), from 0 to 1.
        noise_floor, squared_norm: E|o^ - o|^2 and the estimate of |o|^2 without bias, (levels, rows).
        channel_offsets, channel_shrinkage, channel_noise_floor, channel_squared_norm: the same of P o, the squares
            summed over all positions.
        num_samples: the number of samples of each offset, (levels, rows).
        weights_sample, lora_sample: samples of the weights that this was measured on, where they were taken.

    Raises:
        ValueError: sigmas are not at least two, positive and increasing, or `per` is unknown or was not measured.
    """

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        sigmas: Sequence[float],
        rows: Sequence[str] = (ALL,),
        scheduler: Mapping[str, Any] | None = None,
        null_class: int | None = None,
        measured_on: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        per: str = PER_POSITION,
        has_channels: bool = False,
        sampled_weights: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if per not in (PER_POSITION, PER_CHANNEL) or (per == PER_CHANNEL and not has_channels):
            raise ValueError(f"per={per!r} is no table of those that were measured")
        if len(sigmas) < 2 or not (all(a < b for a, b in pairwise(sigmas)) and sigmas[0] > 0 and sigmas[-1] < inf):
            raise ValueError(f"sigmas must be at least two, positive and increasing, got {sigmas}")
        table = (len(sigmas), len(rows))
        for kind, values in (("", shape), ("channel_", per_channel_shape(shape)))[: 1 + has_channels]:
            self.register_buffer(f"{kind}offsets", torch.zeros(*table, *values))
            for name in ("shrinkage", "noise_floor", "squared_norm"):
                self.register_buffer(f"{kind}{name}", torch.zeros(table))
        self.register_buffer("num_samples", torch.zeros(table, dtype=torch.long))
        for name, n in zip(("weights_sample", "lora_sample"), sampled_weights or (0, 0), strict=True):
            self.register_buffer(name, torch.zeros(n, VALUES), persistent=n > 0)
        self._schedule: NoiseSchedule | None = None
        self._levels: dict[torch.device, Tensor] = {}

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise levels and the prediction of the model that this was made for.

        Raises:
            ValueError: it was made without a scheduler, or with that of a reflected process.
        """
        if self._schedule is None:
            if self.config.scheduler is None:
                raise ValueError("this calibration does not say which scheduler belongs to its model")
            self._schedule = stored_schedule(self.config.scheduler)
            require_gaussian(self._schedule)
        return self._schedule

    def table(self, name: str, per: str | None = None) -> Tensor:
        """Return one of the attributes `offsets`, `shrinkage`, `noise_floor`, `squared_norm`.

        Args:
            per: of which table; by default the one that is used at the measured size.
        """
        return getattr(self, name if (per or self.config.per) == PER_POSITION else f"channel_{name}")

    @property
    def std_error(self) -> Tensor:
        """The standard error of the offsets in use, (levels, rows), in eps: root mean square over coordinates."""
        return (self.table("noise_floor").float() / prod(self.config.shape)).sqrt()

    def per_for(self, shape: Sequence[int]) -> str:
        """Return which table is used for samples of a shape, without the batch dimension: `position` or `channel`.

        Raises:
            ValueError: the positions are others than those that were measured, and there are no offsets per channel.
        """
        own, axes = self.config.shape, position_axes(self.config.shape)
        alike = len(shape) == len(own)
        if alike and self.config.per == PER_POSITION and all(shape[axis] == own[axis] for axis in axes):
            return PER_POSITION
        if not (alike and self.config.has_channels):
            raise ValueError(
                f"the calibration is of outputs of shape {tuple(own)}, this one has {tuple(shape)}"
                + (": measure it again, to have the offsets per channel that other sizes need" if alike else "")
            )
        return PER_CHANNEL

    def check(self, schedule: NoiseSchedule, shape: Sequence[int] | None = None) -> None:
        """Check that this was made for a model with such a schedule, and samples of such a shape.

        Raises:
            ValueError: something differs, which the message names.
        """
        require_gaussian(schedule)
        own, differ = self.schedule, []
        for name in ("family", "prediction_type", "num_train_timesteps", "sigma_data"):
            if getattr(own, name) != getattr(schedule, name):
                differ.append(f"{name} is {getattr(schedule, name)!r}, it was measured with {getattr(own, name)!r}")
        same_steps = own.num_train_timesteps == schedule.num_train_timesteps
        if isinstance(own, VPSchedule) and isinstance(schedule, VPSchedule) and same_steps:
            n = min(len(own.sigmas), len(schedule.sigmas))
            if own.max_diffusion_time < schedule.max_diffusion_time:
                differ.append(f"it was measured up to the diffusion time {own.max_diffusion_time} only")
            elif own.max_diffusion_time == schedule.max_diffusion_time and len(own.sigmas) != n:
                differ.append("the noise schedule (zero terminal SNR) is another one")
            if not torch.allclose(own.sigmas[:n], schedule.sigmas[:n], rtol=1e-4):
                differ.append("the noise schedule (betas) is another one")
        if shape is not None and per_channel_shape(shape) != per_channel_shape(self.config.shape):
            differ.append(f"samples have the shape {tuple(shape)}, it was measured with {tuple(self.config.shape)}")
        elif shape is not None:
            self.per_for(shape)
        if differ:
            raise ValueError(f"this calibration belongs to another model or setting: {'; '.join(differ)}")

    def warn_of_other_weights(self, model: Any) -> None:
        """Log a warning if a network has other weights than that on which this was measured, or another LoRA."""
        if difference := other_weights(model, self.weights_sample.cpu(), self.lora_sample.cpu()):
            logger.warning(
                f"this calibration was measured on other weights: {difference}. A changed model has a mean error "
                f"of its own: measure it"
            )

    def guidance_weights(self, guidance_scale: float) -> Tensor:
        """Return the weights of the rows, (rows,), in the output that guidance combines.

        Raises:
            ValueError: the scale is not finite; guidance needs a conditional and an unconditional row; or the rows are
                those of classes, which a sampler does not know (`calibrate_denoiser` knows them).
        """
        require("guidance_scale", guidance_scale)
        rows = tuple(self.config.rows)
        if rows == (ALL,) and guidance_scale == 1:
            return torch.ones(1)
        if rows == (CONDITIONAL, UNCONDITIONAL):
            return torch.tensor([guidance_scale, 1 - guidance_scale])
        raise ValueError(
            f"guidance_scale={guidance_scale} needs the rows ({CONDITIONAL}, {UNCONDITIONAL}), and the table has "
            f"{rows}: measure both (calibrate.py: --caption_column, for models of prompts), or, for tables by class, "
            f"use calibrate_denoiser"
        )

    def row_weights(self, n: int, class_labels: Tensor | None = None, unconditional: Tensor | None = None) -> Tensor:
        """Return the row of each of n samples, one-hot, (n, rows).

        Args:
            class_labels: (n,), for rows of classes, and for the null class.
            unconditional: (n,) booleans, which samples are unconditional, if the labels do not say it.

        Raises:
            ValueError: the rows are classes, and there are no labels.
        """
        rows, null_class = tuple(self.config.rows), self.config.null_class
        row = torch.zeros(n, dtype=torch.long, device=self.offsets.device)
        if rows not in ((ALL,), (CONDITIONAL, UNCONDITIONAL)):
            if class_labels is None:
                raise ValueError(f"the calibration has a row for each class, {rows}: call the model with class_labels")
            row = class_labels
        if unconditional is None and null_class is not None and class_labels is not None:
            unconditional = class_labels == null_class
        if unconditional is not None and UNCONDITIONAL in rows:
            row = torch.where(unconditional, len(rows) - 1, row)
        return torch.nn.functional.one_hot(row, len(rows)).float()

    def offset(self, sigma: Tensor, weights: Tensor, per: str | None = None) -> Tensor:
        """Return the offset of the network's raw output, (B, *shape), which is to be subtracted from it.

        Args:
            sigma: (B,); beyond the levels of the table the offset is that of its end.
            weights: the weights of the rows, (rows,) or (B, rows).
            per: the table, see `per_for`; by default that of the measured size. Per channel, the offset has length 1
                in place of the positions.
        """
        offsets = self.table("offsets", per)
        (n_levels, n_rows), shape = offsets.shape[:2], offsets.shape[2:]
        device = offsets.device
        if device not in self._levels:
            self._levels[device] = torch.tensor(self.config.sigmas, dtype=torch.float32, device=device)
        levels = self._levels[device]
        sigma = sigma.to(levels).clamp(levels[0], levels[-1])
        low = (torch.searchsorted(levels, sigma, right=True) - 1).clamp(0, n_levels - 2)
        fraction = (sigma / levels[low]).log() / (levels[low + 1] / levels[low]).log()
        _, _, c_out = self.schedule.coefficients(sigma)
        # A sum over the two ends and the rows: (B, 2, rows) entries of the table, each with its share.
        ends = torch.stack([low, low + 1], 1)
        shares = torch.stack([1 - fraction, fraction], 1) * (-sigma / c_out)[:, None]
        shrinkage = self.table("shrinkage", per)[ends].float()
        shares = shares[..., None] * weights.to(levels).expand(len(sigma), n_rows)[:, None] * shrinkage
        entries = ends[..., None] * n_rows + torch.arange(n_rows, device=device)
        table = offsets.float().reshape(n_levels * n_rows, -1)
        total = torch.nn.functional.embedding_bag(
            entries.flatten(1), table, per_sample_weights=shares.flatten(1), mode="sum"
        )
        return total.reshape(-1, *shape)

    def likelihood_gain(self, per: str | None = None) -> Tensor:
        """Return by how much subtracting o raises the likelihood bound, (rows,), in bits per dimension.

        It is int |o|^2 dln(sigma), computed from `squared_norm`, without bias (and so perhaps negative).

        Args:
            per: the table; by default that of the measured size.
        """
        squared_norm = self.table("squared_norm", per).float()
        log_sigmas = torch.tensor(self.config.sigmas, device=squared_norm.device).log()
        return torch.trapezoid(squared_norm, log_sigmas, dim=0) / (prod(self.config.shape) * log(2))

    def kept_per_channel(self) -> Tensor:
        """Return int |P o|^2 / int |o|^2 over ln(sigma), (rows,): the share that offsets per channel keep of the whole,
        from 0 to 1; NaN where no |o|^2 was found."""
        whole, kept = self.likelihood_gain(PER_POSITION), self.likelihood_gain(PER_CHANNEL)
        return torch.where(whole > 0, (kept / whole).clamp(0, 1), torch.nan)


def require_gaussian(schedule: NoiseSchedule) -> None:
    """Refuse the schedule of a reflected process.

    Raises:
        ValueError: it is one.
    """
    if not isinstance(schedule.process, GaussianProcess):
        raise ValueError(
            "the score of a reflected process has the mean p(high) - p(low) in every coordinate and not 0: there is no "
            "mean error to subtract"
        )


def subtract(output: Tensor, offset: Tensor) -> Tensor:
    """Return `output` - `offset`; a network's variance channels, which come after the others, stay as they are.

    Raises:
        ValueError: the shapes do not fit.
    """
    if output.shape[1:] == offset.shape[1:] or _fits(offset.shape[1:], output.shape[1:]):
        return output - offset.to(output)
    channels = offset.shape[1]
    first, rest = output[:, :channels], output[:, channels:]
    if output.shape[1] != 2 * channels or not _fits(offset.shape[1:], first.shape[1:]):
        raise ValueError(
            f"the calibration is of outputs of shape {tuple(offset.shape[1:])}, this one has {tuple(output.shape[1:])}"
        )
    return torch.cat([first - offset.to(output), rest], dim=1)


def _fits(offset: Sequence[int], output: Sequence[int]) -> bool:
    """Return whether an offset is that of an output, or one for each of its channels."""
    return list(offset) == list(output) or list(offset) == per_channel_shape(output)


def calibrate_denoiser(
    model: Any,
    calibration: Calibration,
    *,
    guidance: str | None = None,
    is_guided: Callable[[], bool] | None = None,
    convention: NetworkConvention | None = None,
) -> RemovableHandle:
    """Subtract the offset from every output of a network, by a forward hook.

    This is exact whatever the sampler does with the output, and is lost when the model is saved. Another call replaces
    the first.

    Args:
        model: a diffusers network, called as (sample, timestep, ...); wrapped or not.
        calibration: moved to the device of the model's output.
        guidance: `first_half` if the first half of each batch is unconditional, as in the text pipelines of diffusers
            with guidance; `None` if the class labels say it, or there is no guidance.
        is_guided: asked at each call whether guidance is on; by default it always is.
        convention: as for `denoiser_from`.

    Returns:
        A handle; `handle.remove()` undoes it.

    Raises:
        ValueError: `guidance` is unknown, or the table has no rows for it, or the convention of the network is not
            known; and in a call, where shapes do not fit.
    """
    rows = tuple(calibration.config.rows)
    if guidance not in (None, "first_half") or (guidance is not None and UNCONDITIONAL not in rows):
        raise ValueError(f"guidance={guidance!r} must be None, or 'first_half' with a row {UNCONDITIONAL!r} in {rows}")
    network = unwrap(model)
    signature = inspect.signature(network.forward)
    means, n_timesteps = convention or convention_of(network), calibration.schedule.num_train_timesteps

    def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        raw = output[0] if isinstance(output, tuple) else output.sample
        n, device = len(raw), raw.device
        calibration.to(device)
        time = torch.as_tensor(given["timestep"], dtype=torch.float32, device=device).expand(n)
        by_halves = guidance == "first_half" and (is_guided is None or is_guided())
        halves = torch.arange(n, device=device) < n // 2 if by_halves else None
        weights = calibration.row_weights(n, given.get("class_labels"), halves)
        sigma = calibration.schedule.sigma(means.timestep(time, n_timesteps))
        raw = subtract(raw, means.sign * calibration.offset(sigma, weights, calibration.per_for(raw.shape[1:])))
        if isinstance(output, tuple):
            return (raw, *output[1:])
        output.sample = raw
        return output

    calibration.warn_of_other_weights(network)
    stop_calibrating(network)
    handle = network.register_forward_hook(hook, with_kwargs=True)
    setattr(network, _HANDLE, handle)
    return handle


def stop_calibrating(model: Any) -> None:
    """Undo `calibrate_denoiser`, if it was called."""
    handle = getattr(unwrap(model), _HANDLE, None)
    if handle is not None:
        handle.remove()
