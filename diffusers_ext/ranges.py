"""The ranges of numbers, in a form that NaN fails: each number has one, which is declared once.

    require("rtol", rtol, above=0)                      # ValueError: rtol must be above 0, got nan

The arguments of the scripts declare theirs with the field, see `fields.arg`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Range:
    """An interval of numbers. Infinity lies in it only where it is a bound by `at_least` or `at_most`, NaN never.

    Attributes:
        above, at_least: the lower bound, without or with the bound itself.
        below, at_most: the upper bound, likewise.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        over = value > -inf if self.at_least is None else value >= self.at_least
        under = value < inf if self.at_most is None else value <= self.at_most
        between = (self.above is None or value > self.above) and (self.below is None or value < self.below)
        return over and under and between

    def __str__(self) -> str:
        """The range in words; empty without bounds."""
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        said = {words: bound for words, bound in bounds.items() if bound is not None and abs(bound) < inf}
        return " and ".join(
            f"{words} {bound:{'g' if isinstance(bound, float) else 'd'}}" for words, bound in said.items()
        )

    def refusal(self, name: str, value: object) -> str:
        """Say that a value is not in the range."""
        needed = [str(self)] if str(self) else []
        needed += ["finite"] if value in (inf, -inf) or not needed else []
        return f"{name} must be {' and '.join(needed)}, got {value}"


def require(
    name: str,
    value: float | None,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Check that a number, if it is given, is in a range.

    Raises:
        ValueError: it is not, or it is NaN; the message names the number and the range.
    """
    allowed = Range(above, at_least, below, at_most)
    if value is not None and value not in allowed:
        raise ValueError(allowed.refusal(name, value))
