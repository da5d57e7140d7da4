"""The format of checkpoints: everything a run needs to go on, in safetensors and JSON, without pickle.

A checkpoint is a folder `checkpoint-00000500` with `state.safetensors` and `state.json`, written aside and renamed. It
holds the state dicts of weights, moving average, optimisers and learning rate: the first file their tensors, the second
the rest, with the names of the tensors. It needs no state of random number generators: what is drawn at a step follows
from the seed and the step (see `diffusers_ext.training.loop`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import replacing_folder

_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(output_dir: Path, step: int, state: Mapping[str, Any], limit: int | None = None) -> Path:
    """Write `checkpoint-<step>`, then delete the oldest ones of earlier steps, so that `limit` are left.

    The others stay until the new one is complete and on the disk, so a run that is killed here, or a full disk, loses
    nothing.

    Raises:
        OSError: the checkpoint could not be written; the older ones are as they were.
    """
    folder = output_dir / f"checkpoint-{step:08d}"
    tensors: dict[str, Tensor] = {}
    tree = _to_json(state, "", tensors)
    with replacing_folder(folder) as partial:
        save_file(tensors, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps(tree))
    if limit is not None:
        earlier = [old for old in list_checkpoints(output_dir) if step_of(old) < step]
        for old in earlier[: max(len(earlier) + 1 - limit, 0)]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the state that `save_checkpoint` has written, with its tensors on the CPU.

    Raises:
        OSError: the folder holds no checkpoint, or a damaged one.
    """
    try:
        tree = json.loads((folder / "state.json").read_text())
        return _from_json(tree, load_file(folder / "state.safetensors"))
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{folder} is damaged: {type(error).__name__}: {error}") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints in the folder, in the order of their steps."""
    if not output_dir.is_dir():
        return []
    found = (f for f in output_dir.iterdir() if _NAME.fullmatch(f.name) and (f / "state.json").is_file())
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint, -1 if it is no such name; `checkpoint-500` is such a name."""
    found = _NAME.fullmatch(folder.name)
    return -1 if found is None else int(found[1])


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a tree of dicts, lists and tuples as JSON; put its tensors into `tensors`, under their paths."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[k, _to_json(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_to_json(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {name}, of type {type(value).__name__}")


def _from_json(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _from_json(v, tensors) for k, v in content}
    values = [_from_json(v, tensors) for v in content]
    return tuple(values) if kind == "tuple" else values


def same_state(a: Any, b: Any) -> bool:
    """Return whether two states are equal, bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b
