"""`diffusers-ext COMMAND ...`: the commands of this package by `accelerate launch`, wherever it is installed.

    diffusers-ext train-consistency --preset digits --output_dir digits-model
    diffusers-ext train-consistency --num_processes 2 --multi_gpu --preset digits --output_dir digits-model

Options of `accelerate launch` may stand among those of the command; those that both have are the command's. It runs
as a module, `accelerate launch -m diffusers_ext.commands.train_consistency ...`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import logging
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..progress import WIDTH

COMMANDS = (
    *("train_consistency", "train_reflected", "train_short_time", "train_observation"),
    *("calibrate", "fit_bridge", "evaluate", "convert"),
)
OURS = ("mixed_precision", "gradient_accumulation_steps")
"""Options that commands and `accelerate launch` have both."""


def split(words: Sequence[str], launcher: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Return the words of the launcher, and those of the command.

    Args:
        words: a command line.
        launcher: the parser of `accelerate launch`.
    """
    flags = {flag: action for action in launcher._actions for flag in action.option_strings if flag.startswith("--")}
    of_launcher: list[str] = []
    of_command: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name = word.split("=")[0]
        action = None if name.lstrip("-").replace("-", "_") in OURS else flags.get(name)
        (of_command if action is None else of_launcher).append(word)
        if action is not None and action.nargs != 0 and "=" not in word:
            of_launcher += rest[:1]
            del rest[:1]
    return of_launcher, of_command


def usage() -> str:
    """Return what `diffusers-ext --help` prints: the first line of each command's docstring."""
    lines = [
        "diffusers-ext COMMAND [options of accelerate launch] [--ARGUMENT VALUE ...]",
        "",
        "Commands (`diffusers-ext COMMAND --help` lists the arguments of one):",
        "",
    ]
    for name in COMMANDS:
        doc = ast.get_docstring(ast.parse((Path(__file__).with_name(f"{name}.py")).read_text(encoding="utf-8")))
        first = f"  {name.replace('_', '-'):18}"
        lines += textwrap.wrap((doc or "").splitlines()[0], WIDTH, initial_indent=first, subsequent_indent=" " * 20)
    return "\n".join(lines)


def main() -> None:
    """Run a command; see the module's docstring."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    name = words[0].replace("-", "_")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0].replace('_', '-')}?" if close else ""
        sys.exit(f"error: there is no command {words[0]!r}{hint} Commands: {', '.join(COMMANDS).replace('_', '-')}")
    module = f"diffusers_ext.commands.{name}"
    if {"-h", "--help"} & set(words):
        sys.argv = [f"diffusers-ext {words[0]}", *words[1:]]
        importlib.import_module(module).main()
        return
    from accelerate.commands.launch import launch_command, launch_command_parser

    # It lists the defaults of all that `accelerate config` asks for; the run itself says on what it runs.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    launcher = launch_command_parser()
    of_launcher, of_command = split(words[1:], launcher)
    try:
        launch_command(launcher.parse_args([*of_launcher, "--module", module, *of_command]))
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
