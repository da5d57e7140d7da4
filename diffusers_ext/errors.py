"""Errors of the user or of the surroundings, for which a script prints a message instead of a traceback."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable
from pathlib import Path

NOT_PUSHED = 3
"""The exit status of a script whose result is on the disk and not on the Hub."""
SIGNALLED = 128
"""Exit statuses from here on are those of signals: this plus the number of the signal."""


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong, where, and what to do."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a script's `main` to end with the message of an `InputError` or `TrainingStopped`, or of a `ValueError`
    that this package raises, and at Ctrl-C without a traceback."""

    @functools.wraps(main)
    def run() -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show ends no run
                stream.reconfigure(errors="backslashreplace")
        try:
            main()
        except ValueError as error:
            if not (isinstance(error, InputError) or _is_ours(error)):
                raise
            sys.exit(f"error: {error}")
        except TrainingStopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.code)
        except KeyboardInterrupt:
            sys.exit("interrupted")

    return run


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
