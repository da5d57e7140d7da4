"""States whose tensors are spread over the processes, as FSDP2 (`fully_shard`) does.

There, a parameter, its moving average and its moments are `DTensor`s, of which each process holds a part. A checkpoint
and a saved pipeline hold whole tensors, so that any number of processes, sharded or not, goes on from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(state: Any, keep: bool) -> Any:
    """The state (a tree of dicts, lists and tuples) with its spread tensors whole, on the CPU; `None` for them in a
    process that does not `keep` them. All processes must call it together."""
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(state, Mapping):
        return {k: whole(v, keep) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(v, keep) for v in state)
    return state


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, on the device of `like`, spread and laid out in memory as that is."""
    if isinstance(like, DTensor):
        value = distribute_tensor(value.to(like.device_mesh.device_type), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor, put together where it is spread. All processes must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
