"""Load a pipeline, and say what is wrong where that fails."""

from __future__ import annotations

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version

from ..errors import InputError

DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
"""What `from_pretrained` calls the precision: the older name warns."""


def load_lora(pipeline: DiffusionPipeline, name: str, cache_dir: str | None = None) -> None:
    """Load a LoRA beside the weights of a pipeline.

    Raises:
        InputError: the pipeline has no loader, PEFT is not installed, or the LoRA cannot be loaded.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"--lora_weights: {type(pipeline).__name__} has no loader for a LoRA")
    try:
        pipeline.load_lora_weights(name, use_safetensors=True, cache_dir=cache_dir)
    except Exception as error:  # as many as there are files that are no LoRA
        install = " (pip install peft)" if "PEFT" in str(error) else ""
        raise InputError(
            f"the LoRA {name!r} could not be loaded; it must be a folder or a repository of the Hub with a safetensors "
            f"file: {type(error).__name__}: {error}{install}"
        ) from error


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
            name, revision=revision, variant=variant, cache_dir=cache_dir, **{DTYPE: dtype}
        )
    except Exception as error:  # a folder that is damaged fails in as many ways as there are libraries that read it
        raise InputError(
            f"the pipeline {name!r} could not be loaded; it must be the name of a diffusers pipeline on the Hub or a "
            f"folder with a model_index.json: {type(error).__name__}: {error}"
        ) from error
