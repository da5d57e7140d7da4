"""What a run measures on held-out images and says about its result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..interop import score_model_from
from ..losses import score_matching_loss
from ..noise_levels import log_linear_sigmas
from .arguments import DataArguments, TrainingArguments
from .card import write_model_card
from .data import Images, seed_for
from .log import SIGMA_BINS
from .models import classes_of, encode, network_of

_VALIDATION = 4  # the stream of `seed_for`; those of the loop are 2 and 3


@torch.no_grad()
def loss_by_sigma(
    pipeline: DiffusionPipeline, validation: Images, args: DataArguments, sigma_range: tuple[float, float]
) -> dict[str, list[float]]:
    """Mean square error of eps on the validation images at log-spaced noise levels, always with the same noise."""
    network = network_of(pipeline)[1]
    model, device = score_model_from(network, pipeline.scheduler), network.device
    generator = torch.Generator().manual_seed(seed_for(args.seed, _VALIDATION))
    sigmas = log_linear_sigmas(SIGMA_BINS, *sigma_range)
    total = torch.zeros(len(sigmas))
    size, takes_labels = args.train_batch_size, classes_of(pipeline) is not None
    for x0, y in zip(validation.images.split(size), validation.labels.split(size), strict=True):
        x0 = encode(pipeline, x0.to(device), generator)
        cond = {"class_labels": y.to(device)} if takes_labels else {}
        before = generator.get_state()
        for i, sigma in enumerate(sigmas.tolist()):
            x = model.process.perturb(x0, sigma, generator.set_state(before))
            total[i] += score_matching_loss(model, x, x0, sigma, **cond).sum().cpu()
    return {"sigmas": sigmas.tolist(), "eps_mse": (total / len(validation.images)).tolist()}


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
