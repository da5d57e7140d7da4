"""Compare pipelines: what they draw, how likely held-out images are to them, and what it costs.

The script is `training/evaluate.py`.
"""

from ..reports.measured import Cell, Evaluation, Likelihood, Quality
from ..reports.model_index import push_model_index, write_model_index
from ..reports.page import markdown_table, write_report
from .measures import Manifold, MeasureArguments, RealImages, likelihood, load_real_images, quality
from .samples import (
    OWN,
    Drawing,
    file_name,
    pipeline_fingerprint,
    steps_for,
    swap_scheduler,
)

__all__ = [
    "OWN",
    "Cell",
    "Drawing",
    "Evaluation",
    "Likelihood",
    "Manifold",
    "MeasureArguments",
    "Quality",
    "RealImages",
    "file_name",
    "likelihood",
    "load_real_images",
    "markdown_table",
    "pipeline_fingerprint",
    "push_model_index",
    "quality",
    "steps_for",
    "swap_scheduler",
    "write_model_index",
    "write_report",
]
