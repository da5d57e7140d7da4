"""Labels and held-out images of data sets. Truth: the rows that the tests write."""

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_ext.data.contents import changes, mark_of, same_images
from diffusers_ext.data.held_out import held_out_images
from diffusers_ext.data.labelling import with_labels
from diffusers_ext.data.sources import Digits, load_images
from diffusers_ext.errors import InputError
from diffusers_ext.training import TrainingArguments


def png(value):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def data_of():
    """A function that writes splits of (grey values, labels) as parquet files, and returns the arguments of a run."""
    with tempfile.TemporaryDirectory() as name:

        def data_of(feature, splits, **kwargs):
            features = Features({"image": ImageFeature(), "label": feature})
            for split, (greys, labels) in splits.items():
                rows = {"image": [png(value) for value in greys], "label": labels}
                Dataset.from_dict(rows, features=features).to_parquet(Path(name) / f"{split}.parquet")
            return TrainingArguments(dataset_name=name, cache_dir=f"{name}/.cache", **kwargs)

        yield data_of


def one_split(data_of, feature, labels, **kwargs):
    return load_images(data_of(feature, {"train": (range(len(labels)), labels)}, **kwargs), "train")


# --- columns of labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feature", "labels", "numbers", "names"),
    [
        (Value("string"), ["dog", "cat", "dog", None], [1, 0, 1, -1], ["cat", "dog"]),
        (Value("large_string"), ["b", "a"], [1, 0], ["a", "b"]),
        (Value("int32"), [2, 0, None], [2, 0, -1], ["0", "1", "2"]),
        (Value("uint8"), [1, 0], [1, 0], ["0", "1"]),
        (Value("bool"), [True, False], [1, 0], ["0", "1"]),
        (ClassLabel(names=["cat", "dog"]), [1, -1, None], [1, -1, -1], ["cat", "dog"]),
    ],
)
def test_labels_are_read(data_of, feature, labels, numbers, names):
    source = one_split(data_of, feature, labels)
    assert (source.labels, source.class_names) == (numbers, names)


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (Value("float32"), [0.0, 1.5], "must be integers or texts, they are float"),
        (Value("int64"), [0, 10**9], "go from 0 to 1000000000, and classes are 0 to 99999"),
        (Value("int64"), [-2, 0], "go from -2 to 0"),
        (Value("int64"), [2**62, 0], "classes are 0 to 99999"),
        (Value("timestamp[s]"), [0, 1], "must be integers or texts"),
    ],
)
def test_other_columns_are_no_labels_and_stop_no_run_without(data_of, feature, labels, message):
    source = one_split(data_of, feature, labels)
    assert with_labels(source, None, "split train").labels is None
    with pytest.raises(InputError, match=rf"column 'label'.*{message}.*--label_column none"):
        source.labels  # noqa: B018


def test_labels_can_be_switched_off(data_of):
    source = one_split(data_of, ClassLabel(names=["a", "b"]), [0, 1], label_column="none")
    assert (source.labels, source.class_names) == (None, None)


def test_a_part_of_a_split_has_its_own_labels(data_of):
    args = data_of(Value("int64"), {"train": (range(6), [0, 1, 2, 3, 4, 5])})
    assert load_images(args, "train[2:4]").labels == [2, 3]


# --- labels of a network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1], r"1 of 3 images have no label of the model's 3 classes; the first is train\[2\] with none"),
        ([0, None, None], r"2 of 3 images have no label .* the first is train\[1\] with none"),
        ([0, 3, 1], "labels of 3 classes, the data have 4 classes"),
    ],
)
def test_labels_that_a_network_does_not_know_are_refused(data_of, labels, message):
    with pytest.raises(InputError, match=message):
        with_labels(one_split(data_of, Value("int64"), labels), 3, "split train")


def test_a_network_with_labels_needs_some(data_of):
    source = one_split(data_of, Value("int64"), [0, 1], label_column="none")
    with pytest.raises(InputError, match="labels of 3 classes, the data have no labels"):
        with_labels(source, 3, "split train")


def test_labels_of_a_stream_are_checked_as_they_come(data_of):
    args = data_of(ClassLabel(names=["a", "b"]), {"train": (range(3), [1, 0, -1])}, streaming=True, max_train_steps=1)
    stream = with_labels(load_images(args, "train"), 2, "split train")
    rows = stream.rows(0, 0)
    assert [next(rows)[1] for _ in range(2)] == [1, 0]
    with pytest.raises(InputError, match=r"the label of train\[2\] is -1, and classes are 0 to 1"):
        next(rows)
    assert [label for _, label, *_ in with_labels(stream, None, "split train").rows(0, 0)] == [-1] * 3


# --- held-out images --------------------------------------------------------------------------------------------------


def test_classes_of_the_held_out_split_are_those_of_the_training(data_of):
    """In the test split alone, `dog` would be class 0."""
    splits = {"train": ([1, 2, 3], ["bird", "cat", "dog"]), "test": ([4, 5], ["dog", "cat"])}
    args = data_of(Value("string"), splits)
    held_out, name = held_out_images(args, load_images(args, "train"), 3, 10)
    assert (held_out.labels, name) == ([2, 1], "held-out images")


@pytest.mark.parametrize(
    ("feature", "train", "test", "message"),
    [
        (Value("string"), ["cat", "dog"], ["dog", "bird"], "1 images of classes that are not trained on: bird"),
        (Value("int64"), [0, 1], [1, 2], "1 images of classes that are not trained on: 2"),
        (ClassLabel(names=["a", "b"]), [0, 1], [-1, -1], "2 of 2 images have no label"),
    ],
)
def test_a_held_out_split_with_other_labels_is_not_used(data_of, capsys, feature, train, test, message):
    args = data_of(feature, {"train": ([1, 2], train), "test": ([3, 4], test)})
    source = load_images(args, "train")
    assert held_out_images(args, source, 2, 10) == (None, "training images (the labels of split test cannot be used)")
    assert message in capsys.readouterr().out
    args.validation_split = "test"
    with pytest.raises(InputError, match=message):
        held_out_images(args, source, 2, 10)
    assert held_out_images(args, source, None, 10)[1] == "held-out images"
    args.validation_split = "none"
    assert held_out_images(args, source, 2, 10)[0] is None


@pytest.mark.parametrize("train_split", ["test", "train+test", "all", "train[:1]+test"])
def test_what_is_trained_on_is_not_held_out(data_of, train_split):
    args = data_of(Value("int64"), {"train": ([1, 2], [0, 1]), "test": ([3, 4], [0, 1])}, train_split=train_split)
    found = held_out_images(args, load_images(args, train_split), None, 10)
    assert found == (None, "training images (split test is among them)")


def test_a_part_that_is_trained_on_is_left_out(data_of, capsys):
    splits = {"train": ([1, 2, 1], [0, 1, 0]), "test": ([2, 3, 1, 4], [1, 0, 0, 1])}
    args = data_of(Value("int64"), splits, max_train_samples=2)
    held_out, name = held_out_images(args, load_images(args, "train"), 2, 10)
    assert [np.asarray(held_out.open(i)).mean() for i in range(len(held_out))] == [3, 4]
    assert (held_out.labels, name) == ([0, 1], "held-out images")
    assert "2 of the first 4 images of split test are training images and are left out" in capsys.readouterr().out
    args.max_train_samples = 1
    assert len(held_out_images(args, load_images(args, "train"), 2, 10)[0]) == 3


def test_a_stream_of_one_split_is_not_held_out_from_itself(data_of):
    splits = {"train": ([1, 2], [0, 1]), "test": ([3, 4], [0, 1])}
    args = data_of(Value("int64"), splits, streaming=True, max_train_steps=1, train_split="test")
    found = held_out_images(args, load_images(args, "test"), None, 10)
    assert found == (None, "training images (split test is trained on)")


def test_the_digits_share_nothing():
    assert same_images(Digits("test"), 500, Digits("train")) == set()
    assert same_images(Digits("test"), 500, Digits("test"), 100) == set(range(100))


# --- the mark ---------------------------------------------------------------------------------------------------------


def folder_of(root, names):
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), value).save(path)
    args = TrainingArguments(train_data_dir=str(root), cache_dir=str(root / ".cache"))
    source = load_images(args, "train")
    return mark_of(source, source.class_names)


def test_a_folder_has_one_mark_wherever_it_lies_and_another_when_it_has_changed(tmp_path):
    first = folder_of(tmp_path / "a", ["cat/1.png", "dog/2.png"])
    assert changes(first, folder_of(tmp_path / "b", ["cat/1.png", "dog/2.png"])) == {}
    grown = folder_of(tmp_path / "c", ["cat/1.png", "dog/2.png", "dog/3.png"])
    assert changes(first, grown) == {"the images of the data": (2, 3)}
    renamed = folder_of(tmp_path / "d", ["cat/1.png", "hound/2.png"])
    assert changes(first, renamed) == {"the classes of the data": (["cat", "dog"], ["cat", "hound"])}
    other = folder_of(tmp_path / "e", ["cat/1.png", "dog/3.png"])
    assert set(changes(first, other)) == {"the digest of the names and sizes of the images"}


def test_the_mark_does_not_depend_on_how_rows_lie_in_memory():
    features = Features({"image": ImageFeature()})
    rows = [{"bytes": bytes(10 + i), "path": f"{i}.png"} for i in range(7)]
    from diffusers_ext.data.columns import Columns
    from diffusers_ext.data.sources import HubImages

    def mark(data):
        return mark_of(HubImages(data, "train", Columns("image", None), ["/nowhere"]), None)

    whole = Dataset.from_dict({"image": rows}, features=features)
    from datasets import concatenate_datasets

    halves = concatenate_datasets([whole.select(range(3)), whole.select(range(3, 7))])
    assert mark(whole) == mark(halves) != mark(whole.select(range(6, -1, -1)))
