"""Draw the plan of the package, `docs/plan.svg`, from the order of `test_architecture`: `python tests/plan.py`.

A floor imports from the floors below it, and from nothing above. Beside each module stands the first sentence of its
docstring.
"""

import ast
import re
from html import escape

from test_architecture import ORDER, PACKAGE

PLAN = PACKAGE.parent / "docs" / "plan.svg"
WIDTH, LINE, GAP, PADDING, COLUMN = 1000, 22, 8, 10, 200
LONGEST = 104  # characters of a sentence that the width holds


def sentence(name: str) -> str:
    """The first sentence of a module's or a folder's docstring."""
    path = PACKAGE / name / "__init__.py"
    text = ast.get_docstring(ast.parse((path if path.exists() else PACKAGE / f"{name}.py").read_text())) or ""
    first = re.split(r"(?<=\.)\s|:?\n\n", text)[0].replace("\n", " ").strip(" .:").replace("`", "")
    return first if len(first) <= LONGEST else f"{first[: LONGEST - 2].rsplit(' ', 1)[0]} ..."


def plan() -> str:
    """The picture, as SVG; the floor that imports nothing of ours is at the bottom."""
    floors = [sorted(names) for names in reversed(ORDER)]
    heights = [2 * PADDING + LINE * len(names) for names in floors]
    total = sum(heights) + GAP * (len(floors) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}"',
        ' font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
    ]
    y = GAP
    for i, (names, height) in enumerate(zip(floors, heights, strict=True)):
        colour = ("#eef4fb", "#e3ecf7")[i % 2]
        parts.append(f'<rect x="{GAP}" y="{y}" width="{WIDTH - 2 * GAP}" height="{height}" rx="6" fill="{colour}"/>')
        for k, name in enumerate(names):
            line = y + PADDING + LINE * k + 16
            shown = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
            parts.append(f'<text x="{2 * GAP + 4}" y="{line}" font-weight="bold" fill="#1b1f24">{shown}</text>')
            parts.append(f'<text x="{COLUMN}" y="{line}" fill="#3d444d">{escape(sentence(name))}</text>')
        y += height + GAP
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PLAN.write_text(plan())
