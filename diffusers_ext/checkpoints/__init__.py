"""Checkpoints of the code bases of the papers and their field, as pipelines of diffusers.

pickles, reading     what a file holds, without running anything of it
edm, adm, score_sde  the kinds of files: which blocks they have, under which names, and what their numbers mean
layout, schedules    the network and the scheduler of that
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from .adm import convert_adm, is_adm
from .edm import convert_edm, is_edm
from .model import Converted
from .reading import read_checkpoint
from .score_sde import convert_score_sde, is_score_sde

__all__ = ["Converted", "convert_checkpoint", "read_checkpoint"]

KINDS: tuple[tuple[Callable[[Any], bool], Callable[..., Converted], str], ...] = (
    (is_edm, convert_edm, "EDM"),
    (is_adm, convert_adm, "ADM"),
    (is_score_sde, convert_score_sde, "score_sde or Reflected-Diffusion"),
)


def _unwrapped(content: Any) -> Any:
    """Return a state dict without what some trainers put around it: a dict with one key, or a prefix of its names."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, dict) and content and all(str(name).startswith("module.") for name in content):
        content = {str(name).removeprefix("module."): value for name, value in content.items()}
    return content


def convert_checkpoint(path: str | Path, **told: Any) -> Converted:
    """Return the diffusers pipeline of a checkpoint of EDM (and its forks), ADM, score_sde or Reflected-Diffusion.

    The kind is recognised by the content. Nothing of the file is executed.

    Args:
        path: the file.
        told: what the file does not say of its model. ADM: resolution, beta_schedule ("linear" or "cosine"),
            attention_head_dim or num_attention_heads, new_attention_order. score_sde: resolution, sde ("vp", "ddpm",
            "ve" or "reflected"), sigma_min and sigma_max, beta_min and beta_max, fir. `None` means not told.

    Raises:
        InputError: the file cannot be read or is of none of these kinds, something must be told or is not of this kind,
            or the network cannot be represented.
    """
    content = _unwrapped(read_checkpoint(path))
    told = {name: value for name, value in told.items() if value is not None}
    for is_it, convert, name in KINDS:
        if is_it(content):
            if foreign := sorted(told.keys() - inspect.signature(convert).parameters.keys()):
                raise InputError(f"a file of {name} needs no --{', --'.join(foreign)}: leave it out")
            try:
                return convert(content, **told)
            except InputError:
                raise
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                wrong = f"{type(error).__name__}: {error}".replace("\x1b", "")[:300]
                raise InputError(f"{Path(path).name} looks like one of {name}, and is another: {wrong}") from error
    keys = ", ".join(f"{one!r:.99}" for one in list(content)[:5]) if isinstance(content, dict) else ""
    if "conv_in.weight" in keys:
        raise InputError(
            f"{Path(path).name} has the names of diffusers: open it by from_pretrained, it needs no conversion"
        )
    known, found = ", ".join(name for _, _, name in KINDS), keys or f"a {type(content).__name__}"
    raise InputError(f"{Path(path).name} is of none of the known kinds ({known}): it has {found}")
