"""Pipelines: each differs from the others in where its chain starts."""

from .pipeline_class_conditional import ClassConditionalPipeline
from .pipeline_reflected import ReflectedPipeline
from .pipeline_short_time import ShortTimePipeline
from .short_time_text import NAMES as SHORT_TIME_TEXT_PIPELINES
from .short_time_text import short_time_text_class

__all__ = [
    "SHORT_TIME_TEXT_PIPELINES",
    "ClassConditionalPipeline",
    "ReflectedPipeline",
    "ShortTimePipeline",
    "short_time_text_class",
]
