"""One run for a folder: two would write into one log and delete each other's checkpoints.

A file in the folder names the process that writes there. It is created by a hard link, which only one of two processes
can make, on a network file system as well. A process that was killed leaves it behind, so that others must recognise a
lock without an owner: on the same machine by the process, which is gone or is a later one of the same number; from
another machine by the time, as the owner touches the file every `_BEAT` seconds.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from ..errors import InputError

NAME = ".lock.json"
_BEAT = 20.0
_SILENT = 300.0
"""A lock of another machine that was not touched for so many seconds has no owner."""


class RunLock:
    """Holds the lock of a folder until `release`, the end of a `with` block or of the process.

    Args:
        folder: the folder; it is made if it is missing.

    Raises:
        InputError: the folder cannot be made or written to, or another run writes into it; the message says which, and
            what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._me, self._held = folder / NAME, _identity(), True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take(folder)
        except OSError as error:
            raise InputError(f"--output_dir {folder} cannot be made or written to: {error}") from error
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        atexit.register(self.release)

    def _take(self, folder: Path) -> None:
        while not _created(self.path, self._me):
            owner = _read(self.path)
            if _is_alive(owner, self.path):
                self._held = False
                raise InputError(
                    f"another run writes into {folder}: process {owner.get('pid')} on {owner.get('host')}. Wait for "
                    f"its end, stop it, or name another --output_dir. If there is no such process, delete {self.path}"
                )
            _remove(self.path, owner)

    def _beat(self) -> None:
        while not self._stopped.wait(_BEAT):
            try:
                os.utime(self.path)
            except OSError:  # the folder is gone, or the disk cannot be reached for a while
                continue

    def release(self) -> None:
        """Give the lock back; a second call, or one in a child process, does nothing."""
        if self._held and os.getpid() == self._me["pid"]:
            self._held = False
            self._stopped.set()
            atexit.unregister(self.release)
            _remove(self.path, self._me)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str:
    """Return what tells numbers of processes apart: the boot of the machine, and the container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """Return when a process was started; `None` if there is none of this number."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _is_alive(owner: dict[str, Any], path: Path) -> bool:
    """Return whether the owner of a lock still runs, and is another process than this one."""
    if owner.get("machine") != _machine():
        return _age(path) < _SILENT
    if owner.get("pid") == os.getpid() or not isinstance(owner.get("pid"), int):
        return False
    started = _started(owner["pid"])
    return started is not None and abs(started - owner.get("started", 0.0)) < 1


def _age(path: Path) -> float:
    """Return how long ago a file was touched, by the clock of its own file system."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{NAME}-") as now:
        os.utime(now.name)
        try:
            return os.stat(now.name).st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")


def _created(path: Path, content: dict[str, Any]) -> bool:
    """Create the file with its whole content, unless there is one; return whether it was created."""
    aside = path.with_name(f"{NAME}-{socket.gethostname()}-{os.getpid()}")
    aside.write_text(json.dumps(content))
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("x") as file:
                file.write(json.dumps(content))
        except FileExistsError:
            return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a lock; that of one which is gone, or is none, has no owner."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"machine": _machine()}
    return owner if isinstance(owner, dict) else {"machine": _machine()}


def _remove(path: Path, owner: dict[str, Any]) -> None:
    """Remove the lock of this owner: it is moved aside first, as another process may just have replaced it."""
    aside = path.with_name(f"{NAME}-{socket.gethostname()}-{os.getpid()}")
    try:
        os.rename(path, aside)
    except OSError:
        return
    if _read(aside) not in (owner, {"machine": _machine()}):
        os.replace(aside, path)
    aside.unlink(missing_ok=True)
