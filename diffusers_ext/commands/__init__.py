"""The commands, one module each with a `main`, how they read their command lines, and how they are launched."""

from .parsing import parse_arguments

__all__ = ["parse_arguments"]
