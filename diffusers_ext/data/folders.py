"""A folder of images on this machine, read by the imagefolder of `datasets`, which finds splits, classes and captions.

    photos/*.png                      one class
    photos/cat/*.png, dog/*.png       the folders are classes
    photos/train/..., test/...        folders named like splits are these
    photos/metadata.csv               columns for the images that it names, e.g. captions

An imagefolder leaves images out without a word: those in folders that are links, those beside folders named like
splits, those that the metadata do not name. So the folder is listed before. Links are followed; where images would
still be lost, or classes, this is an error that says how many.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .columns import NONE

# --- what there is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """What a folder holds; hidden files and folders are left out, and links are followed.

    Attributes:
        root: the folder.
        images: how many images lie directly in each folder below it, by relative path.
        links: whether some of these folders are reached by a link.
        metadata: the files that name images and say more of them.
    """

    root: Path
    images: dict[str, int]
    links: bool
    metadata: list[str]

    @property
    def splits(self) -> dict[str, list[str]]:
        """The folders with images of each split; all are of `train` where none is named like a split."""
        found: dict[str, list[str]] = defaultdict(list)
        for folder in self.images:
            found[_split_of(folder)].append(folder)
        return dict(found) if set(found) != {""} else {"train": found[""]}

    @property
    def classes(self) -> list[str]:
        """The folders that would be classes; a split whose images are all in one folder has none."""
        return sorted({Path(f).name for folders in self.splits.values() if len(folders) > 1 for f in folders})

    def as_arguments(self) -> dict[str, Any]:
        """Return how `load_dataset("imagefolder", ...)` finds all of it."""
        if not self.links:
            return {"data_dir": str(self.root)}
        with_metadata = {os.path.dirname(name) for name in self.metadata}
        folders = {split: {*names, *(with_metadata - {*self.images})} for split, names in self.splits.items() if split}
        return {
            "data_files": {
                split: [f"{glob.escape(os.path.join(os.path.abspath(self.root), name))}/*" for name in sorted(names)]
                for split, names in folders.items()
            }
        }


def list_folder(folder: str | os.PathLike) -> Listing:
    """List a folder of images.

    Raises:
        InputError: it is no folder, or has no images.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    known, root = {extension.lower() for extension in ImageFolder.EXTENSIONS}, Path(folder)
    if not root.is_dir():
        raise InputError(f"--train_data_dir {folder} is not a folder")
    images: dict[str, int] = {}
    links, metadata = False, []
    for path, folders, files in os.walk(root, followlinks=True):
        here = os.path.relpath(path, root).removeprefix(".")
        folders[:] = sorted(f for f in folders if _is_seen(f) and not _leads_back(os.path.join(path, f)))
        files = [f for f in files if _is_seen(f)]
        if wrong := [os.fsencode(f) for f in files if not _is_text(f)]:
            shown = wrong[0].decode(errors="backslashreplace")
            raise InputError(f"the name of {shown} in {path} is not text (UTF-8): give the file another one")
        if found := sum(os.path.splitext(f)[1].lower() in known for f in files):
            images[here] = found
            links = links or os.path.realpath(path) != os.path.normpath(os.path.join(os.path.realpath(root), here))
        metadata += [os.path.join(here, f) for f in files if f in ImageFolder.METADATA_FILENAMES]
    if not images:
        raise InputError(
            f"--train_data_dir {folder} has no images. It must be a folder of images, or of one folder for each class, "
            f"perhaps in folders train and test"
        )
    return Listing(root, images, links, metadata)


def _is_seen(name: str) -> bool:
    return not name.startswith((".", "__"))


def _is_text(name: str) -> bool:
    return name.encode(errors="ignore") == os.fsencode(name)


def _leads_back(path: str) -> bool:
    """Return whether a folder is a link to one that it lies in."""
    parent, target = os.path.realpath(os.path.dirname(path)), os.path.realpath(path)
    return os.path.islink(path) and os.path.commonpath([parent, target]) == target


def _split_of(folder: str) -> str:
    """Return the split that a folder is named like, as `datasets` reads names; "" if it is none."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    for split, words in SPLIT_KEYWORDS.items():
        pattern = rf"(^|[{NON_WORDS_CHARS}/])({'|'.join(words)})([{NON_WORDS_CHARS}/]|$)"
        if re.search(pattern, folder):
            return str(split)
    return ""


# --- what is read of it -----------------------------------------------------------------------------------------------


def require_all(listing: Listing, read: dict[str, int]) -> None:
    """Refuse a folder of which an imagefolder would leave images out without a word.

    Args:
        listing: what there is.
        read: the number of images that are read, by split.

    Raises:
        InputError: says how many are read, how many there are, and what to do.
    """
    there, found = sum(listing.images.values()), sum(read.values())
    if found == there:
        return
    if listing.metadata:
        raise InputError(
            f"--train_data_dir {listing.root} has {there} images, and {', '.join(listing.metadata)} name {found} of "
            f"them. Add the others there, or move them elsewhere"
        )
    beside = Counter({folder: n for folder, n in listing.images.items() if not _split_of(folder)})
    named = f", and not those in {', '.join(f or 'itself' for f in sorted(beside)[:5])}" if beside else ""
    raise InputError(
        f"--train_data_dir {listing.root} has {there} images, and its splits ({', '.join(read)}) hold {found} of them"
        f"{named}. A folder named like a split (train, validation, test) is one, and then all images must be in such "
        f"folders"
    )


def class_of_all(listing: Listing, label_column: str | None, has_labels: bool) -> str | None:
    """Return the name of the one class of all images, or `None` where labels are read or not wanted.

    Args:
        listing: what there is.
        label_column: what the user has said.
        has_labels: whether the imagefolder has found a column of labels.

    Raises:
        InputError: there are several folders, and an imagefolder does not take them for classes.
    """
    if label_column is not None:
        return None
    classes = listing.classes
    if not classes:
        return listing.root.absolute().name
    if has_labels:
        return None
    n = sum(listing.images.values())
    there = f"--train_data_dir {listing.root} has {n} images in {len(listing.images)} folders"
    without = f"; to go on without classes: --label_column {NONE}"
    if listing.metadata:
        raise InputError(
            f"{there}, which are no classes where {', '.join(listing.metadata)} says more of the images. Add a column "
            f"with their classes there, and name it with --label_column{without}"
        )
    raise InputError(
        f"{there}, which are no classes. Put the images of each class into one folder of its own name, and none beside "
        f"these folders{without}"
    )


def require_outside(output_dir: str | None, folder: str | os.PathLike) -> None:
    """Refuse an output folder among the training images: its sample grids would be trained on.

    Raises:
        InputError: it lies inside of the folder of images.
    """
    if output_dir is None:
        return
    out, root = os.path.realpath(output_dir), os.path.realpath(folder)
    inside = os.path.relpath(out, root)
    if not inside.startswith("..") and all(_is_seen(part) for part in inside.split(os.sep) if part != "."):
        raise InputError(
            f"--output_dir {output_dir} lies among the training images in {folder}: its sample grids would be trained "
            f"on. Name a folder elsewhere"
        )
