"""Encode once: latents and conditions of all images on the disk, so that the encoders need not be on the GPU.

    cache = LatentCache(subject, source, transform, root, mark)
    cache.fill(accelerator, batch_size)                     # with a bar; a stopped one goes on where it was
    x0, condition = cache.rows(batch.indices, generator)

The cache lies beside that of `datasets`, in a folder whose name depends on the weights of the encoders, the data, the
resolution and the precision: another run with the same finds it. A file holds the rows of `ROWS` images, is written
aside and renamed, so that several runs may fill one cache. Of an image it holds the law of its latents, and not a draw:
x0 is drawn anew each time, by the same random numbers as without a cache, and is the same up to rounding.

Images are always cut in the centre and not mirrored: that is checked where the arguments are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..conditions import Condition
from ..errors import InputError
from ..files import PARTIAL, replacing
from ..progress import progress_bar
from ..subjects import TextToImage
from ..weights import sample_of
from .batches import collate, read_image
from .images import Transform
from .sources import ImageSource

ROWS = 128
STALE_SECONDS = 3600
"""A half-written file of this age is left over by a run that was killed."""
LAW, CONDITION = "law", "condition"


class LatentCache:
    """The laws of the latents, and the conditions, of all images of a source.

    Args:
        subject: encodes them.
        source, transform: the images; the transform must cut the centre and mirror nothing.
        root: the folder of all caches.
        mark: what tells the data from others, see `mark_of`.
        n: only the first so many images are trained on.
    """

    def __init__(
        self,
        subject: TextToImage,
        source: ImageSource,
        transform: Transform,
        root: Path,
        mark: Mapping[str, Any],
        n: int | None = None,
    ) -> None:
        self.subject, self.source, self.transform = subject, source, transform
        self.n = len(source) if n is None else min(n, len(source))
        captions = hashlib.sha256("\n".join(source.captions or []).encode()).hexdigest()
        encoders = [(name, part) for name, part in subject.pipeline.components.items() if isinstance(part, nn.Module)]
        weights = {
            name: hashlib.sha256(sample_of(part).numpy().tobytes()).hexdigest()
            for name, part in encoders
            if part is not subject.network
        }
        precision = [str(part.dtype) for name, part in encoders]
        told: list[Any] = [type(subject.pipeline).__name__, weights, precision, str(transform), captions, dict(mark)]
        told.append(subject.told_guidance)
        key = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:20]
        self.folder = root / "diffusers_ext" / key
        self._files: dict[int, Any] = {}

    def fill(self, accelerator: Any, batch_size: int) -> None:
        """Encode what is not there yet; each process its share.

        Raises:
            InputError: the disk has not enough space.
        """
        parts = range(0, self.n, ROWS)
        if missing := sum(not self._file(first).is_file() for first in parts):
            self._require_space(missing * ROWS)
        accelerator.wait_for_everyone()
        # Each process looks at parts of its own: another run may fill some meanwhile.
        own = list(parts[accelerator.process_index :: accelerator.num_processes])
        own = [first for first in own if not self._file(first).is_file()]
        quiet = not accelerator.is_main_process
        if not quiet:
            self._remove_stale()
        for first in progress_bar(own, "encoding images and captions", unit=f"x{ROWS}", shown=bool(own) and not quiet):
            rows = range(first, min(first + ROWS, len(self.source)))
            encoded = [self._encoded(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
            tensors = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._file(first)) as aside:
                save_file(tensors, aside)
        accelerator.wait_for_everyone()

    def _remove_stale(self) -> None:
        """Remove what killed runs have left half written; a file that another run writes now is younger."""
        for left in self.folder.glob(f"{PARTIAL}*"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()

    def rows(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """Return x0 and the conditions of some images, on the network's device.

        Args:
            indices: (B,), the numbers of the images.
            generator: draws x0 from its law.
        """
        found = [self._row(index) for index in indices.tolist()]
        device = self.subject.network.device
        tensors = {name: torch.stack([row[name] for row in found]).to(device, non_blocking=True) for name in found[0]}
        law = {name.removeprefix(f"{LAW}/"): value for name, value in tensors.items() if name.startswith(LAW)}
        condition: Condition = {}
        for name, value in tensors.items():
            kind, *path, last = name.split("/")
            if kind == CONDITION:
                place = condition
                for step in path:
                    place = place.setdefault(step, {})
                place[last] = value
        return self.subject.drawn(law, generator), condition

    def _file(self, first: int) -> Path:
        return self.folder / f"rows-{first:08d}.safetensors"

    def _row(self, index: int) -> dict[str, Tensor]:
        first = index - index % ROWS
        if first not in self._files:
            self._files[first] = safe_open(self._file(first), framework="pt")
        file = self._files[first]
        return {name: file.get_slice(name)[index - first] for name in file.keys()}  # noqa: SIM118

    @torch.no_grad()
    def _encoded(self, rows: range) -> dict[str, Tensor]:
        samples = [read_image(self.source, i, len(self.source), self.transform, torch.Generator()) for i in rows]
        images = collate(samples)
        law = self.subject.law(images.images.to(self.subject.autoencoder.device))
        tensors = {f"{LAW}/{name}": value for name, value in law.items()}
        tensors |= _flat(self.subject.conditions(images), CONDITION)
        return {name: value.contiguous().cpu() for name, value in tensors.items()}

    def _require_space(self, rows: int) -> None:
        one = sum(value.numel() * value.element_size() for value in self._encoded(range(1)).values())
        place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if rows * one > free:
            raise InputError(
                f"--cache_latents needs {rows * one / 2**30:.1f} GiB in {place}, and {free / 2**30:.1f} GiB are free: "
                f"name another --cache_dir, or leave it out"
            )


def _flat(tree: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{path}/{name}") if isinstance(value, Mapping) else {f"{path}/{name}": value}
    return found
