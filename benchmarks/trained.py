"""What benchmarks of trained models share: train one by a script of the project, load it, and the images beside it."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import DEVICE
from torch import Tensor

from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.batches import Images
from diffusers_ext.evaluation import MeasureArguments, RealImages, load_real_images
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.files import holds_result
from diffusers_ext.subjects import Condition, Subject, load_pipeline, subject_of

ROOT = Path(__file__).resolve().parents[1]


class OutOfTime(Exception):
    """The deadline is over."""


def command(script: str, folder: Path, arguments: Iterable[str]) -> list[str]:
    """The command of a run of `training/<script>` that goes on where an earlier one was stopped."""
    path, goes_on = str(ROOT / "training" / script), ("--resume_from_checkpoint", "latest")
    return [sys.executable, path, *goes_on, *arguments, "--output_dir", str(folder)]


def train(script: str, folder: Path, arguments: list[str], *, deadline: float = math.inf, **record: Any) -> Path:
    """Train by `training/<script>` into `folder`; what is there is used again, and a killed run goes on.

    FOLDER.json beside it records the command, the seconds of all its pieces, and `record`. At the `deadline`, of
    `time.monotonic`, the run writes a checkpoint and OutOfTime is raised; SystemExit where it fails, or where the
    folder is of another command.
    """
    folder = folder.resolve()
    words = command(script, folder, arguments)
    shown = [script, *(word if not Path(word).is_absolute() else Path(word).name for word in words[4:])]
    file = folder.with_name(f"{folder.name}.json")
    before = json.loads(file.read_text()) if file.exists() else {"command": shown, "seconds": 0.0}
    if sorted(before["command"]) != sorted(shown):
        sys.exit(f"error: {folder} is of another run, with other arguments: use another --output_dir")
    if holds_result(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    run = subprocess.Popen(words)
    try:
        code = run.wait(max(1.0, deadline - time.monotonic()) if math.isfinite(deadline) else None)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGTERM)  # it writes a checkpoint
        code = None
    finally:
        run.wait()
    seconds = before["seconds"] + time.monotonic() - start
    file.write_text(json.dumps({"command": shown} | record | {"seconds": seconds}, indent=1) + "\n")
    if code is None:
        raise OutOfTime
    if code != 0:
        sys.exit(f"error: {script} ended with status {code}")
    return folder


def load(name: str | Path, device: str = DEVICE) -> Subject:
    """A pipeline as it is sampled and measured: on a device, in evaluation mode, without gradients and bars."""
    subject = subject_of(subject_of(load_pipeline(str(name))).sampler().to(device))
    subject.pipeline.set_progress_bar_config(disable=True)
    subject.network.eval().requires_grad_(False)
    return subject


def of_the_data(for_training: list[str]) -> list[str]:
    """Those of a training script's arguments that an evaluation takes, too."""
    words = [word for argument in for_training for word in argument.split("=", 1)]
    known = {f"--{f.name}" for f in fields(MeasureArguments)} - {"--train_batch_size", "--seed"}
    return [word for name, value in pairwise(words) if name in known for word in (name, value)]


def held_out_images(for_training: list[str], subject: Subject, num_samples: int) -> RealImages:
    """The images that the arguments name, in the format of a model: all held-out ones are the reference, and as many
    training images as there are samples the floor."""
    args = parse_arguments(MeasureArguments, [*of_the_data(for_training), "--reference", "train"])
    real = load_real_images(args, *subject.image_format(args.resolution))
    described = f"{len(real.unseen.images)} held-out images"
    return replace(real, reference=real.unseen, floor=rows_of(real.training, 0, num_samples), described=described)


def batches(subject: Subject, images: Images, n: int, size: int = 50) -> Iterator[tuple[Tensor, Condition]]:
    """The first n images with their conditions, on the device of the network."""
    for first in range(0, min(n, len(images.images)), size):
        rows = rows_of(images, first, min(first + size, n))
        yield rows.images.to(subject.network.device), subject.conditions(rows)


def kept(kind: Any, folder: Path, make: Callable[[], Any]) -> Any:
    """The bridge or calibration in `folder`, on the device; it is made if there is none."""
    if not (folder / "config.json").exists():
        make().save_pretrained(folder)
    return kind.from_pretrained(folder).to(DEVICE)
