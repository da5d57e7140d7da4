"""The pipeline that a run trains: a pretrained one, or a new one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel

from ..errors import InputError
from ..interop import FLOW_SCHEDULERS, noise_schedule, scheduler_above
from ..pipelines import ClassConditionalPipeline, ReflectedPipeline
from ..presets import PRESETS
from ..randomness import Seeds, Stream
from ..subjects import Lora, Subject, TextToImage, load_pipeline, subject_of
from .arguments import LORA_ARGUMENTS, TrainingArguments

OF_TEXT = (
    *("caption_column", "rank", *LORA_ARGUMENTS, "guidance_scale", "proportion_empty_prompts"),
    *("validation_prompt_file", "validation_prompt"),
)


def build_subject(
    args: TrainingArguments, num_classes: int | None, data_noise: Sequence[float] | None = None
) -> Subject:
    """Load a pretrained pipeline, or build one from a preset or a model's configuration, and return its subject.

    The network is in float32.

    Args:
        args: the run's arguments.
        num_classes: the number of classes of a new class-conditional model; `None` if the data have no labels.
        data_noise: the noise of each image, where they have any: the sampler of the model ends at the lowest.

    Raises:
        InputError: the arguments name no model, or one that cannot be trained.
    """
    if args.pretrained_model_name_or_path is not None:
        pipeline = _load_pipeline(args)
        subject_of(pipeline).require_trainable()
        _require_of_preset(args, subject_of(pipeline))
    else:
        pipeline = _new_pipeline(args, num_classes)
    pipeline = args.adapt(pipeline)
    if data_noise is not None and (lowest := args.lowest_noise(data_noise)) > 0:
        pipeline.register_modules(scheduler=_ending_at(lowest, pipeline.scheduler, args))
    try:
        schedule = noise_schedule(pipeline.scheduler)
    except ValueError as error:
        raise InputError(str(error)) from error
    if args.needs_scheduler == "ReflectedScheduler" and schedule.family != "reflected":
        raise InputError(
            f"this script trains models of a ReflectedScheduler, without beta_schedule and trained_betas: the pipeline "
            f"has the noise levels of a {schedule.family} model ({type(pipeline.scheduler).__name__})"
        )
    subject = subject_of(pipeline)
    if data_noise is not None and subject.others:
        raise InputError("images with noise are trained on as pixels, and this pipeline has latents")
    _prepare_text(subject, args)
    subject.before_training()
    return subject


def _ending_at(lowest_noise: float, scheduler: Any, args: TrainingArguments) -> Any:
    """Return the scheduler with this lowest noise level.

    Raises:
        InputError: there is none that its network would fit.
    """
    advice = "train from scratch with a variance-preserving scheduler, or an EDM model"
    try:
        above = scheduler_above(scheduler, lowest_noise)
    except ValueError as error:
        raise InputError(f"images with noise: {error}; {advice}") from error
    if (
        args.pretrained_model_name_or_path is not None
        and above is not scheduler
        and noise_schedule(above).family == "vp"
    ):
        raise InputError(
            f"images with noise: the pipeline's network was told the timesteps of another table than one that ends at "
            f"{lowest_noise:g}: {advice}"
        )
    return above


def _prepare_text(subject: Subject, args: TrainingArguments) -> None:
    """Set what the arguments say of text-to-image models, and refuse it for others.

    Raises:
        InputError: the arguments do not fit the model.
    """
    if not isinstance(subject, TextToImage):
        for name in OF_TEXT:
            if getattr(args, name) is not None:
                raise InputError(f"--{name} is for text-to-image models, and {type(subject.pipeline).__name__} is none")
        if args.cache_latents:
            raise InputError(
                f"--cache_latents is for text-to-image models, and {type(subject.pipeline).__name__} is none"
            )
        return
    if args.caption_column is None:
        raise InputError("text-to-image models are trained on captions: name their column, --caption_column")
    if args.guidance_scale is not None:
        subject.tell_guidance(args.guidance_scale)
    if args.rank is not None:
        layers = args.lora_layers
        lora = Lora(args.rank, args.lora_alpha, args.lora_dropout or 0.0, layers)
        subject.add_lora(lora, Seeds(args.seed)(Stream.WEIGHTS))
    subject.reload = partial(_load_pipeline, args)


def _require_of_preset(args: TrainingArguments, subject: Subject) -> None:
    """Refuse the images of a preset for a pretrained model of others.

    Raises:
        InputError: the preset says the resolution, or the data, and the model samples others.
    """
    if args.preset is None:
        return
    preset, (channels, resolution) = PRESETS[args.preset], subject.image_format()
    size, kinds = preset.model["sample_size"], {1: "grey", 3: "RGB"}
    its_size, its_data = (getattr(args, n) == preset.arguments[n] for n in ("resolution", "dataset_name"))
    if (its_size and resolution != size) or (its_data and channels != preset.model["in_channels"]):
        ours, theirs = kinds[preset.model["in_channels"]], kinds.get(channels, f"{channels} channels")
        raise InputError(
            f"--preset {args.preset} is for {ours} images of {size} x {size}, and "
            f"{args.pretrained_model_name_or_path} is a model of {resolution} x {resolution}, {theirs}: leave the "
            f"preset out, and say --dataset_name or --train_data_dir"
        )


def _load_pipeline(args: TrainingArguments) -> DiffusionPipeline:
    name = args.pretrained_model_name_or_path
    assert name is not None
    fixed = [argument for argument, value in args.scheduler_settings().items() if value is not None]
    for argument in (*fixed, "scheduler", "class_conditional", "model_config_name_or_path"):
        if getattr(args, argument) not in (None, False):
            raise InputError(f"--{argument} is for training from scratch: the pipeline {name!r} keeps its own")
    return load_pipeline(name, args.revision, args.variant, args.cache_dir)


def _new_pipeline(args: TrainingArguments, num_classes: int | None) -> DiffusionPipeline:
    if args.model_config_name_or_path is not None:
        try:
            config = dict(UNet2DModel.load_config(args.model_config_name_or_path, cache_dir=args.cache_dir))
        except (OSError, ValueError) as error:
            raise InputError(f"--model_config_name_or_path: {error}") from error
        scheduler_name, settings = "DDIMScheduler", {"timestep_spacing": "trailing"}
    elif args.preset is not None:
        config = dict(PRESETS[args.preset].model)
        scheduler_name, settings = PRESETS[args.preset].scheduler
    else:
        raise InputError("name the model: --pretrained_model_name_or_path, --model_config_name_or_path or --preset")
    asked = args.scheduler if args.scheduler is not None else args.needs_scheduler
    if asked is not None and asked != scheduler_name:
        scheduler_name, settings = asked, {}
    settings = settings | {name: value for name, value in args.scheduler_settings().items() if value is not None}
    kind = getattr(diffusers, scheduler_name, None)
    if kind is None:
        raise InputError(f"diffusers has no scheduler {scheduler_name!r}")
    try:
        scheduler, unused = kind.from_config(settings, return_unused_kwargs=True)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(f"{scheduler_name} cannot be made with {settings}: {error}") from error
    if unused:
        raise InputError(f"{scheduler_name} takes no {', '.join(sorted(unused))}")

    if args.class_conditional:
        if num_classes is None:
            raise InputError("--class_conditional needs data with labels: see --label_column")
        config["num_class_embeds"] = num_classes + 1
    if args.resolution is not None:
        config["sample_size"] = args.resolution
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Seeds(args.seed)(Stream.WEIGHTS))
        unet = UNet2DModel.from_config(config)
    labelled = config.get("num_class_embeds") is not None
    return _pipeline_for(unet, scheduler, labelled, null_class=num_classes if args.class_conditional else None)


def _pipeline_for(unet: UNet2DModel, scheduler: Any, labelled: bool, null_class: int | None) -> DiffusionPipeline:
    """Make a stock pipeline if there is one that samples this model rightly: it opens without this package."""
    name = type(scheduler).__name__
    if name == "ReflectedScheduler":
        return ReflectedPipeline(unet=unet, scheduler=scheduler, null_class=null_class)
    if not labelled and name == "DDIMScheduler":
        return DDIMPipeline(unet=unet, scheduler=scheduler)
    if not labelled and (name == "DDPMScheduler" or name in FLOW_SCHEDULERS):
        return DDPMPipeline(unet=unet, scheduler=scheduler)
    return ClassConditionalPipeline(unet=unet, scheduler=scheduler, null_class=null_class)
