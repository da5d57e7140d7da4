"""Compare pipelines: what they draw, how likely held-out images are to them, and what it costs.

`evaluate` does all of it, and `write_report` shows it to people. Its parts are of use alone: `Drawing` draws images and
keeps them, and `Judge` compares them with `RealImages`. The script is `training/evaluate.py`.
"""

from ..reports.measured import Cell, Evaluation, Likelihood, Quality
from ..reports.model_index import push_model_index, write_model_index
from ..reports.page import markdown_table, write_report
from .evaluate import EvaluationArguments, evaluate
from .measures import Judge, LikelihoodSettings, Manifold, likelihood, quality
from .real_images import MeasureArguments, RealImages, load_real_images
from .samples import Drawing, file_name, pipeline_fingerprint
from .schedulers import OWN, read_schedulers, steps_for, swap_scheduler

__all__ = [
    "OWN",
    "Cell",
    "Drawing",
    "Evaluation",
    "EvaluationArguments",
    "Judge",
    "Likelihood",
    "LikelihoodSettings",
    "Manifold",
    "MeasureArguments",
    "Quality",
    "RealImages",
    "evaluate",
    "file_name",
    "likelihood",
    "load_real_images",
    "markdown_table",
    "pipeline_fingerprint",
    "push_model_index",
    "quality",
    "read_schedulers",
    "steps_for",
    "swap_scheduler",
    "write_model_index",
    "write_report",
]
