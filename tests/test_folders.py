"""Folders of images. Truth: the files that the tests write, image i of grey value i."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.data.batches import first_images
from diffusers_ext.data.held_out import held_out_images, load_validation_images
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import load_images
from diffusers_ext.errors import InputError
from diffusers_ext.training import TrainingArguments


def arguments(tmp_path, **kwargs):
    return TrainingArguments(cache_dir=str(tmp_path / "cache"), **kwargs)


def write(folder, *names):
    """Write images of 8 x 8, of the grey values 0, 1, 2, ..."""
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), value).save(path)
    return folder


def read(source):
    """The grey value and the class of each image."""
    labels = [None] * len(source) if source.labels is None else [source.class_names[k] for k in source.labels]
    return sorted((int(np.asarray(source.open(i)).mean()), label) for i, label in enumerate(labels))


def test_folders_are_classes(tmp_path):
    for name, value in (("cats/a.png", 10), ("dogs/b.JPG", 200), ("dogs/deep.txt", 0)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.new("L", (8, 8), value).save(path)
    folder = load_images(arguments(tmp_path, train_data_dir=str(tmp_path)), "train")
    assert (len(folder), folder.class_names, list(folder.labels)) == (2, ["cats", "dogs"], [0, 1])
    assert np.asarray(folder.open(0)).mean() == 10
    one = load_images(arguments(tmp_path, train_data_dir=str(tmp_path / "cats")), "train")
    assert (one.class_names, list(one.labels)) == (["cats"], [0])


def test_the_splits_of_a_folder_are_never_mixed(tmp_path):
    for value, name in enumerate(("train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/dog/d.png")):
        path = tmp_path / "faces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), value).save(path)
    args = arguments(tmp_path, train_data_dir=str(tmp_path / "faces"))
    seen, (held_out, _) = load_images(args, "train"), load_validation_images(args)
    for source, expected in ((seen, [0, 1]), (held_out, [2, 3])):
        assert [np.asarray(source.open(i)).mean() for i in range(len(source))] == expected
        assert (source.class_names, list(source.labels)) == (["cat", "dog"], [0, 1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("bus/a.png", "car/b.png", "train/c.png"), "has 3 images, and its splits .train. hold 1 of them"),
        (("x/1/a.png", "y/1/b.png"), "has 2 images in 2 folders, which are no classes"),
        (("a.png", "sub/b.png"), "has 2 images in 2 folders, which are no classes"),
    ],
)
def test_a_folder_that_would_lose_images_or_classes_is_refused(tmp_path, files, message):
    for name in files:
        path = tmp_path / "vehicles" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    with pytest.raises(InputError, match=message):
        load_images(arguments(tmp_path, train_data_dir=str(tmp_path / "vehicles")), "train")


def test_folders_that_are_links_are_read(tmp_path):
    """One link to a folder of a class elsewhere, one to a folder of a split, and one that leads back to the root."""
    faces = write(tmp_path / "faces", "train/cat/a.png", "test/cat/b.png")
    write(tmp_path / "elsewhere", "x/skip.png", "dogs/c.png", "more/d.png")
    for link, target in (("train/dog", "dogs"), ("test/dog", "more")):
        (faces / link).symlink_to(tmp_path / "elsewhere" / target)
    (faces / "train" / "again").symlink_to(faces)
    args = arguments(tmp_path, train_data_dir=str(faces))
    assert read(load_images(args, "train")) == [(0, "cat"), (1, "dog")]
    assert read(load_validation_images(args)[0]) == [(1, "cat"), (2, "dog")]


def test_a_name_that_is_no_text_is_named(tmp_path):
    folder = write(tmp_path / "one", "a.png")
    (folder / "a.png").rename(os.fsdecode(bytes(folder / "b") + b"\xff.png"))
    with pytest.raises(InputError, match=r"the name of b\\xff.png in .* is not text"):
        load_images(arguments(tmp_path, train_data_dir=str(folder)), "train")


def test_links_to_files_and_hidden_files(tmp_path):
    folder = write(tmp_path / "one", ".hidden.png", "__MACOSX/b.png", ".cache/c.png", "d.png")
    (folder / "e.png").symlink_to(write(tmp_path / "elsewhere", "e.png") / "e.png")
    assert read(load_images(arguments(tmp_path, train_data_dir=str(folder)), "train")) == [(0, "one"), (3, "one")]


def test_a_folder_without_classes_is_one_class_in_every_split(tmp_path):
    args = arguments(
        tmp_path, train_data_dir=str(write(tmp_path / "faces", "train/a.png", "train/b.png", "test/c.png"))
    )
    assert read(load_images(args, "train")) == [(0, "faces"), (1, "faces")]
    assert read(load_validation_images(args)[0]) == [(2, "faces")]


@pytest.mark.parametrize("named", [{"train_data_dir": True}, {"dataset_name": True}])
def test_a_local_folder_is_the_same_by_either_name(named):
    with tempfile.TemporaryDirectory(prefix="test_") as name:  # no split
        folder = write(Path(name), "cat/a.png", "dog/b.png")
        (folder / "bird").symlink_to(write(Path(name) / ".elsewhere", "c.png"))
        args = arguments(folder / ".hidden", **dict.fromkeys(named, name))
        assert read(load_images(args, "train")) == [(0, "bird"), (0, "cat"), (1, "dog")]


def test_images_that_metadata_do_not_name_are_missed(tmp_path):
    folder = write(tmp_path / "faces", "a.png", "b.png", "c.png")
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,two\n")
    with pytest.raises(InputError, match=r"has 3 images, and metadata.csv name 2 of them"):
        load_images(arguments(tmp_path, train_data_dir=str(folder)), "train")
    (folder / "c.png").unlink()
    source = load_images(arguments(tmp_path, train_data_dir=str(folder)), "train")
    assert source.rows["text"][:] == ["one", "two"]


def test_classes_that_metadata_hide_are_missed(tmp_path):
    """An imagefolder takes no labels from folders where there are metadata."""
    folder = write(tmp_path / "pets", "cat/a.png", "dog/b.png")
    (folder / "metadata.csv").write_text("file_name,kind\ncat/a.png,1\ndog/b.png,0\n")
    args = arguments(tmp_path, train_data_dir=str(folder))
    with pytest.raises(InputError, match=r"has 2 images in 2 folders, which are no classes where metadata.csv .*none"):
        load_images(args, "train")
    assert load_images(arguments(tmp_path, train_data_dir=str(folder), label_column="none"), "train").labels is None
    assert load_images(arguments(tmp_path, train_data_dir=str(folder), label_column="kind"), "train").labels == [1, 0]


def test_a_streamed_folder_loses_nothing_either(tmp_path):
    folder = write(tmp_path / "pets", "cat/a.png", "dog/b.png")
    args = arguments(tmp_path, train_data_dir=str(folder), streaming=True)
    stream = load_images(args, "train").labelled_for(2)
    assert Counter(label for _, label, *_ in stream.rows(0, 0)) == {0: 1, 1: 1}
    write(folder, "test/c.png")
    with pytest.raises(
        InputError, match=r"has 3 images, and its splits .test. hold 1 of them, and not those in cat, dog"
    ):
        load_images(args, "train")


@pytest.mark.parametrize("out", ["", "cat", "output", "deep/er"])
def test_an_output_folder_among_the_training_images_is_refused(tmp_path, out):
    folder = write(tmp_path / "pets", "cat/a.png", "dog/b.png")
    link = tmp_path / "link"
    link.symlink_to(folder)
    args = arguments(tmp_path, train_data_dir=str(folder), output_dir=os.path.join(link, out))
    with pytest.raises(InputError, match="lies among the training images"):
        load_images(args, "train")


@pytest.mark.parametrize("out", ["../run", "../pets2", ".runs/1"])
def test_other_output_folders_are_not(tmp_path, out):
    folder = write(tmp_path / "pets", "cat/a.png", "dog/b.png")
    args = arguments(tmp_path, train_data_dir=str(folder), output_dir=str(folder / out))
    assert len(load_images(args, "train")) == 2


def test_the_held_out_images_of_a_folder_are_not_trained_on(tmp_path):
    """The test folder is a copy of a part of the train folder, but for one image."""
    folder = write(tmp_path / "faces", *(f"train/{i}.png" for i in range(5)))
    for i in (1, 3):
        target = folder / "test" / f"copy-{i}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((folder / "train" / f"{i}.png").read_bytes())
    args = arguments(tmp_path, train_data_dir=str(folder))
    source = load_images(args, "train")
    assert held_out_images(args, source, None, 10) == (None, "training images (split test is among them)")
    Image.new("L", (8, 8), 77).save(folder / "test" / "new.png")
    held_out, name = held_out_images(args, load_images(args, "train"), None, 10)
    assert (first_images(held_out, 10, Transform(8, 1)).images.unique().tolist(), name) == (
        [pytest.approx(77 / 127.5 - 1)],
        "held-out images",
    )


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"--train_data_dir .*empty has no images. It must be a folder of images"):
        load_images(arguments(tmp_path, train_data_dir=str(tmp_path / "empty")), "train")
    with pytest.raises(InputError, match="is not a folder"):
        load_images(arguments(tmp_path, train_data_dir=str(tmp_path / "nowhere")), "train")
