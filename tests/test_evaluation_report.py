"""Truth: what the csv module, html.parser, matplotlib's axes, the Hub's readers and its real client say of it all."""

import base64
import csv
import io
import json
import math
import os
import re
import shlex
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
import stranger
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext.metrics import Interval
from diffusers_ext.reports.measured import Cell, Evaluation, Likelihood, Quality
from diffusers_ext.reports.model_index import merged_card, model_index, write_model_index
from diffusers_ext.reports.page import write_report
from diffusers_ext.reports.plots import loss_figure, plots, quality_figure
from diffusers_ext.reports.tables import MISSING, clear_winner, interval_text, markdown_table, verdict

NAN, INF = math.nan, math.inf
WILD = "_c<b>&|$x$"  # a name that HTML, Markdown and matplotlib would each read as something else
MODELS, SCHEDULERS, STEPS = ["a", "org/b", WILD], ["DDIM", "DPMSolverMultistep"], [5, 10, 20, 50]


def interval(estimate, half):
    return Interval(estimate, estimate - half, estimate + half)


def quality(i, k, n):
    distance = 3 * (i + 1) / (k + 1) / n + 0.01 * i
    return Quality(
        interval(distance, 0.05),
        interval(distance / 100, 0.001),
        *(0.7 - i / 10, 0.6 - i / 10, 0.01 + i / 100),
        pixels=interval(10 * distance, 0.5),
    )


def evaluation(**changes):
    cells = [
        Cell(model, scheduler, n, n, 0.004 * n * (1 + i), 0.02 / n, 1000, quality(i, k, n))
        for i, model in enumerate(MODELS)
        for k, scheduler in enumerate(SCHEDULERS)
        for n in STEPS
    ]
    sigmas = [0.01, 0.1, 1.0, 10.0]
    likelihoods = {
        "a": Likelihood(interval(3.0, 0.02), interval(3.2, 0.02), sigmas, [0.9, 0.8, 0.3, 0.02]),
        "org/b": Likelihood(None, interval(3.3, 0.03), sigmas, [0.8, 0.6, 0.3, 0.03]),
    }
    values = {
        "data": "user/digits",
        "reference": "1000 held-out images",
        "num_reference": 1000,
        "extractor": "DINOv2 ViT-S/14",
        "num_features": 64,
        "is_fid": False,
        "floor": Quality(interval(0.02, 0.05), interval(1e-4, 6e-4), 0.79, 0.71, None),
        "num_floor": 500,
        "models": {name: name for name in MODELS},
        "seed": 7,
        "command": "training/evaluate.py --hub_token hf_secretsecret --schedulers DDIM",
        "versions": {"torch": "2.6"},
        "cells": cells,
        "likelihoods": likelihoods,
    }
    return Evaluation(**values | changes)


def broken():
    """With everything that can be missing or not finite."""
    lost = Interval(NAN, NAN, NAN)
    cells = [
        Cell("a", "DDIM", 5, 5, NAN, INF, 100, Quality(lost, lost, NAN, 0.0, None)),
        Cell("a", "DDIM", 10, 10, 0.1, 0.0, 100, Quality(Interval(INF, -INF, INF), lost, 0.5, 0.5, NAN)),
        Cell("nan", "DDIM", 10, 10, 0.2, 0.0, 100, Quality(Interval(1.5, NAN, NAN), interval(0.1, 0.0), 0.5, 0.5, 0.0)),
    ]
    likelihoods = {"a": Likelihood(lost, None, [0.1, 1.0], [NAN, INF]), "nan": Likelihood(None, None, [0.1], [0.2])}
    return evaluation(models={"a": "a", "nan": "nan"}, cells=cells, floor=None, likelihoods=likelihoods)


def one_cell():
    return evaluation(models={"a": "a"}, cells=evaluation().cells[:1], likelihoods={})


EMPTY = {"cells": [], "likelihoods": {}, "floor": None}
CASES = {"full": evaluation, "broken": broken, "one cell": one_cell, "empty": lambda: evaluation(**EMPTY)}
cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


# --- results.json -----------------------------------------------------------------------------------------------------


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


@cases
def test_results_come_back_from_strict_json(tmp_path, make):
    before = make()
    before.save(tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=no_constant)
    after = Evaluation.load(tmp_path / "results.json")
    assert repr(after) == repr(before)  # == would find nan unequal to itself
    assert os.listdir(tmp_path) == ["results.json"]
    assert all(type(c.quality.frechet) is Interval for c in after.cells)


def test_another_version_is_refused(tmp_path):
    evaluation().save(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").write_text(text.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ValueError, match="version 99"):
        Evaluation.load(tmp_path / "results.json")


# --- files ------------------------------------------------------------------------------------------------------------


@cases
def test_csv_holds_the_cells(tmp_path, make):
    what = make()
    write_report(what, tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    floor = [("real images", what.num_floor, what.floor)] if what.floor else []
    expected = [(c.model, c.num_samples, c.quality) for c in what.cells] + floor
    assert [(r["model"], int(r["num_samples"])) for r in rows] == [(m, n) for m, n, _ in expected]
    for row, (_, _, q) in zip(rows, expected, strict=True):
        names = ("frechet", "frechet_low", "frechet_high", "kernel", "kernel_low", "kernel_high", "precision", "recall")
        read = [float(row[name]) for name in names]
        np.testing.assert_array_equal(read, [*q.frechet, *q.kernel, q.precision, q.recall])
        assert row["copies"] == "" if q.copies is None else repr(float(row["copies"])) == repr(q.copies)
        assert (row["extractor"], row["data"]) == (what.extractor, what.data)
    for row, cell in zip(rows, what.cells, strict=False):
        read = [float(row[name]) for name in ("steps", "nfe", "seconds", "out_of_range")]
        np.testing.assert_array_equal(read, [cell.steps, cell.nfe, cell.seconds, cell.out_of_range])
        assert row["scheduler"] == cell.scheduler


class Page(HTMLParser):
    """What a page shows and loads."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.images, self.rows, self.text, self.open = [], [], [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.links += [v for k, v in attributes.items() if k in ("src", "href", "action", "data", "srcset")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", attributes.get("class"), False))
        if tag == "strong":
            text, kind, _ = self.rows[-1][-1]
            self.rows[-1][-1] = text, kind, True

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            text, kind, bold = self.rows[-1][-1]
            self.rows[-1][-1] = text + data, kind, bold


@cases
def test_the_page_is_complete_and_loads_nothing(tmp_path, make):
    title = "Samples <i>DDIM</i> & \"5\" 'steps'"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))
    what = make()
    what.pictures[title] = picture
    write_report(what, tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|url\(|@import", text)
    assert not {"script", "link", "iframe", "b", "i"} & set(page.tags)
    decoded = [base64.b64decode(image["src"].split(",")[1], validate=True) for image in page.images]
    files = [tmp_path / name for name in ("quality_nfe.png", "quality_seconds.png", "loss_by_sigma.png")]
    assert decoded[:-1] == [file.read_bytes() for file in files if file.exists()]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(decoded[-1]))), np.asarray(picture))
    assert page.images[-1]["alt"] == title
    assert title in page.text
    assert "hf_secretsecret" not in text
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_page_shows_names_numbers_and_what_they_mean(tmp_path):
    what = evaluation()
    write_report(what, tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    shown = {(r[0][0], r[1][0]): [c[0] for c in r[2:]] for r in page.rows if len(r) == 2 + len(STEPS)}
    for i, model in enumerate(MODELS):
        for k, scheduler in enumerate(SCHEDULERS):
            values = [quality(i, k, n).frechet.estimate for n in STEPS]
            assert shown[model, scheduler] == [f"{v:.3f} ± 0.050" for v in values]
    assert shown["real images", "–"] == ["0.020 ± 0.050"] * len(STEPS)
    for row in page.rows:
        for text, kind, _ in row:
            assert kind == "n" or not re.fullmatch(r"[-\d.]+( ±.*|%)?", text)
    for words in (
        "DINOv2 ViT-S/14",
        "may be below 0",
        "500 real images",
        "1000 samples",
        "1000 held-out",
        "user/digits",
    ):
        assert words in page.text
    texts = [text for row in page.rows for text, _, _ in row]
    assert {"3.000 ± 0.020", "3.200 ± 0.020", "3.300 ± 0.030"} <= set(texts)


def test_plots_of_an_earlier_report_go(tmp_path):
    write_report(evaluation(), tmp_path)
    assert (tmp_path / "loss_by_sigma.png").exists()
    write_report(evaluation(likelihoods={}), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        *("index.html", "quality_nfe.png", "quality_seconds.png", "results.csv", "table.md"),
    ]


def test_without_matplotlib_there_is_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(evaluation(), tmp_path)
    assert "pip install matplotlib" in capsys.readouterr().out
    assert "no matplotlib" in (tmp_path / "index.html").read_text()
    assert not list(tmp_path.glob("*.png"))


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown_rows(text):
    """Rows of the tables, as GitHub splits them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_holds_the_numbers():
    rows = markdown_rows(markdown_table(evaluation()))
    assert rows[0] == ["model", "scheduler", *(f"NFE {n}" for n in STEPS)]
    own = next(row for row in rows if row[:2] == ["org/b", "DPMSolverMultistep"])
    values = [quality(1, 1, n).frechet.estimate for n in STEPS]
    assert own[2:] == [f"{v:.3f} ± 0.050" for v in values]
    assert ["real images", "–", *["0.020 ± 0.050"] * 4] in rows
    measures = next(row for row in rows if row[:3] == ["a", "DDIM", "20"])
    assert measures[3:] == ["1000", "0.0015 ± 0.0010", "1.50 ± 0.50", "0.700", "0.600", "1%", "0.1%", "0.08"]
    assert ["real images", "–", "–", "500", "0.00010 ± 0.00060", "–", "0.790", "0.710", "–", "–", "–"] in rows
    assert ["org/b", "–", "3.300 ± 0.030"] in rows
    wild = [row[0] for row in rows if row[0].startswith("_c")]
    assert len(wild) == 2 + 8
    assert set(wild) == {r"_c\<b\>\&|$x$"}
    widths = [line.count("|") for line in markdown_table(evaluation()).splitlines() if line.startswith("| ---")]
    assert widths == [7, 12, 4]


def test_a_missing_combination_is_a_dash():
    what = evaluation()
    what.cells = [cell for cell in what.cells if (cell.model, cell.steps) != ("a", 10)]
    rows = markdown_rows(markdown_table(what))
    assert next(row for row in rows if row[:2] == ["a", "DDIM"])[3] == "–"


def test_text_of_an_interval():
    assert interval_text(Interval(12.345, 11.1, 13.59)) == "12.3 ± 1.2"
    assert interval_text(Interval(-0.001234, -0.005, 0.002)) == "-0.0012 ± 0.0035"
    assert interval_text(Interval(1234.5, 1000, 1469)) == "1234 ± 234"
    assert interval_text(Interval(3e-9, 1e-9, 5e-9)) == "3.00e-09 ± 2.0e-09"
    assert interval_text(Interval(2.0, 2.0, 2.0)) == "2 ± 0"
    assert interval_text(Interval(2.0, NAN, INF)) == "2 ± –"
    assert interval_text(Interval(NAN, 0, 1)) == interval_text(Interval(-INF, 0, 1)) == "not finite"
    assert interval_text(None) == "–"
    assert [interval_text(Interval(v, v - 1, v + 1), signed=True) for v in (3.0, -3.0)] == ["+3.0 ± 1.0", "-3.0 ± 1.0"]


def test_a_winner_needs_an_interval_of_its_own():
    low, above, over, lost = Interval(1, 0, 2), Interval(4, 3, 5), Interval(2.5, 1.9, 3), Interval(NAN, NAN, NAN)
    assert clear_winner([above, low]) == 1
    assert clear_winner([low, above, over]) is None
    assert clear_winner([low, Interval(3, 2, 4)]) is None
    assert clear_winner([lost, low, above, None]) == 1
    assert clear_winner([low]) is clear_winner([low, lost]) is clear_winner([]) is None
    assert clear_winner([Interval(0, -10, 10), low, above]) is None  # the lowest estimate, but it knows nothing


def test_bold_is_who_wins_outside_the_noise(tmp_path):
    what = evaluation()
    bold = {}
    for j, row in enumerate(markdown_rows(markdown_table(what))[2:8]):
        bold |= {(j, n): text.startswith("**") for n, text in zip(STEPS, row[2:], strict=True)}
    for n in STEPS:
        values = [quality(i, k, n).frechet for i in range(3) for k in range(2)]
        for j, one in enumerate(values):
            assert bold[j, n] == all(one.high < other.low for m, other in enumerate(values) if m != j)
    assert any(bold.values())
    assert not all(bold[1, n] for n in STEPS)
    write_report(what, tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    rows = [row for row in page.rows if len(row) == 6][1:7]
    assert {(j, n): row[2 + m][2] for j, row in enumerate(rows) for m, n in enumerate(STEPS)} == bold


def compared(cells, **changes):
    """An evaluation of (model, scheduler, NFE, the values of its groups), each of 100 images but for WILD."""
    made = [
        Cell(model, scheduler, n, n, 0.1, 0.0, 50 if model == WILD else 100, Quality(interval(np.mean(values), 9.0),
            interval(np.mean(values), 9.0), 0.5, 0.5, None, list(values), [10 * v for v in values],
            interval(np.mean(values), 9.0), [-3 * v for v in values]))
        for model, scheduler, n, values in cells
    ]  # fmt: skip
    return evaluation(**{"models": {"a": "a", "b": "b"}, "cells": made, "likelihoods": {}} | changes)


def test_changes_are_paired(tmp_path):
    """Groups that vary much more than their differences do: SciPy's paired interval. At 10 evaluations the second is
    worse, and at 20 there is no telling."""
    base = np.array([5.0, 9.0, 1.0, 7.0])
    moved = {5: [-0.2, -0.1, -0.3, -0.2], 10: [0.2, 0.1, 0.3, 0.2], 20: [-2.0, 2.0, -1.0, 1.0]}
    cells = [("a", "DDIM", n, base) for n in moved] + [("b", "DDIM", n, base + d) for n, d in moved.items()]
    what = compared(cells)
    for cell in what.cells[3:]:
        baseline, found = what.change(cell)
        truth = scipy.stats.ttest_1samp(moved[cell.nfe], 0).confidence_interval(0.95)
        assert baseline is what.cells[[5, 10, 20].index(cell.nfe)]
        assert found == pytest.approx((np.mean(moved[cell.nfe]), *truth), rel=1e-4, abs=1e-12)
    assert [what.change(cell) for cell in what.cells[:3]] == [None] * 3
    rows = [row for row in markdown_rows(markdown_table(what)) if row[2:3] == ["a, DDIM"]]
    assert rows[0] == ["b", "DDIM", "a, DDIM", "**-0.20 ± 0.13**", "+0.20 ± 0.13", "+0.0 ± 2.9"]
    assert rows[1] == ["b", "DDIM", "a, DDIM", "+0.60 ± 0.39", "**-0.60 ± 0.39**", "+0.0 ± 8.7"]  # of pixels
    write_report(what, tmp_path)
    assert "Change of the Frechet distance" in Page((tmp_path / "index.html").read_text(encoding="utf-8")).text
    with open(tmp_path / "results.csv", newline="") as file:
        read = [row["change"] for row in csv.DictReader(file)]
    assert read[:3] == ["", "", ""]
    assert [float(text) for text in read[3:6]] == pytest.approx([-0.2, 0.2, 0.0])
    with open(tmp_path / "results.csv", newline="") as file:
        read = [row["pixels_change"] for row in csv.DictReader(file)][3:6]
    assert [float(text) for text in read] == pytest.approx([0.6, -0.6, 0.0])
    of_kernel = compared(cells, num_features=101)
    assert of_kernel.change(of_kernel.cells[3])[1].estimate == pytest.approx(-2.0)


def test_the_page_begins_with_the_verdict(tmp_path):
    """Paired groups as above; pixels go the other way in `compared`."""
    base = np.array([5.0, 9.0, 1.0, 7.0])
    moved = {
        5: [-0.2, -0.1, -0.3, -0.2],
        8: [-0.2, -0.1, -0.3, -0.2],
        10: [0.2, 0.1, 0.3, 0.2],
        20: [-2.0, 2.0, -1.5, 1.0],
    }
    what = compared([("a", "DDIM", n, base) for n in moved] + [("b", "DDIM", n, base + d) for n, d in moved.items()])
    said = (
        "b with DDIM is better than a at NFE 5 and 8, worse than a at NFE 10, too close to a to tell at NFE 20, by "
        "pixels worse at NFE 5 and 8, and by pixels better at NFE 10."
    )
    assert verdict(what) == said
    write_report(what, tmp_path)
    text = Page((tmp_path / "index.html").read_text(encoding="utf-8")).text
    assert text.index(said) < text.index("Features:")
    assert markdown_table(what).startswith(said)
    many = [(m, "DDIM", 5, base + (0 if m == "a" else 0.1 * np.array([1, 2, 1, 2]))) for m in "abcdefgh"]
    assert verdict(compared(many)) == (
        "Of 7 comparisons with a baseline 0 are better, 7 worse, and 0 too close to tell."
    )


def test_without_a_baseline_the_verdict_names_who_wins():
    assert verdict(one_cell()).startswith("Nothing was compared")
    apart = evaluation(models={"a": "a"}, cells=[c for c in evaluation().cells if c.model == "a"])
    best = min(apart.cells, key=lambda c: c.quality.frechet.estimate)
    others = [c for c in apart.cells if c is not best and c.quality.frechet.low > best.quality.frechet.high]
    near = evaluation(models={"a": "a"}, cells=apart.cells)
    assert verdict(near) == "None of the 8 settings is better than all others beyond its interval."
    clear = evaluation(models={"a": "a"}, cells=[best, *others])
    assert verdict(clear) == f"a with {best.scheduler} at NFE {best.nfe:g} is better than all others."


def test_a_dash_is_explained_where_there_is_one():
    lost = evaluation(cells=[c for c in evaluation().cells if not (c.model == "a" and c.nfe == 50)])
    assert f"{MISSING}: not drawn" in markdown_table(lost)
    assert f"{MISSING}: not drawn" not in markdown_table(evaluation())
    assert f"{MISSING}: not asked for" in markdown_table(evaluation())  # the ODE of the second model


@pytest.mark.parametrize(
    ("model", "scheduler", "nfe", "baseline"),
    [
        ("a", "DDIM", 5, None),
        ("a", "PNDM", 5, None),
        ("a", "CalibratedPNDM", 5, "PNDM"),
        ("b", "PNDM", 5, "PNDM"),
        ("b", "CalibratedPNDM", 5, "CalibratedPNDM"),
        ("b", "CalibratedDDIM", 5, "DDIM"),
        ("b", "ShortTimePNDM", 5, "PNDM"),
        ("b", "CalibratedShortTimePNDM", 5, "PNDM"),
        ("b", "Reflected", 5, "DDIM"),  # the first, for want of a kin
        ("b", "PNDM", 10, "DDIM"),  # PNDM has no 10
        ("b", "PNDM", 20, None),
        (WILD, "DDIM", 5, None),  # other images
    ],
)
def test_the_baseline_is_the_first_model_with_the_same_scheduler_or_its_kin(model, scheduler, nfe, baseline):
    values = [1.0, 2.0]
    cells = [("a", name, 5, values) for name in ("DDIM", "PNDM", "CalibratedPNDM")] + [("a", "DDIM", 10, values)]
    what = compared(list(dict.fromkeys((*c[:3], tuple(c[3])) for c in [*cells, (model, scheduler, nfe, values)])))
    cell = next(c for c in what.cells if (c.model, c.scheduler, c.nfe) == (model, scheduler, nfe))
    found = what.change(cell)
    assert (found and (found[0].model, found[0].scheduler, found[0].nfe)) == (baseline and ("a", baseline, nfe))


def test_a_calibrated_scheduler_of_short_times_is_compared_with_the_stock_one_of_short_times():
    what = compared([("a", name, 5, [1.0, 2.0]) for name in ("CalibratedShortTimeDDIM", "ShortTimeDDIM")])
    assert what.change(what.cells[0])[0] is what.cells[1]
    assert what.change(what.cells[1]) is None


@cases
def test_fid_is_named_only_where_it_is_fid(tmp_path, make):
    what = make()
    write_report(what, tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "FID" not in markdown_table(what)
    assert "FID" not in page.text.replace("This distance is not FID", "")
    assert "FID" not in "".join(f"{r.metric_type} {r.metric_name}".upper() for r in model_index(what, "a"))
    what.is_fid, what.extractor = True, "Inception-v3"
    assert ("FID (Inception-v3)" in markdown_table(what)) == bool(what.cells)
    finite = [c for c in what.cells if c.model == "a" and math.isfinite(c.quality.frechet.estimate)]
    assert [r.metric_type for r in model_index(what, "a")].count("fid") == len(finite)


# --- plots ------------------------------------------------------------------------------------------------------------


def containers(figure):
    return {(axis.get_title(), bars[0].get_gid()): bars for axis in figure.axes for bars in axis.containers}


@pytest.mark.parametrize("key", ["nfe", "seconds"])
def test_the_plots_hold_the_cells(key):
    what = evaluation()
    figure = quality_figure(what, lambda cell: getattr(cell, key), key, marked=key == "nfe")
    drawn = containers(figure)
    assert set(drawn) == {(s, m) for s in SCHEDULERS for m in MODELS}
    for (scheduler, model), bars in drawn.items():
        cells = [c for c in what.cells if (c.model, c.scheduler) == (model, scheduler)]
        x, y = bars[0].get_data()
        np.testing.assert_array_equal(x, [getattr(c, key) for c in cells])
        np.testing.assert_array_equal(y, [c.quality.frechet.estimate for c in cells])
        ends = np.array([segment[:, 1] for segment in bars[2][0].get_segments()])
        np.testing.assert_allclose(ends, [c.quality.frechet[1:] for c in cells], atol=1e-12)
    for axis in figure.axes:
        assert axis.get_xscale() == "log"
        low, high = axis.get_ylim()
        assert low < min(c.quality.frechet.low for c in what.cells)
        assert high > max(c.quality.frechet.high for c in what.cells)
        (band,) = axis.patches
        np.testing.assert_allclose([band.get_y(), band.get_y() + band.get_height()], what.floor.frechet[1:])
        assert axis.get_xlim()[0] < min(getattr(c, key) for c in what.cells)
        assert axis.get_xlim()[1] > max(getattr(c, key) for c in what.cells)
    assert "DINOv2" in figure.get_supylabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 1 + len(MODELS)


@pytest.mark.parametrize(
    ("estimates", "half", "scale"),
    [
        ([5, 6, 7], 0.1, "linear"),
        ([0.5, 5, 50], 0.1, "log"),
        ([0.01, 1, 30], 0.1, "symlog"),
        ([-0.1, 0, 0.2], 0.1, "linear"),
    ],
)
def test_the_vertical_scale_fits_the_values(estimates, half, scale):
    cells = [
        Cell("a", "DDIM", n, n, n, 0, 9, Quality(interval(v, half), interval(0, 1), 1, 1, None))
        for n, v in enumerate(estimates, 1)
    ]
    what = evaluation(cells=cells, floor=None, models={"a": "a"}, num_features=4)
    assert quality_figure(what, lambda cell: cell.nfe, "NFE").axes[0].get_yscale() == scale


def test_what_is_not_finite_is_a_cross():
    figure = quality_figure(broken(), lambda cell: cell.nfe, "NFE", marked=True)
    (axis,) = figure.axes
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[5, 10]]
    y = {bars[0].get_gid(): bars[0].get_ydata() for bars in axis.containers}
    assert np.isnan(y["a"]).all()
    assert list(y["nan"]) == [1.5]


def test_losses_and_their_ratio():
    upper, lower = loss_figure(evaluation()).axes
    assert (upper.get_xscale(), upper.get_yscale()) == ("log", "log")
    losses = {line.get_gid(): line.get_ydata() for line in upper.lines}
    assert {name: list(y) for name, y in losses.items()} == {"a": [0.9, 0.8, 0.3, 0.02], "org/b": [0.8, 0.6, 0.3, 0.03]}
    ratios = {line.get_gid(): line.get_ydata() for line in lower.lines}
    np.testing.assert_allclose(ratios["org/b"], [0.8 / 0.9, 0.75, 1, 1.5])
    np.testing.assert_allclose(ratios["a"], 1)


def test_the_ratio_of_other_levels_is_interpolated():
    what = evaluation()  # a loss of 1 / sigma is a line in logarithms, so that interpolation is exact
    what.likelihoods = {
        "a": Likelihood(sigmas=[10.0, 0.1, 1.0], eps_mse=[0.1, 10.0, 1.0]),
        "org/b": Likelihood(sigmas=[0.01, 0.3, 3.0, 30.0], eps_mse=[100.0, 2 / 0.3, 2 / 3, 1.0]),
    }
    ratio = loss_figure(what).axes[1].lines[1].get_ydata()
    np.testing.assert_allclose(ratio, [NAN, 2, 2, NAN])


@cases
def test_every_plot_can_be_drawn(make):
    what = make()
    drawn = plots(what)
    assert ("quality_nfe.png" in drawn) == ("quality_seconds.png" in drawn) == bool(what.cells)
    for png in drawn.values():
        assert min(Image.open(io.BytesIO(png)).size) > 300


# --- model-index ------------------------------------------------------------------------------------------------------

CARD = """---
license: mit   # ours
tags: [a, "b"]
model-index:
- name: somebody's name
  results:
  - task:
      type: unconditional-image-generation
    dataset:
      name: Digits
      type: user/digits
    metrics:
    - type: frechet_distance
      value: 12.5
      name: of somebody else
    source:
      name: a paper
      url: https://example.org
# a comment that stays
datasets:
    - user/digits
---

# A card\x20\x20

with --- and | text
"""


def results_of(text):
    return ModelCard(text).data.eval_results


def test_model_index_goes_through_the_readers_of_the_hub(tmp_path):
    what = evaluation()
    write_model_index(what, "org/b", tmp_path / "README.md")
    read = results_of((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert read == model_index(what, "org/b")
    own = [c for c in what.cells if c.model == "org/b"]
    assert len(read) == 6 * len(own) + 1
    frechet = [r for r in read if r.metric_type == "frechet_distance"]
    for result, cell in zip(frechet, own, strict=True):
        args = result.metric_args
        assert (result.metric_value, args["low"], args["high"]) == cell.quality.frechet
        assert (args["scheduler"], args["num_inference_steps"], args["num_samples"]) == (
            cell.scheduler,
            cell.steps,
            1000,
        )
        assert (result.dataset_type, result.dataset_name) == ("user/digits", "user/digits")
        assert result.task_type == "unconditional-image-generation"
        assert "DINOv2 ViT-S/14" in result.metric_name
        assert f"{cell.scheduler}, {cell.steps} steps" in result.metric_name
    (bits,) = [r for r in read if r.metric_type == "bits_per_dimension"]
    assert (bits.metric_value, bits.metric_args["method"]) == (3.3, "bound")
    copies = [r.metric_value for r in read if r.metric_type == "near_copies"]
    assert copies == [c.quality.copies for c in own]


def test_what_is_not_finite_has_no_result():
    values = [r.metric_value for m in ("a", "nan") for r in model_index(broken(), m)]
    assert values
    assert all(map(math.isfinite, values))
    (alone,) = [r for r in model_index(broken(), "nan") if r.metric_type == "frechet_distance"]
    assert "low" not in alone.metric_args  # its interval is not finite
    with pytest.raises(ValueError, match="no model 'z'"):
        model_index(broken(), "z")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_rest_of_a_card_keeps_its_bytes(tmp_path, newline):
    path = tmp_path / "README.md"
    before = CARD.replace("\n", newline)
    path.write_bytes(before.encode())
    write_model_index(evaluation(), "a", path)
    once = path.read_bytes().decode()
    write_model_index(evaluation(), "a", path)
    assert path.read_bytes().decode() == once
    assert once.startswith(before.split("model-index")[0])
    assert once.endswith(before[before.index("# a comment") :])
    assert newline == "\n" or "\n" not in once.replace("\r\n", "")
    ((entry,), other) = (yaml.safe_load(once.split("---")[1])[key] for key in ("model-index", "datasets"))
    assert other == ["user/digits"]
    assert entry["name"] == "somebody's name"
    assert entry["results"][0] == yaml.safe_load(CARD.split("---")[1])["model-index"][0]["results"][0]
    assert results_of(once)[1:] == model_index(evaluation(), "a")
    assert os.listdir(tmp_path) == ["README.md"]


def test_new_results_replace_ours_of_the_same_data_and_metric():
    what = evaluation()
    first = merged_card(CARD, what, "a")
    again = evaluation()
    again.cells = [c for c in again.cells if c.steps == 10]
    moved = {c.steps: Quality(interval(9.0, 1.0), *list(vars(c.quality).values())[1:]) for c in again.cells}
    again.cells = [Cell(**vars(c) | {"quality": moved[c.steps]}) for c in again.cells]
    second = merged_card(first, again, "a")
    assert results_of(second)[0].metric_name == "of somebody else"
    assert results_of(second)[1:] == model_index(again, "a")
    elsewhere = evaluation(data="user/letters")
    third = merged_card(second, elsewhere, "a")
    assert results_of(third)[1:] == model_index(again, "a") + model_index(elsewhere, "a")
    assert merged_card(third, elsewhere, "a") == third
    assert results_of(third)[0].source_url == "https://example.org"


@pytest.mark.parametrize(
    "card",
    [
        "", "# no header\n", "---\n{license: mit, model-index: [], tags: [a]}\n---\ntext\n",
        "---\nlicense: mit\n---\ntext",
        "---\nmodel-index:\n- name: x\n  results: []\n---\n", "---\nmodel-index: null\nlicense: mit\n---\n",
    ],
)  # fmt: skip
def test_cards_of_every_kind(card):
    after = merged_card(card, evaluation(), "a")
    assert results_of(after) == model_index(evaluation(), "a")
    assert merged_card(after, evaluation(), "a") == after
    assert after.endswith((card or "# a\n").split("---\n")[-1])
    assert ModelCard(after).data.get("license") == ("mit" if "mit" in card else None)


@pytest.mark.parametrize("header", ["a: [", "model-index: 3", "model-index:\n- results:\n  - x: 1", "- a"])
def test_a_card_that_cannot_be_read_is_left_alone(tmp_path, header):
    path = tmp_path / "README.md"
    path.write_text(f"---\n{header}\n---\n")
    with pytest.raises(ValueError, match="metadata of the model card cannot be read"):
        write_model_index(evaluation(), "a", path)
    assert path.read_text() == f"---\n{header}\n---\n"


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


PUSH = """
import sys
from diffusers_ext.reports.model_index import push_model_index
from diffusers_ext.reports.measured import Evaluation
for k in range({times}):
    push_model_index(Evaluation.load("results.json"), "a", "tester/model", {token!r}, ".")
"""


def push(hub, folder, times=1, token=None, login=TOKEN):
    evaluation().save(folder / "results.json")
    environment = hub.environment(folder / "hf-home", login)
    code = PUSH.format(times=times, token=token)
    done = stranger.run(code, cwd=folder, env=environment)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_a_push_merges_into_the_card_of_the_hub(hub, tmp_path):
    hub.create("tester/model")
    hub._repositories["tester/model"].commit("first", {"README.md": CARD.encode(), "model.bin": b"x"})
    done = push(hub, tmp_path, times=2)
    assert done.returncode == 0, done.stderr
    assert hub.files("tester/model") == {"README.md": merged_card(CARD, evaluation(), "a").encode(), "model.bin": b"x"}
    assert sum("/preupload/" in request for request in hub.requests) == 1
    assert hub.commits("tester/model") == ["first", "Evaluation on user/digits"]  # the second push had nothing to say


def test_a_failed_push_tells_how_to_push_later(hub, tmp_path):
    hub.create("tester/model")
    hub._repositories["tester/model"].commit("first", {"model.bin": b"x"})
    hub.fail("POST .*/commit/", status=403, times=1)  # its message repeats the token
    done = push(hub, tmp_path, token=TOKEN, login=None)
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("RuntimeError") :]
    assert done.stderr.count("Traceback") == 1
    assert "'a' were not pushed to tester/model" in last
    assert "safe in ." in last
    assert "README.md" not in hub.files("tester/model")
    python, option, *command = shlex.split(last.splitlines()[-1].strip())
    assert (python, option) == ("python", "-c")
    assert stranger.run(*command, cwd=tmp_path, env=hub.environment(tmp_path / "hf-home")).returncode == 0
    assert hub.files("tester/model")["README.md"].decode() == merged_card("", evaluation(), "a")


def test_a_card_that_cannot_be_fetched_is_not_replaced(hub, tmp_path):
    hub.create("tester/model")
    hub._repositories["tester/model"].commit("first", {"README.md": CARD.encode()})
    hub.fail("(GET|HEAD) .*/README.md", status=500, times=99)
    assert push(hub, tmp_path).returncode == 1
    assert hub.files("tester/model") == {"README.md": CARD.encode()}


def test_fewer_images_than_features_have_no_frechet_distance_anywhere(tmp_path):
    """Its bias cannot be taken off: tables and plots show the kernel distance, and say why."""
    few = evaluation(num_features=2048)
    text = markdown_table(few)
    assert "Frechet distance (" not in text
    assert "kernel distance (DINOv2 ViT-S/14) by evaluations" in text
    assert "fewer than the 2048 features" in text
    assert interval_text(few.cells[0].quality.kernel) in text.split("Other measures")[0]
    figure = quality_figure(few, lambda cell: cell.nfe, "NFE")
    line = next(line for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 2)
    assert any(np.isclose(line.get_ydata()[0], cell.quality.kernel.estimate) for cell in few.cells)
