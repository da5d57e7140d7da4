"""How a command line, a YAML file and a preset become the arguments of a script."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from ..data.sources import DataArguments
from ..errors import InputError
from ..presets import PRESETS

Arguments = TypeVar("Arguments", bound=DataArguments)


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Fill an argument class from its defaults, a preset, a YAML file and the command line; what comes later wins.

    An error in any of them ends the program with a message, as argparse does.
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
        # In front of the command line they are checked and converted like it, and what comes later wins.
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
