"""Files that are complete or absent at any time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def write_aside(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent at any time."""
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    aside.write_bytes(content)
    os.replace(aside, path)


def save_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """`save_pretrained`, written aside and moved into place entry by entry; other files in the folder stay."""
    with _moved_into(Path(folder)) as aside:
        pipeline.save_pretrained(aside)


def copy_pipeline(source: Path, folder: Path, leave_out: Sequence[str] = ()) -> None:
    """Copy what lies in a pipeline's folder into another, in the same way."""
    with _moved_into(folder) as aside:
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns(*leave_out), dirs_exist_ok=True)


@contextmanager
def _moved_into(folder: Path) -> Iterator[Path]:
    """A folder whose entries are moved to `folder` at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        yield Path(aside)
        for entry in sorted(Path(aside).iterdir(), key=lambda e: e.name == "model_index.json"):
            target = folder / entry.name
            if target.is_dir():
                os.replace(target, Path(aside) / f"old-{entry.name}")
            os.replace(entry, target)


def is_local(value: str) -> bool:
    return value.startswith(("/", "~", ".")) or os.path.isabs(value) or os.path.exists(value)


def shown(value: str) -> str:
    """A name as others may see it: a local path by its base name."""
    return os.path.basename(os.path.abspath(os.path.expanduser(value))) if is_local(value) else value
