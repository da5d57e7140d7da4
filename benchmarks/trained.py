"""What benchmarks of trained models share: train one by a script of the project, draw from it, judge what it draws."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_ext.data.batches import first_images
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import load_images, load_validation_images
from diffusers_ext.evaluation import MeasureArguments
from diffusers_ext.extractors import train_classifier
from diffusers_ext.metrics import frechet_distance
from diffusers_ext.training import TrainingArguments

ROOT = Path(__file__).resolve().parents[1]


class OutOfTime(Exception):
    """The deadline is over."""


def train(script: str, folder: Path, arguments: list[str], *, deadline: float = math.inf, **record: Any) -> Path:
    """By `training/<script>` into `folder`; what is there is used again, and a killed run goes on.

    Args:
        deadline: of `time.monotonic`.
        record: more of what FOLDER.json holds beside it: the command, and the seconds of all its pieces.

    Raises:
        OutOfTime: the run has written a checkpoint instead.
        SystemExit: it has failed, or the folder is of another command.
    """
    folder = folder.resolve()
    command = [sys.executable, str(ROOT / "training" / script), "--resume_from_checkpoint", "latest"]
    command += [*arguments, "--output_dir", str(folder)]
    shown = [script, *(word if not Path(word).is_absolute() else Path(word).name for word in command[4:])]
    file = folder.with_name(f"{folder.name}.json")
    before = json.loads(file.read_text()) if file.exists() else {"command": shown, "seconds": 0.0}
    if sorted(before["command"]) != sorted(shown):
        sys.exit(f"error: {folder} is of another run, with other arguments: use another --output_dir")
    if (folder / "model_index.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    run = subprocess.Popen(command)
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


def evaluate(models: dict[str, Path], folder: Path, arguments: list[str]) -> None:
    """By `training/evaluate.py` into `folder`; the first of the models is the baseline."""
    named = ["--pretrained_model_name_or_path", *map(str, models.values()), "--names", *models]
    command = [sys.executable, str(ROOT / "training" / "evaluate.py"), *named, "--output_dir", str(folder)]
    subprocess.run([*command, *arguments], check=True)


def of_the_data(for_training: list[str]) -> list[str]:
    """Those of a training script's arguments that an evaluation takes, too."""
    words = [word for argument in for_training for word in argument.split("=", 1)]
    known = {f"--{f.name}" for f in fields(MeasureArguments)} - {"--train_batch_size", "--seed"}
    return [word for name, value in pairwise(words) if name in known for word in (name, value)]


class Judge:
    """Frechet distance of a small classifier's features to held-out images.

    Attributes:
        seen, held_out: the images in [-1, 1] and their labels, the former in random order.
    """

    def __init__(self, data: TrainingArguments, size: int, channels: int, device: str, held_out: int = 5000) -> None:
        source, unseen = load_images(data, "train"), load_validation_images(data)
        transform = Transform(size, channels)
        seen = first_images(source, len(source), transform)
        order = torch.randperm(len(seen.images), generator=torch.Generator().manual_seed(0))
        self.seen, self.seen_labels = seen.images[order].to(device), seen.labels[order].to(device)
        self.held_out = first_images(unseen, held_out, transform).images.to(device)
        self.classifier = train_classifier(seen.images.to(device), seen.labels.to(device), len(source.class_names))
        self.real = self._features(self.held_out)

    def distance(self, images: Tensor) -> float:
        """Of images (n, C, H, W) in [-1, 1]; depends on n, so compare at equal n."""
        return frechet_distance(self._features(images), self.real)

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.classifier.features(part) for part in images.split(500)])


@torch.no_grad()
def draw(pipeline: Any, n: int, steps: int, **options: Any) -> Tensor:
    """(n, C, H, W) in [-1, 1], of an unconditional pipeline; the noise of batch i is that of seed i."""
    images = []
    for i in range(0, n, 100):
        options |= {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(i), "output_type": "pt"}
        images.append(pipeline(batch_size=min(100, n - i), **options).images)
    return torch.cat(images) * 2 - 1
