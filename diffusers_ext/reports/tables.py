"""An evaluation as tables: Markdown, HTML and csv. A value is bold only where its interval lies below those of all
others that it competes with.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from ..files import shown
from ..metrics import Interval
from .card import table
from .measured import Evaluation, Measure, Quality

REAL = "real images"  # the floor's name among the models
MISSING, NOT_FINITE = "–", "not finite"


def clear_winner(intervals: Sequence[Interval | None]) -> int | None:
    """Return the index of the interval that lies below all other finite ones; `None` where the two lowest overlap."""
    finite = [(i, one) for i, one in enumerate(intervals) if one is not None and all(map(math.isfinite, one))]
    if len(finite) < 2:
        return None
    best, lowest = min(finite, key=lambda pair: pair[1].high)
    return best if all(lowest.high < one.low for i, one in finite if i != best) else None


@dataclass
class Table:
    """A table of texts whose first `names` columns are names, and the others numbers."""

    title: str
    note: str
    header: list[str]
    names: int
    rows: list[list[str]] = field(default_factory=list)
    bold: set[tuple[int, int]] = field(default_factory=set)
    floor: bool = False
    """Whether the last row is that of real images."""

    def embolden(self, column: int, intervals: Sequence[Interval | None]) -> None:
        """Make a column's value bold in the row, if any, whose interval lies below those of all others."""
        best = clear_winner(intervals)
        if best is not None:
            self.bold.add((best, column))

    def explain(self, missing: str) -> None:
        """Say in the note why there are values that were not measured, if there are."""
        if any(MISSING in row for row in self.rows):
            self.note = f"{self.note} {MISSING}: {missing}."

    def end(self, row: list[str]) -> None:
        """Add the row of real images, the last one."""
        self.rows.append(row)
        self.floor = True

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
    """Return Markdown that shows the text; underscores inside of names need no escape."""
    return re.sub(r"([\\`*<>&\[\]])", r"\\\1", text)


def markdown_table(evaluation: Evaluation) -> str:
    """Return Markdown tables for a README: distance by NFE, its change from the baseline, the other measures, bits per
    dimension."""
    first, second = tables(evaluation)
    return "\n\n".join([_plain(verdict(evaluation)), *(one.markdown() for one in first + second)])


FEW = 6  # rows that the verdict names; of more it gives the numbers


def verdict(evaluation: Evaluation) -> str:
    """Return in words which models and schedulers are better or worse than their baselines, beyond the noise."""
    groups: dict[tuple[str, str, str], list[tuple[float, str, str]]] = {}
    for cell in evaluation.ordered():
        if (found := evaluation.change(cell)) is not None:
            baseline, change = found
            of_pixels = evaluation.change(cell, "pixels")
            name = baseline.model if baseline.model != cell.model else f"{baseline.model} with {baseline.scheduler}"
            sides = _side(change), "open" if of_pixels is None else _side(of_pixels[1])
            groups.setdefault((cell.model, cell.scheduler, name), []).append((cell.nfe, *sides))
    if not groups:
        return _best_of(evaluation)
    if len(groups) > FEW:
        found_sides = [side for group in groups.values() for _, side, _ in group]
        better, worse, open_ = (found_sides.count(side) for side in ("better", "worse", "open"))
        return (
            f"Of {len(found_sides)} comparisons with a baseline {better} are better, {worse} worse, and {open_} too "
            f"close to tell."
        )
    return " ".join(_sentence(*names, group) for names, group in groups.items())


def _side(change: Interval) -> str:
    """The side of 0 that an interval of a distance lies on."""
    return "better" if change.high < 0 else "worse" if change.low > 0 else "open"


def _sentence(model: str, scheduler: str, baseline: str, group: Sequence[tuple[float, str, str]]) -> str:
    """`tuned with DDIM is better than stock at NFE 5 and 10, and too close to stock to tell at NFE 20.`"""
    words = {"better": f"better than {baseline}", "worse": f"worse than {baseline}"}
    words["open"] = f"too close to {baseline} to tell"
    parts = [f"{said} {_at(nfe for nfe, found, _ in group if found == side)}" for side, said in words.items()
             if any(found == side for _, found, _ in group)]  # fmt: skip
    for side, other in (("better", "worse"), ("worse", "better")):
        if against_it := [nfe for nfe, found, pixels in group if found == side and pixels == other]:
            parts.append(f"by pixels {other} {_at(against_it)}")
    return f"{model} with {scheduler} is {', '.join(parts[:-1])}{', and ' if parts[1:] else ''}{parts[-1]}."


def _at(nfes: Iterable[float]) -> str:
    *first, last = (f"{nfe:g}" for nfe in nfes)
    return f"at NFE {', '.join(first)} and {last}" if first else f"at NFE {last}"


def _best_of(evaluation: Evaluation) -> str:
    """The verdict where there is nothing to compare with: the cell whose interval lies below those of all others."""
    cells = evaluation.ordered()
    if len(cells) < 2:
        return "Nothing was compared: name several models, schedulers or numbers of evaluations."
    best = clear_winner([evaluation.distance(cell.quality) for cell in cells])
    if best is None:
        return f"None of the {len(cells)} settings is better than all others beyond its interval."
    cell = cells[best]
    return f"{cell.model} with {cell.scheduler} at NFE {cell.nfe:g} is better than all others."


def tables(evaluation: Evaluation) -> tuple[list[Table], list[Table]]:
    """Return the tables of the distance, and the others."""
    of_distance, others = (_distances, _changes, _changes_of_pixels), (_measures, _likelihoods)
    made = ([make(evaluation) for make in makers] for makers in (of_distance, others))
    first, second = ([one for one in some if one.rows] for some in made)
    return first, second


def _distances(evaluation: Evaluation) -> Table:
    steps = sorted({cell.nfe for cell in evaluation.cells})
    made = Table(
        f"{evaluation.distance_name} by evaluations of the network per image (NFE)",
        f"{against(evaluation)} {_few(evaluation)}Estimate ± half of its 95% interval, without bias, so it may be "
        f"below 0. {_floor_note(evaluation)}Bold: the interval lies below all other finite ones of its column.",
        ["model", "scheduler", *(f"NFE {nfe:g}" for nfe in steps)],
        names=2,
    )
    lines = []
    for model, scheduler in _pairs(evaluation):
        own = [cell for cell in evaluation.cells if (cell.model, cell.scheduler) == (model, scheduler)]
        lines.append([[evaluation.distance(cell.quality) for cell in own if cell.nfe == nfe] for nfe in steps])
        texts = [" / ".join(map(interval_text, found)) or MISSING for found in lines[-1]]
        made.rows.append([model, scheduler, *texts])
    for j in range(len(steps)):
        made.embolden(j + 2, [line[j][0] if len(line[j]) == 1 else None for line in lines])
    made.explain("not drawn, as it was not asked for, or the scheduler cannot take so many steps (the command said so)")
    if made.rows and evaluation.floor is not None:
        made.end([REAL, MISSING, *[interval_text(evaluation.distance(evaluation.floor))] * len(steps)])
    return made


def _changes(evaluation: Evaluation) -> Table:
    return _changes_of(evaluation, evaluation.distance_name.split(" (")[0], None)


def _changes_of_pixels(evaluation: Evaluation) -> Table:
    return _changes_of(evaluation, "distance of pixels", "pixels")


def _changes_of(evaluation: Evaluation, kind: str, of: Measure | None) -> Table:
    steps = sorted({cell.nfe for cell in evaluation.cells})
    made = Table(
        f"Change of the {kind}",
        f"{kind[0].upper()}{kind[1:]} less that of the baseline from the same noise, so below 0 is better. The "
        "interval is of the pairs, so as a rule narrower than those above; where it holds 0 the change is too small "
        "to tell with so many images. It does not cover another seed of the training. Bold: it lies below 0.",
        ["model", "scheduler", "baseline", *(f"NFE {nfe:g}" for nfe in steps)],
        names=3,
    )
    rows: dict[tuple[str, str, str], dict[float, Interval]] = {}
    for cell in evaluation.ordered():
        found = evaluation.change(cell, of)
        if found is not None:
            baseline, change = found
            name = f"{baseline.model}, {baseline.scheduler}"
            rows.setdefault((cell.model, cell.scheduler, name), {})[cell.nfe] = change
    for i, (names, changes) in enumerate(rows.items()):
        made.rows.append([*names, *(interval_text(changes.get(nfe), signed=True) for nfe in steps)])
        made.bold |= {(i, j + 3) for j, nfe in enumerate(steps) if nfe in changes and changes[nfe].high < 0}
    made.explain("not drawn, or there is no baseline of as many evaluations and images")
    return made


def _measures(evaluation: Evaluation) -> Table:
    made = Table(
        "Other measures",
        "Kernel distance: as above, without bias, may be below 0. Pixels: Frechet distance of colours and fine "
        "detail, which sees noise and blur. Bold: the interval lies below all others of the same NFE. Precision: "
        "share of the samples in the manifold of the reference; recall: share of the reference in that of the "
        "samples. Near copies: share of the images nearer to a training image than all but 1% of held-out images "
        "are, so 1% if nothing was memorised. Out of range: share of the values outside [-1, 1], by more than half "
        "a grey level, before they are clamped. n: images. Seconds depend on the machine.",
        [
            *("model", "scheduler", "NFE", "n", "kernel distance", "pixels", "precision", "recall"),
            *("near copies", "out of range", "seconds per image"),
        ],
        names=2,
    )
    cells = evaluation.ordered()
    for cell in cells:
        start = [cell.model, cell.scheduler, f"{cell.nfe:g}", str(cell.num_samples)]
        made.rows.append(
            [*start, *_quality_texts(cell.quality), _percent(cell.out_of_range), _number(cell.seconds, ".3g")]
        )
    made.explain("of pixels, fewer images than their features; of near copies, no held-out images to compare with")
    for nfe in {cell.nfe for cell in cells}:
        made.embolden(4, [cell.quality.kernel if cell.nfe == nfe else None for cell in cells])
        made.embolden(5, [cell.quality.pixels if cell.nfe == nfe else None for cell in cells])
    if evaluation.floor is not None:
        count = str(evaluation.num_floor)
        made.end([REAL, MISSING, MISSING, count, *_quality_texts(evaluation.floor), MISSING, MISSING])
    return made


def _likelihoods(evaluation: Evaluation) -> Table:
    made = Table(
        f"Bits per dimension of {evaluation.likelihood_of}",
        "Lower is better; ± half of the 95% interval over images. ODE: by the probability flow; bound: an upper bound, "
        "by denoising. Bold: the interval lies below all others of its column.",
        ["model", "ODE", "bound"],
        names=1,
    )
    measured = [
        (name, evaluation.likelihoods[name]) for name in evaluation.model_names if name in evaluation.likelihoods
    ]
    measured = [(name, one) for name, one in measured if one.ode is not None or one.bound is not None]
    made.rows = [[name, interval_text(one.ode), interval_text(one.bound)] for name, one in measured]
    made.explain("not asked for (--ode_images, --likelihood_images)")
    for j, column in ((1, [one.ode for _, one in measured]), (2, [one.bound for _, one in measured])):
        made.embolden(j, column)
    return made


def _quality_texts(quality: Quality) -> list[str]:
    shares = [_number(quality.precision, ".3f"), _number(quality.recall, ".3f"), _percent(quality.copies)]
    return [interval_text(quality.kernel), interval_text(quality.pixels), *shares]


def interval_text(value: Interval | None, *, signed: bool = False) -> str:
    """Return "estimate ± half-width", with two significant digits of the latter."""
    sign = "+" if signed else ""
    if value is None:
        return MISSING
    if not math.isfinite(value.estimate):
        return NOT_FINITE
    half = (value.high - value.low) / 2
    if not math.isfinite(half):
        return f"{value.estimate:{sign}.4g} ± {MISSING}"
    if half <= 0:
        return f"{value.estimate:{sign}.4g} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    if decimals > 6:
        return f"{value.estimate:{sign}.2e} ± {half:.1e}"
    return f"{value.estimate:{sign}.{decimals}f} ± {half:.{decimals}f}"


def _number(value: float | None, spec: str) -> str:
    return MISSING if value is None else format(value, spec) if math.isfinite(value) else NOT_FINITE


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.3g}%" if math.isfinite(value) else NOT_FINITE


def against(evaluation: Evaluation) -> str:
    counts = sorted({cell.num_samples for cell in evaluation.cells})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "no"
    count = "" if str(evaluation.num_reference) in evaluation.reference else f" ({evaluation.num_reference})"
    return f"{n} samples of each against {evaluation.reference}{count} of {shown(evaluation.data)}."


def _few(evaluation: Evaluation) -> str:
    if not evaluation.by_kernel:
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


def _pairs(evaluation: Evaluation) -> list[tuple[str, str]]:
    return list(dict.fromkeys((cell.model, cell.scheduler) for cell in evaluation.ordered()))


def csv_text(evaluation: Evaluation) -> str:
    """Return a row for each cell and for the floor; a value that was not measured is empty."""
    rows = [
        {key: getattr(cell, key) for key in ("model", "scheduler", "steps", "nfe", "num_samples")}
        | {"seconds": cell.seconds, "out_of_range": cell.out_of_range}
        | _columns(cell.quality)
        | ({} if (found := evaluation.change(cell)) is None else _interval_columns("change", found[1]))
        | ({} if (found := evaluation.change(cell, "pixels")) is None else _interval_columns("pixels_change", found[1]))
        for cell in evaluation.cells
    ]
    if evaluation.floor is not None:
        rows.append({"model": REAL, "num_samples": evaluation.num_floor} | _columns(evaluation.floor))
    names = [
        *("model", "scheduler", "steps", "nfe", "num_samples", "seconds", "out_of_range"),
        *("frechet", "frechet_low", "frechet_high", "kernel", "kernel_low", "kernel_high"),
        *("change", "change_low", "change_high", "pixels", "pixels_low", "pixels_high"),
        *("pixels_change", "pixels_change_low", "pixels_change_high"),
        *("precision", "recall", "copies", "extractor", "data"),
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"extractor": evaluation.extractor, "data": shown(evaluation.data)} for row in rows)
    return file.getvalue()


def _columns(quality: Quality) -> dict[str, Any]:
    distances = _interval_columns("frechet", quality.frechet) | _interval_columns("kernel", quality.kernel)
    if quality.pixels is not None:
        distances |= _interval_columns("pixels", quality.pixels)
    return distances | {"precision": quality.precision, "recall": quality.recall, "copies": quality.copies}


def _interval_columns(name: str, value: Interval) -> dict[str, float]:
    return {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}
