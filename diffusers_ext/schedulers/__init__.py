"""Schedulers that take the place of diffusers' own."""

from .scheduling_reflected import ReflectedScheduler

__all__ = ["ReflectedScheduler"]
