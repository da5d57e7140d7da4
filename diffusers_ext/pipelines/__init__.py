"""Pipelines: each differs from the others in where its chain starts."""

from .pipeline_class_conditional import ClassConditionalPipeline
from .pipeline_reflected import ReflectedPipeline
from .pipeline_short_time import ShortTimePipeline

__all__ = ["ClassConditionalPipeline", "ReflectedPipeline", "ShortTimePipeline"]
