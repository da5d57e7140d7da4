"""An evaluation as plots."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..figures import agg_figure
from ..files import shown
from ..metrics import Interval
from .measured import Cell, Evaluation
from .tables import REAL

QUALITY_NFE, QUALITY_SECONDS, LOSS_BY_SIGMA = "quality_nfe.png", "quality_seconds.png", "loss_by_sigma.png"
# Okabe and Ito's colours without their yellow, which white swallows; a marker for each, and a line for each round.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
_MARKERS, _LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", ":")


def plots(evaluation: Evaluation) -> dict[str, bytes]:
    """Draw the plots that there are numbers for, and return file name -> PNG.

    Without matplotlib print a line that says that there are no plots, and return none.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots in the report: they need matplotlib (pip install matplotlib)")
        return {}
    figures: dict[str, Any] = {}
    if evaluation.cells:
        figures[QUALITY_NFE] = quality_figure(evaluation, lambda cell: cell.nfe, "NFE", marked=True)
        figures[QUALITY_SECONDS] = quality_figure(evaluation, lambda cell: cell.seconds, "seconds per image")
    if losses_of(evaluation):
        figures[LOSS_BY_SIGMA] = loss_figure(evaluation)
    drawn = {}
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, dpi=120, format="png")
        drawn[name] = file.getvalue()
    return drawn


def quality_figure(evaluation: Evaluation, cost: Callable[[Cell], float], label: str, *, marked: bool = False) -> Any:
    """Draw the distance against the cost of a cell: a panel for each scheduler, a line for each model.

    Bars are the intervals, the band is the floor's, a cross on the upper edge an estimate that is not finite. `marked`
    puts the ticks at the costs.
    """
    from matplotlib.transforms import ScaledTranslation

    models, schedulers = evaluation.model_names, evaluation.schedulers
    columns = 2 if len(schedulers) == 4 else min(3, len(schedulers))
    rows = -(-len(schedulers) // columns)
    figure = agg_figure(max(5.5, 4.4 * columns), 3.5 * rows + 0.5 + 0.2 * -(-(len(models) + 1) // 3))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    handles: dict[str, Any] = {}
    floor = evaluation.distance(evaluation.floor) if evaluation.floor is not None else None
    costs = [x for x in map(cost, evaluation.cells) if math.isfinite(x) and x > 0]
    for axis, scheduler in zip(axes, schedulers, strict=False):
        axis.set_title(_label(scheduler, 40), fontsize=11)
        axis.set_axisbelow(True)
        axis.grid(color="0.9", lw=0.7)
        if floor is not None and math.isfinite(floor.estimate):
            low, high = _ends(floor)
            band = axis.axhspan(low, high, color="0.5", alpha=0.25, lw=0)
            axis.axhline(floor.estimate, color="0.4", lw=1, ls="--")
            handles[f"{REAL} (n = {evaluation.num_floor})"] = band
        for i, model in enumerate(models):
            cells = [c for c in evaluation.ordered() if (c.model, c.scheduler) == (model, scheduler)]
            cells = [c for c in cells if math.isfinite(cost(c)) and cost(c) > 0]
            x, values = [cost(c) for c in cells], [evaluation.distance(c.quality) for c in cells]
            y = np.array([v.estimate if math.isfinite(v.estimate) else math.nan for v in values])
            bars = np.array([[y - low, high - y] for y, (low, high) in zip(y, map(_ends, values), strict=True)])
            # Beside each other on the picture, where bars at one NFE would hide each other; the data stay exact.
            aside = ScaledTranslation((i - (len(models) - 1) / 2) * 2.2 / 72, 0, figure.dpi_scale_trans)
            if cells:
                handles[_label(model)] = axis.errorbar(
                    x, y, bars.T.clip(min=0), transform=axis.transData + aside if marked else axis.transData,
                    **_style(i), ms=4.5, lw=1.4, elinewidth=1, capsize=2.5, gid=model,
                )  # fmt: skip
            lost = [x for x, v in zip(x, values, strict=True) if not math.isfinite(v.estimate)]
            if lost:
                axis.plot(
                    lost, [0.97] * len(lost), "x", ms=8, mew=2, color=_style(i)["color"], zorder=5,
                    transform=axis.get_xaxis_transform() + aside,
                )  # fmt: skip
    for axis in axes[len(schedulers) :]:
        axis.set_axis_off()
    measured = [evaluation.distance(cell.quality) for cell in evaluation.cells] + ([floor] if floor is not None else [])
    for k, axis in enumerate(axes[: len(schedulers)]):
        _log_axis(axis, costs, marked)
        _vertical_axis(axis, measured)
        lowest = k >= len(schedulers) - columns
        axis.set_xlabel(label if lowest else "")
        axis.xaxis.set_tick_params(labelbottom=lowest)
    figure.supylabel(_wrapped(evaluation.distance_name), fontsize=10)
    _legend(figure, handles)
    return figure


def _ends(value: Interval) -> tuple[float, float]:
    """Return the ends of the interval, which has no width where it is not finite."""
    finite = math.isfinite(value.low) and math.isfinite(value.high)
    return (value.low, value.high) if finite else (value.estimate, value.estimate)


def _vertical_axis(axis: Any, values: Sequence[Interval]) -> None:
    """Scale the axis: linear, but logarithmic if the estimates span a factor of 10, and linear around 0 if an interval
    reaches there."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    finite = [v for v in values if math.isfinite(v.estimate)]
    ends = [end for v in finite for end in _ends(v)]
    if not finite or min(ends) == max(ends):
        return
    low, high = min(ends), max(ends)
    largest, threshold = max(abs(v.estimate) for v in finite), 0.0
    if low <= 0:
        reaching = max(abs(end) for v in finite for end in _ends(v) if _ends(v)[0] <= 0)
        threshold = 10.0 ** round(math.log10(reaching)) if reaching > 0 else low
        if threshold > 0 and largest > 5 * threshold:
            axis.set_yscale("symlog", linthresh=threshold)
    elif largest > 10 * low:
        axis.set_yscale("log")
    if low <= 0:
        axis.axhline(0, color="0.3", lw=0.7, zorder=1)
    # The limits are ours: autoscaling does not see through the shift of the lines.
    scale = axis.yaxis.get_transform()
    bottom, top = scale.transform([low, high])
    bottom, top = scale.inverted().transform([bottom - 0.06 * (top - bottom), top + 0.08 * (top - bottom)])
    axis.set_ylim(bottom, top)
    if axis.get_yscale() != "linear":
        start = threshold if low <= 0 else low
        ticks = {sign * tick for tick in _log_ticks(start, high) for sign in (1, -1)}
        axis.yaxis.set_major_locator(FixedLocator(sorted(t for t in ticks | {0.0} if bottom <= t <= top)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers in a range, few enough for their labels."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 100 * low else (1, 3) if high < 2000 * low else (1,)
    return [k * 10.0**d for d in decades for k in steps if 0.999 * low <= k * 10.0**d <= 1.001 * high]


def _log_axis(axis: Any, values: Sequence[float], marked: bool) -> None:
    """Make the x axis logarithmic with plain numbers, also for one value; `marked` puts the ticks at the values."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    if not values:
        return
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.07, 1.15 if high > low else 1.8)
    axis.set_xlim(low / margin, high * margin)
    if marked:
        ticks: list[float] = []
        for x in sorted(set(values)):  # no two labels on each other
            if not ticks or math.log(x / ticks[-1]) > 0.07 * math.log(high / low * margin**2):
                ticks.append(x)
    else:
        ticks = _log_ticks(low, high) if high > 3 * low else sorted({float(f"{x:.2g}") for x in (low, high)})
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}" if x < 1000 else f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def losses_of(evaluation: Evaluation) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return model -> levels, increasing, and losses of which there is a logarithm."""
    found = {}
    for model in evaluation.model_names:
        one = evaluation.likelihoods.get(model)
        if one is None or not one.sigmas:
            continue
        sigmas, mse = np.array(one.sigmas, dtype=float), np.array(one.eps_mse, dtype=float)
        usable = np.isfinite(sigmas) & np.isfinite(mse) & (sigmas > 0) & (mse > 0)
        order = np.argsort(sigmas[usable])
        if usable.any():
            found[model] = sigmas[usable][order], mse[usable][order]
    return found


def loss_figure(evaluation: Evaluation) -> Any:
    """Draw loss against noise level; below, for several models, the ratio to the first, interpolated in logarithms."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    losses, models = losses_of(evaluation), evaluation.model_names
    several = len(losses) > 1
    height = (6.2 if several else 4.0) + 0.2 * -(-len(losses) // 3)
    figure = agg_figure(7.5, height)
    axes = figure.subplots(2 if several else 1, 1, squeeze=False, sharex=True, height_ratios=[3, 2][: 1 + several])[
        :, 0
    ]
    handles = {}
    first_sigmas, first_mse = next(iter(losses.values()))
    for model, (sigmas, mse) in losses.items():
        style = _style(models.index(model)) | {"ms": 3.5, "lw": 1.4}
        (handles[_label(model)],) = axes[0].loglog(sigmas, mse, gid=model, **style)
        if several:
            logs = np.interp(np.log(sigmas), np.log(first_sigmas), np.log(first_mse), left=np.nan, right=np.nan)
            axes[1].plot(sigmas, mse / np.exp(logs), gid=model, **style)
    axes[0].set_ylabel("mean square error of eps")
    axes[0].set_title(f"Held-out images of {_label(shown(evaluation.data), 50)}", fontsize=11)
    if several:
        axes[1].set_ylabel(_wrapped(f"ratio to {_label(next(iter(losses)), 24)}", 24))
        low, high = axes[1].get_ylim()
        if low > 0 and high > 4 * low:
            axes[1].set_yscale("log")
            axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[-1].set_xlabel("noise level sigma")
    for axis in axes:
        axis.grid(color="0.9", lw=0.7)
    if len(first_sigmas) > 1:
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    _legend(figure, handles)
    return figure


def _style(i: int) -> dict[str, str]:
    rounds = i // len(_COLORS)
    return {
        "color": _COLORS[i % len(_COLORS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _LINES[rounds % len(_LINES)],
    }


def _label(name: str, longest: int = 36) -> str:
    """Prepare a name for matplotlib: not too long, without mathematics, and with no leading underscore, which would
    hide it in a legend."""
    if len(name) > longest:
        name = f"{name[: longest // 2 - 1]}...{name[-(longest // 2 - 2) :]}"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _wrapped(text: str, width: int = 44) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _legend(figure: Any, handles: Mapping[str, Any]) -> None:
    if handles:
        columns = 3 if max(map(len, handles)) <= 26 and figure.get_figwidth() > 7 else 2
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(columns, len(handles)),
            fontsize=9, frameon=False,
        )  # fmt: skip
