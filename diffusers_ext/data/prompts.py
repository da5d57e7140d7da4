"""Prompts in a file."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError


def read_prompts(path: str, argument: str) -> list[str]:
    """Return the prompts in a text file in UTF-8, one in a line; empty lines are left out.

    Args:
        path: the file.
        argument: the argument that named it, for the message.

    Raises:
        InputError: the file cannot be read, or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--{argument} {path} cannot be read as text in UTF-8: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--{argument} {path} holds no prompt: it must have one in a line")
    return prompts
