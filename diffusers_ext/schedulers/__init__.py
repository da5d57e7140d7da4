"""Schedulers that take the place of diffusers' own."""

from .scheduling_calibrated import CalibratedScheduler, calibrated_class, save_tables
from .scheduling_reflected import ReflectedScheduler

__all__ = ["CalibratedScheduler", "ReflectedScheduler", "calibrated_class", "save_tables"]
