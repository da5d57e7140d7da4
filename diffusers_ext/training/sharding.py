"""States whose tensors are sharded: spread over the processes, as by FSDP2 (`fully_shard`).

There, a parameter, its moving average and its moments are `DTensor`s, of which each process holds a part. A checkpoint
and a saved pipeline hold whole tensors, so any number of processes, sharded or not, can go on from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(state: Any, keep: bool) -> Any:
    """Return a state (a tree of dicts, lists and tuples) in which sharded tensors are put together, on the CPU.

    A process that does not `keep` them gets `None` in their stead. All processes must call this together.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(state, Mapping):
        return {k: whole(v, keep) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(v, keep) for v in state)
    return state


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor, the same in all processes, as `like` is, on its device and in its memory layout."""
    if isinstance(like, DTensor):
        value = distribute_tensor(value.to(like.device_mesh.device_type), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor, put together if it is sharded. All processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
