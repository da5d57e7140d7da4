"""What the environment makes of a run: `accelerate launch` and its configuration speak through variables.

A precision that the run's own argument leaves open is taken from there, and where it runs (devices, compilation) is
theirs to say. What would train something else than the arguments say is refused.
"""

from __future__ import annotations

import os
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from ..errors import NOT_PUSHED, InputError, TrainingStopped
from .arguments import TrainingArguments

TIMEOUT = timedelta(days=2)
"""How long processes wait for one that validates, fits, measures or pushes; without it, they give up after minutes."""


def make_accelerator(**options: Any) -> Accelerator:
    """Return an `Accelerator` with these options, whose processes wait for each other as long as `TIMEOUT`."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)], **options)


def end_run(accelerator: Accelerator, failure: str | None) -> None:
    """Wait for all processes, and end the run.

    Raises:
        TrainingStopped: the result could not be pushed; `failure` says why, and how to go on.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if failure is not None:
        raise TrainingStopped(failure, code=NOT_PUSHED)


def tracker_named(name: str) -> str | None:
    """Return what accelerate is told of `--report_to`; `None` is no tracker beside the log file.

    Raises:
        InputError: the tracker is not installed, which accelerate would pass over in silence.
    """
    if name == "auto":
        return "tensorboard" if find_spec("tensorboard") is not None else None
    if name in LOGGER_TYPE_TO_CLASS and name not in {str(one) for one in get_available_trackers()}:
        raise InputError(
            f"--report_to {name}: it is not installed (pip install {name}); `none` keeps the log file alone"
        )
    return None if name == "none" else name


def require_as_asked(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Check that the accelerator trains what the arguments say.

    Raises:
        InputError: the environment has changed something, which the message names with its variable.
    """
    steps, precision = accelerator.gradient_accumulation_steps, accelerator.mixed_precision
    if steps != args.gradient_accumulation_steps:
        raise InputError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, and the environment makes it {steps}"
            f" ({_set_by('ACCELERATE_GRADIENT_ACCUMULATION_STEPS')}): unset it, or give the same number"
        )
    if args.mixed_precision not in (None, precision):
        raise InputError(
            f"--mixed_precision is {args.mixed_precision}, and the environment makes it {precision} "
            f"({_set_by('ACCELERATE_MIXED_PRECISION')}): unset it, or give the same"
        )
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(
            f"mixed precision {precision} ({_set_by('ACCELERATE_MIXED_PRECISION')}) is not supported: give "
            f"--mixed_precision no, fp16 or bf16"
        )
    sizes = {name: _size(accelerator, name) for name in ("tp_size", "cp_size", "sp_size")}
    if shared := {name: size for name, size in sizes.items() if size > 1}:
        raise InputError(
            f"the environment lets several processes share one batch "
            f"({_set_by('ACCELERATE_USE_PARALLELISM_CONFIG')}: {shared}), which would train on the same images several "
            f"times: unset it"
        )


def _size(accelerator: Accelerator, name: str) -> int:
    return getattr(getattr(accelerator, "parallelism_config", None), name, 1)


def _set_by(variable: str) -> str:
    return f"{variable}={os.environ[variable]}" if variable in os.environ else f"not by {variable}, but by a plugin"
