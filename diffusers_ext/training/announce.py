"""What a run says for people: before its first step what will be done, after all its work what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..reports.hub import HubPusher
from .parts import Run

# Arguments that say which images are meant, and that an evaluation takes, too.
_OF_THE_DATA = ("preset", "dataset_name", "dataset_config_name", "train_data_dir", "caption_column", "value_range")


def before(run: Run, pusher: HubPusher | None) -> str:
    """Return what is trained, how, on which device, and where the results go.

    Args:
        run: the run, all set up.
        pusher: pushes the result to the Hub, if it is pushed.
    """
    args, subject, accelerator = run.args, run.subject, run.accelerator
    network, parameters = subject.network, list(subject.trainable().values())
    trained, whole = (sum(p.numel() for p in some) for some in (parameters, network.parameters()))
    share = "all of them trained" if trained == whole else f"{_short(trained)} trained"
    kind = f"a LoRA of rank {args.rank} of it, {share}" if subject.is_lora else share
    model = f"{type(subject.pipeline).__name__} of {_short(whole)} parameters, {kind}"
    weights = ((f.name, getattr(args, f.name)) for f in fields(args) if f.name.endswith("_weight"))
    settings = [f"learning rate {args.learning_rate:g}", *(f"{name} {value:g}" for name, value in weights if value)]
    run_is = f"{run.total_steps:,} steps of {run.images_per_step} images, {', '.join(settings)}, seed {args.seed}"
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    number = accelerator.num_processes
    device = f"{accelerator.device.type}, {number} process{'es' if number > 1 else ''}, {precision}"
    every = [] if args.validation_steps is None else [f"held-out loss and samples every {args.validation_steps} steps"]
    every += [f"checkpoints every {args.checkpointing_steps} steps"] if args.checkpointing_steps else []
    places = "; ".join([str(run.output_dir), *every, *([f"pushed to {pusher.repo_id}"] if pusher else [])])
    return f"model: {model}\nrun: {run_is}\ndevice: {device}\nresults: {places}"


def after(run: Run, where: str) -> str:
    """Return where the result is, how it is opened and judged, and where pictures and logs are.

    Args:
        run: the run, with all its work done.
        where: what was written, and which folder it is in.
    """
    args, folder = run.args, str(run.output_dir)
    base = args.pretrained_model_name_or_path
    name = f'DiffusionPipeline.from_pretrained("{base if run.subject.is_lora else folder}")'
    opened = f'{name}, then pipe.load_lora_weights("{folder}")' if run.subject.is_lora else name
    models = [str(base), "--lora_weights", folder] if run.subject.is_lora else [folder]
    lines = [where, f"  open it:    {opened}", f"  judge it:   {evaluation_of(models, args)}"]
    grids = [f"{folder}/samples"] if args.num_validation_images > 0 else []
    lines.append(f"  look at it: {', '.join([*grids, str(run.log.path)])}")
    return "\n".join(lines)


def evaluation_of(models: Sequence[str], args: Any, *more: str) -> str:
    """Return the command that evaluates models on the images that the arguments of another command name.

    Args:
        models: the words after --pretrained_model_name_or_path.
        args: the arguments of the other command, with its output_dir.
        more: further words.
    """
    words: list[Any] = ["diffusers-ext", "evaluate", "--pretrained_model_name_or_path", *models]
    for argument in _OF_THE_DATA:
        if (value := getattr(args, argument, None)) is not None:
            words += [f"--{argument}={value}"] if str(value).startswith("-") else [f"--{argument}", value]
    return shlex.join(map(str, [*words, *more, "--output_dir", f"{args.output_dir}-evaluation"]))


def _short(n: int) -> str:
    """A number of parameters for people: 1.1M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
