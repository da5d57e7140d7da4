"""From the command line to arguments."""

from .parsing import parse_arguments

__all__ = ["parse_arguments"]
