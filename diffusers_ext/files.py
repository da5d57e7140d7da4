"""The one way to replace what lies on a disk: written aside, then renamed, so that it is complete or as it was before.

    replacing(file)            a file
    replacing_folder(folder)   a folder as a whole
    replacing_entries(folder)  the entries of a folder that are written anew; the others stay

Each is a context that gives the path to write to. If the body raises, what was there before stays. A full disk is an
OSError in all of them, also where safetensors reports it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial-"
"""The names of incomplete files and folders begin like this."""
_SAVING, _OLD = ".saving-", "old-"


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """A context in which an error that safetensors makes of a failed write is an OSError, as all others are."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{target}: {error}") from error


@contextmanager
def replacing(file: str | os.PathLike) -> Iterator[Path]:
    """Give the path of a new file that replaces `file` at the end; make its folder if it is missing."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{PARTIAL}{os.getpid()}-{file.name}")
    try:
        with _disk_errors(file):
            yield aside
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def write_file(file: str | os.PathLike, content: bytes | str) -> None:
    """Replace the content of a file; text is UTF-8."""
    with replacing(file) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give the path of a new folder that replaces `folder` at the end, once it is on the disk."""
    partial, old = folder.with_name(f"{PARTIAL}{folder.name}"), _old(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with _disk_errors(folder):
            yield partial
        for written in (*partial.rglob("*"), partial):
            _to_disk(written)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        _to_disk(folder.parent)
    finally:
        recover_folder(folder)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Put a folder back that `replacing_folder` has moved aside, if the process was killed between its two renames."""
    if _old(folder).exists() and not folder.exists():
        os.replace(_old(folder), folder)


def remove_partial(folder: Path) -> None:
    """Delete what killed processes have left incomplete in a folder; an entry that `replacing_entries` had moved aside
    returns to its place if no new one has taken it."""
    for old in folder.glob(f"{_SAVING}*/{_OLD}*"):
        if not (target := folder / old.name.removeprefix(_OLD)).exists():
            os.replace(old, target)
    for left in (*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{_SAVING}*")):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


@contextmanager
def replacing_entries(folder: str | Path) -> Iterator[Path]:
    """Give the path of a new folder whose entries replace those of the same names in `folder` at the end, the index of
    a pipeline last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_SAVING) as aside:
        with _disk_errors(folder):
            yield Path(aside)
        for entry in sorted(Path(aside).iterdir(), key=lambda e: e.name == "model_index.json"):
            target = folder / entry.name
            if target.is_dir():
                os.replace(target, Path(aside) / f"{_OLD}{entry.name}")
            os.replace(entry, target)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{PARTIAL}old-{folder.name}")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- names ------------------------------------------------------------------------------------------------------------


def is_local(value: str) -> bool:
    """Return whether a name is that of a file or folder on this machine, and not one of the Hub."""
    return value.startswith(("/", "~", ".")) or os.path.isabs(value) or os.path.exists(value)


def shown(value: str) -> str:
    """Return a name that can be published: of a local path only the base name."""
    return os.path.basename(os.path.abspath(os.path.expanduser(value))) if is_local(value) else value
