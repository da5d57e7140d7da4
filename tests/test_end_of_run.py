"""The last stretch of a run, from the last optimiser step to the last file. Truth: the run in which nothing fails."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import stranger
import torch
from test_train_consistency import assert_same_weights, log_of, script, small, weights_of  # noqa: F401

from diffusers_ext.training import TrainingLoop
from diffusers_ext.training.best import Best
from diffusers_ext.training.checkpoint import list_checkpoints
from diffusers_ext.training.log import RunLog
from diffusers_ext.training.outcome import Outcome

SCRIPT = Path(__file__).parents[1] / "training" / "train_consistency.py"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_fails_at_its_end_only_does_the_rest(script, small, tmp_path, monkeypatch, failure):  # noqa: F811
    """The number of steps, 4, is no multiple of the steps between two checkpoints."""
    argv = [*small, "--max_train_steps", 4, "--checkpointing_steps", 3]
    script.run(*argv, "--output_dir", tmp_path / "whole")

    def fail(*args):
        raise failure

    monkeypatch.setattr(Outcome, "_install", fail)
    with pytest.raises(SystemExit) as stopped:
        script.run(*argv, "--output_dir", tmp_path / "out")
    assert stopped.value.code not in (0, None)
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert list_checkpoints(tmp_path / "out")[-1].name == "checkpoint-00000004"
    monkeypatch.undo()
    script.run(*argv, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest")
    assert_same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "out"))
    assert [r["step"] for r in log_of(tmp_path / "out") if "start" in r][-1] == 4  # and no step twice


def test_the_message_of_a_full_disk_says_how_to_go_on(script, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Outcome, "_install", fail)
    with pytest.raises(SystemExit):
        script.run(*small, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr().err
    assert "No space left on device" in printed
    assert "--resume_from_checkpoint latest" in printed


def test_too_little_memory_for_a_validation_does_not_end_the_run(script, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    original, failed = Outcome.losses, []

    def losses(self, trained):
        if not failed:
            failed.append(self.run.step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, trained)

    monkeypatch.setattr(Outcome, "losses", losses)
    script.run(*small, "--validation_steps", 1, "--output_dir", tmp_path / "out")
    assert failed == [1]
    assert "CUDA out of memory" in capsys.readouterr().out
    assert (tmp_path / "out" / "model_index.json").exists()


def test_a_log_that_cannot_be_written_is_said_once_and_keeps_whole_lines(tmp_path):
    """A limit to the size of files cuts a line, as a full disk does."""
    log = RunLog.__new__(RunLog)
    log.accelerator, log.path, log._lost = SimpleNamespace(is_main_process=True), tmp_path / "log.jsonl", False
    warnings: list[str] = []
    log.warn = warnings.append
    log.write({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 5, hard))
    try:
        log.write({"step": 2, "more": "x" * 100})
        log.write({"step": 3, "more": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write({"step": 4})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 4]
    assert len(warnings) == 1


def test_overwriting_keeps_what_no_run_wrote(script, small, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    script.run(*small, "--output_dir", out)
    mine = [out / "logs" / "slurm.out", out / "samples" / "mine.png", out / "notes.txt", out / "best" / "thesis.txt"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    (out / "samples" / "step-00000099.png").write_text("of the old run")
    script.run(*small, "--output_dir", out, "--overwrite_output_dir")
    assert [file.read_text() for file in mine] == ["mine"] * 4
    assert not (out / "samples" / "step-00000099.png").exists()
    assert sum("start" in record for record in log_of(out)) == 1
    shutil.rmtree(out)


SIGNALLED_AT_THE_END = """
import os, runpy, signal, sys
from diffusers_ext.training.outcome import Outcome
number = getattr(signal, sys.argv[1])
def losses(self, trained):
    os.kill(os.getpid(), number)
    raise AssertionError("the signal was not received")
Outcome.losses = losses
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("SIGTERM", [], "To do only the rest, repeat the command with --resume_from_checkpoint latest"),
        (
            "SIGUSR1",
            ["--checkpointing_steps", 0],
            "There is no checkpoint (--checkpointing_steps 0); the pipeline is",
        ),
    ],
)
def test_a_signal_after_the_last_step_is_said(small, tmp_path, name, options, said):  # noqa: F811
    argv = [name, SCRIPT, *small, *options, "--output_dir", tmp_path / "out"]
    done = stranger.run(SIGNALLED_AT_THE_END, *map(str, argv))
    assert done.returncode == 128 + getattr(signal, name)
    assert f"stopped after the last step. {said}" in done.stderr
    assert (tmp_path / "out" / "model_index.json").exists()


def test_slurms_warning_stops_a_run_with_a_checkpoint(script, small, tmp_path, monkeypatch):  # noqa: F811
    update = TrainingLoop.update

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGUSR1)
        update(self, *args, **kwargs)

    monkeypatch.setattr(TrainingLoop, "update", signalled)
    with pytest.raises(SystemExit) as stopped:
        script.run(*small, "--output_dir", tmp_path / "out")
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert [f.name for f in list_checkpoints(tmp_path / "out")] == ["checkpoint-00000001"]


def test_a_run_goes_on_without_its_terminal(small, tmp_path):  # noqa: F811
    """Both streams are pipes that nobody reads any more, as after `| head -1` or a lost connection."""
    code = (
        "import os, runpy, sys\n"
        "for number in (1, 2):\n"
        "    read, write = os.pipe(); os.close(read); os.dup2(write, number)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [SCRIPT, *small, "--validation_steps", 1, "--output_dir", tmp_path / "out"]
    assert stranger.run(code, *map(str, argv)).returncode == 0
    assert (tmp_path / "out" / "model_index.json").exists()
    assert log_of(tmp_path / "out")[-1]["step"] == 3


def test_a_run_goes_on_without_files_that_have_vanished(load_script, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    observation = load_script("train_observation")
    offer = Best.offer

    def vanish(self, *args):
        metrics = offer(self, *args)
        for name in ("best", "logs", "samples"):
            shutil.rmtree(tmp_path / "out" / name)
        return metrics

    monkeypatch.setattr(Best, "offer", vanish)
    options = ["--frechet_samples", 8, "--frechet_steps", 2, "--discriminator_channels", "8,16"]
    observation.run(*small, *options, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert "best is not as it was written: the last pipeline is taken and not the best one" in said
    assert "log.jsonl cannot be written" in said
    assert (tmp_path / "out" / "model_index.json").exists()
