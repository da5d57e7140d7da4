"""The one way to replace what lies on a disk: written aside, then renamed, so that it is complete or as it was before.

    replacing(file)            a file
    replacing_folder(folder)   a folder as a whole
    replacing_files(folder)    the files of a folder that are written anew; the others stay

Each is a context that gives the path to write to. If the body raises, what was there before stays. A full disk is an
OSError in all of them, also where safetensors reports it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial-"
"""The names of incomplete files and folders begin like this."""
WRITTEN = ".written.json"
"""The list of the files in a folder that `replacing_files` has written."""
_SAVING = ".saving-"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """A context in which an error that safetensors makes of a failed write is an OSError, as all others are."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(*([int(found[1])] if found else []), f"{target}: {error}") from error


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


RESULTS = ("model_index.json", "pytorch_lora_weights.safetensors")
"""The files of which a folder with the result of a training has one: the index of a pipeline, or a LoRA."""


def holds_result(folder: Path) -> bool:
    """Return whether a folder holds a pipeline or a LoRA."""
    return any((folder / name).is_file() for name in RESULTS)


def recover_folder(folder: Path) -> None:
    """Put a folder back that `replacing_folder` has moved aside, if the process was killed between its two renames."""
    if _old(folder).exists() and not folder.exists():
        os.replace(_old(folder), folder)


def remove_partial(folder: Path) -> None:
    """Finish, or take back, what killed processes have left in a folder."""
    for aside in folder.glob(f"{_SAVING}*"):
        if (aside / WRITTEN).is_file():
            _move_in(aside, folder)
        shutil.rmtree(aside, ignore_errors=True)
    for old in folder.glob(f"{PARTIAL}old-*"):
        recover_folder(folder / old.name.removeprefix(f"{PARTIAL}old-"))
    for left in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


@contextmanager
def replacing_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Give the path of a new folder whose files replace those of the same names in `folder` at the end, one by one.

    Each file is the old or the new one at any moment, so that a saved pipeline opens; a network whose weights are in
    several files may have some of each until all are moved. The list of the files, `WRITTEN`,
    is complete before the first one is moved: `remove_partial` finishes what a kill has interrupted. What an earlier
    call has written and this one has not is deleted; other files stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=_SAVING))
    try:
        with _disk_errors(folder):
            yield aside
        for file in _files(aside):
            _to_disk(file)
        list_written(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _move_in(aside, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _move_in(aside: Path, folder: Path) -> None:
    """Move the files of a complete save to their places, the index of a pipeline last."""
    new = written(aside)
    for older in {*folder.glob(f"{_SAVING}*")} - {aside}:  # its moves had failed
        shutil.rmtree(older, ignore_errors=True)
    for name in sorted(new, key=lambda name: name in RESULTS):
        if (aside / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / name, folder / name)
    beside = (path for name in new for path in _weights_beside(folder / name))
    old = written(folder) or {path.relative_to(folder).as_posix() for path in beside}
    _delete(folder, old - new)
    os.replace(aside / WRITTEN, folder / WRITTEN)


def list_written(folder: Path) -> None:
    """Write the list of all files in a folder as those that `remove_written` may delete."""
    write_file(folder / WRITTEN, json.dumps(sorted(_names(folder))))


def not_written(folder: Path) -> list[Path]:
    """Return the files in a folder with a list that are not in it, relative to the folder: they are the user's own."""
    names = written(folder)
    return [Path(name) for name in sorted(_names(folder) - names - {WRITTEN})] if names else []


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in _files(folder)}


def remove_written(folder: Path) -> None:
    """Delete what `replacing_files` has written into a folder, and the folders that are empty then."""
    _delete(folder, written(folder) | {WRITTEN})


def _delete(folder: Path, names: set[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for parent in sorted({(folder / name).parent for name in names}, key=lambda path: -len(path.parts)):
        with suppress(OSError):  # there are other files
            parent.rmdir()


def written(folder: Path) -> set[str]:
    """Return the names of the files that `replacing_files` has written into a folder."""
    try:
        names = json.loads((folder / WRITTEN).read_text())
    except (OSError, ValueError):
        return set()
    # A list of somebody else's that names files outside of the folder is none of ours.
    inside = (name for name in names if isinstance(name, str) and not Path(name).is_absolute())
    return {name for name in inside if ".." not in Path(name).parts}


def _weights_beside(file: Path) -> list[Path]:
    """Return the weights in the folder of new ones: diffusers would open old ones of another format first."""
    if not file.name.endswith(_WEIGHTS):
        return []
    return [path for path in file.parent.iterdir() if path.name.endswith(_WEIGHTS)]


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
