"""How a noise level meets a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def align(sigma: Tensor | float, x: Tensor) -> Tensor:
    """View `sigma`, () or (B,), so that it broadcasts over `x` (B, ...), in the dtype and on the device of `x`.

    Raises:
        ValueError: `sigma` has neither shape () nor one entry for each sample of `x`.
    """
    if not isinstance(sigma, Tensor):
        return torch.full((), sigma, dtype=x.dtype, device=x.device)
    if sigma.ndim == 0:
        return sigma.to(x)
    if sigma.shape != x.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; x of shape {tuple(x.shape)} needs () or ({len(x)},)")
    return sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
