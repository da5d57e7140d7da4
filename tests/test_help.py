"""What --help shows. Truth: the fields of the argument classes, and the parser that reads the command line."""

import re
import shlex
from dataclasses import MISSING, fields

import pytest
from test_wrong_input import KINDS

from diffusers_ext.commands import parse_arguments
from diffusers_ext.commands.help import USUAL, help_text
from diffusers_ext.presets import PRESETS
from diffusers_ext.progress import WIDTH


def shown(text):
    """The names that a help text lists, in their order, as the fields are called."""
    return [name.removeprefix("no_") for name in re.findall(r"^  --(\w+)", text, re.MULTILINE)]


@pytest.mark.parametrize("name", KINDS)
def test_all_arguments_are_listed_once_and_most_are_not_usual(name):
    kind = KINDS[name]
    everything, usual = (help_text(kind, whole) for whole in (True, False))
    assert sorted(shown(everything)) == sorted(f.name for f in fields(kind))
    few = shown(usual)
    assert len(few) == len(set(few)) <= 36
    assert set(few) <= set(shown(everything))
    assert {"output_dir", "file" if name == "convert" else "pretrained_model_name_or_path"} <= set(few)
    assert f"These are {len(few)} of {len(fields(kind))} arguments" in usual


@pytest.mark.parametrize("name", KINDS)
def test_help_is_as_wide_as_a_bar(name):
    lines = [line for line in help_text(KINDS[name], True).splitlines() if not line.startswith("    diffusers-ext")]
    body = lines[next(i for i, line in enumerate(lines) if line in ("Data:", "Hub:")) :]
    assert max(map(len, body)) <= WIDTH


@pytest.mark.parametrize("name", KINDS)
def test_defaults_are_those_that_the_parser_gives(name):
    kind, text = KINDS[name], help_text(KINDS[name], True)
    said = re.findall(r"^  --(\w+).*\n((?:      .*\n)*)", text + "\n", re.MULTILINE)
    defaults = {f.name: f.default for f in fields(kind)}
    for argument, described in said:
        found = re.search(r"\(default:\s+(\S[^)]*)\)", described)
        argument = argument.removeprefix("no_") if argument.startswith("no_") else argument
        default = defaults[argument]
        if found:
            if default is not MISSING:
                assert re.sub(r"\s+", " ", found[1]) == str(default)
        else:
            assert default is MISSING or default is None or isinstance(default, bool)


@pytest.mark.parametrize("name", KINDS)
def test_the_examples_are_commands_that_are_taken(name):
    text = help_text(KINDS[name], False).replace("\\\n", " ")
    examples = re.findall(r"^    diffusers-ext ([\w-]+) (.*)$", text, re.MULTILINE)
    assert examples
    for command, words in examples:
        assert command == name.replace("_", "-")
        parse_arguments(KINDS[name], shlex.split(words))


def test_presets_are_shown_with_what_they_set():
    text = re.sub(r"\s+", " ", help_text(KINDS["train_consistency"], False))
    for name, preset in PRESETS.items():
        assert f"{name}: dataset_name {preset.arguments['dataset_name']}, resolution" in text
        assert f"learning_rate {preset.arguments['learning_rate']}" in text


def test_the_usual_arguments_exist():
    assert set(USUAL) <= {f.name for kind in KINDS.values() for f in fields(kind)}


@pytest.mark.parametrize(("words", "whole"), [(["--help"], False), (["-h"], False), (["--help", "all"], True)])
def test_help_wins_over_everything_else(words, whole, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(KINDS["train_consistency"], ["--learning_rate", "-1", *words])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == help_text(KINDS["train_consistency"], whole).strip()
