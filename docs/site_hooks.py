"""Equations of the site as MathML, made when it is built: no script runs, and nothing is fetched, when it is read."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def _mathml(found: re.Match[str]) -> str:
    """The equation that `pymdownx.arithmatex` left between \\( \\) or \\[ \\]."""
    display = "block" if found[1] == "div" else "inline"
    return convert(html.unescape(found[2]).strip()[2:-2], display=display)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return _EQUATION.sub(_mathml, content)
