"""Choose the scheduler that draws, and its number of steps.

    read_schedulers(["own", "DPMSolverMultistep:use_karras_sigmas=true"])    # names and their settings
    swap_scheduler(pipeline, "DPMSolverMultistep", use_karras_sigmas=True)   # a scheduler for this pipeline
    steps_for(scheduler, nfe=10)                                            # 5 steps of Heun's method

The number of function evaluations (NFE) counts the calls of the network for one image. Schedulers of higher order call
it more than once a step, so models and schedulers are compared at equal NFE and not at equal steps.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline

import diffusers_ext

from ..errors import InputError
from ..interop import OF_THE_MODEL, live_config, noise_schedule
from ..pipelines.pipeline_class_conditional import reads_variance
from ..schedulers import CalibratedScheduler, ShortTimeScheduler
from ..subjects import subject_of

OWN = "own"
"""The name of each pipeline's own scheduler."""


def read_schedulers(asked: Iterable[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Map each text to the name of the scheduler's class and its settings.

    Args:
        asked: texts, names with or without settings: `NAME:setting=value:setting=value`; values are read as YAML.

    Raises:
        InputError: a text has another form.
    """
    found = {}
    for words in asked:
        name, *pairs = words.split(":")
        if not name or not all(re.fullmatch(r"\w+=.+", pair) for pair in pairs):
            raise InputError(f"--schedulers {words!r} must be NAME, or NAME:setting=value:setting=value")
        found[words] = name, {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    if not found:
        raise InputError("--schedulers names none")
    return found


def swap_scheduler(pipeline: DiffusionPipeline, name: str, folder: str | None = None, **settings: Any) -> Any:
    """Make a scheduler of another class with the configuration of the pipeline's own.

    Args:
        name: the class, with or without "Scheduler" at its end; "own" is the pipeline's. For a pipeline of short
            diffusion times it is the short-time class of that name.
        folder: the folder of the pipeline, or its Hub name, where a calibrated scheduler finds its tables.
        settings: entries of the configuration that replace the pipeline's.

    Raises:
        InputError: there is no such class or setting, or the pipeline cannot take it; the message names some that it
            can.
    """
    own = pipeline.scheduler
    if name == OWN and not settings:
        return copy.deepcopy(own)
    wanted = type(own).__name__ if name == OWN else name.removesuffix("Scheduler") + "Scheduler"
    if isinstance(own, ShortTimeScheduler) and "ShortTime" not in wanted:
        calibrated = "Calibrated" if wanted.startswith("Calibrated") else ""
        wanted = f"{calibrated}ShortTime{wanted.removeprefix('Calibrated')}"
    kind = getattr(diffusers_ext, wanted, None) or getattr(diffusers, wanted, None)
    try:
        family = noise_schedule(own).family
    except (TypeError, ValueError) as error:
        raise InputError(f"--schedulers {name}: only {OWN!r} can be drawn with this pipeline: {error}") from error
    others = sorted({k.__name__ for k in own.compatibles} - {type(own).__name__})
    advice = f"it is a {family} model, whose scheduler is {type(own).__name__}; others for it: {', '.join(others)}"
    if kind is None:
        raise InputError(f"--schedulers: there is no {wanted}; {advice}")
    known = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    if unknown := sorted(settings.keys() - known):
        have = ", ".join(sorted(known))
        raise InputError(f"--schedulers: {wanted} has no setting {', '.join(unknown)}; it has {have}")
    if changed := sorted(settings.keys() & set(OF_THE_MODEL)):
        raise InputError(
            f"--schedulers: {', '.join(changed)} of {wanted}: that is a fact about the model, which was trained with "
            f"it, and no setting of a sampler: leave it out"
        )
    try:
        if issubclass(kind, CalibratedScheduler) and folder is not None:
            scheduler = kind.from_pretrained(folder, subfolder="scheduler", **settings)
        else:
            scheduler = kind.from_config(live_config(own), **settings)
        fits = noise_schedule(scheduler).family == family
    except (TypeError, ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"--schedulers: the pipeline cannot take {wanted}: {error}; {advice}") from error
    if not fits:
        raise InputError(f"--schedulers: the pipeline cannot take {wanted}; {advice}")
    if (refusal := subject_of(pipeline).refusal_of(scheduler)) is not None:
        raise InputError(f"--schedulers: {refusal}; {advice}")
    if isinstance(scheduler, CalibratedScheduler) and scheduler.calibration is None:
        raise InputError(f"--schedulers: {wanted} finds no tables of a calibration in {folder}: run calibrate.py first")
    return scheduler


def clipping_advice(scheduler: Any, label: str) -> str | None:
    """Return what to compare with a scheduler that could clip x0 of a model of pixels, and does not; else `None`.

    Args:
        label: the scheduler's name for people, with its settings.
    """
    kinds = type(scheduler).__mro__
    stock: Any = next((kind for kind in kinds if kind.__module__.startswith("diffusers.schedulers.")), kinds[0])
    takes = [n for n in ("clip_sample", "thresholding") if n in inspect.signature(stock.__init__).parameters]
    if not takes or any(scheduler.config[name] or f":{name}=" in label for name in takes):
        return None
    return (
        f"{label} does not clip x0. Of a model of pixels compare {label}:{takes[0]}=true, too: values beyond the range "
        f"of images are then cut at each step, and not at the end alone"
    )


def steps_for(scheduler: Any, nfe: int) -> int:
    """Return the largest number of steps for which the scheduler needs at most `nfe` evaluations of the network.

    Raises:
        InputError: there is no such number.
    """
    why = ""
    for steps in range(nfe, 0, -1):
        try:
            needed = _tried(copy.deepcopy(scheduler), steps)
        except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
            why = f" ({type(error).__name__}: {error})"
            continue
        if why and 2 * needed < nfe:
            break
        if needed <= nfe:
            return steps
    raise InputError(
        f"{type(scheduler).__name__} makes no image with {nfe} evaluations of the network{why}: try more with --nfe, "
        f"or another of --schedulers"
    )


def _tried(scheduler: Any, steps: int) -> int:
    """Make all steps with a network whose output is 0, and return their number: some combinations of settings fail in
    the last step only.

    Raises:
        ValueError, IndexError, ZeroDivisionError, RuntimeError: the scheduler cannot make them.
    """
    dynamic = scheduler.config.get("use_dynamic_shifting", False)  # the pipeline computes mu from the size of the image
    scheduler.set_timesteps(steps, **({"mu": 1.0} if dynamic else {}))
    calibration = getattr(scheduler, "calibration", None)
    sample = torch.ones(1, *((3, 8, 8) if calibration is None else calibration.config.shape))
    output = torch.cat([torch.zeros_like(sample)] * (2 if reads_variance(scheduler) else 1), 1)
    generator = torch.Generator().manual_seed(0)
    takes = inspect.signature(scheduler.step).parameters
    for t in scheduler.timesteps:
        scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)(sample, t)
        options = {"generator": generator} if "generator" in takes else {}
        sample = scheduler.step(output.to(scaled), t, sample, **options).prev_sample
    return len(scheduler.timesteps)


def possible_steps(scheduler: Any, nfe: Sequence[int], say: Callable[[str], None] = print) -> list[int]:
    """Return `steps_for` of each number of evaluations that the scheduler can make, without repetitions.

    Args:
        nfe: numbers of evaluations, in increasing order.
        say: prints why a number is left out.

    Raises:
        InputError: none is left.
    """
    steps: list[int] = []
    for evaluations in nfe:
        try:
            steps.append(steps_for(scheduler, evaluations))
        except InputError as error:
            if evaluations == nfe[-1] and not steps:
                raise
            say(f"left out: {error}")
    return list(dict.fromkeys(steps))
