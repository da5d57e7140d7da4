"""Truth: what a user needs of an error. That of the package is a message, that of a library keeps its traceback."""

import pytest
import torch

from diffusers_ext import errors, lower_sigma
from diffusers_ext.errors import InputError, command


def refused():
    lower_sigma(torch.ones(2), -1.0)


def through_a_context():
    with torch.no_grad():
        refused()


def asked():
    raise InputError("give another")


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (refused, "error: width must be at least 0, got -1.0"),
        (through_a_context, "error: width must be at least 0, got -1.0"),
        (asked, "error: give another"),
    ],
)
def test_a_refusal_of_the_package_is_a_message(main, message) -> None:
    with pytest.raises(SystemExit) as ended:
        command(main)()
    assert ended.value.code == message


def of_torch():
    torch.utils.data.DataLoader([1], num_workers=-1)


def of_python():
    int("x")


def of_python_in_a_module_of_the_package():
    exec(compile("int('x')", errors.__file__, "exec"))


def of_the_script():
    raise ValueError("not ours")


@pytest.mark.parametrize("main", [of_torch, of_python, of_python_in_a_module_of_the_package, of_the_script])
def test_another_error_keeps_its_traceback(main) -> None:
    with pytest.raises(ValueError, match=r"num_workers|invalid literal|not ours"):
        command(main)()
