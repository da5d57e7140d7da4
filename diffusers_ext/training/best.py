"""Early stopping: the pipeline whose samples of few steps are nearest to held-out images becomes the result.

    loop.keep(Best(steps=10, samples=500, patience=5))

At every validation `samples` images are drawn in `steps` steps by the pipeline's own sampler, always from the same
noise, and the Frechet distance of their pixels to the run's validation images is measured, which sees colours, blur and
noise that was left (`diffusers_ext.extractors.pixel_features`). The nearest pipeline so far lies in `best/`, in the
output folder; it is written aside and renamed, so that a run that is killed leaves the last one or the new one. The end
of the run puts it, and not the last one, in the output folder itself.

The distance is biased, the more so the fewer the images (see `diffusers_ext.metrics`): compare those of one run only.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..extractors import pixel_features, pixel_means
from ..files import holds_result, list_written, not_written, recover_folder, replacing_files, replacing_folder, written
from ..metrics import frechet_distance
from ..randomness import Stream
from ..subjects import Subject
from .parts import Run

NAME = "best"
FEATURES = {"pixels": pixel_features, "means": lambda images: pixel_means(images, 16).flatten(1)}


class Best:
    """Keeps the nearest pipeline; see the module's docstring.

    Args:
        steps: the number of steps of the sampler.
        samples: the number of images that are drawn.
        patience: the run ends after so many validations in a row without a nearer pipeline; `None`: never.

    Attributes:
        step, distance, metrics: those of the nearest pipeline so far; step is `None` while there is none.
        measured: the step of the last measurement.
        stale: the number of measurements since that of the nearest pipeline.
        features: those of the distance: "pixels", or "means" in a run that an earlier version of this package began.
    """

    name, saved = NAME, False

    def __init__(self, *, steps: int, samples: int, patience: int | None) -> None:
        self.steps, self.samples, self.patience = steps, samples, patience
        self.step: int | None = None
        self.distance, self.metrics = math.inf, dict[str, Any]()
        self.measured, self.stale = 0, 0
        self.features = "pixels"
        self._real: torch.Tensor | None = None  # features of the validation images, at the first measurement

    def join(self, run: Run) -> None:
        """Repair the folder if the run was killed."""
        self.run, self.folder = run, run.output_dir / NAME
        if run.accelerator.is_main_process:
            recover_folder(self.folder)

    def ends(self) -> bool:
        """Return whether there was no nearer pipeline for too long; all processes must call this together."""
        (ends,) = broadcast_object_list([self.patience is not None and self.stale >= self.patience])
        if ends and self.run.accelerator.is_main_process:
            print(f"\nno nearer samples in {self.stale} validations: training ends at step {self.run.step}")
        return ends

    def measure(self, subject: Subject) -> float:
        """Return the distance of the pipeline's samples; it is infinite if they are not finite."""
        classes, size, drawn = subject.num_classes, self.run.args.train_batch_size, []
        for first in range(0, self.samples, size):
            numbers = range(first, min(first + size, self.samples))
            labels = None if classes is None else [i % classes for i in numbers]
            seed, texts = self.run.seeds(Stream.BEST, first), self.run.validation.captions
            captions = None if texts is None else [texts[i % len(texts)] for i in numbers]
            rows = {"captions": captions} if subject.takes_captions else {"labels": labels}
            drawn.append(torch.from_numpy(subject.sample(len(numbers), self.steps, seed, **rows)))
        images = torch.cat(drawn).movedim(3, 1) * 2 - 1
        if not images.isfinite().all():
            return math.inf
        features = FEATURES[self.features]
        if self._real is None:
            self._real = features(self.run.validation.images)
        return frechet_distance(features(images), self._real)

    def offer(self, subject: Subject, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the pipeline of the current step, keep it if it is the nearest, and return all its metrics.

        If the sampler cannot take so few steps, this warns and does not measure.
        """
        step = self.run.step
        try:
            distance = self.measure(subject)
        except (ValueError, RuntimeError, IndexError) as error:
            self.run.log.warn(f"no Frechet distance at step {step}, {type(error).__name__} in the sampler: {error}")
            return dict(metrics)
        metrics = {**metrics, "frechet_distance": distance}
        self.measured, self.stale = step, self.stale + 1
        if distance < self.distance:
            self._write(subject, {"step": step, **metrics})
            self.step, self.distance, self.metrics, self.stale = step, distance, metrics, 0
        return metrics

    def _write(self, subject: Subject, described: Mapping[str, Any]) -> None:
        """Replace the folder, in which files of the user stay; if that raises an OSError, the last one stays."""
        with replacing_folder(self.folder) as aside:
            subject.write(aside)
            for part in self.run.parts.values():
                part.save(aside)
            (aside / "best.json").write_text(json.dumps(described))
            list_written(aside)
            for name in not_written(self.folder):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.folder / name, aside / name)

    def is_whole(self) -> bool:
        """Return whether the nearest pipeline is still in its folder; if not, this warns."""
        if holds_result(self.folder) and all((self.folder / n).is_file() for n in written(self.folder)):
            return True
        self.run.log.warn(f"{self.folder} is not as it was written: the last pipeline is taken and not the best one")
        return False

    def install(self, folder: Path) -> None:
        """Put the nearest pipeline into `folder`."""
        with replacing_files(folder) as aside:
            files = {str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()}
            for name in (written(self.folder) or files) - {"best.json"}:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, aside / name)

    def check(self, means: Mapping[str, float]) -> None:
        """Nothing that is logged ends the run."""

    def save(self, folder: Path) -> None:
        """There is nothing to save beside a pipeline."""

    def state_dict(self) -> dict[str, Any]:
        names = ("step", "distance", "metrics", "measured", "stale", "features")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in ({"features": "means"} | dict(state)).items():
            setattr(self, name, value)
        self._real = None
