"""What benchmarks of trained models share: train one by a script of the project, draw from it, judge what it draws."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_ext.extractors import train_classifier
from diffusers_ext.metrics import frechet_distance, precision_recall
from diffusers_ext.training import TrainingArguments
from diffusers_ext.training.data import first_images
from diffusers_ext.training.images import Transform, load_images, load_validation_images

ROOT = Path(__file__).resolve().parents[1]


def train(script: str, folder: Path, arguments: list[str]) -> None:
    """By `training/<script>` into `folder`; what is there is used again, and a killed run goes on."""
    if not (folder / "model_index.json").exists():
        command = [sys.executable, str(ROOT / "training" / script), "--resume_from_checkpoint", "latest", *arguments]
        subprocess.run([*command, "--output_dir", str(folder)], check=True)


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

    def precision_recall(self, images: Tensor) -> tuple[float, float]:
        """Of images as for `distance`, against as many held-out ones at random, or all if there are fewer."""
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0)).to(self.real.device)
        return precision_recall(self._features(images), self.real[order[: len(images)]])

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
