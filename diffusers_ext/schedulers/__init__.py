"""Schedulers that take the place of diffusers' own."""

from .scheduling_calibrated import CalibratedScheduler, calibrated_class, save_tables
from .scheduling_reflected import ReflectedScheduler
from .scheduling_short_time import ShortTimeScheduler

__all__ = ["CalibratedScheduler", "ReflectedScheduler", "ShortTimeScheduler", "calibrated_class", "save_tables"]
