"""Errors of the user or of the surroundings, for which a script prints a message instead of a traceback."""

from __future__ import annotations

import contextlib
import dis
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOT_PUSHED = 3
"""The exit status of a script whose result is on the disk and not on the Hub."""
SIGNALLED = 128
"""Exit statuses from here on are those of signals: this plus the number of the signal."""


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What asks a run to stop: Ctrl-C, the end of a job, and SLURM's warning before it."""


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong, where, and what to do."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a script's `main` to end with the message of an `InputError` or `TrainingStopped`, or of a `ValueError`
    that this package raises, and at Ctrl-C without a traceback."""

    @functools.wraps(main)
    def run() -> None:
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
        try:
            main()
        except ValueError as error:
            if not (isinstance(error, InputError) or _is_ours(error)):
                raise
            sys.exit(f"error: {error}")
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            sys.exit(f"error: {error}; what was complete stays as it was: mend that and repeat the command")
        except TrainingStopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.code)
        except KeyboardInterrupt:
            sys.exit("interrupted")
        finally:
            sys.stdout, sys.stderr = streams

    return run


class Lasting:
    """A stream of text that ends no run: what a terminal cannot show is escaped, and once the terminal or the pipe is
    gone, what is written is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Send what follows, and what still waits in buffers, nowhere."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _is_ours(error: ValueError) -> bool:
    """Return whether a `raise` of this package made the error; others are of no use to the user without a traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or type(error) is not ValueError:
        return False
    code = trace.tb_frame.f_code
    raised = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # and not an `int("x")` or `zip` in this line
    return raised and Path(__file__).parent in Path(code.co_filename).parents


class TrainingStopped(Exception):
    """Training has ended early; the message says why and how to go on, and `code` is the exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
