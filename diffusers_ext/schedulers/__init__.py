"""Schedulers that are used like those of diffusers, and sample reflected, short or calibrated processes."""

from typing import Any

from .derived import by_name
from .scheduling_calibrated import CALIBRATED_SCHEDULERS, CalibratedScheduler, calibrated_class, save_tables
from .scheduling_reflected import ReflectedScheduler
from .scheduling_short_time import SHORT_TIME_SCHEDULERS, ShortTimeScheduler

__all__ = [
    "FAMILIES",
    "CalibratedScheduler",
    "ReflectedScheduler",
    "ShortTimeScheduler",
    "calibrated_class",
    "save_tables",
]

FAMILIES: dict[str, Any] = by_name(CALIBRATED_SCHEDULERS) | by_name(SHORT_TIME_SCHEDULERS)
"""The classes of the two families of subclasses, by their own names."""
