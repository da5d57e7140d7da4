"""`diffusers-ext`: the commands, from a wheel in an empty folder. Truth: accelerate's own parser, and a run."""

import importlib
import logging
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from test_models import tiny_unet
from test_wrong_input import KINDS

from diffusers_ext.commands import launch
from diffusers_ext.progress import WIDTH
from diffusers_ext.reports.card import command_line

ROOT = Path(__file__).resolve().parents[1]


def test_options_that_both_have_are_the_commands_own():
    flags = {f.lstrip("-").replace("-", "_") for a in launch_command_parser()._actions for f in a.option_strings}
    assert set(KINDS) == set(launch.COMMANDS)
    assert {f.name for kind in KINDS.values() for f in fields(kind)} & flags == set(launch.OURS)


def test_a_command_line_is_split_between_the_launcher_and_the_command():
    words = "--preset digits --num_processes 2 --multi_gpu --mixed_precision=bf16 --num-machines=1 --no_use_ema"
    several = ["--validation_prompt", "a b", "c"]
    of_launcher, of_command = launch.split([*words.split(" "), *several], launch_command_parser())
    assert of_launcher == ["--num_processes", "2", "--multi_gpu", "--num-machines=1"]
    assert of_command == ["--preset", "digits", "--mixed_precision=bf16", "--no_use_ema", *several]


@pytest.mark.parametrize("name", launch.COMMANDS)
def test_the_files_of_training_are_the_commands(name, monkeypatch, capsys):
    text = (ROOT / "training" / f"{name}.py").read_text()
    assert f"from diffusers_ext.commands.{name} import main" in text
    assert len(text.splitlines()) < 15
    monkeypatch.setattr(sys, "argv", ["diffusers-ext", name.replace("_", "-"), "--help"])
    with pytest.raises(SystemExit):
        launch.main()
    assert "--output_dir" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusers-ext", "train-consistancy"])
    with pytest.raises(SystemExit, match="did you mean train-consistency"):
        launch.main()
    monkeypatch.setattr(sys, "argv", ["diffusers-ext"])
    launch.main()
    shown = capsys.readouterr().out
    assert all(name.replace("_", "-") in shown for name in launch.COMMANDS)


def test_a_card_shows_the_command_that_ran(monkeypatch):
    module = importlib.import_module("diffusers_ext.commands.evaluate")
    monkeypatch.setattr(sys, "argv", [module.__file__, "--names", "a b"])
    assert command_line() == "diffusers-ext evaluate --names 'a b'"
    monkeypatch.setattr(sys, "argv", ["training/evaluate.py", "--nfe", "5"])
    assert command_line() == "accelerate launch training/evaluate.py --nfe 5"


def test_an_installed_wheel_trains_in_an_empty_folder(tmp_path):
    """No checkout is on the path: the wheel alone, with the dependencies of this environment."""
    build = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PIP_CONFIG_FILE": os.devnull}
    source = tmp_path / "source"  # a build leaves files beside the sources
    source.mkdir()
    for part in ("diffusers_ext", "pyproject.toml", "README.md", "LICENSE"):
        (source / part).symlink_to(ROOT / part)
    done = subprocess.run([*build, "--target", tmp_path / "site", source], env=environment, capture_output=True)
    if done.returncode and b"setuptools" in done.stderr:
        pytest.skip("no setuptools to build a wheel with")
    assert done.returncode == 0, done.stderr.decode()
    tiny_unet().save_config(tmp_path / "config")
    empty = tmp_path / "empty"
    empty.mkdir()
    run = "import sys; from diffusers_ext.commands.launch import main; import diffusers_ext; "
    run += "assert 'site' in diffusers_ext.__file__; main()"
    argv = ["train-consistency", "--num_processes", "1", "--cpu", "--model_config_name_or_path", tmp_path / "config"]
    argv += ["--dataset_name", "digits", "--resolution", "8", "--train_batch_size", "4", "--max_train_steps", "2"]
    argv += ["--num_validation_images", "2", "--num_inference_steps", "2", "--max_validation_samples", "4"]
    argv += ["--report_to", "none", "--output_dir", "out"]
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", run, *map(str, argv)], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (empty / "out" / "unet").is_dir()
    again = [sys.executable, "-c", run, *map(str, argv)]
    done = subprocess.run(again, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 1  # the command's own status, and its message alone
    assert "--overwrite_output_dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_list_of_commands_fits_and_the_launcher_does_not_list_its_defaults(monkeypatch):
    """accelerate warns of everything that `accelerate config` would have asked for; the run says what it uses."""
    assert max(map(len, launch.usage().splitlines())) <= WIDTH
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: seen.append(args.training_script))
    monkeypatch.setattr(sys, "argv", ["diffusers-ext", "evaluate", "--nfe", "5"])
    launch.main()
    assert seen == ["diffusers_ext.commands.evaluate"]
    assert not logging.getLogger("accelerate.commands.launch").isEnabledFor(logging.WARNING)
