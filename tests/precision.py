"""How equal two computations of the same numbers are.

Bits agree where the same operations run on the same memory layout: of the same tensors, or of newly made ones, in one
process. Loaded weights lie at other addresses, and MKL rounds by the address of its data, unless `MKL_CBWR=COMPATIBLE`
is set before torch is imported. There, and where a batch is split, a float32 layer differs by some 1e-6, and the images
of a sampler by some 1e-5.
"""

import os

import numpy as np
import torch

REPRODUCIBLE = os.environ.get("MKL_CBWR") == "COMPATIBLE"


def assert_same_images(ours, theirs) -> None:
    """Of images in [0, 1], up to the rounding of a network's layers over a few steps of a sampler."""
    ours, theirs = (torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def assert_resumed(start: dict, ours: dict, theirs: dict) -> None:
    """Of the weights of a run and of one that went on from `start`: the same bits where that is promised."""
    assert_same_training(start, ours, theirs)
    if REPRODUCIBLE:
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def assert_same_training(start: dict, ours: dict, theirs: dict) -> None:
    """Of weights trained from `start` in two ways, that the difference is small against how far they have come: AdamW
    divides by the size of a gradient, and so magnifies the rounding of small ones."""
    assert ours.keys() == theirs.keys() == start.keys()
    moved, apart = (sum((x[k] - ours[k]).square().sum() for k in ours) for x in (start, theirs))
    assert moved > 0
    assert apart < 0.02**2 * moved


def assert_same_numbers(ours, theirs, rel: float = 1e-4) -> None:
    """Of two lists of measurements: the same numbers where that is promised, elsewhere nearly."""
    np.testing.assert_allclose(ours, theirs, rtol=0 if REPRODUCIBLE else rel)
