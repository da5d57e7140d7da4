"""Which images are held out: those of another split that are not among the training images, by their content."""

from __future__ import annotations

from ..errors import InputError
from .columns import NONE
from .contents import same_images
from .labelling import with_labels
from .sources import HeldOutArguments, HubStream, ImageSource, View, load_images

TRAINING_IMAGES = "training images"
HELD_OUT_IMAGES = "held-out images"


def load_validation_images(args: HeldOutArguments) -> tuple[ImageSource | HubStream, str] | None:
    """Open the split that the arguments name, else `validation` or `test`, if the data have one.

    Returns:
        The images and the name of the split.
    """
    if args.validation_split == NONE:
        return None
    if args.validation_split is not None:
        return load_images(args, args.validation_split), args.validation_split
    for split in ("validation", "test"):
        try:
            return load_images(args, split), split
        except InputError:
            continue
    return None


def held_out_images(
    args: HeldOutArguments, training: ImageSource | HubStream, num_classes: int | None, n: int
) -> tuple[ImageSource | HubStream | None, str]:
    """Return the held-out images, and what a report calls the images that are measured on.

    Args:
        args: which split is held out, and how many images are trained on.
        training: the images of the split that is trained on, with all their labels.
        num_classes: how many classes the network knows; `None` if it takes no labels.
        n: how many images are used; no more are compared with the training images.

    Returns:
        Images that are not trained on, at most n if they had to be chosen, with their labels. `None` if there are
        none: then the training images are what can be measured on.

    Raises:
        InputError: the split that the arguments name cannot be used.
    """
    if (found := load_validation_images(args)) is None:
        return None, f"{TRAINING_IMAGES} (the data have no held-out split)"
    source, split = found
    if isinstance(source, HubStream) or isinstance(training, HubStream):
        if split == args.train_split:
            return None, f"{TRAINING_IMAGES} (split {split} is trained on)"
        chosen, names = source, None
    else:
        n = min(n, len(source))
        same = same_images(source, n, training, args.max_train_samples)
        if len(same) == n:
            return None, f"{TRAINING_IMAGES} (split {split} is among them)"
        if same:
            print(f"{len(same)} of the first {n} images of split {split} are training images and are left out")
        names = training.class_names if num_classes is not None else None
        kept = None if not same else [i for i in range(n) if i not in same]
        chosen = source
    try:
        chosen = with_labels(chosen, num_classes, f"split {split}", names)
    except InputError as error:
        if args.validation_split is not None:
            raise InputError(f"{error}. To go on without held-out images: --validation_split {NONE}") from error
        print(f"split {split} is not held out: {error}")
        return None, f"{TRAINING_IMAGES} (the labels of split {split} cannot be used)"
    if not isinstance(chosen, HubStream) and kept is not None:
        chosen = View(chosen, chosen.labels, chosen.class_names, kept)
    return chosen, HELD_OUT_IMAGES
