"""What benchmarks of trained models share: train one by a script of the project, draw from it, judge what it draws.

model = load(train("train_consistency.py", folder / "model", ["--preset", "digits"]))
study = Study(folder, model, ["--preset", "digits"], num_samples=500)
study.distance(study.draw(model, swap_scheduler(model, "DDIM"), steps=10))
"""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from timing import DEVICE
from torch import Tensor

from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.batches import Images
from diffusers_ext.evaluation import Drawing, Judge, MeasureArguments, RealImages, load_real_images
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.extractors import Extractor, train_classifier
from diffusers_ext.figures import agg_figure
from diffusers_ext.metrics import frechet_distance
from diffusers_ext.reports.card import table
from diffusers_ext.subjects import Condition, Subject, load_pipeline, subject_of

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


class OutOfTime(Exception):
    """The deadline is over."""


def command(script: str, folder: Path, arguments: Iterable[str]) -> list[str]:
    """The command of a run of `training/<script>` that goes on where an earlier one was stopped."""
    start = [sys.executable, str(ROOT / "training" / script), "--resume_from_checkpoint", "latest"]
    return [*start, *arguments, "--output_dir", str(folder)]


def train(script: str, folder: Path, arguments: list[str], *, deadline: float = math.inf, **record: Any) -> Path:
    """Train by `training/<script>` into `folder`; what is there is used again, and a killed run goes on.

    Args:
        deadline: of `time.monotonic`.
        record: more of what FOLDER.json holds beside it: the command, and the seconds of all its pieces.

    Raises:
        OutOfTime: the run has written a checkpoint instead.
        SystemExit: it has failed, or the folder is of another command.
    """
    folder = folder.resolve()
    words = command(script, folder, arguments)
    shown = [script, *(word if not Path(word).is_absolute() else Path(word).name for word in words[4:])]
    file = folder.with_name(f"{folder.name}.json")
    before = json.loads(file.read_text()) if file.exists() else {"command": shown, "seconds": 0.0}
    if sorted(before["command"]) != sorted(shown):
        sys.exit(f"error: {folder} is of another run, with other arguments: use another --output_dir")
    if (folder / "model_index.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    run = subprocess.Popen(words)
    try:
        code = run.wait(max(1.0, deadline - time.monotonic()) if math.isfinite(deadline) else None)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGTERM)  # it writes a checkpoint
        run.wait()
        code = None
    except KeyboardInterrupt:
        run.wait()
        raise
    seconds = before["seconds"] + time.monotonic() - start
    file.write_text(json.dumps({"command": shown} | record | {"seconds": seconds}, indent=1) + "\n")
    if code is None:
        raise OutOfTime
    if code != 0:
        sys.exit(f"error: {script} ended with status {code}")
    return folder


def load(name: str | Path) -> DiffusionPipeline:
    """A pipeline as it is sampled and measured: on the device, in evaluation mode, without gradients and bars."""
    pipeline = subject_of(load_pipeline(str(name))).sampler().to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    subject_of(pipeline).network.eval().requires_grad_(False)
    return pipeline


def of_the_data(for_training: list[str]) -> list[str]:
    """Those of a training script's arguments that an evaluation takes, too."""
    words = [word for argument in for_training for word in argument.split("=", 1)]
    known = {f"--{f.name}" for f in fields(MeasureArguments)} - {"--train_batch_size", "--seed"}
    return [word for name, value in pairwise(words) if name in known for word in (name, value)]


def real_images(for_training: list[str], pipeline: DiffusionPipeline) -> RealImages:
    """The images that the arguments name, in the format of a pipeline, with the training images as the reference."""
    args = parse_arguments(MeasureArguments, [*of_the_data(for_training), "--reference", "train"])
    return load_real_images(args, *subject_of(pipeline).image_format(args.resolution))


def batches(subject: Subject, images: Images, size: int = 50) -> Iterator[tuple[Tensor, Condition]]:
    """Images with their conditions, on the device of the network."""
    for first in range(0, len(images.images), size):
        rows = rows_of(images, first, first + size)
        yield rows.images.to(subject.network.device), subject.conditions(rows)


def bridge(kind: Any, folder: Path, images: Tensor, scheduler: Any, max_diffusion_time: float, **options: Any) -> Any:
    """The bridge in `folder`, on the device; it is fitted to the images if there is none."""
    if not (folder / "config.json").exists():
        kind.fit(images.split(500), scheduler, max_diffusion_time, **options).save_pretrained(folder)
    return kind.from_pretrained(folder).to(DEVICE)


class Study:
    """Frechet distances of samples to held-out images, in the features of a small classifier; they depend on the number
    of samples, so compare them at equal numbers.

    Args:
        folder: for `results.jsonl` and what is drawn; what is there is not drawn again.
        pipeline: one of those that are compared; they draw images of one format.
        for_training: arguments of a training script, which name the data.
        num_samples: of each drawing.

    Attributes:
        real: the reference are all held-out images, the floor are as many training images as there are samples.
        classifier: of the training images.
        rows: what `add` was given, in this call and earlier ones.
    """

    def __init__(self, folder: Path, pipeline: DiffusionPipeline, for_training: list[str], num_samples: int) -> None:
        self.folder, self.drawn, self.num_samples = folder, folder / "drawn", num_samples
        real = real_images(for_training, pipeline)
        self.real = replace(real, reference=real.unseen, floor=rows_of(real.training, 0, num_samples), held_out=None)
        images, labels = real.training.images.to(DEVICE), real.training.labels.to(DEVICE)
        self.classifier = train_classifier(images, labels, int(labels.max()) + 1)
        extractor = Extractor("a small classifier", self.classifier.features, DEVICE, batch_size=500)
        self.judge = Judge(self.real, extractor, num_samples)
        file = folder / "results.jsonl"
        self.rows: list[Row] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def draw(self, pipeline: DiffusionPipeline, scheduler: Any, steps: int, **options: Any) -> Drawing:
        """Draw the samples; the noise is the same for all."""
        drawing = Drawing.of(pipeline, scheduler, steps, self.num_samples, batch_size=100, **options)
        drawing.draw(self.drawn)
        return drawing

    def distance(self, images: Drawing | Images) -> float:
        """The distance of a drawing, or of other images, to the held-out ones."""
        drawn = isinstance(images, Drawing)
        features = images.features(self.drawn, self.judge.extractor) if drawn else self.judge.features(images)
        return frechet_distance(features, self.judge.manifold.reference.to(features.device))

    def add(self, settings: Row, **measured: Any) -> None:
        """Keep what was measured with some settings, in place of an earlier row of theirs."""
        row = settings | measured
        self.rows = [r for r in self.rows if not settings.items() <= r.items()] + [row]
        (self.folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.rows))
        print(json.dumps(row), flush=True)

    def report(self, text: str) -> None:
        """Print the tables, and write them into `table.md`."""
        (self.folder / "table.md").write_text(text + "\n")
        print(text)


def pivot(rows: Iterable[Row], names: Mapping[str, str], column: str, title: str, cell: Callable[[Row], str]) -> str:
    """A Markdown table with a line for each combination of names, and a column for each value of one setting.

    Args:
        names: heading -> the key of the rows that it shows.
        column, title: the setting, and what to call it.
        cell: the text of a row.
    """
    rows, lines = list(rows), {}
    values = sorted({row[column] for row in rows})
    for row in rows:
        lines.setdefault(tuple(str(row[key]) for key in names.values()), {})[row[column]] = cell(row)
    header = [*names, *(f"{title} {value:g}" for value in values)]
    return table(header, [[*line, *(cells.get(value, "") for value in values)] for line, cells in lines.items()])


Line = tuple[list[float], list[float], dict[str, Any]]
"""Values of x and y, and options of matplotlib's `plot`."""


def plot(panels: list[tuple[dict[str, Any], dict[str, Line]]], columns: int, file: Path, title: str = "") -> None:
    """Draw panels, each of settings of its axes and lines by name; the names stand beside them all."""
    figure = agg_figure(5.5 * columns + 2, 4.3 * -(-len(panels) // columns))
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axis, (settings, lines) in zip(axes, panels, strict=False):
        for name, (x, y, options) in lines.items():
            axis.plot(x, y, label=name, **options)
        axis.set(xscale="log", **settings)
        axis.grid(alpha=0.3)
    names = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
