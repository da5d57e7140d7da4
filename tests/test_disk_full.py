"""A full disk at every write of every script. Truth: the run in which nothing fails.

The n-th file that is opened for writing in the output folder cannot be opened, n = 1, 2, 3, ...; weights, which
safetensors writes by itself, fail with its own error. The script must end with a message and no traceback, or go on
without the file; the same command, without the fault, then gives what an undisturbed run gives.
"""

import os
import shutil
import sys

import pytest
import safetensors.torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_models import tiny_unet

_FAULT = {"folder": None, "left": 0, "said": []}


def _on_open(event, args):
    if event == "open" and _FAULT["folder"] and isinstance(args[0], str):
        path, mode, flags = args
        writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
        if writes and os.path.abspath(path).startswith(_FAULT["folder"]) and _is_due(path):
            raise OSError(28, "No space left on device", path)


def _is_due(path):
    _FAULT["left"] -= 1
    if _FAULT["left"] != 0:
        return False
    _FAULT["said"].append(os.path.relpath(path, _FAULT["folder"]))
    return True


sys.addaudithook(_on_open)


class fault:
    """A context in which the n-th write below a folder fails; `hit` is the file, or `None`."""

    def __init__(self, monkeypatch, folder, n):
        self.monkeypatch, self.folder, self.n = monkeypatch, str(folder), n

    def __enter__(self):
        write = safetensors.torch.serialize_file

        def serialize_file(tensors, filename, *args, **kwargs):
            if _FAULT["folder"] and str(filename).startswith(_FAULT["folder"]) and _is_due(filename):
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            return write(tensors, filename, *args, **kwargs)

        self.context = self.monkeypatch.context()
        self.context.__enter__().setattr(safetensors.torch, "serialize_file", serialize_file)
        _FAULT.update(folder=self.folder, left=self.n, said=[])
        return self

    def __exit__(self, *error):
        self.hit = (_FAULT["said"] or [None])[0]
        _FAULT.update(folder=None)
        self.context.__exit__(None, None, None)


TRAINING = "--model_config_name_or_path {place}/config --dataset_name digits --resolution 8 --train_batch_size 4 "
TRAINING += "--max_train_steps 2 --checkpointing_steps 1 --max_validation_samples 8 --report_to none --logging_steps 1 "
TRAINING += "--num_validation_images 2 --num_inference_steps 2 --validation_steps 1 --resume_from_checkpoint latest"
MODEL = "--pretrained_model_name_or_path {place}/model --dataset_name digits "
SCRIPTS = {
    "train_consistency": TRAINING,
    "train_observation": f"{TRAINING} --discriminator_channels 8 --frechet_samples 8 --frechet_steps 2",
    "train_reflected": TRAINING,
    "train_short_time": f"{TRAINING} --bridge_rank 2 --max_bridge_samples 40 --max_diffusion_time 0.5",
    "fit_bridge": f"{MODEL} --bridge_rank 2 --max_bridge_samples 128 --num_validation_images 2 --num_inference_steps 2",
    "calibrate": f"{MODEL} --num_levels 2 --max_train_samples 64 --train_batch_size 16 --save_pipeline",
    "evaluate": f"{MODEL} --nfe 2 --num_samples 20 --likelihood_images 4 --likelihood_evaluations 2 --extractor pixels "
    "--max_train_samples 40",
}


@pytest.fixture
def place(tmp_path):
    tiny_unet().save_config(tmp_path / "config")
    DDIMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path


def weights_in(folder):
    files = (f for f in folder.rglob("*.safetensors") if "state" not in f.parts and f.name != "state.safetensors")
    return {f.relative_to(folder).as_posix(): load_file(f) for f in files}


def same(a, b):
    """Whether two folders hold the same tensors in the same files, bit for bit."""
    return a.keys() == b.keys() and all(
        tensors.keys() == b[file].keys() and all(value.equal(b[file][name]) for name, value in tensors.items())
        for file, tensors in a.items()
    )


def failures(load_script, place, monkeypatch, capsys, name, numbers):
    """What a full disk does at each of these writes, where it is not what it should do."""
    script, options = load_script(name), SCRIPTS[name].format(place=place).split()
    script.run(*options, "--output_dir", place / "whole")
    truth, wrong = weights_in(place / "whole"), []
    for n in numbers:
        out = place / "out"
        shutil.rmtree(out, ignore_errors=True)
        ended = "went on"
        with fault(monkeypatch, out, n) as disk:
            try:
                script.run(*options, "--output_dir", out)
            except SystemExit as error:
                ended = f"ended: {error.code}"
            except BaseException as error:
                wrong.append(f"{name}, write {n}: {type(error).__name__}: {error}")
        if disk.hit is None:
            break
        said = capsys.readouterr()
        if "No space left" not in said.out + said.err + ended:
            wrong.append(f"{name}, write {n}, {disk.hit}: it says nothing, {ended}")
        try:
            script.run(*options, "--output_dir", out)
        except BaseException as error:
            wrong.append(f"{name}, write {n}, {disk.hit}, {ended}: then {type(error).__name__}: {error}")
            continue
        if not same(weights_in(out), truth):
            wrong.append(
                f"{name}, write {n}, {disk.hit}: other weights than {sorted(truth)}: {sorted(weights_in(out))}"
            )
    return wrong


@pytest.mark.parametrize(
    ("name", "numbers"), [("train_consistency", [3, 5]), ("fit_bridge", [3, 9]), ("calibrate", [7, 15])]
)
def test_a_full_disk_loses_nothing(load_script, place, monkeypatch, capsys, name, numbers):
    assert failures(load_script, place, monkeypatch, capsys, name, numbers) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_at_every_write_loses_nothing(load_script, place, monkeypatch, capsys, name):
    assert failures(load_script, place, monkeypatch, capsys, name, range(1, 200)) == []
