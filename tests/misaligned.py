"""A plugin of pytest: loaded weights lie at any multiple of 4 bytes, as they may anywhere, and MKL rounds otherwise.

`PYTHONPATH=tests python -m pytest -p misaligned` finds tests that ask for equal bits of a model and its loaded copy,
whatever the addresses happen to be on this machine.
"""

import random

import safetensors.torch

DRAWS = random.Random()


def moved(tensor):
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    offset = DRAWS.randrange(1, 16)
    larger = tensor.new_empty(tensor.numel() + 16)
    return larger[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


def with_moved_tensors(load):
    return lambda *args, **kwargs: {name: moved(value) for name, value in load(*args, **kwargs).items()}


for name in ("load", "load_file"):
    setattr(safetensors.torch, name, with_moved_tensors(getattr(safetensors.torch, name)))
