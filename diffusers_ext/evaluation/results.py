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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..metrics import Interval

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Quality:
    """Of a set of images, against the reference images, in the features of the extractor.

    Attributes:
        frechet, kernel: distances without their bias of order 1/n, with intervals; they may be below 0.
        precision, recall: see `diffusers_ext.metrics`.
        copies: share of the images that are nearer to a training image than all but 1% of held-out images are: 0.01 if
            nothing was memorised. `None` without held-out images.
    """

    frechet: Interval
    kernel: Interval
    precision: float
    recall: float
    copies: float | None


@dataclass(frozen=True)
class Cell:
    """Samples of one model with one scheduler and number of steps.

    Attributes:
        model: name of the model in the evaluation.
        scheduler: its class, without "Scheduler".
        steps: `num_inference_steps`.
        nfe: evaluations of the network for one image (twice the steps with classifier-free guidance).
        seconds: per image.
        out_of_range: share of the values of the pipeline's last state (decoded, of a latent model) that are outside
            [-1, 1] by more than half a grey level, or not finite.
        num_samples: images.
        quality: of them.
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
    """Of held-out images under one model, in bits per dimension.

    Attributes:
        ode: by the probability flow; `None` if it was not measured.
        bound: an upper bound, by denoising.
        sigmas, eps_mse: mean square error of the predicted noise by noise level.
    """

    ode: Interval | None = None
    bound: Interval | None = None
    sigmas: list[float] = field(default_factory=list)
    eps_mse: list[float] = field(default_factory=list)

    def save(self, path: str | os.PathLike) -> None:
        """As JSON, written aside and renamed."""
        write_aside(Path(path), json.dumps(_stored(asdict(self)), allow_nan=False).encode())

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
        num_reference: images of it.
        extractor: label of the features; "FID" appears in the outputs only where it says Inception on standard weights.
        num_features: of the extractor; the Frechet distance of fewer images is NaN.
        is_fid: whether the Frechet distance is FID.
        floor: the measures of real images that are not in the reference, `num_floor` of them.
        models: name -> Hub name or folder.
        seed, command, versions: of the run.
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

    def save(self, path: str | os.PathLike) -> None:
        """As JSON, written aside and renamed."""
        values = _stored({"format_version": FORMAT_VERSION} | asdict(self))
        write_aside(Path(path), json.dumps(values, indent=1, allow_nan=False).encode())

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


def write_aside(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent at any time."""
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    aside.write_bytes(content)
    os.replace(aside, path)


def _stored(value: Any) -> Any:
    """The value as JSON takes it."""
    if isinstance(value, dict):
        return {key: _stored(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(stored: Any) -> Any:
    """Inverse of `_stored` for a number."""
    return float(stored) if isinstance(stored, str) else stored


def _interval(values: Any) -> Interval | None:
    return None if values is None else Interval(*map(_number, values))


def _quality(values: Any) -> Quality | None:
    if values is None:
        return None
    read: Any = {k: _interval(v) if k in ("frechet", "kernel") else _number(v) for k, v in values.items()}
    return Quality(**read)


def _cell(values: Any) -> Cell:
    numbers = {k: _number(v) for k, v in values.items() if k not in ("model", "scheduler", "quality")}
    return Cell(**values | numbers | {"quality": _quality(values["quality"])})


def _likelihood(values: Any) -> Likelihood:
    lists = {key: [_number(v) for v in values[key]] for key in ("sigmas", "eps_mse")}
    return Likelihood(_interval(values["ode"]), _interval(values["bound"]), **lists)
