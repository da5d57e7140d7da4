"""Fields of argument classes, and the checks that these share."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from .errors import InputError


def arg(default: Any, help: str) -> Any:
    """Return a field of an argument class, with the text that --help shows."""
    return field(default=default, metadata={"help": help})


def at_least(args: Any, name: str, least: float, optional: bool = False) -> None:
    value = getattr(args, name)
    if not ((value is None and optional) or (value is not None and value >= least)):
        raise InputError(f"--{name} must be at least {least}, got {value}")
