"""The checkpoints of a run: when one is written, which one a run goes on from, and whether it is of the same run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..data.batches import Position
from ..data.contents import changes
from ..errors import InputError
from ..files import holds_result, remove_written
from ..networks import unwrap
from ..randomness import Seeds
from .arguments import TrainingArguments
from .best import NAME as BEST
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, step_of
from .parts import Run
from .sharding import spread_like, whole

# A run must be continued with the arguments that it was started with, except these. (Accumulation and the number of
# devices may only change together: the number of images of a step must stay.)
_MAY_CHANGE = (
    *("config", "revision", "variant", "cache_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "report_to", "validation_split"),
    *("max_validation_samples", "validation_steps", "num_validation_images", "num_inference_steps"),
    *("dataloader_num_workers", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs"),
    *("max_skipped_steps", "allow_tf32", "channels_last", "torch_compile", "gradient_checkpointing"),
    *("cache_latents", "patience", "max_logit", "push_discriminator", "validation_prompt"),
    *("validation_prompt_file",),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy", "hub_timeout", "license"),
)


# What a checkpoint says of the run; everything else is the state of what trains.
_OF_THE_RUN = ("step", "images_per_step", "processes", "places", "random_rule", "data", "arguments", "model")


class Checkpoints:
    """Writes the checkpoints of a run, and restores the run from one.

    Args:
        args: the run's arguments.
        accelerator: the run's accelerator; its main process chooses the checkpoint.

    Raises:
        InputError: there is no checkpoint where the arguments say, or the output folder holds a run and the arguments
            do not say to continue it.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator) -> None:
        self.args, self.accelerator, self.output_dir = args, accelerator, Path(args.output_dir)
        (self.resume_from,) = broadcast_object_list([checkpoint_to_resume(args)])
        if args.resume_from_checkpoint == "latest" and self.resume_from is None and accelerator.is_main_process:
            print(f"no checkpoint in {self.output_dir} yet: starting from the beginning")

    @property
    def starts_here(self) -> bool:
        """Whether the output folder is new to the run: it begins, or goes on from another folder."""
        return self.resume_from is None or self.resume_from.resolve().parent != self.output_dir.resolve()

    def are_due(self, step: int, last: bool = False) -> bool:
        """Return whether a checkpoint is due after a step; it is after the last one, as the end of a run takes time."""
        every = self.args.checkpointing_steps
        return every is not None and (last or step % every == 0)

    def write(self, run: Run) -> bool:
        """Write a checkpoint, and return, on the main process, whether that succeeded.

        On a full disk this warns, and the last checkpoint stays.
        """
        keep, positions = self.accelerator.is_main_process, gather_object([list(run.position)])
        written = not keep
        state = {
            "step": run.step,
            "images_per_step": run.images_per_step,
            "processes": self.accelerator.num_processes,
            "places": positions,
            "random_rule": run.seeds.rule,
            "data": run.data.mark,
            "arguments": {k: v for k, v in asdict(self.args).items() if "token" not in k},
            "model": whole(run.subject.state(run.model), keep),
            **{name: whole(part.state_dict(), keep) for name, part in run.stateful().items()},
        }
        if keep:
            with run.log.goes_on_without("the checkpoint", run.step):
                save_checkpoint(self.output_dir, run.step, state, self.args.checkpoints_total_limit)
                written = True
        self.accelerator.wait_for_everyone()
        return written

    def resume(self, run: Run) -> dict[str, Any]:
        """Restore the state of a run, if it goes on from a checkpoint; return the states of the parts by their
        names: they have not joined yet.

        Raises:
            InputError: the checkpoint cannot be read, or is of another run.
        """
        if (folder := self.resume_from) is None:
            return {}
        try:
            state = load_checkpoint(folder)
            require_whole(state, step_of(folder), run)
        except OSError as error:
            raise InputError(f"the checkpoint {folder} cannot be read: {error}. {_way_out(folder)}") from error
        shares = self.accelerator.num_processes if run.streamed else None
        check_same_run(folder, state, self.args, run.images_per_step, shares, run.data.mark)
        if "data" not in state:
            run.log.warn(f"{folder.name} does not say on which images it was trained: they are taken to be these")
        run.step = state["step"]
        run.seeds = Seeds(self.args.seed, state.get("random_rule", 1))
        if run.streamed:
            run.position = Position(*state["places"][self.accelerator.process_index])
        own = run.stateful()
        try:
            load_weights(state, run)
            for name, part in own.items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"the checkpoint {folder} does not fit this run: {reason}. {_way_out(folder)}") from error
        if self.accelerator.is_main_process:
            print(f"going on from {folder}, step {run.step} of {run.total_steps}")
        return {name: value for name, value in state.items() if name not in (*_OF_THE_RUN, *own)}


def checkpoint_to_resume(args: TrainingArguments) -> Path | None:
    """Return the checkpoint that the arguments name, or `None` to start from the beginning.

    Raises:
        InputError: there is none where they say, or the output folder holds a run and they do not say to continue it.
    """
    asked, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    found = list_checkpoints(output_dir)
    holds_run = bool(found) or (output_dir / "logs" / "log.jsonl").exists()
    if asked is None:
        if holds_run and not args.overwrite_output_dir:
            go_on = "continue it with --resume_from_checkpoint latest, " if found else ""
            raise InputError(
                f"--output_dir {output_dir} holds another run (checkpoints: {_names(found)}): {go_on}replace it with "
                f"--overwrite_output_dir, or name another folder"
            )
        return None
    if asked == "latest":
        if not found and holds_result(output_dir) and not args.overwrite_output_dir:
            raise InputError(
                f"--output_dir {output_dir} holds a finished run without checkpoints, which cannot be continued: "
                f"replace it with --overwrite_output_dir, name another folder, or train on from its pipeline with "
                f"--pretrained_model_name_or_path"
            )
        return found[-1] if found else None
    folder, in_output_dir = _asked_for(asked, found)
    if folder is None:
        raise InputError(f"--resume_from_checkpoint {asked}: no checkpoint there; found: {_names(found)}")
    if in_output_dir and (later := [f for f in found if step_of(f) > step_of(folder)]):
        raise InputError(
            f"{output_dir} holds later checkpoints than {folder}: {_names(later)}. To branch off there, name another "
            f"--output_dir or delete them"
        )
    if holds_run and not in_output_dir and not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir {output_dir} holds another run than {folder} (checkpoints: {_names(found)}): continue it "
            f"with --resume_from_checkpoint latest, replace it with --overwrite_output_dir, or name another folder"
        )
    return folder


def _asked_for(asked: str, found: list[Path]) -> tuple[Path | None, bool]:
    """Return the checkpoint of this path, or of this name among those found in the output folder, and whether it is one
    of these. A folder may be spelled in several ways."""
    path = Path(asked)
    if not (path / "state.json").is_file() and path.name == asked:
        path = next((f for f in found if step_of(f) == step_of(path)), path)
    if not (path / "state.json").is_file():
        return None, False
    return path, any(f.samefile(path) for f in found)


def require_whole(state: Any, step: int, run: Run) -> None:
    """Check what a checkpoint says of its run.

    Args:
        state: its content.
        step: the step in its name, -1 if it has another name.
        run: the run that goes on from it.

    Raises:
        OSError: something is missing, or cannot be.
    """
    kinds = {"step": int, "images_per_step": int, "processes": int, "arguments": dict, "model": dict, "optimizer": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(state, dict) or type(state.get(name)) is not kind]
    if wrong:
        raise OSError(f"it is damaged: {', '.join(wrong)} cannot be read from its state.json")
    if state["step"] < 0 or step not in (-1, state["step"]):
        raise OSError(f"it is damaged: it is called that of step {step}, and says step {state['step']}")
    if state["step"] > run.total_steps:
        raise OSError(f"it is of step {state['step']}, and --max_train_steps ends the run at step {run.total_steps}")
    if run.streamed and len(state.get("places") or []) != state["processes"]:
        raise OSError("it is damaged: it does not say where the stream goes on")


def _way_out(folder: Path) -> str:
    others = [f for f in list_checkpoints(folder.parent) if not f.samefile(folder)]
    if others:
        return f"Delete it to go on from {others[-1].name}"
    return "There is no other one in its folder: start anew with --overwrite_output_dir"


def clear_output_dir(folder: Path) -> None:
    """Delete what another run has written into an output folder; the user's own files stay."""
    remove_written(folder / BEST)
    for old in list_checkpoints(folder):
        shutil.rmtree(old, ignore_errors=True)
    for pattern in ("logs/log.jsonl", "logs/**/events.out.tfevents.*", "samples/step-*.png"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def check_same_run(
    folder: Path,
    state: Mapping[str, Any],
    args: TrainingArguments,
    images_per_step: int,
    stream_shares: int | None,
    mark: Mapping[str, Any],
) -> None:
    """Check that a checkpoint was written with the same data and arguments, except those in `_MAY_CHANGE`.

    Args:
        folder, state: the checkpoint's folder and content.
        args: the arguments of this run.
        images_per_step: images of an optimiser step in this run, over all devices.
        stream_shares: the number of processes that share a stream of data; `None` if the data are not streamed.
        mark: the mark of the data, see `mark_of`.

    Raises:
        InputError: arguments or data differ; the message names them.
    """
    defaults = {one.name: one.default for one in fields(args)}  # of arguments that are newer than the checkpoint
    before, now = defaults | state["arguments"], asdict(args)
    changed = {k: (before.get(k), now[k]) for k in now if k not in _MAY_CHANGE and before.get(k) != now[k]}
    if state["images_per_step"] != images_per_step:
        changed["images per step, over all devices"] = state["images_per_step"], images_per_step
    changed |= changes(state.get("data", mark), mark)
    if stream_shares not in (None, state["processes"]):
        changed["processes that share a stream"] = state["processes"], stream_shares
    if changed:
        listed = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
        raise InputError(
            f"{folder.name} is of a run with other arguments or data: {listed}. Continue with the same;"
            f" to change them, start a new run from the saved pipeline with --pretrained_model_name_or_path"
        )


def load_weights(state: Mapping[str, Any], run: Run) -> None:
    """Load the weights of a checkpoint into the model.

    The optimiser's moments and the moving average in `state` are replaced by tensors on the devices, and with the
    sharding and memory layout, of the parameters that they belong to.
    """
    model = unwrap(run.model)
    own, parameters = model.state_dict(), list(run.subject.trainable(model).values())
    for name in run.subject.state(model):
        if name not in state["model"] or state["model"][name].shape != own[name].shape:
            raise ValueError(f"the weights {name} are not those of this network, of shape {tuple(own[name].shape)}")
    model.load_state_dict(own | {name: spread_like(value, own[name]) for name, value in state["model"].items()})
    for i, moments in state["optimizer"]["state"].items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[i].shape:
                moments[name] = spread_like(value, parameters[i])
    if "ema" in run.stateful():
        average = state["ema"]["shadow_params"]
        average[:] = [spread_like(value, p) for value, p in zip(average, parameters, strict=True)]


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(f.name for f in checkpoints) or "none"
