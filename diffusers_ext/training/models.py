"""The pipeline that a training script trains, and how it is saved.

A pipeline here is anything with one network that takes (noisy sample, time) and at most class labels: stock pixel
pipelines (DDPM, DDIM, ...), latent ones (DiT, LDM) and `ClassConditionalPipeline`.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from PIL import Image
from torch import Tensor

from ..interop import FLOW_SCHEDULERS, Network, noise_schedule
from ..pipelines import ClassConditionalPipeline, ReflectedPipeline
from .arguments import InputError, TrainingArguments
from .presets import PRESETS


def build_pipeline(args: TrainingArguments, num_classes: int | None) -> DiffusionPipeline:
    """A pretrained pipeline, or a new one by preset or model configuration; the network in float32.

    Args:
        args: the run's arguments.
        num_classes: number of classes of the data, `None` if they have no labels.

    Raises:
        InputError: nothing, or something that cannot be trained, was asked for.
    """
    if args.pretrained_model_name_or_path is not None:
        pipeline = _load_pipeline(args)
        network_of(pipeline)
    else:
        pipeline = _new_pipeline(args, num_classes)
    pipeline = args.adapt(pipeline)
    try:
        schedule = noise_schedule(pipeline.scheduler)
    except ValueError as error:
        raise InputError(str(error)) from error
    if args.needs_scheduler == "ReflectedScheduler" and schedule.family != "reflected":
        raise InputError(
            f"this script trains models of a ReflectedScheduler, without beta_schedule and trained_betas: the pipeline "
            f"has the noise levels of a {schedule.family} model ({type(pipeline.scheduler).__name__})"
        )
    for module in network_of(pipeline)[1].modules():
        if isinstance(module, LabelEmbedding):  # labels are dropped once for all evaluations of a sample, by the loop
            module.dropout_prob = 0.0
    classes = classes_of(pipeline)
    if classes is not None and (num_classes is None or num_classes > classes):
        have = "no labels" if num_classes is None else f"{num_classes} classes"
        raise InputError(f"the model takes labels of {classes} classes, the data have {have}")
    return pipeline


def _load_pipeline(args: TrainingArguments) -> DiffusionPipeline:
    name = args.pretrained_model_name_or_path
    assert name is not None
    fixed = [argument for argument, value in args.scheduler_settings().items() if value is not None]
    for argument in (*fixed, "scheduler", "class_conditional", "model_config_name_or_path"):
        if getattr(args, argument) not in (None, False):
            raise InputError(f"--{argument} is for training from scratch: the pipeline {name!r} keeps its own")
    return load_pipeline(name, args.revision, args.variant, args.cache_dir)


def load_pipeline(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """A pretrained pipeline, its networks in `dtype`.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return DiffusionPipeline.from_pretrained(
            name, revision=revision, variant=variant, cache_dir=cache_dir, torch_dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"the pipeline {name!r} could not be loaded; it must be the name of a diffusers pipeline on the Hub or a "
            f"folder with a model_index.json: {error}"
        ) from error


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
        torch.manual_seed(args.seed)
        unet = UNet2DModel.from_config(config)
    return _pipeline_for(unet, scheduler, null_class=num_classes if args.class_conditional else None)


def _pipeline_for(unet: UNet2DModel, scheduler: Any, null_class: int | None) -> DiffusionPipeline:
    """A stock pipeline where one samples this model rightly, so that it loads without our package."""
    name = type(scheduler).__name__
    if name == "ReflectedScheduler":
        return ReflectedPipeline(unet=unet, scheduler=scheduler, null_class=null_class)
    if unet.config.num_class_embeds is None and name == "DDIMScheduler":
        return DDIMPipeline(unet=unet, scheduler=scheduler)
    if unet.config.num_class_embeds is None and (name == "DDPMScheduler" or name in FLOW_SCHEDULERS):
        return DDPMPipeline(unet=unet, scheduler=scheduler)
    return ClassConditionalPipeline(unet=unet, scheduler=scheduler, null_class=null_class)


def network_of(pipeline: DiffusionPipeline) -> tuple[str, Any]:
    """The network that is trained, and the name of its component.

    Raises:
        InputError: the pipeline has none that is unconditional or class-conditional.
    """
    for name, kind in (("unet", UNet2DModel), ("transformer", DiTTransformer2DModel)):
        network = getattr(pipeline, name, None)
        if isinstance(network, kind):
            return name, network
    raise InputError(
        f"{type(pipeline).__name__} cannot be trained here: it needs a UNet2DModel (`unet`) or a DiTTransformer2DModel "
        f"(`transformer`), unconditional or conditioned on class labels"
    )


def null_class_of(pipeline: DiffusionPipeline) -> int | None:
    """The label that means "no class", if the model has one."""
    _, network = network_of(pipeline)
    if isinstance(network, DiTTransformer2DModel):
        return network.config.num_embeds_ada_norm
    return pipeline.config.get("null_class")


def classes_of(pipeline: DiffusionPipeline) -> int | None:
    """Number of classes beside the null class; `None` if the network takes no labels."""
    _, network = network_of(pipeline)
    if isinstance(network, DiTTransformer2DModel):
        return network.config.num_embeds_ada_norm
    if network.config.num_class_embeds is None:
        return None
    return network.config.num_class_embeds - (null_class_of(pipeline) is not None)


def _autoencoder(pipeline: DiffusionPipeline) -> Any:
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


@torch.no_grad()
def encode(pipeline: DiffusionPipeline, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What the network is trained on: images (B, C, H, W), or their latents where the pipeline has an autoencoder."""
    autoencoder = _autoencoder(pipeline)
    if autoencoder is None:
        return images
    encoded = autoencoder.encode(images)
    latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - (autoencoder.config.get("shift_factor") or 0.0)) * autoencoder.config.scaling_factor


def image_format(pipeline: DiffusionPipeline, resolution: int | None) -> tuple[int, int]:
    """(channels, resolution) of the images to train on; by default the resolution that the pipeline samples.

    A pixel model that is trained at another resolution samples at that one from then on.

    Raises:
        InputError: the network does not take images of this size or number of channels.
    """
    _, network = network_of(pipeline)
    autoencoder = _autoencoder(pipeline)
    factor = 1 if autoencoder is None else 2 ** (len(autoencoder.config.block_out_channels) - 1)
    channels = network.config.in_channels if autoencoder is None else autoencoder.config.in_channels
    size = network.config.sample_size
    if resolution is None and not isinstance(size, int):
        raise InputError(f"the model samples at {size}: name the training size with --resolution")
    resolution = size * factor if resolution is None else resolution
    if channels not in (1, 3):
        raise InputError(f"the model takes images with {channels} channels; these scripts train on 1 (grey) or 3 (RGB)")
    if isinstance(network, UNet2DModel):
        multiple = factor * 2 ** (len(network.config.block_out_channels) - 1)
        if resolution % multiple:
            below = resolution // multiple * multiple
            sizes = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise InputError(f"--resolution {resolution} does not fit the model: use {sizes}")
        network.register_to_config(sample_size=resolution // factor)
    elif resolution != size * factor:
        raise InputError(f"--resolution {resolution} does not fit the model: it takes {size * factor}")
    probe = torch.zeros(1, network.config.in_channels, resolution // factor, resolution // factor)
    labels = {} if classes_of(pipeline) is None else {"class_labels": torch.zeros(1, dtype=torch.long)}
    with torch.no_grad():
        output = Network(network)(probe, torch.ones(1), **labels)
    if output.shape != probe.shape:
        raise InputError(f"the network maps {tuple(probe.shape)} to {tuple(output.shape)}: it predicts no noise")
    return channels, resolution


# --- the trained pipeline ---------------------------------------------------------------------------------------------


def with_weights(
    pipeline: DiffusionPipeline, state: dict[str, Tensor], average: Sequence[Tensor] | None = None
) -> DiffusionPipeline:
    """A copy of the pipeline with these weights in its network, or with the moving average of its parameters; shares
    what is not trained.

    The network is built anew: accelerate replaces `forward` of the one it wraps, and a deep copy would keep calling it.
    """
    name, network = network_of(pipeline)
    with torch.random.fork_rng(devices=[]):
        trained = type(network).from_config(network.config)
    trained.load_state_dict(state)
    trained.to(network.device)
    if average is not None:
        for parameter, averaged in zip(trained.parameters(), average, strict=True):
            parameter.data.copy_(averaged)
    components = dict(pipeline.components) | {name: trained.eval(), "scheduler": copy.deepcopy(pipeline.scheduler)}
    if isinstance(pipeline, ClassConditionalPipeline):
        components["null_class"] = pipeline.config.null_class
    copied = type(pipeline)(**components)
    copied.set_progress_bar_config(disable=True)
    return copied


def save_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """`save_pretrained`, written aside and moved into place entry by entry; other files in the folder stay."""
    with _moved_into(Path(folder)) as aside:
        pipeline.save_pretrained(aside)


def copy_pipeline(source: Path, folder: Path, leave_out: Sequence[str] = ()) -> None:
    """Copy what lies in a pipeline's folder into another, in the same way."""
    with _moved_into(folder) as aside:
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns(*leave_out), dirs_exist_ok=True)


@contextmanager
def _moved_into(folder: Path) -> Iterator[Path]:
    """A folder whose entries are moved to `folder` at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        yield Path(aside)
        for entry in sorted(Path(aside).iterdir(), key=lambda e: e.name == "model_index.json"):
            target = folder / entry.name
            if target.is_dir():
                os.replace(target, Path(aside) / f"old-{entry.name}")
            os.replace(entry, target)


def sample_images(
    pipeline: DiffusionPipeline,
    n: int,
    num_inference_steps: int = 50,
    seed: int = 0,
    class_labels: list[int] | None = None,
) -> np.ndarray:
    """(n, H, W, C) in [0, 1]; class-conditional models without guidance, by default the classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    classes = classes_of(pipeline)
    if classes is None:
        what: dict[str, Any] = {"batch_size": n}
    else:
        what = {"class_labels": class_labels or [i % classes for i in range(n)], "guidance_scale": 1.0}
    return pipeline(**what, num_inference_steps=num_inference_steps, generator=generator, output_type="np").images


def image_grid(images: np.ndarray, columns: int | None = None, min_size: int = 64) -> Image.Image:
    """Images (n, H, W, C) in [0, 1] side by side; small ones enlarged by a whole factor to at least `min_size`."""
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    factor = max(1, -(-min_size // height))
    grid = Image.new("RGB", (columns * width * factor, -(-n // columns) * height * factor), "white")
    for i, tile in enumerate((images * 255).round().astype(np.uint8)):
        picture = Image.fromarray(tile.squeeze()).convert("RGB")
        picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        grid.paste(picture, (i % columns * width * factor, i // columns * height * factor))
    return grid
