"""The pages of docs/: their Python runs, their commands and settings are taken, links lead somewhere, quotes are said.

Truth: the commands' own parsers, the source of the package, and, with the extra `docs`, the site as it is built."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from test_wrong_input import KINDS

import diffusers_ext
from diffusers_ext.commands import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.name != "HEAD.md")
METHODS = sorted((DOCS / "methods").glob("*.md"))


def name_of(page):
    return str(page.relative_to(DOCS))


def blocks(page, language):
    """The fenced blocks of a language; those marked `no-run` load models that are not here."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def all_blocks(language):
    return [(page, code) for page in PAGES for code in blocks(page, language)]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p.parts[-2] in ("methods", "guides", "docs")], ids=name_of
)
def test_python_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), scope)
    losses = [scope[name] for name in ("loss", "guidance") if name in scope]
    assert all(loss.isfinite().all() for loss in losses)


@pytest.mark.parametrize(("page", "code"), all_blocks("bash"), ids=lambda x: name_of(x) if isinstance(x, Path) else "")
def test_commands_are_taken(page, code):
    of_launcher = {"--multi_gpu": 1, "--num_processes": 2}
    commands = re.findall(r"^diffusers-ext ([\w-]+)((?:.*\\\n)*.*)", code, re.MULTILINE)
    assert len(commands) == len(re.findall(r"^diffusers-ext", code, re.MULTILINE))
    for name, command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        for option, length in of_launcher.items():
            if option in words:
                del words[words.index(option) : words.index(option) + length]
        args = parse_arguments(KINDS[name.replace("-", "_")], words)
        assert all(getattr(args, word[2:].split("=")[0]) is not None for word in words if word.startswith("--"))


@pytest.mark.parametrize("page", METHODS, ids=name_of)
def test_the_settings_of_the_paper_are_taken(page, tmp_path):
    (code,) = blocks(page, "yaml")
    command = re.search(r"diffusers-ext ([\w-]+) --config", code)[1]
    file = tmp_path / "this.yaml"
    file.write_text(code)
    args = parse_arguments(
        KINDS[command.replace("-", "_")], ["--config", str(file), "--output_dir", str(tmp_path / "new")]
    )
    assert {name: getattr(args, name) for name in yaml.safe_load(code)} == yaml.safe_load(code)


@pytest.mark.parametrize("page", METHODS, ids=name_of)
def test_each_method_has_every_part(page):
    parts = ["When it helps, and when not", "Equation", "In ten lines", "Command", "The paper's settings"]
    parts += ["In the paper, in the code", "Where ours differs", "Figures of the paper"]
    assert re.findall(r"^## (.*)", page.read_text(), re.MULTILINE) == parts


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        titles = re.findall(r"^#+ (.*)", other.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in titles}


def test_every_page_is_in_the_menu():
    menu = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(name_of(page) for page in PAGES)


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.MULTILINE)
    assert len(named) == len(set(named))
    for address in named:
        module, name = address.rsplit(".", 1)
        __import__(module)
        assert getattr(sys.modules[module], name).__module__ == module
    shown = {address.rsplit(".", 1)[1] for address in named}
    assert set(diffusers_ext.__all__) - set(diffusers_ext.schedulers.FAMILIES) - shown == set()


def test_messages_are_quoted_as_they_are_said():
    source = "".join(path.read_text() for path in Path(diffusers_ext.__file__).parent.rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", source)  # texts over several lines
    quoted = re.findall(r"^\| `([^`]+)` \|", (DOCS / "guides" / "messages.md").read_text(), re.MULTILINE)
    of_others = ("CUDA out of memory", "module diffusers has no attribute")
    ours = [message for message in quoted if not message.startswith(of_others)]
    assert len(ours) >= 7
    for message in ours:
        for part in message.split("..."):
            assert part.strip() in said, message


class _Fetched(HTMLParser):
    """The addresses that a page fetches when it is read, and the programs that it holds."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(attrs.get("src") or "")
        if tag == "link" and attrs.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(attrs.get("href") or "")


def test_the_site_builds_and_fetches_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        fetched = _Fetched()
        fetched.feed(page.read_text())
        for address in fetched.addresses:
            assert not re.match(r"(?:\w+:)?//", address), (page, address)
            local = address.split("?")[0].split("#")[0]
            if page.name != "404.html" and local and not local.startswith("data:"):
                assert (page.parent / local).exists(), (page, address)
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:\w+:)?//", sheet.read_text())
    for name in ("consistency", "reflected", "short-times", "observation", "calibration"):
        text = (tmp_path / "methods" / f"{name}.html").read_text()
        assert "<math" in text
        assert "arithmatex" not in text
