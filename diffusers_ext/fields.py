"""Fields of argument classes: each with the text that --help shows and, if it is a number, its range.

learning_rate: float = arg(1e-4, "Peak learning rate.", above=0)
patience: int | None = arg(None, "Stop after so many validations.", at_least=1)      # None is always allowed
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any

from .errors import InputError
from .ranges import Range


class _Help(str):
    """A text for --help that also holds the range: the parser would take further entries of the metadata for its own
    options."""

    allowed: Range


def arg(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Return a field of an argument class.

    Args:
        default: the value of an argument that is not given.
        help: the text that --help shows, to which the range is added.
        above, at_least, below, at_most: the range of a number, see `Range`.
    """
    allowed = Range(above, at_least, below, at_most)
    text = _Help(f"{help} [{allowed}]" if str(allowed) else help)
    text.allowed = allowed
    return field(default=default, metadata={"help": text})


def range_of(one: Field[Any]) -> Range:
    """Return the range of a field; that of one without bounds is all finite numbers."""
    return getattr(one.metadata.get("help"), "allowed", Range())


@dataclass
class Ranged:
    """The base of all argument classes, which checks their numbers and refuses empty texts.

    Raises:
        InputError: a number is not in its range, or a text is empty.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            value, allowed = getattr(self, one.name), range_of(one)
            if value == "":
                raise InputError(f"--{one.name} is empty: give it a value, or leave it out")
            if isinstance(value, int | float) and not isinstance(value, bool) and value not in allowed:
                raise InputError(allowed.refusal(f"--{one.name}", value))
