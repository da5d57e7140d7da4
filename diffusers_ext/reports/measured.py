"""What an evaluation has measured: a `Cell` for every model, scheduler and number of steps, a `Likelihood` for every
model, and the same measures of real images beside them.

    evaluation = Evaluation.load("evaluation/results.json")
    evaluation.cells[0].frechet         # Interval(estimate, low, high)

The file is strict JSON with the fields of the classes below; `format_version` counts its changes. JSON has no number
that is not finite: these are the texts "nan", "inf" and "-inf". `null` is what was not measured.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image

from ..files import write_file
from ..metrics import Interval, student_interval

FORMAT_VERSION = 1
Measure = Literal["frechet", "kernel", "pixels"]  # of the distances of a `Quality`


@dataclass(frozen=True)
class Quality:
    """Measures of a set of images against the reference images, in the features of the extractor.

    Attributes:
        frechet, kernel: distances without their bias of order 1/n, with intervals; they may be below 0.
        precision, recall: see `diffusers_ext.metrics`.
        copies: share of the images that are nearer to a training image than all but 1% of held-out images are: 0.01 if
            nothing was memorised. `None` without held-out images.
        frechet_values, kernel_values: the jackknife's pseudo-values of the distances, one for each group of images:
            with those of other images from the same noise they make a paired comparison.
        pixels, pixels_values: the Frechet distance of `pixel_features`, which sees noise and blur that the features of
            the extractor may overlook; `None` and empty for fewer images than these features.
    """

    frechet: Interval
    kernel: Interval
    precision: float
    recall: float
    copies: float | None
    frechet_values: list[float] = field(default_factory=list)
    kernel_values: list[float] = field(default_factory=list)
    pixels: Interval | None = None
    pixels_values: list[float] = field(default_factory=list)

    def change(self, baseline: Quality, of: Measure = "frechet") -> Interval | None:
        """A distance less the baseline's, with the interval of the pairs.

        Both sets of images must come from the same noise. `None` where the pseudo-values are missing, or are of other
        numbers of groups.
        """
        values = (getattr(quality, f"{of}_values") for quality in (self, baseline))
        ours, theirs = (torch.tensor(one, dtype=torch.float64) for one in values)
        return student_interval(ours - theirs) if len(ours) == len(theirs) > 1 else None


@dataclass(frozen=True)
class Cell:
    """Measures of the samples of one model with one scheduler and number of steps.

    Attributes:
        model: name of the model in the evaluation.
        scheduler: its class, without "Scheduler".
        steps: `num_inference_steps`.
        nfe: evaluations of the network for one image (twice the steps with classifier-free guidance).
        seconds: time for one image.
        out_of_range: share of the values of the pipeline's last state (decoded, of a latent model) that are outside
            [-1, 1] by more than half a grey level, or not finite.
        num_samples: the number of images.
        quality: the measures of these images; NaN if the values of some were not finite.
    """

    model: str
    scheduler: str
    steps: int
    nfe: float
    seconds: float
    out_of_range: float
    num_samples: int
    quality: Quality


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of held-out images under one model, in bits per dimension.

    Attributes:
        ode: by the probability flow; `None` if it was not measured.
        bound: an upper bound, by denoising.
        sigmas, eps_mse: noise levels, and the mean square error of the predicted noise at each.
    """

    ode: Interval | None = None
    bound: Interval | None = None
    sigmas: list[float] = field(default_factory=list)
    eps_mse: list[float] = field(default_factory=list)

    def save(self, path: str | os.PathLike) -> None:
        """Write this as JSON; the file is complete, or as it was before."""
        write_file(path, json.dumps(_stored(asdict(self)), allow_nan=False))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Likelihood:
        """Read what `save` wrote."""
        return _likelihood(json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass
class Evaluation:
    """All results of one call.

    Attributes:
        data: name of the data set, shown to people.
        reference: what the samples are compared with, e.g. "250 held-out images".
        num_reference: the number of these images.
        extractor: label of the features; "FID" appears in the outputs only where it says Inception on standard weights.
        num_features: d of the extractor; the Frechet distance of fewer images is NaN.
        is_fid: whether the Frechet distance is FID.
        floor: the measures of real images that are not in the reference, `num_floor` of them.
        models: name -> Hub name or folder.
        seed, command, versions: those of the run; a call from Python has no command.
        likelihood_of: the images whose likelihood was measured: held-out ones, or "training images" if there are none.
        pictures: title -> sample grids and other pictures for people. They are not saved with the numbers.
    """

    data: str
    reference: str
    num_reference: int
    extractor: str
    num_features: int
    is_fid: bool
    floor: Quality | None
    num_floor: int
    models: dict[str, str]
    seed: int
    command: str
    versions: dict[str, str]
    cells: list[Cell] = field(default_factory=list)
    likelihoods: dict[str, Likelihood] = field(default_factory=dict)
    likelihood_of: str = "held-out images"
    pictures: dict[str, Image.Image] = field(default_factory=dict, compare=False, repr=False)

    @property
    def by_kernel(self) -> bool:
        """Whether the images are fewer than the features, so that there is no Frechet distance."""
        counts = [self.num_reference, self.num_floor, *(cell.num_samples for cell in self.cells)]
        return min(counts) < self.num_features

    @property
    def distance_name(self) -> str:
        """The name of the distance, with the extractor."""
        kind = "kernel distance" if self.by_kernel else "FID" if self.is_fid else "Frechet distance"
        return f"{kind} ({self.extractor})"

    def distance(self, quality: Quality) -> Interval:
        """Return the distance that this evaluation is about: `by_kernel` says which."""
        return quality.kernel if self.by_kernel else quality.frechet

    @property
    def model_names(self) -> list[str]:
        """The names of the models, of which the first is the baseline."""
        return list(dict.fromkeys([*self.models, *(cell.model for cell in self.cells)]))

    @property
    def schedulers(self) -> list[str]:
        return list(dict.fromkeys(cell.scheduler for cell in self.cells))

    def ordered(self) -> list[Cell]:
        """Return the cells sorted by model, scheduler and NFE; the first two in the order of the evaluation."""
        models, schedulers = self.model_names, self.schedulers
        return sorted(self.cells, key=lambda c: (models.index(c.model), schedulers.index(c.scheduler), c.nfe))

    def change(self, cell: Cell, of: Measure | None = None) -> tuple[Cell, Interval] | None:
        """Return the baseline of a cell, and a distance, by default that of `distance`, less the baseline's. The
        interval is that of the pairs: both sides are drawn from the same noise, so that it is narrower, as a rule, than
        those of the two distances.

        The baseline is of the first model and the same NFE, with the same scheduler, or with what that one is derived
        from (DDIM for CalibratedDDIM), or else with the first. `None` for a baseline itself, and where the values of
        the groups are missing or not of as many images.
        """
        derived = cell.scheduler.removeprefix("Calibrated")
        kin = [cell.scheduler, derived, derived.removeprefix("ShortTime")]
        first = self.model_names[0]
        candidates = {c.scheduler: c for c in self.ordered() if c.model == first and c.nfe == cell.nfe}
        names = [*(kin if cell.model != first else kin[::-1]), *candidates]
        baseline = next((candidates[name] for name in names if name in candidates), None)
        if baseline is None or baseline is cell or baseline.num_samples != cell.num_samples:
            return None
        change = cell.quality.change(baseline.quality, of or ("kernel" if self.by_kernel else "frechet"))
        return None if change is None else (baseline, change)

    def save(self, path: str | os.PathLike) -> None:
        """Write all but the pictures as JSON; the file is complete, or as it was before."""
        values = _stored({"format_version": FORMAT_VERSION} | asdict(replace(self, pictures={})))
        del values["pictures"]
        write_file(path, json.dumps(values, indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is of another version.
        """
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}; this package reads {FORMAT_VERSION}")
        values["floor"] = _quality(values["floor"])
        values["cells"] = [_cell(cell) for cell in values["cells"]]
        values["likelihoods"] = {name: _likelihood(one) for name, one in values["likelihoods"].items()}
        return cls(**values)


def _stored(value: Any) -> Any:
    """Return the value as JSON takes it."""
    if isinstance(value, dict):
        return {key: _stored(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(stored: Any) -> Any:
    """Invert `_stored` for a number."""
    return float(stored) if isinstance(stored, str) else stored


def _numbers(stored: list[Any]) -> list[float]:
    return [_number(one) for one in stored]


def _interval(values: Any) -> Interval | None:
    return None if values is None else Interval(*map(_number, values))


def _quality(values: Any) -> Quality | None:
    if values is None:
        return None
    read: dict[str, Any] = {}
    for name in get_args(Measure):
        read |= {name: _interval, f"{name}_values": _numbers}
    return Quality(**{key: read.get(key, _number)(value) for key, value in values.items()})


def _cell(values: Any) -> Cell:
    numbers = {k: _number(v) for k, v in values.items() if k not in ("model", "scheduler", "quality")}
    return Cell(**values | numbers | {"quality": _quality(values["quality"])})


def _likelihood(values: Any) -> Likelihood:
    lists = {key: _numbers(values[key]) for key in ("sigmas", "eps_mse")}
    return Likelihood(_interval(values["ode"]), _interval(values["bound"]), **lists)
