"""`make test` takes each value of each parameter; the full product of them belongs to `make test-all`."""

from itertools import product

import pytest


def every_value(*axes) -> list:
    """All combinations of the values; those beyond the first with each value are marked as slow."""
    longest = max(map(len, axes))
    first = {tuple(i % len(axis) for axis in axes) for i in range(longest)}
    cases = []
    for places in product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, places, strict=True)]
        cases.append(pytest.param(*values, marks=[] if places in first else [pytest.mark.slow]))
    return cases
