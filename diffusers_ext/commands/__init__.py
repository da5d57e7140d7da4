"""What the scripts need to read their command lines."""

from .parsing import parse_arguments

__all__ = ["parse_arguments"]
