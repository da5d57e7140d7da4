"""What a script prints instead of a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong, where, and what to do."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a script's `main` end with the message of an `InputError` or `TrainingStopped`; no traceback on Ctrl-C."""

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
    """Training ended before its time; the message says why and how to go on, `code` is the exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
