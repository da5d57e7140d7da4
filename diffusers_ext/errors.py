"""Errors of the user or of the surroundings, for which a script prints a message instead of a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

NOT_PUSHED = 3
"""The exit status of a script whose result is on the disk and not on the Hub."""
SIGNALLED = 128
"""Exit statuses from here on are those of signals: this plus the number of the signal."""


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong, where, and what to do."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a script's `main` to end with the message of an `InputError` or `TrainingStopped`, and at Ctrl-C without
    a traceback."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except InputError as error:
            sys.exit(f"error: {error}")
        except TrainingStopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.code)
        except KeyboardInterrupt:
            sys.exit("interrupted")

    return run


class TrainingStopped(Exception):
    """Training has ended early; the message says why and how to go on, and `code` is the exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
