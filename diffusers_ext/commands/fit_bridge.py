r"""Fit an auxiliary model ("bridge") of the diffused data at a time T to a pretrained pipeline (arXiv 2206.05173).

    diffusers-ext fit-bridge --pretrained_model_name_or_path google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --max_diffusion_time 0.6 --bridge flow --output_dir short-cifar10 --report
    diffusers-ext fit-bridge --pretrained_model_name_or_path stabilityai/stable-diffusion-2-1-base \
        --scheduler DDIMScheduler --dataset_name you/photos --max_diffusion_time 0.8 --output_dir sd-bridge

The first command saves a `ShortTimePipeline`: the same network, sampled on [0, T] alone. Of a text-to-image pipeline
only the bridge and the scheduler are saved:

    pipe = short_time_pipeline(pipe, 0.8, GaussianBridge.from_pretrained("sd-bridge"))
    pipe.scheduler = ShortTimeDDIMScheduler.from_pretrained("sd-bridge", subfolder="scheduler")
    pipe(prompt)

`--report` measures what each T costs and gains, to choose one.
"""

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from ..bridges.fitting import BridgeArguments, fit_bridge, shared_moments
from ..bridges.moments import DataMoments
from ..conversion import short_time_pipeline
from ..data.encoded import EncodedImages
from ..data.held_out import held_out_images
from ..data.prepared import describe, make_transform
from ..data.sources import HeldOutArguments, load_images
from ..diffusion_time import MIN_SAMPLES, diffusion_time_report
from ..errors import InputError, command
from ..fields import arg
from ..files import remove_partial, replacing, replacing_files
from ..interop import live_config
from ..randomness import Seeds, Stream
from ..reports.bridge_card import write_bridge_card
from ..reports.card import command_line
from ..reports.hub import HubArguments, make_pusher, push_and_wait
from ..reports.pictures import image_grid
from ..schedulers.scheduling_short_time import SHORT_TIME_SCHEDULERS, short_time_class
from ..subjects import load_pipeline, subject_of
from ..training.announce import evaluation_of
from ..training.environment import end_run, make_accelerator
from ..training.lock import RunLock
from .parsing import parse_arguments


@dataclass
class FitArguments(BridgeArguments, HubArguments, HeldOutArguments):
    """Arguments that say which pipeline and data are used, which bridge is fitted, and where the result goes."""

    pretrained_model_name_or_path: str | None = arg(None, "Pipeline to sample on [0, T] (Hub name or folder).")
    revision: str | None = arg(None, "Git revision of the pipeline.")
    variant: str | None = arg(None, "Weights variant of the pipeline, e.g. fp16.")
    scheduler: str | None = arg(
        None, f"Scheduler to sample with, by default the pipeline's: {', '.join(SHORT_TIME_SCHEDULERS)}."
    )
    output_dir: str = arg("bridge", "Folder of the result.")
    report: bool = arg(False, "Measure the likelihood bound by T, with such a bridge at each, on held-out images.")
    report_times: str = arg("0.2,0.4,0.6,0.8,1.0", "The times of the report.")
    max_validation_samples: int = arg(256, "Held-out images of the report.", at_least=MIN_SAMPLES)
    num_validation_images: int = arg(16, "Images of the sample grid; 0 makes none.", at_least=0)
    num_inference_steps: int = arg(20, "Sampler steps of the sample grid.", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        times_of_report(self)


def times_of_report(args: FitArguments) -> list[float]:
    try:
        times = sorted({float(word) for word in args.report_times.split(",")})
    except ValueError as error:
        raise InputError(f"--report_times must be numbers with commas between them: {error}") from error
    if not times or not 0 < times[0] <= times[-1] <= 1:
        raise InputError(f"--report_times must be above 0 and at most 1, got {args.report_times}")
    return times


def choose_scheduler(args: FitArguments, pipeline: DiffusionPipeline) -> Any:
    """Give the pipeline the scheduler that is asked for, and return its short-time version.

    Raises:
        InputError: it has none, or cannot sample the network on [0, T] in so many steps.
    """
    own, name = pipeline.scheduler, args.scheduler or type(pipeline.scheduler).__name__
    try:
        kind = short_time_class(name)
        if args.scheduler is not None:
            pipeline.scheduler = getattr(diffusers, name.removeprefix("ShortTime")).from_config(live_config(own))
        scheduler = kind.from_config(live_config(pipeline.scheduler), max_diffusion_time=args.max_diffusion_time)
        if args.num_validation_images > 0:
            copy.deepcopy(scheduler).set_timesteps(args.num_inference_steps)
    except ValueError as error:
        raise InputError(
            f"{name}: {error}. Choose with --scheduler, --max_diffusion_time, --num_inference_steps"
        ) from error
    return scheduler


def fitted(args: FitArguments, data: EncodedImages, moments: DataMoments) -> Any:
    told = {"data": data.described}
    about: dict[str, Any] = {
        "num_classes": data.num_classes,
        "seed": args.seed,
        "measured_on": told,
        "moments": moments,
    }
    return fit_bridge(args, data, data.subject.pipeline.scheduler, **about)


def write_report(args: FitArguments, data: EncodedImages, moments: DataMoments, held_out: Any, out: Path) -> Any:
    least = min(args.train_batch_size, args.max_validation_samples)
    held = replace(args, max_train_samples=None, train_batch_size=least)
    unseen = EncodedImages(held, data.subject, held_out, data.transform, args.max_validation_samples, data.device)
    times, device = times_of_report(args), data.device
    bridges = [fitted(replace(args, max_diffusion_time=time), data, moments).to(device) for time in times]
    report = diffusion_time_report(
        data.subject.network.eval(),
        data.subject.pipeline.scheduler,
        unseen,
        {args.bridge: bridges},
        times,
        levels=256 if data.subject.autoencoder is None else None,
        generator=Seeds(args.seed).generator(Stream.BRIDGE_REPORT, device=device),
    )
    report.save(out / "diffusion_time.json")
    report.plot(out / "diffusion_time.png")
    print(f"{report.table()}\n\n{report.verdict()}")
    return report


def save(
    args: FitArguments,
    data: EncodedImages,
    moments: DataMoments,
    bridge: Any,
    scheduler: Any,
    held_out: Any,
    name: str,
) -> None:
    """Write the bridge, or the pipeline that starts from it, the report and the card into the output folder.

    Args:
        data, moments: the images of the fit, and their moments.
        scheduler: the short-time scheduler.
        held_out: the images of the report, if it is asked for.
        name: how the card calls the result.
    """
    out, subject, device = Path(args.output_dir), data.subject, data.device
    remove_partial(out)
    if subject.takes_captions:
        with replacing_files(out) as aside:
            bridge.save_pretrained(aside)
            scheduler.save_pretrained(aside / "scheduler")
    else:
        short = short_time_pipeline(subject.pipeline, args.max_diffusion_time, bridge).to(device)
        subject_of(short).save(out)
        if args.num_validation_images > 0:
            seed = Seeds(args.seed)(Stream.GRID)
            images = subject_of(short).sample(args.num_validation_images, args.num_inference_steps, seed)
            with replacing(out / "samples" / "samples.png") as aside:
                image_grid(images).save(aside)
    report = write_report(args, data, moments, held_out, out) if args.report else None
    written = command_line()
    write_bridge_card(
        out,
        bridge,
        name,
        asdict(args),
        written,
        None if report is None else f"{report.verdict()}\n\n{report.table()}",
        subject.has_short_time_class,
    )


def next_steps(args: FitArguments, of_captions: bool) -> str:
    """Return where the result is, how it is opened and compared, for people."""
    out, base = args.output_dir, args.pretrained_model_name_or_path
    if of_captions:
        return f"the bridge and its scheduler are in {out}; its README.md has the lines that use them"
    return (
        f"the short-time pipeline is in {out}\n"
        f'  open it:    import diffusers_ext, then DiffusionPipeline.from_pretrained("{out}")\n'
        f"  compare it: {evaluation_of([str(base), out], args, '--nfe', '5,10,20')}"
    )


@command
def main() -> None:
    args = parse_arguments(FitArguments)
    name, out = args.pretrained_model_name_or_path, Path(args.output_dir)
    if name is None:
        raise InputError("name the model: --pretrained_model_name_or_path")
    if args.bridge == "none":
        raise InputError("--bridge must be gaussian, mixture or flow")
    accelerator = make_accelerator()
    pusher = make_pusher(args, out, accelerator.is_main_process)
    if accelerator.is_main_process:  # one process is enough for a pass over some thousand images
        pipeline = load_pipeline(name, args.revision, args.variant, args.cache_dir).to(accelerator.device)
        subject = subject_of(pipeline)
        if subject.takes_captions and args.report:
            raise InputError("--report needs an unconditional or class-conditional pipeline")
        if not (subject.takes_captions or subject.of_pixels):
            raise InputError(
                f"a {type(pipeline).__name__} cannot start from a bridge: its latents would not be decoded"
            )
        scheduler = choose_scheduler(args, pipeline)
        channels, resolution = subject.image_format(args.resolution)
        subject.train_at(resolution)
        source, held_out = load_images(args, args.train_split), None
        if args.report:
            held_out, named = held_out_images(args, source, subject.num_classes, args.max_validation_samples)
            if held_out is None:
                raise InputError(f"--report needs held-out images, and not {named}: name them with --validation_split")
        transform = make_transform(args, source, channels, resolution)
        print(describe(args, source, transform))
        data = EncodedImages(args, subject, source, transform, args.max_bridge_samples, accelerator.device)
        moments = shared_moments(args, data, data.num_classes)
        bridge = fitted(args, data, moments)
        with RunLock(out):
            save(args, data, moments, bridge, scheduler, held_out, out.name if pusher is None else pusher.repo_id)
        print(next_steps(args, subject.takes_captions))
    end_run(accelerator, push_and_wait(pusher, out, "bridge", args.hub_timeout))


if __name__ == "__main__":
    main()
