"""The metadata of a model card: the YAML between two lines `---` at its beginning.

What changes is written anew, and the rest keeps its bytes, comments and order, where YAML lets it. (huggingface_hub's
own functions dump the whole header anew.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump


def metadata_of(text: str) -> dict[str, Any]:
    """Return the metadata of a card's text.

    Raises:
        ValueError: they cannot be read.
    """
    match = REGEX_YAML_BLOCK.search(text)
    try:
        metadata = yaml.safe_load(match[2] if match else "") or {}
    except yaml.YAMLError as error:
        raise unreadable(error) from error
    if not isinstance(metadata, dict):
        raise unreadable(TypeError(f"a {type(metadata).__name__} is no mapping"))
    return metadata


def body_of(text: str) -> str:
    """Return a card's text without its metadata."""
    match = REGEX_YAML_BLOCK.search(text)
    return text[match.end() :] if match else text


def unreadable(error: Exception) -> ValueError:
    """Return the error of metadata that cannot be read."""
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"the metadata of the model card cannot be read, correct it first: {detail}")


def with_metadata(text: str, changed: Mapping[str, Any]) -> str:
    """Return a card's text with other values for some keys of its metadata.

    Raises:
        ValueError: the metadata cannot be read.
    """
    metadata, match = metadata_of(text), REGEX_YAML_BLOCK.search(text)
    header, newline = (match[2], match[1].lstrip(" \t-") or "\n") if match else ("", "\r\n" if "\r\n" in text else "\n")
    newline = "\r\n" if newline.endswith("\r\n") else newline[-1]
    for key, value in changed.items():
        header = _with_value(header, metadata, key, value, newline)
        metadata = metadata | {key: value}
    if match:
        return text[: match.start(2)] + header + text[match.end(2) :]
    return f"---{newline}{header}{newline}---{newline}{newline}{text}"


def _with_value(header: str, metadata: dict[str, Any], key: str, value: Any, newline: str) -> str:
    block = yaml_dump({key: value}, sort_keys=False, line_break=newline).rstrip()
    root = yaml.compose(header, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    spans = [(name.start_mark.index, _end(node)) for name, node in pairs if name.value == key]
    if spans:
        start, end = spans[0]
        spliced = header[:start] + block + header[end:]
    else:
        spliced = f"{header}{newline}{block}" if header.strip() else block
    expected = metadata | {key: value}
    try:
        if yaml.safe_load(spliced) == expected:
            return spliced
    except yaml.YAMLError:
        pass
    return yaml_dump(expected, sort_keys=False, line_break=newline).rstrip()


def _end(node: yaml.Node) -> int:
    """Return where the last value below a node ends; a block's own mark lies behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return node.end_mark.index
