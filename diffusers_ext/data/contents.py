"""Images by their stored bytes: which ones two sources share, and a mark that tells one data set from another.

Two images are the same if their encoded bytes are. Arrow compares the lengths first, so that only few images of a large
data set are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .columns import encoded
from .sources import HubImages, HubStream, ImageSource


def same_images(source: ImageSource, n: int, other: ImageSource, limit: int | None = None) -> set[int]:
    """Return which of the first n images of a source are among the first `limit` images of another."""
    own = [(i, len(content), _digest(content)) for i, content in _contents(source, n)]
    lengths = {length for _, length, _ in own}
    there = {_digest(c) for _, c in _contents(other, len(other) if limit is None else min(limit, len(other)), lengths)}
    return {i for i, _, digest in own if digest in there}


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _contents(source: ImageSource, n: int, lengths: set[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (index, bytes) of the first n images, as they are stored; only those of these lengths, if any are given.
    Images that cannot be read are left out."""
    if not isinstance(source, HubImages):
        for i in range(n):
            content = np.asarray(source.open(i)).tobytes()
            if lengths is None or len(content) in lengths:
                yield i, content
        return
    first = 0
    for chunk in source.cells().slice(0, n).chunks:
        bytes_of, paths, found = chunk.field("bytes"), chunk.field("path").to_pylist(), _lengths(chunk)
        wanted = np.isin(found, [-1, *lengths]) if lengths is not None else np.ones(len(found), dtype=bool)
        for i in np.flatnonzero(wanted).tolist():
            try:
                if found[i] < 0 and lengths is not None and os.stat(paths[i]).st_size not in lengths:
                    continue
                yield first + i, encoded({"bytes": bytes_of[i].as_py(), "path": paths[i]}, source.places)
            except (OSError, ValueError, TypeError):
                continue
        first += len(chunk)


def mark_of(source: ImageSource | HubStream, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Return what tells a data set from another, as JSON.

    Args:
        source: the images.
        class_names: the names of the classes, where the labels are used.

    Returns:
        How many images there are, the classes, and a digest of the names and lengths of all images. A folder has the
        same mark wherever it lies. Of a stream, only the classes are known.
    """
    classes = None if class_names is None else list(class_names)
    if isinstance(source, HubStream):
        return {"images": None, "classes": classes, "content": None}
    lengths, names = hashlib.sha256(), hashlib.sha256()
    if isinstance(source, HubImages):
        for chunk in source.cells().chunks:
            lengths.update(_lengths(chunk).astype("<i8").tobytes())
            for path in chunk.field("path").to_pylist():
                names.update(f"{_relative(path, source.places)}\n".encode(errors="surrogateescape"))
    else:
        for _, content in _contents(source, len(source)):
            names.update(content)
    both = hashlib.sha256(lengths.digest() + names.digest())
    return {"images": len(source), "classes": classes, "content": both.hexdigest()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two marks do not share, as (before, now) by its name for people; the content if all else is equal."""
    found = {f"the {k} of the data": (before[k], now[k]) for k in ("images", "classes") if before[k] != now[k]}
    if not found and before["content"] != now["content"]:
        short = before["content"][:8], now["content"][:8]
        found["the digest of the names and sizes of the images"] = short
    return found


def _relative(path: str | None, places: Sequence[str]) -> str:
    name = path or ""
    for place in places:
        name = name.removeprefix(place)
    return name


def _lengths(chunk: Any) -> np.ndarray:
    """Return the length of the bytes in each cell, -1 where a file holds them."""
    import pyarrow.compute as pc

    return pc.binary_length(chunk.field("bytes")).fill_null(-1).to_numpy(zero_copy_only=False)
