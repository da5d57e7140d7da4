"""The model card of a trained pipeline, written from what its run knows.

Our part of a card stands between two comments. A card that exists, in the folder or on the Hub, keeps its text and
metadata: our part is renewed where it stands, or is added at the end, and metadata are added where there are none.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from ..files import is_local, shown, write_file
from .front_matter import metadata_of, with_metadata

BEGIN, END = "<!-- written by diffusers_ext: begin -->", "<!-- written by diffusers_ext: end -->"
_NOT_SHOWN = ("hub_token", "cache_dir")  # arguments that no model card shows


def write_model_card(
    folder: Path,
    *,
    name: str,
    arguments: Mapping[str, object],
    command: str,
    data: str,
    metrics: Mapping[str, object],
    sample: Path | None,
    pipeline_class: str,
    needs_package: bool,
    paper: tuple[str, str],
    license: str | None = None,
    is_lora: bool = False,
    prompts: Sequence[str] | None = None,
) -> Path:
    """Write `README.md`, the Hub's model card, from what a run knows.

    Local folders appear by their base name only, in the command also; the token and `cache_dir` do not appear.

    Args:
        folder: the pipeline's folder.
        name: the model's name on the Hub (`HubPusher.repo_id`); the example loads it by this name.
        arguments: the run's arguments; those with a scalar value are listed. Its data set and the model that it started
            from become metadata where they are names of the Hub.
        command: the command line of the run, quoted as by `shlex.join`.
        data: what it was trained on, in words.
        metrics: numbers and texts make one table, lists of equal length another one, with a row for each index.
        sample: picture of samples, in `folder`.
        pipeline_class: name of the pipeline's class.
        needs_package: whether the class is ours, so that loading it needs `import diffusers_ext`.
        paper: the method's title, and its arXiv id or address.
        license: the Hub's name of a licence.
        is_lora: whether it is a LoRA of the pipeline that the run started from.
        prompts: those of the sample, in turn, where it is text-to-image.

    Returns:
        The card's path.

    Raises:
        ValueError: the sample is not in the folder, or the command's quotes do not match.
    """
    parts = [
        f"{'LoRA of a ' if is_lora else ''}`{pipeline_class}` trained on {data} with "
        f"[{paper[0]}]({_address(paper[1])}).",
        "" if sample is None else f"![Samples]({sample.resolve().relative_to(folder.resolve()).as_posix()})",
        "" if not prompts else "Prompts of the samples, in turn:\n\n" + "\n".join(f"- {_cell(p)}" for p in prompts),
        loading_section(name, pipeline_class, needs_package, arguments if is_lora else {}, prompts),
        _training_section(command, arguments),
        _metrics_section(metrics),
    ]
    tags = _tags(pipeline_class, paper[1], needs_package)
    tags += (["text-to-image"] if prompts is not None else []) + (["lora"] if is_lora else [])
    section = _without_secrets("\n\n".join(part for part in parts if part), arguments)
    return _write(folder, name, section, arguments, tags, license)


def save_card(
    folder: Path, name: str, parts: Sequence[str], arguments: Mapping[str, object], tags: Sequence[str]
) -> None:
    """Write `README.md` from its paragraphs; what the arguments name on the Hub, and the licence, become metadata."""
    license = arguments.get("license")
    _write(
        folder, name, "\n\n".join(parts), arguments, ["diffusers_ext", *tags], None if license is None else str(license)
    )


def _write(
    folder: Path, name: str, section: str, arguments: Mapping[str, object], tags: Sequence[str], license: str | None
) -> Path:
    data_set = hub_name(arguments.get("dataset_name"))
    header = ModelCardData(
        library_name="diffusers",
        license=license,
        tags=list(tags),
        datasets=[data_set] if data_set else None,
        base_model=hub_name(arguments.get("pretrained_model_name_or_path")),
    )
    card = folder / "README.md"
    old = card.read_text(encoding="utf-8-sig") if card.is_file() else ""
    new = f"---\n{header.to_yaml()}\n---\n\n# {name}\n\n{BEGIN}\n\n{section}\n\n{END}\n"
    write_file(card, merged(old, new, license))
    return card


def merged(old: str, new: str, license: str | None = None) -> str:
    """Return the text of a card that exists with our part and our metadata; the rest stays.

    Args:
        old: the text that exists, "" if there is none.
        new: a card of ours.
        license: the licence that was asked for; it replaces another one.

    Raises:
        ValueError: the metadata of `old` cannot be read.
    """
    if not old.strip():
        return new
    before, changed = metadata_of(old), {}
    for key, value in metadata_of(new).items():
        if key not in before or before[key] is None:
            changed[key] = value
        elif isinstance(value, list) and isinstance(before[key], list) and not {*value} <= {*before[key]}:
            changed[key] = [*before[key], *(v for v in value if v not in before[key])]
    if license is not None and before.get("license") != license:
        changed["license"] = license
    text = with_metadata(old, changed) if changed else old
    section = new[new.index(BEGIN) : new.index(END) + len(END)]
    first, last = text.find(BEGIN), text.find(END)
    if 0 <= first < last:
        return text[:first] + section + text[last + len(END) :]
    return f"{text.rstrip()}\n\n{section}\n"


def _load_line(name: str) -> str:
    return f'DiffusionPipeline.from_pretrained("{name}")'


def loading_section(
    name: str, pipeline_class: str, needs_package: bool, base: Mapping[str, object], prompts: Sequence[str] | None
) -> str:
    """Return the code that opens the pipeline, or the LoRA on its base, which `base` names as the run's arguments do,
    and, where there are prompts, draws an image."""
    lines = ["from diffusers import DiffusionPipeline", "", f"pipe = {_load_line(name)}"]
    if base:
        lines[2:] = [f"pipe = {_load_line(shown(str(base['pretrained_model_name_or_path'])))}"]
        lines.append(f'pipe.load_lora_weights("{name}")')
    if prompts:
        lines.append(f"image = pipe({prompts[0]!r}).images[0]")
    if needs_package:
        lines.insert(0, f"import diffusers_ext  # makes {pipeline_class} known to diffusers: import it first")
    return "\n".join(["## How to load it", "", "```python", *lines, "```"])


def _training_section(command: str, arguments: Mapping[str, object]) -> str:
    listed = {
        key: shown(value) if isinstance(value, str) else _number(value)
        for key, value in arguments.items()
        if key not in _NOT_SHOWN and isinstance(value, int | float | str)
    }
    rows = [[f"`{key}`", f"`{value}`"] for key, value in listed.items()]
    return f"## Training\n\n```bash\n{shown_command(command)}\n```\n\n{table(['argument', 'value'], rows)}"


def _metrics_section(metrics: Mapping[str, object]) -> str:
    single = [[key, _number(value)] for key, value in metrics.items() if isinstance(value, int | float | str)]
    tables = [table(["metric", "value"], single)] if single else []
    lists = {key: value for key, value in metrics.items() if isinstance(value, list | tuple) and value}
    for n in sorted({len(value) for value in lists.values()}):
        columns = {key: value for key, value in lists.items() if len(value) == n}
        rows = [[_number(v) for v in row] for row in zip(*columns.values(), strict=True)]
        tables.append(table(list(columns), rows))
    return "\n\n".join(["## Metrics", *tables]) if tables else ""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _tags(pipeline_class: str, paper: str, needs_package: bool) -> list[str]:
    tags = [f"diffusers:{pipeline_class}", "image-generation"]
    arxiv = re.search(r"\d{4}\.\d{4,5}", paper)
    return [*tags, *(["diffusers_ext"] if needs_package else []), *([f"arxiv:{arxiv[0]}"] if arxiv else [])]


def _address(paper: str) -> str:
    return paper if "://" in paper else f"https://arxiv.org/abs/{paper}"


def hub_name(value: object) -> str | None:
    """Return the value if it is a name of the Hub, `owner/name`, and else `None`."""
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        return None
    return None if is_local(value) or value.endswith(".parquet") else value


def command_line() -> str:
    """Return the command line that runs, without options of `accelerate launch`."""
    script = Path(sys.argv[0])
    if script.parent == Path(__file__).parents[1] / "commands":  # as a module
        return shlex.join(["diffusers-ext", script.stem.replace("_", "-"), *sys.argv[1:]])
    return f"accelerate launch {shlex.join(sys.argv)}"


def shown_command(command: str) -> str:
    """Return the command line without secrets, local paths cut to their base name; the script keeps a relative path."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if option.lstrip("-").replace("-", "_") in _NOT_SHOWN:
            if not equals:
                next(words, None)
            continue
        script = value.endswith(".py") and not os.path.isabs(value)
        kept.append(option + equals + (value if script or not value else shown(value)))
    return shlex.join(kept)


def _without_secrets(text: str, arguments: Mapping[str, object]) -> str:
    """Remove the token from the text, and cut absolute paths among the arguments to their base name."""
    values = [str(v) for v in arguments.values() if isinstance(v, str | Path)]
    for path in sorted((v for v in values if os.path.isabs(v) and len(v) > 1), key=len, reverse=True):
        text = text.replace(path, os.path.basename(os.path.abspath(path)))
    for token in (arguments.get("hub_token"), os.environ.get("HF_TOKEN")):
        text = text.replace(str(token), "***") if token else text
    return text


def complete_card(card: Path, name: str, repo_id: str) -> None:
    """Let the model card's example load the repository by its full name, which only the Hub knew."""
    if name != repo_id and card.is_file():
        text = card.read_text(encoding="utf-8")
        for load in ("from_pretrained", "load_lora_weights"):
            text = text.replace(f'{load}("{name}")', f'{load}("{repo_id}")')
        write_file(card, text)
