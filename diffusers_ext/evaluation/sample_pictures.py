"""Pictures of samples: the models side by side, and the samples that are nearest to a training image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..files import replacing
from ..metrics import nearest
from ..reports.pictures import image_grid
from .measures import Judge
from .real_images import RealImages
from .samples import Drawing, file_name

GRID_IMAGES = 10


def grids(drawings: Sequence[Drawing], drawn: Path, folder: Path, real: Tensor) -> dict[str, Image.Image]:
    """Return a grid for each scheduler and number of steps, by title: a row for each model, a column for each noise.
    The last row is of real images.

    Args:
        real: images in [-1, 1], (n, C, H, W).
        drawn: the folder of the drawings.
        folder: where the grids are saved.
    """
    groups: dict[tuple[str, int], list[Drawing]] = {}
    for drawing in drawings:
        groups.setdefault((drawing.scheduler_name, drawing.steps), []).append(drawing)
    pictures: dict[str, Image.Image] = {}
    for (scheduler, steps), group in groups.items():
        rows = [next(drawing.images(drawn))[:GRID_IMAGES] / 255 for drawing in group]
        columns = len(rows[0])
        if len(real) >= columns:
            rows.append(real[:columns] / 2 + 0.5)
        picture = image_grid(torch.cat(rows).movedim(1, 3).numpy(), columns)
        with replacing(folder / f"{file_name(scheduler)}-{steps}.png") as aside:
            picture.save(aside)
        names = [*(drawing.model for drawing in group), *["real images"][: len(rows) - len(group)]]
        pictures[f"{scheduler}, {steps} steps. Rows: {', '.join(names)}"] = picture
    return pictures


def nearest_to_training(
    drawing: Drawing, features: Tensor, real: RealImages, judge: Judge, drawn: Path, folder: Path
) -> tuple[str, Image.Image]:
    """Return title and picture of the samples that are nearest to a training image; each stands above that image.

    Args:
        features: features of the samples, (n, d).
        drawn, folder: as for `grids`.
    """
    found = nearest(features.to(judge.manifold.training.device), judge.manifold.training)
    distances, indices = found.distances.cpu(), found.indices.cpu()
    closest = distances.argsort()[:GRID_IMAGES]
    samples = torch.cat(list(drawing.images(drawn)))[closest].float() / 255
    images = torch.cat([samples, real.training.images[indices[closest]] / 2 + 0.5])
    picture = image_grid(images.movedim(1, 3).numpy(), len(closest))
    with replacing(folder / f"nearest-{drawing.name.rsplit('-', 1)[0]}.png") as aside:
        picture.save(aside)
    how = f"{drawing.model}, {drawing.scheduler_name}, {drawing.steps} steps"
    return f"{how}: the samples nearest to a training image, and below them that image", picture
