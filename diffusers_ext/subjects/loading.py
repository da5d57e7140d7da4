"""Load a pipeline, and say what is wrong where that fails."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from ..errors import InputError


def load_pipeline(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """Load a pretrained pipeline, with its networks in `dtype`.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return DiffusionPipeline.from_pretrained(
            name, revision=revision, variant=variant, cache_dir=cache_dir, torch_dtype=dtype
        )
    except Exception as error:  # a folder that is damaged fails in as many ways as there are libraries that read it
        raise InputError(
            f"the pipeline {name!r} could not be loaded; it must be the name of a diffusers pipeline on the Hub or a "
            f"folder with a model_index.json: {type(error).__name__}: {error}"
        ) from error
