"""What the documentation says is true: its Python runs, its files exist, its length is kept."""

import re
import shlex
from pathlib import Path

import pytest
from test_wrong_input import KINDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_in_the_readme_runs(code):
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["loss"].isfinite()
    assert scope["unet"].conv_in.weight.grad.abs().sum() > 0


def test_files_named_in_the_readme_exist():
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"(?:training|benchmarks)/\w+\.py", README)
    assert named
    assert [n for n in named if not (ROOT / n).exists()] == []


def test_commands_in_the_readme_have_arguments_that_exist():
    from diffusers_ext.commands import parse_arguments

    commands = re.findall(r"^diffusers-ext ([\w-]+)((?:.*\\\n)*.*)", README, re.MULTILINE)
    assert len(commands) >= 5
    for name, command in commands:
        kind = KINDS[name.replace("-", "_")]
        parse_arguments(kind, shlex.split(command.replace("\\\n", " ")))


@pytest.mark.parametrize(("name", "lines"), [("README.md", 120), ("CONTRIBUTING.md", 60)])
def test_documents_stay_short(name, lines):
    assert len((ROOT / name).read_text().splitlines()) <= lines
