"""How a command line, a YAML file and a preset become the arguments of a script."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from ..errors import InputError
from ..fields import Ranged
from ..presets import PRESETS
from .help import asked, help_text

Arguments = TypeVar("Arguments", bound=Ranged)


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Fill an argument class from its defaults, a preset, a YAML file and the command line; what comes later wins. A
    class may name the argument that a word without a name is, `named`.

    An error in any of them ends the program with a message, as argparse does.
    """
    known, named = {one.name for one in fields(kind)}, getattr(kind, "named", None)
    begin = "[--preset NAME]" if "preset" in known else f"[{str(named).upper()}]"
    usage = f"%(prog)s {begin} [--config YAML] [--ARGUMENT VALUE ...]; --help lists the arguments"
    parser = HfArgumentParser(kind, allow_abbrev=False, usage=usage)
    argv = list(sys.argv[1:] if argv is None else argv)
    if (wanted := asked(argv)) is not None:
        print(help_text(kind, wanted == "all"))
        sys.exit(0)
    try:
        first, _ = HfArgumentParser(_Sources, allow_abbrev=False, add_help=False).parse_known_args(argv)
        file = _read_yaml(first.config, kind) if first.config is not None else {}
        preset = first.preset or file.get("preset")
        if preset is not None and preset not in PRESETS:
            raise InputError(f"there is no preset {preset!r}; presets: {', '.join(PRESETS)}")
        of_preset = PRESETS[preset].arguments if preset else {}
        values = {name: value for name, value in of_preset.items() if name in known} | file
        # In front of the command line they are checked and converted like it, and what comes later wins.
        words = [_words(name, value) for name, value in values.items()]
        argv = [word for part in words for word in part] + argv
        args, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if named is not None and getattr(args, named) is None and len(unknown) == 1 and not unknown[0].startswith("-"):
            setattr(args, named, unknown.pop())
        for name in (word.split("=")[0] for word in unknown):
            raise InputError(f"unknown argument {name!r}{_hint(name.lstrip('-'), kind)}")
        _require_folder(getattr(args, "output_dir", "."))
    except ValueError as error:
        parser.error(str(error))
    return args


def _require_folder(path: str) -> None:
    """Check that there is a folder, or that one can be made there.

    Raises:
        InputError: a file is in the way, or the folder cannot be written to.
    """
    there = Path(path).absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise InputError(f"--output_dir {path}: {there} is no folder; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {path}: {there} cannot be written to; name another one")


def _words(name: str, value: Any) -> list[str]:
    return [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]


@dataclass
class _Sources:
    config: str | None = None
    preset: str | None = None


# --- the YAML file ----------------------------------------------------------------------------------------------------


class _Texts(yaml.SafeLoader):
    """Reads scalars as the texts that they are, as a command line does, and `null` as None: to YAML `no` is a boolean,
    `1e-4` a text and 12:30 the number 750. A key that comes twice is an error."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.endswith((":null", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{twice[0]!r} comes twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: str, kind: type) -> dict[str, Any]:
    """Return the values in the file as the words of a command line, one or a list of them, without those that are null.

    Raises:
        InputError: the file cannot be read, or does not hold arguments of this class alone, once each.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Texts)
        if not isinstance(values, dict):
            raise InputError("it must hold `name: value` lines")
        _check_names(values, kind)
        types = get_type_hints(kind)
        return {name: _checked(name, value, types[name]) for name, value in values.items() if value is not None}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path} cannot be read: {error}") from error
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from error


def _checked(name: str, value: Any, type_: Any) -> Any:
    """Return the word, or the list of words, that a value of the file stands for."""
    if isinstance(value, dict):
        raise InputError(f"{name} must be a value and not a mapping, got {value}")
    if not isinstance(value, list):
        # YAML calls these booleans, the command line does not.
        return {"on": "true", "off": "false"}.get(str(value).lower(), value) if type_ is bool else value
    if get_origin(type_) is not list:
        raise InputError(f"{name} must be one value and not a list, got {value}")
    for item in value:
        if not isinstance(item, str) or item.startswith("-"):
            raise InputError(f"an item of the list {name} must be a text that does not begin with '-', got {item!r}")
    return value


def _check_names(values: Mapping[Any, Any], kind: type) -> None:
    for name in values:
        if name not in {f.name for f in fields(kind)}:
            raise InputError(f"unknown argument {name!r}{_hint(str(name), kind)}")
        if name == "config":
            raise InputError("a file cannot name another one with `config`")


def _hint(name: str, kind: type) -> str:
    close = difflib.get_close_matches(name, [f.name for f in fields(kind)], n=1)
    return f"; did you mean {close[0]}?" if close else ""
