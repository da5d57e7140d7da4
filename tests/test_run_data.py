"""Runs whose data are not what one thinks: what they say, train on, measure on and refuse."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_consistency import log_of, script, small, tiny_unet  # noqa: F401

from diffusers_ext.training.checkpoint import load_checkpoint, save_checkpoint


def write(folder, *names, size=8):
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def on_folder(script, small, tmp_path, monkeypatch):  # noqa: F811
    """A function that trains for some steps on a folder of images."""
    at = small.index("--dataset_name")
    rest = small[:at] + small[at + 2 :]

    def run(folder, *options, out="out"):
        data = ["--train_data_dir", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / out]
        script.run(*rest, *data, *options)
        return tmp_path / out

    return run


def test_what_was_found_is_said_at_the_start(on_folder, tmp_path, capsys):
    folder = write(tmp_path / "faces", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in range(4)))
    on_folder(folder)
    said = capsys.readouterr().out
    assert "data: 8 images of faces, split train, the first is 8 x 8 L; taken as 8 x 8, grey; values from 0 (bl" in said
    assert "255 (white); no classes; measured on 8 held-out images" in said
    on_folder(folder, "--class_conditional", "--label_drop", 0.5, out="classes")
    assert "; 2 classes; measured on 8 held-out images" in capsys.readouterr().out
    assert json.loads((tmp_path / "classes" / "model_index.json").read_text())["null_class"] == 2


def test_images_that_are_trained_on_are_not_called_held_out(on_folder, tmp_path):
    folder = write(tmp_path / "faces", *(f"{s}/{i}.png" for s in ("train", "test") for i in range(8)))
    out = on_folder(folder, "--train_split", "train+test")
    assert log_of(out)[-1]["validation"]["measured_on"] == "training images (split test is among them)"


def test_float_images_are_not_black(on_folder, tmp_path, capsys):
    folder = tmp_path / "tiff"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.uniform(-1, 1, (8, 8)).astype(np.float32)).save(folder / f"{i}.tiff")
    on_folder(folder)
    out = capsys.readouterr().out
    assert "values from -1 (black) to 1 (white)" in out
    assert "unreadable" not in out


def test_a_run_goes_on_only_with_its_own_data(on_folder, tmp_path, capsys):
    folder = write(tmp_path / "faces", *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(4)))
    options = ["--checkpointing_steps", 1, "--max_train_steps", 1]
    resume = ["--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    out = on_folder(folder, *options)
    write(folder, "dog/9.png")
    with pytest.raises(
        SystemExit, match=r"other arguments or data: the images of the data was 8, is 9\. Continue with"
    ):
        on_folder(folder, *resume)
    (folder / "dog" / "9.png").unlink()
    (folder / "dog").rename(folder / "hound")
    with pytest.raises(SystemExit, match="the digest of the names and sizes of the images was"):
        on_folder(folder, *resume)
    (folder / "hound").rename(folder / "dog")
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    state = load_checkpoint(out / "checkpoint-00000001")
    assert state.pop("data")["images"] == 8
    capsys.readouterr()
    on_folder(folder, *resume)
    assert "does not say on which images" not in capsys.readouterr().out
    save_checkpoint(tmp_path / "old", 1, state)
    on_folder(folder, "--resume_from_checkpoint", tmp_path / "old" / "checkpoint-00000001", out="from-old")
    assert "checkpoint-00000001 does not say on which images it was trained" in capsys.readouterr().out


def test_an_output_folder_among_the_images_is_refused_before_the_work(on_folder, tmp_path):
    folder = write(tmp_path / "faces", "1.png", "2.png")
    with pytest.raises(SystemExit, match="lies among the training images"):
        on_folder(folder, out="faces/run")
    assert list((folder / "run").iterdir()) == []


def test_a_name_that_the_terminal_cannot_show_ends_no_run(on_folder, tmp_path, monkeypatch):
    folder = write(tmp_path / "faces", *(f"{i}.png" for i in range(7)))
    (folder / "hübsch 猫.png").write_bytes(b"no image")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    on_folder(folder)
    said = terminal.buffer.getvalue().decode()
    assert "unreadable image skipped (1 so far)" in said
    assert r"h\xfcbsch \u732b.png" in said


def test_evaluating_on_training_images_is_refused(load_script, tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler

    torch.manual_seed(0)
    DDIMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    options = ["--pretrained_model_name_or_path", tmp_path / "model", "--dataset_name", "digits", "--num_samples", 20]
    options += ["--nfe", 2, "--output_dir", tmp_path / "out", "--extractor", "pixels", "--train_split", "test"]
    with pytest.raises(SystemExit, match="all 500 held-out images are training images: --train_split names what"):
        load_script("evaluate").run(*options)
