"""Random numbers."""

from __future__ import annotations

import numpy as np


def seed_for(*parts: int) -> int:
    """A well-mixed 63-bit seed of non-negative integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
