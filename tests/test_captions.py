"""Captions and places of images on their way through the data. Truth: images that show their own number, and gradients
that show where they were cut from."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_pipelines import tiny

from diffusers_ext.data.batches import Position, first_images, micro_batches
from diffusers_ext.data.images import Transform
from diffusers_ext.data.labelling import with_labels
from diffusers_ext.data.prepared import describe
from diffusers_ext.data.prompts import read_prompts
from diffusers_ext.data.sources import DataArguments, View, load_images
from diffusers_ext.errors import InputError
from diffusers_ext.evaluation.measures import loss_by_sigma
from diffusers_ext.randomness import Seeds
from diffusers_ext.subjects import subject_of

N = 12


def grey(i: int) -> np.ndarray:
    return np.full((4, 4, 3), i * 10, dtype=np.uint8)


def saved(folder, captions, feature=None):
    features = Features({"image": ImageFeature(), "text": feature or Value("string")})
    rows = {"image": [grey(i) for i in range(len(captions))], "text": captions}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def arguments(path, **options) -> DataArguments:
    return DataArguments(dataset_name=str(path), caption_column="text", train_batch_size=4, **options)


def numbers_of(images) -> list[str]:
    """The number that each image shows, as its caption says it."""
    return [f"number {round((image.mean().item() + 1) * 127.5 / 10)}" for image in images]


def read(args, source=None, count=6):
    source = source or load_images(args, "train")
    return list(micro_batches(args, source, Transform(4, 3), 0, 1, count, position=Position(0, 0)))


@pytest.mark.parametrize("streaming", [False, True])
def test_every_image_keeps_its_caption_in_the_shuffle(streaming, tmp_path) -> None:
    args = arguments(saved(tmp_path, [f"number {i}" for i in range(N)]), streaming=streaming, shuffle_buffer=5)
    batches = read(args)
    for batch in batches:
        assert batch.captions == numbers_of(batch.images)
    assert {caption for batch in batches for caption in batch.captions} == {f"number {i}" for i in range(N)}
    held_out = first_images(load_images(args, "train"), 5, Transform(4, 3))
    assert sorted(held_out.captions) == sorted(numbers_of(held_out.images))


def test_a_choice_of_the_images_has_their_captions(tmp_path) -> None:
    source = load_images(arguments(saved(tmp_path, [f"number {i}" for i in range(N)])), "train")
    view = View(with_labels(source, None, "all"), None, order=[7, 3, 9])
    assert view.captions == ["number 7", "number 3", "number 9"]


def test_an_image_in_the_stead_of_an_unreadable_one_brings_its_own_caption(tmp_path) -> None:
    args = arguments(saved(tmp_path, [f"number {i}" for i in range(N)]))
    source = load_images(args, "train")

    def broken(index):
        if index in (2, 3):
            raise OSError("truncated")
        return type(source).open(source, index)

    source.open = broken
    batches = read(args, source)
    assert sum(len(batch.unreadable) for batch in batches) > 0
    for batch in batches:
        assert batch.captions == numbers_of(batch.images)


def test_a_folder_of_images_with_metadata_has_captions(tmp_path) -> None:
    (folder := tmp_path / "photos" / "train").mkdir(parents=True)
    lines = []
    for i in range(N):
        Image.fromarray(grey(i)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    args = DataArguments(train_data_dir=str(tmp_path / "photos"), caption_column="text", train_batch_size=4)
    for batch in read(args):
        assert batch.captions == numbers_of(batch.images)


def test_missing_captions_are_empty_and_counted(tmp_path) -> None:
    args = arguments(saved(tmp_path, ["a", None, "", "d"]))
    source = load_images(args, "train")
    assert source.captions == ["a", "", "", "d"]
    assert describe(args, source, Transform(4, 3)).endswith("; captions in column text, 2 of them empty")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_text_is_refused(streaming, tmp_path) -> None:
    args = arguments(saved(tmp_path, [["a", "b"]] * 4, Sequence(Value("string"))), streaming=streaming)
    with pytest.raises(InputError, match=r"--caption_column must hold one text for each image, .* \['a', 'b'\]"):
        read(args)
    none = DataArguments(dataset_name=args.dataset_name, caption_column="words", streaming=streaming)
    with pytest.raises(InputError, match="the data have no column 'words': image, text"):
        load_images(none, "train")


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (24, 10), (5, 4)], ids=str)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_the_place_says_what_was_cut_out(size, flip, centre) -> None:
    """The first row and column of the crop are found by value in a gradient of the resized image, mirrored or not."""
    width, height = size
    gradient = Image.fromarray(np.mgrid[0:height, 0:width].sum(0).astype(np.uint8) * 5)
    transform = Transform(4, 1, center_crop=centre, random_flip=flip)
    shorter = min(size)
    resized = gradient.resize(tuple(max(4, round(side * 4 / shorter)) for side in size), Image.Resampling.LANCZOS)
    seen = set()
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        tensor, (own_height, own_width, top, left) = transform.placed(gradient, generator)
        assert (own_height, own_width) == (height, width)
        found = []
        for mirrored in (False, True)[: 1 + flip]:
            whole = np.asarray(resized)[:, ::-1] if mirrored else np.asarray(resized)
            part = torch.from_numpy(whole[top : top + 4, left : left + 4].copy()).float() / 127.5 - 1
            found.append(part.shape == (4, 4) and (part - tensor[0]).abs().max() < 0.1)
        assert any(found)
        seen.add((top, left))
    assert len(seen) > 1 or centre or size == (5, 4)


# --- prompts in a file ------------------------------------------------------------------------------------------------


def test_prompts_are_the_lines_of_a_file(tmp_path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red bicycle\r\n\r\n  ein grünes Fahrrad \r\n".encode())
    assert read_prompts(str(tmp_path / "prompts.txt"), "prompt_file") == ["a red bicycle", "ein grünes Fahrrad"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--prompt_file .*cannot be read as text in UTF-8"),
        (b"gr\xfcn", "--prompt_file .*cannot be read as text in UTF-8"),
        (b"\n \n", "--prompt_file .*holds no prompt"),
    ],
)
def test_a_file_without_prompts_is_refused(content, message, tmp_path) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(str(tmp_path / "prompts.txt"), "prompt_file")


# --- measured with their captions -------------------------------------------------------------------------------------


def test_the_held_out_loss_is_that_of_the_captions(tmp_path, monkeypatch) -> None:
    """The rows of a batch have all that its images have: without the captions the model would be told nothing."""
    source = load_images(arguments(saved(tmp_path, [f"number {i}" for i in range(N)])), "train")
    held_out = first_images(source, 5, Transform(32, 3))
    subject = subject_of(tiny("sd"))
    told = []
    plain = subject.conditions

    def spy(rows):
        assert list(rows.captions) == numbers_of(rows.images)
        told.extend(rows.captions)
        return plain(rows)

    monkeypatch.setattr(subject, "conditions", spy)
    loss_by_sigma(subject, held_out, (0.1, 1.0), seeds=Seeds(0), batch_size=2)
    assert told == list(held_out.captions)
