"""Conditions: the keyword arguments of a network's calls beside the sample and the time, as trees.

A condition is a dict of tensors whose first dimension is the batch, or of such dicts (Stable Diffusion XL). The null
condition, which says nothing, may be a part of such a tree: what it does not name stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .randomness import rand

Condition = dict[str, Any]


def each_tensor(function: Callable[[Tensor], Any], condition: Any) -> Any:
    """Apply a function to each tensor, and return the tree of the results."""
    if isinstance(condition, Mapping):
        return {name: each_tensor(function, value) for name, value in condition.items()}
    return function(condition)


def first_tensor(condition: Any) -> Tensor:
    """Return the first tensor of a tree."""
    while isinstance(condition, Mapping):
        condition = next(iter(condition.values()))
    return condition


def overlaid(
    condition: Any, other: Any, function: Callable[[Tensor, Tensor], Tensor] = lambda own, other: other
) -> Any:
    """Return a condition with `function(own, other)` in place of each tensor that another tree has, too; by default
    that is the other's. What only one of them has stays."""
    if not isinstance(condition, Mapping):
        return function(condition, other)
    both = {name: overlaid(value, other[name], function) for name, value in condition.items() if name in other}
    return {**condition, **other, **both}


def dropped(condition: Any, null: Any, share: float, generator: torch.Generator) -> Any:
    """Replace each row of a condition by the null condition, with probability `share` and independently."""
    first = first_tensor(condition)
    chosen = rand((len(first),), generator, device=first.device) < share

    def replaced(value: Tensor, nothing: Tensor) -> Tensor:
        return torch.where(chosen.reshape(-1, *[1] * (value.ndim - 1)), nothing.to(value), value)

    return overlaid(condition, null, replaced)


def for_each(condition: Any, n: int, device: torch.device) -> Any:
    """Repeat a condition of first dimension 1 for each of n samples."""
    return each_tensor(lambda value: value.to(device).expand(n, *value.shape[1:]), condition)
