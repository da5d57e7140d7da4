"""What `--help` shows: the arguments that most runs need, in groups; `--help all` shows all of them.

Everything is read from the argument class: a group is a class of its bases, with the arguments that this one adds.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..presets import PRESETS
from ..progress import WIDTH

# What most runs need, of the arguments that several commands have in common.
USUAL = (
    *("config", "preset", "pretrained_model_name_or_path", "dataset_name", "train_data_dir", "caption_column"),
    *("resolution", "train_batch_size", "seed", "class_conditional", "rank", "max_train_steps", "learning_rate"),
    *("mixed_precision", "validation_steps", "checkpointing_steps", "resume_from_checkpoint", "output_dir"),
    "push_to_hub",
)
INDENT = 6


def asked(argv: list[str]) -> str | None:
    """Return "usual" or "all" where the words of a command line ask for help, else `None`."""
    for i, word in enumerate(argv):
        if word in ("-h", "--help"):
            return "all" if argv[i + 1 : i + 2] == ["all"] else "usual"
        if word == "--help=all":
            return "all"
    return None


def help_text(kind: type, everything: bool, width: int | None = None) -> str:
    """Return the help of a command.

    Args:
        kind: its argument class; the docstring of its module begins the text.
        everything: whether all arguments are listed.
        width: columns; by default those of the terminal, and WIDTH at most.
    """
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if width is None else width
    described = (sys.modules[kind.__module__].__doc__ or kind.__doc__ or "").strip()
    lines, types = [described], get_type_hints(kind)
    listed = 0
    for title, group in _groups(kind):
        shown = [one for one in group if everything or one.name in USUAL or title == OWN]
        listed += len(shown)
        if shown:
            lines += ["", f"{title}:"]
        for one in shown:
            lines += [f"  {_synopsis(one, types[one.name])}", *_wrapped(_text(one), width)]
    if not everything:
        lines += ["", f"These are {listed} of {len(fields(kind))} arguments: --help all lists them."]
    lines += ["", "--config run.yaml reads arguments from a file, a line `name: value` for each."]
    if "preset" in types:
        lines += ["", "A preset sets these, which the command line overrides:"]
        known = {one.name for one in fields(kind)}
        for name, preset in PRESETS.items():
            values = ", ".join(f"{key} {value}" for key, value in preset.arguments.items() if key in known)
            lines += textwrap.wrap(f"{name}: {values}", width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


OWN = "This command"


def _groups(kind: type) -> Iterator[tuple[str, list[Field[Any]]]]:
    """Yield titles and the arguments that each class of the bases adds, those of the command itself last."""
    all_fields = {one.name: one for one in fields(kind)}
    for base in reversed(kind.__mro__):
        added = [n for n in vars(base).get("__annotations__", {}) if n in all_fields]
        group = [all_fields.pop(name) for name in added]
        if group:
            yield (OWN if base is kind else _title(base.__name__)), group


def _title(name: str) -> str:
    """`HeldOutArguments` as "Held out"."""
    words = "".join(f" {c.lower()}" if c.isupper() else c for c in name.removesuffix("Arguments")).strip()
    return words.capitalize()


def _synopsis(one: Field[Any], type_: Any) -> str:
    """`--name VALUE`, with the values that there are, or `--no_name` for a switch that is on."""
    if type_ is bool:
        return f"--no_{one.name}" if one.default is True else f"--{one.name}"
    several = ""
    options = [option for option in get_args(type_) if option is not NoneType]
    inner = options[0] if get_origin(type_) in (Union, UnionType) and len(options) == 1 else type_
    if get_origin(inner) is list:
        several, inner = " ...", get_args(inner)[0]
    if get_origin(inner) is Literal:
        return f"--{one.name} {'|'.join(map(str, get_args(inner)))}{several}"
    words = {int: "N", float: "X", str: "TEXT"}
    return f"--{one.name} {words.get(inner, 'VALUE')}{several}"


def _text(one: Field[Any]) -> str:
    """The text of an argument, with its default where there is one that the text does not say."""
    default = one.default
    if default is MISSING:
        default = None if one.default_factory is MISSING else one.default_factory()
    said = str(one.metadata.get("help", ""))
    if default is None or isinstance(default, bool) or default == []:
        return said
    return f"{said} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
