"""Figures of matplotlib that own their canvas, so that neither pyplot nor the global backend is touched."""

from __future__ import annotations

from typing import Any


def agg_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches, which Agg draws.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
