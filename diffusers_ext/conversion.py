"""Make a pipeline from another one: a calibrated one, by the route that fits it, or one of short diffusion times."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from .bridges import Bridge
from .calibration import ALL, CONDITIONAL, UNCONDITIONAL, Calibration, calibrate_denoiser, stop_calibrating
from .interop import live_config, noise_schedule
from .ranges import require
from .schedulers.scheduling_calibrated import CALIBRATED_SCHEDULERS, CalibratedScheduler, calibrated_class
from .schedulers.scheduling_short_time import short_time_class
from .subjects import subject_of
from .subjects.base import NotKept
from .subjects.guidance import ReadGuidance, default_scale, exposes_guidance, puts_unconditional_first


def calibrate_pipeline(
    pipeline: DiffusionPipeline,
    calibration: Calibration,
    guidance_scale: float | None = None,
    route: str = "auto",
) -> DiffusionPipeline:
    """Subtract the mean error of a pipeline's model wherever it is used.

    Args:
        pipeline: any pipeline with a scheduler and a `unet` or `transformer`; changed in place, unless the class itself
            would drop the scheduler (see below).
        calibration: a calibration that was measured on its model.
        guidance_scale: that of the pipeline's calls. It is read from the pipeline at each step where that can be done
            (`subjects.guidance`: Stable Diffusion and many others), also after callbacks; a calibrated scheduler that
            is saved then has the last one. Of other pipelines it must be told if the table has a row for guidance;
            1 or less is the conditional model, without guidance.
        route: `scheduler` swaps the scheduler for its calibrated subclass, which is saved with the pipeline; `model`
            puts a hook on the network, which is exact also with `guidance_rescale` and for tables by class, is not
            saved, and with guidance needs to know the layout of the batch (`subjects.guidance`); `auto` takes the first
            wherever it is exact: a linear combination of the rows that the table has.

    Returns:
        The pipeline, calibrated by this route alone: an earlier calibration is undone. `DDIMPipeline` turns every
        scheduler into a plain DDIMScheduler, so a `ClassConditionalPipeline` with the same network is returned instead.

    Raises:
        ValueError: the calibration belongs to another model or setting, the route does not exist for it, or the
            guidance scale must be told. Later, in a call, where the table has no rows for its guidance.
    """
    if route not in ("auto", "scheduler", "model"):
        raise ValueError(f"route {route!r} is not one of auto, scheduler, model")
    calibration.check(noise_schedule(pipeline.scheduler))
    subject = subject_of(pipeline)
    network = subject.network
    if subject.second_network is not None:
        raise ValueError(
            f"a {type(pipeline).__name__} has two networks, each with a mean error of its own, and a calibration is "
            f"that of one"
        )
    rows, name = tuple(calibration.config.rows), type(pipeline.scheduler).__name__.removeprefix("Calibrated")
    read = ReadGuidance(pipeline) if exposes_guidance(pipeline) else None
    guidance_scale = _first_scale(pipeline, rows, guidance_scale, read)
    linear = rows == (CONDITIONAL, UNCONDITIONAL) or (rows == (ALL,) and guidance_scale == 1)
    if route == "model" or (route == "auto" and not (linear and name in CALIBRATED_SCHEDULERS)):
        by_halves = guidance_scale != 1 and calibration.config.null_class is None
        if by_halves and UNCONDITIONAL in rows and not puts_unconditional_first(pipeline):
            raise ValueError(
                f"which rows of a batch are unconditional is not known of a {type(pipeline).__name__}, so that no hook "
                f"can calibrate its guidance: use route='scheduler', with a scheduler that has a calibrated class"
            )
        is_guided = None if read is None else read.is_on
        calibrate_denoiser(network, calibration, guidance="first_half" if by_halves else None, is_guided=is_guided)
        if isinstance(pipeline.scheduler, CalibratedScheduler):
            pipeline.scheduler.calibrate(None)
        return pipeline
    kind = calibrated_class(name)
    try:
        calibrated = subject.with_scheduler(kind.from_scheduler(pipeline.scheduler, calibration, guidance_scale))
    except NotKept as error:
        raise ValueError(f"{error}: use route='model'") from error
    calibration.warn_of_other_weights(network)
    stop_calibrating(network)
    if exposes_guidance(calibrated):
        calibrated.scheduler.follow(ReadGuidance(calibrated))
    return calibrated


def calibrating_line(pipeline: DiffusionPipeline, calibration: Calibration) -> str:
    """Return the line of code that calibrates `pipe`, a pipeline like this one, with what it must be told."""
    rows = tuple(calibration.config.rows)
    if rows == (CONDITIONAL, UNCONDITIONAL) and not exposes_guidance(pipeline):
        scale = default_scale(pipeline)
        return f"pipe = calibrate_pipeline(pipe, calibration, guidance_scale={scale:g})  # that of your calls, 1: none"
    if subject_of(pipeline).takes_captions:
        note = "it reads the guidance scale of each call"
        if rows == (ALL,):
            note = f"for calls without guidance: {'guidance_scale=1' if default_scale(pipeline) > 1 else 'the default'}"
        return f"pipe = calibrate_pipeline(pipe, calibration)  # {note}"
    return "pipe = calibrate_pipeline(pipe, calibration)"


def _first_scale(
    pipeline: DiffusionPipeline, rows: tuple[str, ...], told: float | None, read: ReadGuidance | None
) -> float:
    """Return the guidance scale until a call of the pipeline has another one."""
    if told is not None:
        require("guidance_scale", told)
        return told if type(pipeline).__module__.startswith("diffusers_ext") else max(told, 1.0)
    if rows == (ALL,):
        return 1.0
    if read is not None:
        return read.by_default
    if rows == (CONDITIONAL, UNCONDITIONAL):
        raise ValueError(
            f"the guidance of a {type(pipeline).__name__} cannot be read from it: say guidance_scale, that of its "
            f"calls (1 for none)"
        )
    return 1.0


def short_time_pipeline(
    pipeline: DiffusionPipeline, max_diffusion_time: float, bridge: Bridge | None = None
) -> DiffusionPipeline:
    """Make a pipeline that samples the same network on [0, T] alone.

    Args:
        pipeline: any pipeline with a `UNet2DModel` of images; or text-to-image by Stable Diffusion 1 and 2, Stable
            Diffusion XL or PixArt. Its scheduler must have a short-time class. The networks are shared.
        max_diffusion_time: T in (0, 1].
        bridge: a bridge that was fitted at T, for text-to-image to the latents of one size; `None` starts from N(0, I).

    Returns:
        A `ShortTimePipeline`, or, for text-to-image, the stock pipeline's short-time class
        (`pipelines.short_time_text`), which is called as the stock pipeline is.

    Raises:
        ValueError: there is no such class of the pipeline or the scheduler, T is out of range, or the bridge belongs to
            another model.
    """
    subject = subject_of(pipeline)
    kind = short_time_class(type(pipeline.scheduler).__name__)
    scheduler = kind.from_config(live_config(pipeline.scheduler), max_diffusion_time=max_diffusion_time)
    if bridge is not None:
        bridge.check(scheduler)
    return subject.on_short_times(scheduler, bridge)
