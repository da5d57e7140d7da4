r"""Measure the mean error of a model; `diffusers_ext.calibration` says what is measured, and why.

One pass over the data serves all noise levels: every batch is noised to every level that still needs samples. The
values e = eps - c n of one level and row are added up in GROUPS interleaved groups. Without a mean error each sum has
either sign with the same probability (exactly so where it is Gaussian, as it is for many samples), so

    |s_1 V_1 + ... + s_16 V_16|^2,        V_g the sums, s_g = 1 or -1,

has one law for all choices of signs s: the share of them that make it as large as s = 1 does is at most p with
probability p. No approximation of the law of |o^|^2 enters, so a single direction may dominate the noise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .calibration import (
    ALL,
    CONDITIONAL,
    PER_CHANNEL,
    PER_POSITION,
    UNCONDITIONAL,
    Calibration,
    per_channel_shape,
    position_axes,
    require_gaussian,
)
from .conditions import each_tensor, for_each, overlaid
from .files import replacing
from .interop import NoiseSchedule, denoiser_from, noise_schedule, stored_scheduler
from .networks import FRAMES_FIRST, NetworkConvention, unwrap
from .noise_levels import log_linear_sigmas
from .progress import progress_bar
from .randomness import RULE, Seeds, Stream, randn_like
from .ranges import require
from .score import Denoiser
from .weights import sample_of

MOST = 0.9
"""Offsets per channel are used by default where they keep at least this share of |o|^2."""

GROUPS = 16
MIN_P = 2.0 ** (1 - GROUPS)
"""The smallest p-value that there can be: of all signs, only s = 1 and s = -1 make the sum as large."""


@dataclass
class Sums:
    """Sums over the values, with the leading dimensions (levels, rows, GROUPS), or (levels, rows)."""

    values: Tensor
    """Sum of e, (levels, rows, GROUPS, *shape)."""
    counts: Tensor
    """Number of samples, (levels, rows, GROUPS)."""
    squares: Tensor
    """Sum of |e|^2, (levels, rows)."""
    channel_squares: Tensor
    """Sum of |P e|^2, P the mean over positions, (levels, rows)."""
    slopes: Tensor
    """The coefficient c of each level, (levels,); NaN before it is known."""
    batches: Tensor
    """Number of batches that were added, ()."""

    @classmethod
    def zeros(cls, levels: int, rows: int, shape: Iterable[int], device: torch.device) -> Sums:
        counted = torch.zeros(levels, rows, GROUPS, device=device, dtype=torch.float64)
        values = torch.zeros(levels, rows, GROUPS, *shape, device=device)
        squares, slopes = counted[..., 0].clone(), torch.full((levels,), torch.nan, device=device)
        return cls(values, counted, squares, squares.clone(), slopes, torch.zeros((), dtype=torch.long))

    def add(self, level: int, rows: Tensor, e: Tensor) -> None:
        """Add values e (B, *shape) of the rows (B,); the samples of a row go to its groups in turn."""
        e = e.to(self.values.dtype)
        one_hot = torch.nn.functional.one_hot(rows, self.squares.shape[1])
        number = self.counts[level].sum(1).long() + one_hot.cumsum(0) - 1
        cell = rows * GROUPS + number.gather(1, rows[:, None]).squeeze(1) % GROUPS
        self.values[level].flatten(0, 1).index_add_(0, cell, e)
        self.counts[level].flatten().index_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))
        for squares, value in ((self.squares, e), (self.channel_squares, _over_positions(e, 1))):
            squares[level].index_add_(0, rows, value.double().flatten(1).square().sum(1))

    def per_channel(self) -> Sums:
        """Return the sums of P e, times the root of the number of positions: |P e|^2 is that over all positions."""
        return replace(self, values=_over_positions(self.values, 3), squares=self.channel_squares)

    def means(self) -> Tensor:
        """Return o^, (levels, rows, *shape)."""
        n = self.counts.sum(2)
        return self.values.sum(2).double() / n.reshape(*n.shape, *[1] * (self.values.ndim - 3))

    def noise_floor(self) -> Tensor:
        """Return the estimate of tr Cov(o^) = E|o^ - o|^2, (levels, rows)."""
        n = self.counts.sum(2)
        spread = self.squares - n * self.means().flatten(2).square().sum(2)
        return spread.clamp(min=0) / (n - 1).clamp(min=1) / n  # rounding makes it negative where all e are equal

    def p_values(self) -> Tensor:
        """Return the share of all signs s that make |o^|^2 as large as it is, (levels, rows), at least MIN_P."""
        half = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * (GROUPS - 1))
        signs = torch.cat([torch.ones_like(half[:, :1]), half], 1).to(self.values.device)
        shares = []
        for groups in self.values.flatten(3).flatten(0, 1):
            norms = (signs @ (groups.double() @ groups.double().T) * signs).sum(1)
            shares.append((norms >= norms[0] * (1 - 1e-9)).double().mean())
        return torch.stack(shares).reshape(self.squares.shape)


def _over_positions(e: Tensor, leading: int) -> Tensor:
    """Return P e times the root of the number of positions, with length 1 in place of these.

    Args:
        leading: the number of dimensions before those of a sample.
    """
    axes = [leading + axis for axis in position_axes(e.shape[leading:])]
    return e.mean(axes, keepdim=True) * prod(e.shape[axis] for axis in axes) ** 0.5 if axes else e


@torch.no_grad()
def estimate_calibration(
    model: Any,
    scheduler: Any,
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
    *,
    num_levels: int = 24,
    unconditional: Mapping[str, Tensor] | None = None,
    null_class: int | None = None,
    num_classes: int | None = None,
    control_variate: bool = True,
    antithetic: bool = True,
    shrink: bool = True,
    significance: float = 1e-3,
    tolerance: float | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    accelerator: Any = None,
    state_path: str | os.PathLike | None = None,
    save_every: int = 10,
    measured_on: Mapping[str, Any] | None = None,
    progress: bool = True,
    convention: NetworkConvention | None = None,
    per: str | None = None,
) -> Calibration:
    """Measure the mean error of `model` over data.

    Args:
        model: a diffusers network in evaluation mode, any prediction type; wrapped or not.
        scheduler: the stock scheduler that belongs to it.
        batches: (x0, conditions): the network's training data, (B, *shape), scaled as in training (latents included),
            and the keyword arguments of its calls, with first dimension B. The order must be fixed if the run may be
            resumed; of several processes each gets its own part, of equal length.
        num_levels: noise levels, log-spaced over what the network was trained for.
        unconditional: conditions with first dimension 1 that mean "none", such as the empty prompt; they add a row.
        null_class: the class label that means "none"; it adds a row, too.
        num_classes: measure a row for each class; without it one row for all.
        control_variate, antithetic, shrink: switch these on or off; all False gives the plain average of the paper.
            With antithetic noise a control variate has no effect.
        significance: the probability, for each level and row, that something is subtracted from a model without a mean
            error; 3e-5 at least.
        tolerance: a level is done when its standard error (root mean square over coordinates, in eps, whose own is 1)
            is below this; without it all the data are used.
        max_samples: stop after so many samples, over all processes.
        seed: the seed of the noise, which depends on it, the batch's number and size, the process and the level alone.
        accelerator: of accelerate, to add up several processes; the model must be on its device.
        state_path: a file for the sums, written every `save_every` batches; a killed run goes on from it. Other data
            are detected by their first batch.
        measured_on: stored with the result, for people.
        progress: show a progress bar.
        convention: as for `denoiser_from`.
        per: which table is used at the measured size, `position` or `channel`; by default per channel where that keeps
            at least 0.9 of |o|^2 in every row. At other sizes it is per channel. The tolerance is that of this table,
            by default per position.

    Returns:
        The calibration, the same on all processes; on the CPU.

    Raises:
        ValueError: the process is reflected, there are no data or too few samples for an estimate of their noise, a
            value is not finite, an argument is out of range, or the state file is of another run.
    """
    schedule = noise_schedule(scheduler)
    require_gaussian(schedule)
    _check_numbers(num_levels, significance, tolerance, max_samples, save_every, num_classes, per)
    if null_class is not None:
        unconditional = {"class_labels": torch.tensor([null_class])}
    sigmas, rows = _levels(schedule, num_levels), _rows(num_classes, unconditional is not None)
    denoiser = denoiser_from(model, scheduler, convention)
    how = (control_variate, antithetic, per == PER_CHANNEL)
    measurement = _Measurement(denoiser, sigmas, rows, unconditional, *how, seed, accelerator)
    run = {
        "model": _fingerprint(model) if state_path is not None else None,
        "scheduler": stored_scheduler(scheduler),
        "sigmas": sigmas,
        "rows": rows,
        "random_rule": RULE,
        "seed": seed,
        "process": [measurement.rank, measurement.world],
        "tables": [PER_POSITION, PER_CHANNEL],
        "estimator": [control_variate, antithetic, *([convention] if convention is not None else [])],
    }
    sums = _sums_over_data(measurement, batches, run, state_path, tolerance, max_samples, save_every, progress)
    settings: dict[str, Any] = {"num_samples": int(sums.counts[:, 0].sum(1).max()), "seed": seed}
    settings |= {"control_variate": control_variate, "antithetic": antithetic, "shrink": shrink}
    settings |= {"significance": significance, "tolerance": tolerance}
    shape, samples = list(sums.values.shape[3:]), (sample_of(model), sample_of(model, lora=True))
    calibration = Calibration(
        shape=shape,
        sigmas=sigmas,
        rows=rows,
        scheduler=stored_scheduler(scheduler),
        null_class=null_class,
        measured_on=dict(measured_on or {}) | settings,
        has_channels=per_channel_shape(shape) != shape and type(unwrap(model)).__name__ not in FRAMES_FIRST,
        sampled_weights=[len(sample) for sample in samples],
    )
    return _filled(calibration, sums, shrink, significance, per, samples)


def _check_numbers(
    num_levels: int,
    significance: float,
    tolerance: float | None,
    max_samples: int | None,
    save_every: int,
    num_classes: int | None,
    per: str | None,
) -> None:
    if per not in (None, PER_POSITION, PER_CHANNEL):
        raise ValueError(f"per={per!r} is not one of {PER_POSITION}, {PER_CHANNEL}")
    require("num_levels", num_levels, at_least=2)
    require("significance", significance, at_least=MIN_P, at_most=1)
    require("save_every", save_every, at_least=1)
    require("tolerance", tolerance, above=0)
    require("max_samples", max_samples, at_least=1)
    require("num_classes", num_classes, at_least=1)


def _sums_over_data(
    measurement: _Measurement,
    batches: Iterable[tuple[Tensor, Mapping[str, Any]]],
    run: dict[str, Any],
    state_path: str | os.PathLike | None,
    tolerance: float | None,
    max_samples: int | None,
    save_every: int,
    progress: bool,
) -> Sums:
    """Return the sums of all processes, over the data until they end, `max_samples` are seen or no level is left.

    Args:
        run: the settings of this run; those in the state file, if there is one, must be equal.
        others: as for `estimate_calibration`.
    """
    sigmas, rank, world, accelerator = measurement.sigmas, measurement.rank, measurement.world, measurement.accelerator
    path = None if state_path is None else _of_process(Path(state_path), rank, world)
    sums: Sums | None = None
    active, seen, resumed_at = list(range(len(sigmas))), 0, 0
    with progress_bar(None, "calibrating", total=max_samples, unit="sample", shown=progress and rank == 0) as bar:
        for number, (x0, cond) in enumerate(batches):
            x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
            if sums is None:
                run |= {"batch": list(x0.shape), "data": _mark({**cond, "x0": x0})}
                sums = _load(path, run, x0.device) or measurement.no_sums(x0)
                resumed_at = _agreed(sums, accelerator)
                active = measurement.levels_left(sums, tolerance) if resumed_at else active
            seen += len(x0) * world
            bar.update(len(x0) * world)
            last = max_samples is not None and seen >= max_samples
            if number >= resumed_at:
                measurement.take_in(sums, active, x0, cond)
                if int(sums.batches) % save_every == 0 or last:
                    if path is not None:
                        _save(path, _finite(sums, sigmas), run, accelerator)
                    active = measurement.levels_left(sums, tolerance)
                    bar.set_postfix(levels_left=len(active))
            if last or not active:
                break
    if sums is None:
        raise ValueError("there are no data: `batches` is empty")
    total = _finite(_over_processes(sums, accelerator), sigmas)
    if (total.counts < 2).any():
        fewest = int(total.counts.sum(2).min())
        raise ValueError(f"too few samples: each row needs {2 * GROUPS} at every level, and one has {fewest}")
    return total


def _levels(schedule: NoiseSchedule, n: int) -> list[float]:
    sigmas = log_linear_sigmas(n, schedule.sigma_min, schedule.sigma_max).flip(0)
    sigmas[0], sigmas[-1] = schedule.sigma_min, schedule.sigma_max
    return sigmas.tolist()


def _rows(num_classes: int | None, unconditional: bool) -> list[str]:
    rows = [str(i) for i in range(num_classes)] if num_classes else [CONDITIONAL if unconditional else ALL]
    return rows + [UNCONDITIONAL] * unconditional


@dataclass(frozen=True)
class _Measurement:
    """Computes the values of a batch; its arguments are those of `estimate_calibration`."""

    denoiser: Denoiser
    sigmas: Sequence[float]
    rows: Sequence[str]
    unconditional: Mapping[str, Any] | None
    control_variate: bool
    antithetic: bool
    by_channel: bool
    seed: int
    accelerator: Any

    @property
    def rank(self) -> int:
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def world(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def no_sums(self, x0: Tensor) -> Sums:
        return Sums.zeros(len(self.sigmas), len(self.rows), x0.shape[1:], x0.device)

    def take_in(self, sums: Sums, levels: Iterable[int], x0: Tensor, cond: Mapping[str, Any]) -> None:
        """Add the next batch to the sums, at some of the levels."""
        number, conditions = int(sums.batches), self._conditions(x0, cond)
        for level in levels:
            seed = Seeds(self.seed)(Stream.CALIBRATION_NOISE, number, self.rank, level)
            noise = randn_like(x0, torch.Generator(x0.device).manual_seed(seed))
            for i, (row, given) in enumerate(conditions):
                e = self._values(x0, noise, self.sigmas[level], given)
                if self.control_variate and not self.antithetic:
                    if number == i == 0:
                        slope = (e * noise).sum() / noise.square().sum()
                        sums.slopes[level] = self.accelerator.reduce(slope, "mean") if self.accelerator else slope
                    e = e - sums.slopes[level] * noise
                sums.add(level, row, e)
        sums.batches += 1

    def _conditions(self, x0: Tensor, cond: Mapping[str, Any]) -> list[tuple[Tensor, Mapping[str, Any]]]:
        """Return the rows (B,) that a batch adds to, each with the conditions of the network for it."""
        row = torch.zeros(len(x0), dtype=torch.long, device=x0.device)
        row = row if self.rows[0] in (ALL, CONDITIONAL) else cond["class_labels"]
        if self.unconditional is None:
            return [(row, cond)]
        null = torch.full_like(row, len(self.rows) - 1)
        return [(row, cond), (null, overlaid(cond, for_each(self.unconditional, len(x0), x0.device)))]

    def _values(self, x0: Tensor, noise: Tensor, sigma: float, cond: Mapping[str, Any]) -> Tensor:
        e = self.denoiser.eps(x0 + sigma * noise, sigma, **cond)
        return (e + self.denoiser.eps(x0 - sigma * noise, sigma, **cond)) / 2 if self.antithetic else e

    def levels_left(self, sums: Sums, tolerance: float | None) -> list[int]:
        """Return the levels whose standard error is still above the tolerance; without a tolerance, all."""
        if tolerance is None:
            return list(range(len(self.sigmas)))
        sums = _over_processes(sums, self.accelerator)
        floor = (sums.per_channel() if self.by_channel else sums).noise_floor()
        error = (floor / sums.values[0, 0, 0].numel()).sqrt().amax(1)
        enough = (sums.counts.amin((1, 2)) >= 2) & (error <= tolerance)
        return (~enough).nonzero().flatten().tolist()


def _filled(
    calibration: Calibration,
    sums: Sums,
    shrink: bool,
    significance: float,
    per: str | None,
    samples: tuple[Tensor, Tensor],
) -> Calibration:
    """Fill the tables, and decide which one is used at the measured size unless it was asked for."""
    calibration.weights_sample, calibration.lora_sample = samples
    _fill(calibration, sums, shrink, significance)
    if calibration.config.has_channels:
        _fill(calibration, sums.per_channel(), shrink, significance, "channel_")
        shape = calibration.config.shape
        calibration.channel_offsets.div_((prod(shape) / prod(per_channel_shape(shape))) ** 0.5)
        keeps_most = (calibration.kept_per_channel() >= MOST).all()
        calibration.register_to_config(per=per or (PER_CHANNEL if keeps_most else PER_POSITION))
    return calibration


def _fill(calibration: Calibration, sums: Sums, shrink: bool, significance: float, kind: str = "") -> None:
    offsets, floor = sums.means(), sums.noise_floor()
    norm = offsets.flatten(2).square().sum(2)
    factor = torch.where(sums.p_values() <= significance, 1 - floor / norm, 0.0) if shrink else torch.ones_like(norm)
    for name, value in (
        (f"{kind}offsets", offsets),
        (f"{kind}noise_floor", floor),
        (f"{kind}squared_norm", norm - floor),
        (f"{kind}shrinkage", factor.clamp(min=0)),
        ("num_samples", sums.counts.sum(2)),
    ):
        getattr(calibration, name).copy_(value)


def _over_processes(sums: Sums, accelerator: Any) -> Sums:
    if accelerator is None or accelerator.num_processes == 1:
        return sums
    names = ("values", "counts", "squares", "channel_squares")
    added = {name: accelerator.reduce(getattr(sums, name).clone(), "sum") for name in names}
    return Sums(**added, slopes=sums.slopes, batches=sums.batches)


def _finite(sums: Sums, sigmas: Sequence[float]) -> Sums:
    wrong = (~sums.squares.isfinite()).any(1).tolist()
    if any(wrong):
        listed = ", ".join(f"{sigma:.3g}" for sigma, is_wrong in zip(sigmas, wrong, strict=True) if is_wrong)
        raise ValueError(f"the data or the model's output are not finite at sigma = {listed}: try a higher precision")
    return sums


def _of_process(path: Path, rank: int, world: int) -> Path:
    return path if world == 1 else path.with_name(f"{path.stem}-{rank}-of-{world}{path.suffix}")


def _save(path: Path, sums: Sums, run: Mapping[str, Any], accelerator: Any) -> None:
    with replacing(path) as aside:
        save_file({k: v.contiguous() for k, v in vars(sums).items()}, aside, metadata={"run": _written(run)})
        if accelerator is not None:
            accelerator.wait_for_everyone()  # the files of all processes are of the same batch


def _load(path: Path | None, run: Mapping[str, Any], device: torch.device) -> Sums | None:
    if path is None or not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        stored, asked = json.loads((file.metadata() or {}).get("run", "{}")), json.loads(_written(run))
        if stored != asked:
            changed = sorted(k for k in {*stored, *asked} if stored.get(k) != asked.get(k))
            raise ValueError(f"{path} holds the sums of another run, with other {', '.join(changed)}: delete it")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Sums(**{name: tensor if name == "batches" else tensor.to(device) for name, tensor in tensors.items()})


def _agreed(sums: Sums, accelerator: Any) -> int:
    """Return the number of batches that were added, after checking that it is the same in all processes."""
    if accelerator is None or accelerator.num_processes == 1:
        return int(sums.batches)
    batches = accelerator.gather(sums.batches.reshape(1).to(accelerator.device)).tolist()
    if min(batches) != max(batches):
        raise ValueError(f"the processes were stopped after different numbers of batches, {batches}: delete the states")
    return batches[0]


def _written(run: Mapping[str, Any]) -> str:
    return json.dumps(run, default=str)


def _fingerprint(model: Any) -> str:
    """Return a text that depends on the weights, to tell the models of two runs apart."""
    weights = torch.cat([sample_of(model), sample_of(model, lora=True)])
    return f"{type(unwrap(model)).__name__} {hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]}"


def _mark(data: Any) -> Any:
    """Return numbers that depend on a tree of tensors, to tell the data of two runs apart."""

    def mark(value: Any) -> str:
        return f"{value.double().norm().item():.4g}" if isinstance(value, Tensor) else str(value)

    return each_tensor(mark, data)
