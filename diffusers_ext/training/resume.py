"""Which checkpoint a run goes on from, whether it is one of the same run, and how its tensors come to their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .arguments import TrainingArguments
from .checkpoint import list_checkpoints
from .sharding import place_like

# A run is continued with the values that it was started with; these may change. (Accumulation and devices only
# together: the images of a step must stay.)
_MAY_CHANGE = (
    *("config", "revision", "variant", "cache_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "report_to", "validation_split"),
    *("max_validation_samples", "validation_steps", "num_validation_images", "num_inference_steps"),
    *("dataloader_num_workers", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs"),
    *("max_skipped_steps", "allow_tf32", "channels_last", "torch_compile", "gradient_checkpointing"),
    *("patience", "max_logit", "push_discriminator"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy", "hub_timeout"),
)


def checkpoint_to_resume(args: TrainingArguments) -> Path | None:
    """The checkpoint that the arguments name, `None` to start from the beginning.

    Raises:
        InputError: there is none where they say, or the output folder holds a run that they do not say to continue.
    """
    asked, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    found = list_checkpoints(output_dir)
    if asked is None:
        holds_run = bool(found) or (output_dir / "logs" / "log.jsonl").exists()
        if holds_run and not args.overwrite_output_dir:
            go_on = "continue it with --resume_from_checkpoint latest, " if found else ""
            raise InputError(
                f"--output_dir {output_dir} holds another run (checkpoints: {_names(found)}): {go_on}replace it with "
                f"--overwrite_output_dir, or name another folder"
            )
        return None
    if asked == "latest":
        if not found and (output_dir / "model_index.json").exists() and not args.overwrite_output_dir:
            raise InputError(
                f"--output_dir {output_dir} holds a finished run without checkpoints, which cannot be continued: "
                f"replace it with --overwrite_output_dir, name another folder, or train on from its pipeline with "
                f"--pretrained_model_name_or_path"
            )
        return found[-1] if found else None
    folder = Path(asked)
    if not (folder / "state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {asked}: no checkpoint there; found: {_names(found)}")
    if later := [f for f in found if f.parent == folder.parent and f.name > folder.name]:
        raise InputError(
            f"{output_dir} holds later checkpoints than {folder}: {_names(later)}. To branch off there, name another "
            f"--output_dir or delete them"
        )
    return folder


def check_same_run(
    folder: Path, state: Mapping[str, Any], args: TrainingArguments, images_per_step: int, stream_shares: int | None
) -> None:
    """A checkpoint is continued with the arguments that it was written with, but for `_MAY_CHANGE`.

    Args:
        folder, state: the checkpoint.
        stream_shares: over how many processes the data are streamed; `None` if they are not.

    Raises:
        InputError: names every argument that differs.
    """
    before, now = state["arguments"], asdict(args)
    changed = {k: (before.get(k), now[k]) for k in now if k not in _MAY_CHANGE and before.get(k) != now[k]}
    if state["images_per_step"] != images_per_step:
        changed["images per step, over all devices"] = state["images_per_step"], images_per_step
    if stream_shares not in (None, state["processes"]):
        changed["processes that share a stream"] = state["processes"], stream_shares
    if changed:
        listed = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
        raise InputError(
            f"{folder.name} is of a run with other arguments: {listed}. Continue with the same values; to change them, "
            f"start a new run from the saved pipeline with --pretrained_model_name_or_path"
        )


def place_state(state: Mapping[str, Any], model: torch.nn.Module, averaged: bool) -> None:
    """Load the weights of a checkpoint into the model, and give the moments of its optimiser and its moving average, if
    it has one, the place and the layout of its parameters, in the state itself."""
    own, parameters = model.state_dict(), list(model.parameters())
    model.load_state_dict({name: place_like(value, own[name]) for name, value in state["model"].items()})
    for i, moments in state["optimizer"]["state"].items():
        for name, value in moments.items():
            if value.shape == parameters[i].shape:
                moments[name] = place_like(value, parameters[i])
    if averaged:
        average = state["ema"]["shadow_params"]
        average[:] = [place_like(value, p) for value, p in zip(average, parameters, strict=True)]


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(f.name for f in checkpoints) or "none"
