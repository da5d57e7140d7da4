r"""Stock schedulers that subtract a model's mean error from its output before each step.

    calibration = Calibration.from_pretrained("user/model-calibration")
    pipe = calibrate_pipeline(pipe, calibration)                    # where it can, it reads the scale of guidance
    pipe.scheduler = CalibratedDDIMScheduler.from_scheduler(pipe.scheduler, calibration, guidance_scale=7.5)  # told

The name of a class is `Calibrated` + the exact name of the stock scheduler (or of a short-time one) that it derives
from. It overrides only `step`, `set_timesteps`, loading and saving. Without a calibration nothing changes, bit for
bit.

The output that reaches `step` under guidance is combined already, u + s (c - u), and diffusers does not pass s to the
scheduler. `calibrate_pipeline` lets the scheduler read it from the pipeline at each step (`follow`), where that can be
done; elsewhere it is told. This is exact where the combination is this linear one; for `guidance_rescale` and tables by
class use `calibrate_denoiser`. What reads the pipeline is neither copied nor saved with the scheduler: a copy uses the
last scale.

`save_pretrained` writes the tables into a folder `calibration.tables` beside the scheduler's configuration. (The dot
keeps them out of the way of diffusers' download filter: a file of weights in `scheduler/` itself would make it leave
out the UNet's.) `save_tables` puts them beside a stock scheduler: people without this package then open that pipeline
uncalibrated, and `CalibratedXScheduler.from_pretrained(repo, subfolder="scheduler")` finds the tables.

Reference: On Calibrating Diffusion Probabilistic Models (Pang et al., 2023, arXiv 2302.10688).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from ..calibration import Calibration, subtract
from ..files import write_file
from ..interop import live_config, noise_schedule
from ..ranges import require
from ..stock import EDM_SCHEDULERS, FLOW_SCHEDULERS, VP_SCHEDULERS, require_known, swapped_in
from .derived import by_name, derive, position_in_step
from .scheduling_short_time import SHORT_TIME_SCHEDULERS, ShortTimeScheduler

logger = logging.get_logger(__name__)

TABLES = "calibration.tables"

# Of longer tables, offsets are computed in the step that needs them, to save memory.
MAX_REMEMBERED = 200


class CalibratedScheduler(SchedulerMixin):
    """Subtracts the model's mean error from the output before each step."""

    calibration: Calibration | None = None
    guidance_scale: float = 1.0
    _read: Callable[[bool], float | None] | None = None
    _timestep_at = 0
    _shape: torch.Size | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Any, calibration: Calibration | None, guidance_scale: float = 1.0) -> Any:
        """Make this scheduler with the configuration of another scheduler of the same model.

        Args:
            scheduler: any stock scheduler whose configuration `from_config` takes.
            calibration: of the model; `None` for the stock behaviour.
            guidance_scale: that of the pipeline's calls; 1 or less is the conditional model, without guidance, as in
                diffusers.

        Raises:
            ValueError: the calibration belongs to another model, schedule or prediction type, or lacks the rows that
                guidance needs; the scale is not finite; or the other scheduler is a short-time one, and this class is
                not.
        """
        if isinstance(scheduler, ShortTimeScheduler) and not issubclass(cls, ShortTimeScheduler):
            raise ValueError(f"{cls.__name__} would sample from T = 1 on: use Calibrated{type(scheduler).__name__}")
        require("guidance_scale", guidance_scale)
        return cls.from_config(live_config(scheduler)).calibrate(calibration, max(guidance_scale, 1.0))

    def calibrate(self, calibration: Calibration | None, guidance_scale: float = 1.0) -> Any:
        """Use another calibration or guidance scale s from now on; returns self. Raises as `from_scheduler`; here the
        output is u + s (c - u) at every s."""
        if calibration is not None:
            self._schedule = noise_schedule(self)
            calibration.check(self._schedule)
            self._weights = calibration.guidance_weights(guidance_scale)
            self._per, self._shape = calibration.config.per, None
        self.calibration, self.guidance_scale, self._read = calibration, guidance_scale, None
        self._times = self._offsets = torch.empty(0)
        return self

    def follow(self, read: Callable[[bool], float | None]) -> None:
        """Take the guidance scale from a function from now on: it gets whether a call begins, and returns the scale, or
        `None` where it is not known."""
        self._read = read

    def _follow(self, begins: bool) -> None:
        assert self.calibration is not None
        scale = None if self._read is None else self._read(begins)
        if scale is None or scale == self.guidance_scale:
            return
        self._weights, self.guidance_scale = self.calibration.guidance_weights(scale), scale
        self._times = self._offsets = torch.empty(0)
        if not begins:
            self._remember_offsets()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pipeline behind that is read: a copy is of the scheduler alone."""
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

    def _remember_offsets(self) -> None:
        """Compute the offsets of all timesteps at once, (timesteps, *shape)."""
        assert self.calibration is not None
        known, self._times = self._times, self.timesteps[:MAX_REMEMBERED]
        if known.device.type == self._times.device.type == "cpu" and torch.equal(known, self._times):
            return  # elsewhere the comparison would wait
        self._offsets = self._offset(self._times)
        self._rows = self._offsets.split(1)

    def _offset(self, times: Tensor) -> Tensor:
        assert self.calibration is not None
        if times.device.type != "cpu":
            self.calibration.to(times.device)
        times = times.reshape(-1).to(self.calibration.device)
        self._weights = self._weights.to(times.device)
        return self.calibration.offset(self._schedule.sigma(times).float(), self._weights, self._per)

    def _fit(self, shape: torch.Size) -> None:
        """Take the table of the samples' size from now on."""
        assert self.calibration is not None
        per, self._shape = self.calibration.per_for(shape), shape
        if per != self._per:
            self._per, self._times = per, torch.empty(0)
            if getattr(self, "timesteps", None) is not None:
                self._remember_offsets()

    def _position(self, timestep: Tensor | float) -> int | None:
        """Return the index of an element of `timesteps`, found by its address, not its value; `None` for others."""
        times = self._times
        if not isinstance(timestep, Tensor) or timestep.dtype != times.dtype or timestep.device != times.device:
            return None
        position, rest = divmod(timestep.data_ptr() - times.data_ptr(), times.element_size())
        return position if 0 <= position < len(times) and rest == 0 else None

    def offset(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        """Return what `step` subtracts at a timestep, (1, *shape) or one for each channel, in the dtype and on the
        device of `like`; it does not wait for that device."""
        position = self._position(timestep)
        if position is None:
            times = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, dtype=torch.float64)
            return self._offset(times).to(like)
        row = self._rows[position]
        if row.dtype != like.dtype or row.device != like.device:
            self._rows = self._offsets.to(like).split(1)
            row = self._rows[position]
        return row

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Set the timesteps as diffusers does, and compute their offsets."""
        super().set_timesteps(*args, **kwargs)
        if self.calibration is not None:
            self._follow(begins=True)
            self._remember_offsets()

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Step as diffusers does, from the output minus its mean error.

        Raises:
            ValueError: the output has another size, and the calibration has no offsets per channel.
        """
        if self.calibration is not None:
            self._follow(begins=False)
            if model_output.shape[1:] != self._shape:
                self._fit(model_output.shape[1:])
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[self._timestep_at]
            model_output = subtract(model_output, self.offset(timestep, model_output))
        return super().step(model_output, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as diffusers does, with the tables beside the configuration."""
        folder = Path(save_directory) / TABLES
        shutil.rmtree(folder, ignore_errors=True)
        if self.calibration is not None:
            save_tables(self.calibration, save_directory, self.guidance_scale)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Load as diffusers does, with the tables beside the configuration, of this scheduler or of a stock one.

        Args:
            pretrained_model_name_or_path, subfolder: as in diffusers.
            kwargs: as in diffusers, and `guidance_scale`; by default the one that the scheduler was saved with.

        Raises:
            OSError: the files cannot be read. Where there are no tables, this only warns.
            ValueError: as `from_scheduler`.
        """
        guidance_scale = kwargs.pop("guidance_scale", None)
        loaded = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        scheduler = loaded[0] if isinstance(loaded, tuple) else loaded
        of_hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        where = {k: v for k, v in kwargs.items() if k in of_hub}
        where["subfolder"] = f"{subfolder}/{TABLES}" if subfolder else TABLES
        try:
            Calibration.load_config(pretrained_model_name_or_path, **where)
        except OSError as error:
            if not _absent(error, pretrained_model_name_or_path):
                raise
            logger.warning(
                f"{pretrained_model_name_or_path} has no {where['subfolder']}: {cls.__name__} is the stock one"
            )
            return loaded
        calibration = Calibration.from_pretrained(pretrained_model_name_or_path, **where)
        scheduler.calibrate(
            calibration, calibration.config.guidance_scale if guidance_scale is None else guidance_scale
        )
        return loaded


def _absent(error: OSError, path: str | os.PathLike) -> bool:
    """Return whether an error of diffusers says that the file does not exist, and not that it was out of reach."""
    cause = error.__context__
    there_is_none = isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)
    return there_is_none or os.path.isdir(path)


def save_tables(calibration: Calibration, scheduler_folder: str | os.PathLike, guidance_scale: float = 1.0) -> None:
    """Put a calibration beside a scheduler's configuration, where a calibrated scheduler looks for it."""
    folder = Path(scheduler_folder) / TABLES
    calibration.save_pretrained(folder)
    file = folder / "config.json"
    write_file(file, json.dumps(json.loads(file.read_text()) | {"guidance_scale": guidance_scale}, indent=2) + "\n")


def _make(stock: Any) -> Any:
    kind = derive("Calibrated", CalibratedScheduler, stock)
    kind._timestep_at = position_in_step("timestep", stock)
    return kind


CALIBRATED_SCHEDULERS: dict[str, Any] = {
    name: _make(stock)
    for name, stock in (
        *swapped_in(VP_SCHEDULERS, FLOW_SCHEDULERS, EDM_SCHEDULERS).items(),
        *by_name(SHORT_TIME_SCHEDULERS).items(),
    )
}
"""The calibrated class of each stock or short-time scheduler, by the name of that scheduler."""

globals().update(by_name(CALIBRATED_SCHEDULERS))


def calibrated_class(name: str) -> Any:
    """Return the calibrated class of a stock or short-time scheduler, by its name.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    require_known(name, "calibrated", CALIBRATED_SCHEDULERS)
    return CALIBRATED_SCHEDULERS[name]
