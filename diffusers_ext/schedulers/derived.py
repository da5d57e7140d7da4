"""Make a family of schedulers: one subclass of each of many stock schedulers, all with the same added methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

WRAPPED = ("step", "set_timesteps")


def derive(prefix: str, family: Any, stock: Any) -> Any:
    """Make the class `prefix` + the stock scheduler's name: the methods of `family` come before those of the stock.

    Pipelines read the signature of `step` to decide which arguments to pass on, so the signatures of `step` and
    `set_timesteps` stay those of the stock scheduler.
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


def position_in_step(name: str, stock: Any) -> int:
    """Return the position of an argument of the stock scheduler's `step`, after the network's output: CogVideoX's DPM
    scheduler has others before `timestep`."""
    return list(inspect.signature(stock.step).parameters).index(name) - 2


def by_name(family: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes of a family by their own names. The module that makes them adds these to its namespace, where
    pickle looks for them."""
    return {kind.__name__: kind for kind in family.values()}
