"""Subclasses of the stock schedulers, by the dozen: one mechanism for every family of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

WRAPPED = ("step", "set_timesteps")


def derive(prefix: str, family: Any, stock: Any) -> Any:
    """The class `prefix` + the stock scheduler's name: that scheduler with the methods of `family` in front of its own.

    Pipelines read the signature of `step` to decide what to pass on, so it stays that of the stock one, and that of
    `set_timesteps`, too.
    """

    def keep_signature(name: str) -> Any:
        @functools.wraps(getattr(stock, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(super(kind, self), name)(*args, **kwargs)

        return method

    doc = f"`{stock.__name__}`: {(family.__doc__ or '').strip().splitlines()[0]} See `{family.__module__}`."
    members = {"__module__": family.__module__, "__doc__": doc} | {name: keep_signature(name) for name in WRAPPED}
    kind = type(f"{prefix}{stock.__name__}", (family, stock), members)
    return kind


def by_name(family: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of a family by their own names. A module that makes them takes these up into its namespace, where
    pickle looks for them."""
    return {kind.__name__: kind for kind in family.values()}
