"""An evaluation as files for people: `results.csv`, `table.md`, plots, and `index.html` that holds it all.

    write_report(evaluation, folder)

The page is one file without scripts: it loads nothing, so it works without a network and can be mailed. A value is
bold only where its interval lies below those of all others that it competes with. Where matplotlib is missing there are
no plots, and the page says so.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

from PIL import Image

from ..files import shown, write_file
from .card import shown_command
from .measured import Evaluation
from .plots import LOSS_BY_SIGMA, QUALITY_NFE, QUALITY_SECONDS, losses_of, plots
from .tables import against, csv_text, markdown_table, tables, verdict

_PLOTS = (QUALITY_NFE, QUALITY_SECONDS, LOSS_BY_SIGMA)


def write_report(evaluation: Evaluation, folder: str | os.PathLike) -> None:
    """Write the files into a folder, and remove plots of an earlier report that are not drawn now.

    The page shows `evaluation.pictures` below the results, in their order.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(evaluation)
    write_file(folder / "results.csv", csv_text(evaluation))
    write_file(folder / "table.md", (markdown_table(evaluation) + "\n"))
    for name in _PLOTS:
        if name in drawn:
            write_file(folder / name, drawn[name])
        else:
            (folder / name).unlink(missing_ok=True)
    write_file(folder / "index.html", html_page(evaluation, drawn))


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
p.verdict { font-size: 1.1rem; font-weight: 600; }
code { font-size: .85rem; white-space: pre-wrap; }
"""


def html_page(evaluation: Evaluation, drawn: Mapping[str, bytes]) -> str:
    """Return the page, with tables, plots and pictures inside of one file."""
    of_distance, others = ([one.html() for one in some] for some in tables(evaluation))
    captions = _captions(evaluation)
    figures = {name: _img(drawn[name], captions[name]) for name in _PLOTS if name in drawn}
    quality = [figures[name] for name in _PLOTS[:2] if name in figures]
    parts = [
        f"<h1>Evaluation on {escape(shown(evaluation.data))}</h1>",
        f"<p class='verdict'>{escape(verdict(evaluation))}</p>",
        f"<p>{escape(', '.join(evaluation.model_names))}. Features: {escape(evaluation.extractor)}. "
        f"{'' if evaluation.is_fid else 'This distance is not FID: compare it with the same features only. '}"
        f"{escape(against(evaluation)) if evaluation.cells else ''}</p>",
        *of_distance,
        *quality,
        ""
        if drawn or not (evaluation.cells or losses_of(evaluation))
        else "<p class='note'>No plots: no matplotlib.</p>",
        *others,
        *([f"<h2>Loss by noise level</h2>\n{figures[_PLOTS[2]]}"] if _PLOTS[2] in figures else []),
        *(["<h2>Pictures</h2>"] if evaluation.pictures else []),
        *(_img(_png(picture), title) for title, picture in evaluation.pictures.items()),
        _footer(evaluation),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation on {escape(shown(evaluation.data))}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _captions(evaluation: Evaluation) -> dict[str, str]:
    floor = ""
    if evaluation.floor is not None:
        floor = f" The band is the floor, {evaluation.num_floor} real images that are not in the reference."
    about = (
        f"{evaluation.distance_name}, lower is better. {against(evaluation)} Bars are 95% intervals; the bias is "
        f"taken off, so estimates may be below 0.{floor} A cross on the upper edge is an estimate that is not finite."
    )
    ratio = " Below: the ratio to the first model." if len(losses_of(evaluation)) > 1 else ""
    return {
        _PLOTS[0]: f"Quality against evaluations of the network for one image. {about}",
        _PLOTS[1]: f"Quality against seconds for one image on the machine of this run. {about}",
        _PLOTS[2]: f"Mean square error of the predicted noise by noise level, of {evaluation.likelihood_of}.{ratio}",
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
    named = {name: shown(path) for name, path in evaluation.models.items()}
    models = "; ".join(name if name == path else f"{name}: {path}" for name, path in named.items())
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    command = f"<p><code>{escape(shown_command(evaluation.command))}</code></p>\n" if evaluation.command else ""
    return (
        f"<footer><h2>This run</h2>\n<p>Models: {escape(models)}. Seed {evaluation.seed}. {escape(versions)}.</p>\n"
        f"{command}<p>Beside this page: results.json, results.csv, table.md and the pictures.</p></footer>"
    )
