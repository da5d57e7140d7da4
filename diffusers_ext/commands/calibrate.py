r"""Measure the mean error of a pretrained model, to be subtracted by calibrated schedulers (arXiv 2302.10688).

    diffusers-ext calibrate --pretrained_model_name_or_path google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --output_dir cifar10-calibration --push_to_hub
    diffusers-ext calibrate --pretrained_model_name_or_path stabilityai/stable-diffusion-2-1-base \
        --dataset_name you/captioned-photos --caption_column text --max_train_samples 2000 --output_dir sd-calibration

Then, where the guidance scale is read from each call (of other pipelines, tell it: `guidance_scale=4.5`):

    calibration = Calibration.from_pretrained("sd-calibration")
    pipe = calibrate_pipeline(pipe, calibration)

Repeat the command to continue a run that was stopped.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..calibration import Calibration
from ..conversion import calibrating_line
from ..data.batches import Images, Position, micro_batches
from ..data.labelling import with_labels
from ..data.prepared import describe, make_transform
from ..data.sources import DataArguments, HubStream, load_images
from ..errors import InputError, command
from ..fields import arg
from ..files import remove_partial, replacing_files, shown, write_file
from ..mean_error import GROUPS, MIN_P, estimate_calibration
from ..randomness import Seeds, Stream
from ..reports.calibration_card import example, plot, summary, verdict, write_calibration_card
from ..reports.card import command_line
from ..reports.hub import HubArguments, make_pusher, push_and_wait
from ..schedulers import save_tables
from ..subjects import Subject, load_lora, load_pipeline, subject_of
from ..training.environment import end_run, make_accelerator
from ..training.lock import RunLock
from .parsing import parse_arguments


@dataclass
class CalibrationArguments(HubArguments, DataArguments):
    """Arguments that say which model is measured, on which data, how exactly, and where the result goes."""

    pretrained_model_name_or_path: str | None = arg(None, "Pipeline whose model is measured (Hub name or folder).")
    revision: str | None = arg(None, "Git revision of the pipeline.")
    variant: str | None = arg(None, "Weights variant of the pipeline, e.g. fp16.")
    lora_weights: str | None = arg(None, "LoRA that the pipeline is called with (Hub name or folder).")
    guidance_scale: float | None = arg(
        None, "Flux: the scale that its network is told; by default that of the pipeline's call.", at_least=0
    )
    torch_dtype: Literal["float32", "float16", "bfloat16"] = arg("float32", "Precision of the networks.")
    per_class: bool = arg(False, "One offset for each class, and not their average.")
    per: Literal["position", "channel"] | None = arg(
        None,
        "Offsets of each position of the image, or of each channel; by default per channel where that keeps nine "
        "tenths of the mean error. Images of other sizes always get those of the channels.",
    )
    num_levels: int = arg(24, "Noise levels, log-spaced; between them offsets are interpolated.", at_least=2)
    tolerance: float | None = arg(
        None,
        "A level is done when the standard error of its offset (eps has 1) is below this; by default all data.",
        above=0,
    )
    plain: bool = arg(False, "The plain average of the paper: no control variate, antithetic noise or shrinkage.")
    significance: float = arg(
        1e-3, "Chance, per level, to subtract something from a model without a mean error.", at_least=MIN_P, at_most=1
    )
    output_dir: str = arg("calibration", "Folder of the tables, the picture and the report.")
    save_pipeline: bool = arg(False, "Save, and push, the whole pipeline with the tables beside its scheduler.")


def batches(
    args: CalibrationArguments, subject: Subject, accelerator: Accelerator, channels: int, resolution: int
) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Return the network's training data with their conditions: every image once, each process its own share.

    Raises:
        InputError: the data do not fit the model or the arguments.
    """
    everything = replace(args, max_train_samples=None)  # `count` limits them, in random order
    source = load_images(everything, args.train_split)
    n = sys.maxsize if isinstance(source, HubStream) else len(source)
    n = n if args.max_train_samples is None else min(n, args.max_train_samples)
    if n == sys.maxsize:
        raise InputError("a stream has no known length: say how much of it with --max_train_samples")
    rank, world = accelerator.process_index, accelerator.num_processes
    count = n // (args.train_batch_size * world)
    if count == 0:
        raise InputError(f"{n} images are fewer than a batch of {args.train_batch_size} for each of {world} processes")
    transform = make_transform(args, source, channels, resolution)
    accelerator.print(describe(args, source, transform))
    if args.caption_column is not None and not subject.takes_captions:
        raise InputError("--caption_column: the model takes no prompts")
    classes = subject.num_classes
    source = with_labels(source, classes, f"split {args.train_split}")
    require_enough(source, count * args.train_batch_size * world, classes if args.per_class else None)
    drawn = micro_batches(everything, source, transform, rank, world, count, position=Position(0, 0))
    return conditioned(drawn, args, subject, accelerator)


def require_enough(source: Any, n: int, classes: int | None) -> None:
    """Check that n images of the source are enough, for each class if there are classes.

    Raises:
        InputError: they are not.
    """
    least = 2 * GROUPS
    if n < least * (classes or 1):
        of = "" if classes is None else f" for each of {classes} classes (--per_class)"
        raise InputError(f"{n} images in whole batches are too few: a mean error needs {least}{of}")
    if classes is not None and not isinstance(source, HubStream):
        found = Counter(source.labels)
        if few := {k: found[k] for k in range(classes) if found[k] < least}:
            raise InputError(f"--per_class needs {least} images of each class; there are, by class: {few}")


def conditioned(
    drawn: Iterable[Images], args: CalibrationArguments, subject: Subject, accelerator: Accelerator
) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield the batches in the network's own space, with its conditions."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    for i, batch in enumerate(drawn):
        if batch.position is not None and batch.position.epoch > 0:
            taken = i * args.train_batch_size * world
            raise InputError(f"the stream has {taken} images in whole batches: repeat with --max_train_samples {taken}")
        generator = Seeds(args.seed).generator(Stream.CALIBRATION_LATENTS, i * world + rank, device=device)
        x0 = subject.encode(batch.images.to(device, subject.pipeline.dtype), generator).float()
        yield x0, subject.conditions(replace(batch, places=None))  # the pipeline's calls name no size and no crop


def measure(args: CalibrationArguments, subject: Subject, data: Any, accelerator: Accelerator, resolution: int) -> Any:
    """Measure the mean errors, or go on with a measurement that was stopped.

    Raises:
        InputError: the data do not fit the arguments, or the sums in the folder are of another measurement.
    """
    try:
        return estimate_calibration(
            subject.network.eval(),
            subject.pipeline.scheduler,
            data,
            num_levels=args.num_levels,
            unconditional=subject.null_condition(resolution) if args.caption_column is not None else None,
            null_class=subject.null_class,
            num_classes=subject.num_classes if args.per_class else None,
            control_variate=not args.plain,
            antithetic=not args.plain,
            shrink=not args.plain,
            significance=args.significance,
            tolerance=args.tolerance,
            per=args.per,
            seed=args.seed,
            accelerator=accelerator,
            state_path=Path(args.output_dir) / "state" / "sums.safetensors",
            measured_on={"model": shown(args.pretrained_model_name_or_path or ""), "data": args.described} | told(args),
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def told(args: CalibrationArguments) -> dict[str, Any]:
    """Return what else the mean error depends on, where it was given."""
    lora = None if args.lora_weights is None else shown(args.lora_weights)
    given = {"lora_weights": lora, "guidance_scale": args.guidance_scale}
    return {name: value for name, value in given.items() if value is not None}


def save(
    args: CalibrationArguments, pipeline: DiffusionPipeline, calibration: Calibration, name: str, line: str
) -> None:
    """Write the tables, also beside the scheduler, the numbers, the picture and the card into the output folder."""
    out = Path(args.output_dir)
    with replacing_files(out) as aside:
        if args.save_pipeline:
            pipeline.save_pretrained(aside)
        calibration.save_pretrained(aside)
        pipeline.scheduler.save_pretrained(aside / "scheduler")
        save_tables(calibration, aside / "scheduler")
        write_file(aside / "metrics.json", json.dumps(summary(calibration), indent=2) + "\n")
        plot(calibration, aside / "offsets.png")
    write_calibration_card(out, calibration, name, asdict(args), command_line(), line)


@command
def main() -> None:
    args = parse_arguments(CalibrationArguments)
    if args.pretrained_model_name_or_path is None:
        raise InputError("name the model: --pretrained_model_name_or_path")
    accelerator, out = make_accelerator(), Path(args.output_dir)
    dtype = getattr(torch, args.torch_dtype)
    name = args.pretrained_model_name_or_path
    pipeline = load_pipeline(name, args.revision, args.variant, args.cache_dir, dtype).to(accelerator.device)
    if args.lora_weights is not None:
        load_lora(pipeline, args.lora_weights, args.cache_dir)
    subject = subject_of(pipeline)
    if args.guidance_scale is not None:
        subject.tell_guidance(args.guidance_scale)
    channels, resolution = subject.image_format(args.resolution)
    subject.train_at(resolution)
    if args.per_class and subject.num_classes is None:
        raise InputError("--per_class: the model takes no class labels")
    if subject.takes_captions and args.caption_column is None:
        accelerator.print(
            "without --caption_column the mean error is that of the empty prompt: the table holds for calls without "
            "guidance only (guidance_scale of 1 or less). For guidance, name the captions of the images"
        )
    data = batches(args, subject, accelerator, channels, resolution)
    pusher = make_pusher(args, out, accelerator.is_main_process)

    with RunLock(out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            remove_partial(out)
            (out / "state").mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        calibration = measure(args, subject, data, accelerator, resolution)
        if accelerator.is_main_process:
            line = calibrating_line(pipeline, calibration)
            save(args, pipeline, calibration, out.name if pusher is None else pusher.repo_id, line)
            print(verdict(calibration))
            print(f"the calibration is in {out}; use it by\n\n{example(str(out), line, asdict(args))}\n")
    end_run(accelerator, push_and_wait(pusher, out, "calibration", args.hub_timeout))


if __name__ == "__main__":
    main()
