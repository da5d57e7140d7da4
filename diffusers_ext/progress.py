"""What is seen while work is done: bars of at most 100 columns, and a line before work that cannot be counted."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

WIDTH = 100


def progress_bar(
    iterable: Iterable[Any] | None = None, desc: str | None = None, *, shown: bool = True, **options: Any
) -> Any:
    """Return a bar of tqdm that fits the terminal and WIDTH columns; in a notebook it has the width of the cell.

    Args:
        iterable: what is counted, and passed on; without it say `total`.
        desc: what is done.
        shown: whether the bar is shown.
        options: others of tqdm.
    """
    if "ipykernel" not in sys.modules:
        options["ncols"] = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    return tqdm(iterable, desc, disable=not shown, **options)


def say(what: str, *, shown: bool = True) -> None:
    """Write a line that says what is being done now, beside the bars and without breaking one."""
    if shown:
        tqdm.write(f"{what} ...", file=sys.stderr)
