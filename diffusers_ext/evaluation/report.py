"""An evaluation as files for people: `results.csv`, `table.md`, plots, and `index.html` that holds it all.

    write_report(evaluation, folder, {"DDIM, 10 steps": image})

The page is one file without scripts: it loads nothing, so it works without a network and can be mailed. A value is
bold only where its interval lies below those of all others that it competes with. Where matplotlib is missing there are
no plots, and the page says so.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..metrics import Interval
from ..training.card import shown, shown_command, table
from .results import Cell, Evaluation, Quality, write_aside

REAL = "real images"  # the floor's name among the models
MISSING, NOT_FINITE = "–", "not finite"
# Okabe and Ito's colours without their yellow, which white swallows; a marker for each, and a line for each round.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
_MARKERS, _LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", ":")
_PLOTS = ("quality_nfe.png", "quality_seconds.png", "loss_by_sigma.png")


def write_report(evaluation: Evaluation, folder: Path, pictures: Mapping[str, Image.Image] | None = None) -> None:
    """Write the files into a folder, each aside and renamed; plots of an earlier report that are not drawn now go.

    Args:
        pictures: title -> sample grids and other pictures that the page shows below the results, in this order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(evaluation)
    write_aside(folder / "results.csv", _csv(evaluation).encode())
    write_aside(folder / "table.md", (markdown_table(evaluation) + "\n").encode())
    for name in _PLOTS:
        if name in drawn:
            write_aside(folder / name, drawn[name])
        else:
            (folder / name).unlink(missing_ok=True)
    write_aside(folder / "index.html", html_page(evaluation, drawn, pictures or {}).encode())


def distance_name(evaluation: Evaluation) -> str:
    """What the distance of tables and plots may be called, with the extractor."""
    kind = "kernel distance" if _by_kernel(evaluation) else "FID" if evaluation.is_fid else "Frechet distance"
    return f"{kind} ({evaluation.extractor})"


def _by_kernel(evaluation: Evaluation) -> bool:
    """Whether there is no Frechet distance, the images being fewer than the features."""
    counts = [evaluation.num_reference, evaluation.num_floor, *(cell.num_samples for cell in evaluation.cells)]
    return min(counts) < evaluation.num_features


def _distance(evaluation: Evaluation, quality: Quality) -> Interval:
    return quality.kernel if _by_kernel(evaluation) else quality.frechet


def clear_winner(intervals: Sequence[Interval | None]) -> int | None:
    """The place of the interval that lies below all other finite ones; `None` where two of the lowest overlap."""
    finite = [(i, one) for i, one in enumerate(intervals) if one is not None and all(map(math.isfinite, one))]
    if len(finite) < 2:
        return None
    best, lowest = min(finite, key=lambda pair: pair[1].high)
    return best if all(lowest.high < one.low for i, one in finite if i != best) else None


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass
class _Table:
    """Rows of texts; the first `names` columns are names, the others numbers."""

    title: str
    note: str
    header: list[str]
    names: int
    rows: list[list[str]] = field(default_factory=list)
    bold: set[tuple[int, int]] = field(default_factory=set)
    floor: bool = False
    """The last row is that of real images."""

    def markdown(self) -> str:
        rows = [
            [
                f"**{text}**" if (i, j) in self.bold else _plain(text) if j < self.names else text
                for j, text in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]
        return f"**{_plain(self.title)}**\n\n{table(self.header, rows)}\n\n{_plain(self.note)}".rstrip()

    def html(self) -> str:
        number, below = ' class="n"', ' class="floor"'

        def line(tag: str, texts: Sequence[str], i: int | None = None) -> str:
            cells = []
            for j, text in enumerate(texts):
                inside = escape(text)
                if i is not None and (i, j) in self.bold:
                    inside = f"<strong>{inside}</strong>"
                cells.append(f"<{tag}{'' if j < self.names else number}>{inside}</{tag}>")
            last = self.floor and i == len(self.rows) - 1
            return f"<tr{below if last else ''}>{''.join(cells)}</tr>"

        body = "\n".join(line("td", row, i) for i, row in enumerate(self.rows))
        return (
            f"<h2>{escape(self.title)}</h2>\n<div class='wide'><table>\n<thead>{line('th', self.header)}</thead>\n"
            f"<tbody>\n{body}\n</tbody></table></div>\n<p class='note'>{escape(self.note)}</p>"
        )


def _plain(text: str) -> str:
    """Markdown that shows the text; underscores inside of names need no escape."""
    return re.sub(r"([\\`*<>&\[\]])", r"\\\1", text)


def markdown_table(evaluation: Evaluation) -> str:
    """The results as Markdown tables for a README: distance by NFE, the other measures, bits per dimension."""
    return "\n\n".join(one.markdown() for one in _tables(evaluation))


def _tables(evaluation: Evaluation) -> list[_Table]:
    made = [_distances(evaluation), _measures(evaluation), _likelihoods(evaluation)]
    return [one for one in made if one.rows]


def _distances(evaluation: Evaluation) -> _Table:
    steps = sorted({cell.nfe for cell in evaluation.cells})
    made = _Table(
        f"{distance_name(evaluation)} by evaluations of the network per image (NFE)",
        f"{_against(evaluation)} {_few(evaluation)}Estimate ± half of its 95% interval, without bias, so it may be "
        f"below 0. {_floor_note(evaluation)}Bold: the interval lies below all other finite ones of its column.",
        ["model", "scheduler", *(f"NFE {nfe:g}" for nfe in steps)],
        names=2,
    )
    lines = []
    for model, scheduler in _pairs(evaluation):
        own = [cell for cell in evaluation.cells if (cell.model, cell.scheduler) == (model, scheduler)]
        lines.append([[_distance(evaluation, cell.quality) for cell in own if cell.nfe == nfe] for nfe in steps])
        texts = [" / ".join(map(interval_text, found)) or MISSING for found in lines[-1]]
        made.rows.append([model, scheduler, *texts])
    for j in range(len(steps)):
        best = clear_winner([line[j][0] if len(line[j]) == 1 else None for line in lines])
        if best is not None:
            made.bold.add((best, j + 2))
    if made.rows and evaluation.floor is not None:
        made.rows.append([REAL, MISSING, *[interval_text(_distance(evaluation, evaluation.floor))] * len(steps)])
        made.floor = True
    return made


def _measures(evaluation: Evaluation) -> _Table:
    made = _Table(
        "Other measures",
        "Kernel distance: as above, without bias, may be below 0; bold: its interval lies below all others of the same "
        "NFE. Precision: share of the samples in the manifold of the reference; recall: share of the reference in that "
        "of the samples. Near copies: share of the images nearer to a training image than all but 1% of held-out "
        "images are, so 1% if nothing was memorised. Out of range: share of the values outside [-1, 1], by more than "
        "half a grey level, before they are clamped. n: images. Seconds depend on the machine.",
        [
            *("model", "scheduler", "NFE", "n", "kernel distance", "precision", "recall", "near copies"),
            *("out of range", "seconds per image"),
        ],
        names=2,
    )
    cells = _ordered(evaluation)
    for cell in cells:
        start = [cell.model, cell.scheduler, f"{cell.nfe:g}", str(cell.num_samples)]
        made.rows.append(
            [*start, *_quality_texts(cell.quality), _percent(cell.out_of_range), _number(cell.seconds, ".3g")]
        )
    for nfe in {cell.nfe for cell in cells}:
        best = clear_winner([cell.quality.kernel if cell.nfe == nfe else None for cell in cells])
        if best is not None:
            made.bold.add((best, 4))
    if evaluation.floor is not None:
        count = str(evaluation.num_floor)
        made.rows.append([REAL, MISSING, MISSING, count, *_quality_texts(evaluation.floor), MISSING, MISSING])
        made.floor = True
    return made


def _likelihoods(evaluation: Evaluation) -> _Table:
    made = _Table(
        "Bits per dimension of held-out images",
        "Lower is better; ± half of the 95% interval over images. ODE: by the probability flow; bound: an upper bound, "
        "by denoising. Bold: the interval lies below all others of its column.",
        ["model", "ODE", "bound"],
        names=1,
    )
    measured = [(name, evaluation.likelihoods[name]) for name in _models(evaluation) if name in evaluation.likelihoods]
    measured = [(name, one) for name, one in measured if one.ode is not None or one.bound is not None]
    made.rows = [[name, interval_text(one.ode), interval_text(one.bound)] for name, one in measured]
    for j, column in ((1, [one.ode for _, one in measured]), (2, [one.bound for _, one in measured])):
        best = clear_winner(column)
        if best is not None:
            made.bold.add((best, j))
    return made


def _quality_texts(quality: Quality) -> list[str]:
    shares = [_number(quality.precision, ".3f"), _number(quality.recall, ".3f"), _percent(quality.copies)]
    return [interval_text(quality.kernel), *shares]


def interval_text(value: Interval | None) -> str:
    """Estimate ± half-width, to two significant digits of the latter."""
    if value is None:
        return MISSING
    if not math.isfinite(value.estimate):
        return NOT_FINITE
    half = (value.high - value.low) / 2
    if not math.isfinite(half):
        return f"{value.estimate:.4g} ± {MISSING}"
    if half <= 0:
        return f"{value.estimate:.4g} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    if decimals > 6:
        return f"{value.estimate:.2e} ± {half:.1e}"
    return f"{value.estimate:.{decimals}f} ± {half:.{decimals}f}"


def _number(value: float | None, spec: str) -> str:
    return MISSING if value is None else format(value, spec) if math.isfinite(value) else NOT_FINITE


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.3g}%" if math.isfinite(value) else NOT_FINITE


def _against(evaluation: Evaluation) -> str:
    counts = sorted({cell.num_samples for cell in evaluation.cells})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "no"
    count = "" if str(evaluation.num_reference) in evaluation.reference else f" ({evaluation.num_reference})"
    return f"{n} samples of each against {evaluation.reference}{count} of {_data(evaluation)}."


def _few(evaluation: Evaluation) -> str:
    if not _by_kernel(evaluation):
        return ""
    return (
        f"There is no Frechet distance: images are fewer than the {evaluation.num_features} features, too few to take "
        f"its bias off. "
    )


def _floor_note(evaluation: Evaluation) -> str:
    if evaluation.floor is None:
        return ""
    return (
        f'"{REAL}" is the floor: {evaluation.num_floor} real images that are not in the reference, measured like '
        "samples; an estimate below it does not mean better than real. "
    )


def _data(evaluation: Evaluation) -> str:
    return shown(evaluation.data)


def _models(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys([*evaluation.models, *(cell.model for cell in evaluation.cells)]))


def _schedulers(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(cell.scheduler for cell in evaluation.cells))


def _pairs(evaluation: Evaluation) -> list[tuple[str, str]]:
    return list(dict.fromkeys((cell.model, cell.scheduler) for cell in _ordered(evaluation)))


def _ordered(evaluation: Evaluation) -> list[Cell]:
    """Cells by model, scheduler and NFE; the first two in the order of the evaluation."""
    models, schedulers = _models(evaluation), _schedulers(evaluation)
    return sorted(evaluation.cells, key=lambda c: (models.index(c.model), schedulers.index(c.scheduler), c.nfe))


def _csv(evaluation: Evaluation) -> str:
    """One row for each cell and for the floor; empty where nothing was measured."""
    rows = [
        {key: getattr(cell, key) for key in ("model", "scheduler", "steps", "nfe", "num_samples")}
        | {"seconds": cell.seconds, "out_of_range": cell.out_of_range}
        | _columns(cell.quality)
        for cell in evaluation.cells
    ]
    if evaluation.floor is not None:
        rows.append({"model": REAL, "num_samples": evaluation.num_floor} | _columns(evaluation.floor))
    names = [
        *("model", "scheduler", "steps", "nfe", "num_samples", "seconds", "out_of_range"),
        *("frechet", "frechet_low", "frechet_high", "kernel", "kernel_low", "kernel_high"),
        *("precision", "recall", "copies", "extractor", "data"),
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"extractor": evaluation.extractor, "data": _data(evaluation)} for row in rows)
    return file.getvalue()


def _columns(quality: Quality) -> dict[str, Any]:
    intervals: tuple[tuple[str, Interval], ...] = (("frechet", quality.frechet), ("kernel", quality.kernel))
    return {
        **{name + end: v for name, one in intervals for end, v in zip(("", "_low", "_high"), one, strict=True)},
        **{"precision": quality.precision, "recall": quality.recall, "copies": quality.copies},
    }


# --- plots ------------------------------------------------------------------------------------------------------------


def plots(evaluation: Evaluation) -> dict[str, bytes]:
    """File name -> PNG of the plots that there are numbers for; none, and a line that says so, without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots in the report: they need matplotlib (pip install matplotlib)")
        return {}
    figures: dict[str, Any] = {}
    if evaluation.cells:
        figures["quality_nfe.png"] = quality_figure(evaluation, lambda cell: cell.nfe, "NFE", marked=True)
        figures["quality_seconds.png"] = quality_figure(evaluation, lambda cell: cell.seconds, "seconds per image")
    if _losses(evaluation):
        figures["loss_by_sigma.png"] = loss_figure(evaluation)
    drawn = {}
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, dpi=120, format="png")
        drawn[name] = file.getvalue()
    return drawn


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def quality_figure(evaluation: Evaluation, place: Callable[[Cell], float], label: str, *, marked: bool = False) -> Any:
    """The distance against `place` of a cell: a panel for each scheduler, a line for each model.

    Bars are the intervals, the band is the floor's, a cross on the upper edge an estimate that is not finite. `marked`
    puts the ticks at the values of `place`.
    """
    from matplotlib.transforms import ScaledTranslation

    models, schedulers = _models(evaluation), _schedulers(evaluation)
    columns = 2 if len(schedulers) == 4 else min(3, len(schedulers))
    rows = -(-len(schedulers) // columns)
    figure = _figure(max(5.5, 4.4 * columns), 3.5 * rows + 0.5 + 0.2 * -(-(len(models) + 1) // 3))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    handles: dict[str, Any] = {}
    floor = _distance(evaluation, evaluation.floor) if evaluation.floor is not None else None
    places = [x for x in map(place, evaluation.cells) if math.isfinite(x) and x > 0]
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
            cells = [c for c in _ordered(evaluation) if (c.model, c.scheduler) == (model, scheduler)]
            cells = [c for c in cells if math.isfinite(place(c)) and place(c) > 0]
            x, values = [place(c) for c in cells], [_distance(evaluation, c.quality) for c in cells]
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
    measured = [_distance(evaluation, cell.quality) for cell in evaluation.cells] + (
        [floor] if floor is not None else []
    )
    for k, axis in enumerate(axes[: len(schedulers)]):
        _log_places(axis, places, marked)
        _vertical_axis(axis, measured)
        lowest = k >= len(schedulers) - columns
        axis.set_xlabel(label if lowest else "")
        axis.xaxis.set_tick_params(labelbottom=lowest)
    figure.supylabel(_wrapped(distance_name(evaluation)), fontsize=10)
    _legend(figure, handles)
    return figure


def _ends(value: Interval) -> tuple[float, float]:
    """The interval, without width where it is not finite."""
    finite = math.isfinite(value.low) and math.isfinite(value.high)
    return (value.low, value.high) if finite else (value.estimate, value.estimate)


def _vertical_axis(axis: Any, values: Sequence[Interval]) -> None:
    """Linear; logarithmic if the estimates span a factor of 10, linear around 0 if an interval reaches there."""
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
    """Round numbers in a range, few enough for their labels."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 100 * low else (1, 3) if high < 2000 * low else (1,)
    return [k * 10.0**d for d in decades for k in steps if 0.999 * low <= k * 10.0**d <= 1.001 * high]


def _log_places(axis: Any, places: Sequence[float], marked: bool) -> None:
    """A logarithmic axis with plain numbers, also if there is one place."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    if not places:
        return
    low, high = min(places), max(places)
    margin = max((high / low) ** 0.07, 1.15 if high > low else 1.8)
    axis.set_xlim(low / margin, high * margin)
    if marked:
        shown_places: list[float] = []
        for x in sorted(set(places)):  # no two labels on each other
            if not shown_places or math.log(x / shown_places[-1]) > 0.07 * math.log(high / low * margin**2):
                shown_places.append(x)
        axis.xaxis.set_major_locator(FixedLocator(shown_places))
    else:
        ticks = _log_ticks(low, high) if high > 3 * low else sorted({float(f"{x:.2g}") for x in (low, high)})
        axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}" if x < 1000 else f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _losses(evaluation: Evaluation) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Model -> levels, increasing, and losses that a logarithm takes."""
    found = {}
    for model in _models(evaluation):
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
    """Loss against noise level; below it, of several models, the ratio to the first (interpolated in logarithms)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    losses, models = _losses(evaluation), _models(evaluation)
    several = len(losses) > 1
    height = (6.2 if several else 4.0) + 0.2 * -(-len(losses) // 3)
    figure = _figure(7.5, height)
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
    axes[0].set_title(f"Held-out images of {_label(_data(evaluation), 50)}", fontsize=11)
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
    """A name for matplotlib: not too long, no mathematics, and shown in a legend also with a leading underscore."""
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


# --- page -------------------------------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light dark; --fg: #1b1f24; --bg: #fff; --soft: #57606a; --line: #d0d7de; --row: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e6edf3; --bg: #0d1117; --soft: #9aa4af; --line: #30363d; --row: #161b22; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 68rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
th { vertical-align: bottom; } td:first-child { min-width: 7rem; max-width: 18rem; overflow-wrap: anywhere; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } th.n { white-space: normal; }
tbody tr:nth-child(even) { background: var(--row); }
tr.floor td { border-top: 2px solid var(--soft); color: var(--soft); }
.note, figcaption, footer { color: var(--soft); font-size: .875rem; } figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
code { font-size: .85rem; white-space: pre-wrap; }
"""


def html_page(evaluation: Evaluation, drawn: Mapping[str, bytes], pictures: Mapping[str, Image.Image]) -> str:
    """The page: tables, plots and pictures inside of one file."""
    tables = [one.html() for one in _tables(evaluation)]
    captions = _captions(evaluation)
    figures = {name: _img(drawn[name], captions[name]) for name in _PLOTS if name in drawn}
    quality = [figures[name] for name in _PLOTS[:2] if name in figures]
    first = 1 if evaluation.cells else 0
    parts = [
        f"<h1>Evaluation on {escape(_data(evaluation))}</h1>",
        f"<p>{escape(', '.join(_models(evaluation)))}. Features: {escape(evaluation.extractor)}. "
        f"{'' if evaluation.is_fid else 'This distance is not FID: compare it with the same features only. '}"
        f"{escape(_against(evaluation)) if evaluation.cells else ''}</p>",
        *tables[:first],
        *quality,
        ""
        if drawn or not (evaluation.cells or _losses(evaluation))
        else "<p class='note'>No plots: no matplotlib.</p>",
        *tables[first:],
        *([f"<h2>Loss by noise level</h2>\n{figures[_PLOTS[2]]}"] if _PLOTS[2] in figures else []),
        *(["<h2>Pictures</h2>"] if pictures else []),
        *(_img(_png(picture), title) for title, picture in pictures.items()),
        _footer(evaluation),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation on {escape(_data(evaluation))}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _captions(evaluation: Evaluation) -> dict[str, str]:
    floor = ""
    if evaluation.floor is not None:
        floor = f" The band is the floor, {evaluation.num_floor} real images that are not in the reference."
    about = (
        f"{distance_name(evaluation)}, lower is better. {_against(evaluation)} Bars are 95% intervals; the bias is "
        f"taken off, so estimates may be below 0.{floor} A cross on the upper edge is an estimate that is not finite."
    )
    ratio = " Below: the ratio to the first model." if len(_losses(evaluation)) > 1 else ""
    return {
        _PLOTS[0]: f"Quality against evaluations of the network for one image. {about}",
        _PLOTS[1]: f"Quality against seconds for one image on the machine of this run. {about}",
        _PLOTS[2]: f"Mean square error of the predicted noise by noise level, of held-out images.{ratio}",
    }


def _img(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text, first = escape(caption), escape(caption.split(". ")[0])
    return f'<figure><img alt="{first}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _footer(evaluation: Evaluation) -> str:
    named = {name: shown(place) for name, place in evaluation.models.items()}
    models = "; ".join(name if name == place else f"{name}: {place}" for name, place in named.items())
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    return (
        f"<footer><h2>This run</h2>\n<p>Models: {escape(models)}. Seed {evaluation.seed}. {escape(versions)}.</p>\n"
        f"<p><code>{escape(shown_command(evaluation.command))}</code></p>\n"
        "<p>Beside this page: results.json, results.csv, table.md and the pictures.</p></footer>"
    )
