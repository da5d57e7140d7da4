"""Pipelines: each differs from the others in where its chain starts."""

from .pipeline_class_conditional import ClassConditionalPipeline

__all__ = ["ClassConditionalPipeline"]
