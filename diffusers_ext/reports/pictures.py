"""Pictures of samples."""

from __future__ import annotations

import numpy as np
from PIL import Image


def image_grid(images: np.ndarray, columns: int | None = None, min_size: int = 64) -> Image.Image:
    """Put images (n, H, W, C) in [0, 1] side by side; enlarge small ones by a whole factor to at least `min_size`."""
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    factor = max(1, -(-min_size // height))
    grid = Image.new("RGB", (columns * width * factor, -(-n // columns) * height * factor), "white")
    for i, tile in enumerate((images * 255).round().astype(np.uint8)):
        picture = Image.fromarray(tile.squeeze()).convert("RGB")
        picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        grid.paste(picture, (i % columns * width * factor, i // columns * height * factor))
    return grid
