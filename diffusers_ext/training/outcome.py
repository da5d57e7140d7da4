"""What a run measures on held-out images and says about its result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..reports.card import write_model_card
from ..subjects.base import Subject
from .arguments import TrainingArguments


def describe(
    folder: Path,
    name: str,
    subject: Subject,
    args: TrainingArguments,
    paper: tuple[str, str],
    metrics: Mapping[str, Any],
    sample: Path,
) -> None:
    """Write the model card of the pipeline in a folder; `sample` is a picture that may be missing."""
    data = args.train_data_dir
    write_model_card(
        folder,
        name=name,
        arguments=asdict(args),
        command=f"accelerate launch {shlex.join(sys.argv)}",
        data=f"the images of {Path(data).name}" if data else f"{args.dataset_name}",
        metrics=metrics,
        sample=sample if sample.is_file() else None,
        pipeline_class=type(subject.pipeline).__name__,
        needs_package=subject.needs_package,
        paper=paper,
    )
