"""Pipelines: each differs from the others in where its chain starts."""

from .pipeline_class_conditional import ClassConditionalPipeline
from .pipeline_reflected import ReflectedPipeline
from .pipeline_short_time import ShortTimePipeline, short_time_pipeline

__all__ = ["ClassConditionalPipeline", "ReflectedPipeline", "ShortTimePipeline", "short_time_pipeline"]
