"""What replaces files: complete, or as before, whatever fails and wherever a process is killed."""

import json
import os
from contextlib import suppress

import pytest
from safetensors import SafetensorError

from diffusers_ext.files import WRITTEN, remove_partial, remove_written, replacing, replacing_files, replacing_folder


@pytest.mark.parametrize("context", [replacing, replacing_folder, replacing_files])
def test_a_full_disk_is_an_os_error_and_changes_nothing(tmp_path, context):
    """safetensors has an error of its own for a write that fails."""
    target = tmp_path / "pipeline"
    if context is replacing:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "weights").write_text("old")
    with pytest.raises(OSError, match="No space left on device"), context(target):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert (target if context is replacing else target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


OLD = {"model/config.json": "old", "model/a.safetensors": "old", "model/b.safetensors": "old", "vae/a.bin": "old"}
NEW = {"model/config.json": "new", "model/a.safetensors": "new", "model_index.json": "new"}
MINE = {"model/notes.txt": "mine", "thesis.txt": "mine"}


def test_a_save_replaces_what_the_last_one_wrote_and_nothing_else(tmp_path):
    with replacing_files(tmp_path) as aside:
        write(aside, OLD)
    write(tmp_path, MINE)
    with replacing_files(tmp_path) as aside:
        write(aside, NEW)
    assert contents(tmp_path) == NEW | MINE
    assert not (tmp_path / "vae").exists()
    remove_written(tmp_path)
    assert contents(tmp_path) == MINE
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_weights_that_a_save_without_a_list_has_left_are_replaced(tmp_path):
    """diffusers would open the parts of the old weights, of which there is an index."""
    write(tmp_path, OLD | MINE | {"model/a.safetensors.index.json": "old"})
    with replacing_files(tmp_path) as aside:
        write(aside, NEW)
    assert contents(tmp_path) == NEW | MINE | {"vae/a.bin": "old"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moves", range(5))
def test_a_kill_at_any_move_leaves_whole_files_and_is_finished_at_the_next_start(tmp_path, monkeypatch, moves):
    with replacing_files(tmp_path) as aside:
        write(aside, OLD)
    write(tmp_path, MINE)
    replace, left = os.replace, [moves]

    def killed(source, target):
        if str(source).rpartition("/")[2].startswith(".partial-"):  # it is still being written
            return replace(source, target)
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with suppress(Killed), replacing_files(tmp_path) as aside:
        write(aside, NEW)
    monkeypatch.undo()
    seen = contents(tmp_path)
    assert all(seen[name] in ("old", "new") for name in ("model/config.json", "model/a.safetensors"))
    assert ("model_index.json" in seen) == (moves > 2)
    remove_partial(tmp_path)
    assert contents(tmp_path) == NEW | MINE
    assert [path.name for path in tmp_path.rglob(".*")] == [WRITTEN]


def test_a_save_that_was_killed_before_it_was_complete_is_taken_back(tmp_path):
    write(tmp_path, MINE)
    write(tmp_path / ".saving-1a2b", NEW)
    remove_partial(tmp_path)
    assert contents(tmp_path) == MINE


def test_a_folder_that_was_moved_aside_returns(tmp_path):
    """Killed between the two renames of `replacing_folder`."""
    write(tmp_path / ".partial-old-checkpoint-1", {"state": "old"})
    write(tmp_path / ".partial-checkpoint-1", {"state": "half"})
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "state").read_text() == "old"


def test_a_list_of_somebody_else_deletes_nothing_outside(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("mine")
    (folder / WRITTEN).write_text(json.dumps(["../secret", str(secret), "a/../../secret", 7]))
    remove_written(folder)
    assert secret.read_text() == "mine"
