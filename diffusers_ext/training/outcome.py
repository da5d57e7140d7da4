"""What a run measures on held-out images and says about its result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..reports.card import write_model_card
from .arguments import TrainingArguments


def describe(
    folder: Path,
    name: str,
    pipeline: DiffusionPipeline,
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
        pipeline_class=type(pipeline).__name__,
        needs_package=type(pipeline).__module__.startswith("diffusers_ext"),
        paper=paper,
    )
