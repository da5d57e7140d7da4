"""The lock of an output folder. Truth: processes that run, were killed, or never were."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import stranger
from test_train_consistency import script, small  # noqa: F401

from diffusers_ext.errors import InputError
from diffusers_ext.training import lock
from diffusers_ext.training.lock import NAME, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from diffusers_ext.training.lock import RunLock
RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def foreign(folder, **changes):
    owner = {"host": "node7", "machine": "another", "pid": 4711, "started": 1.0} | changes
    (folder / NAME).write_text(json.dumps(owner))


def test_a_run_beside_another_is_refused_and_the_lock_of_a_killed_one_is_not_in_the_way(script, small, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    out.mkdir()
    other = holder(out)
    try:
        with pytest.raises(SystemExit, match=rf"another run writes into .*out: process {other.pid} on .*delete"):
            script.run(*small, "--output_dir", out)
        assert not (out / "logs").exists()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (out / NAME).exists()
    script.run(*small, "--output_dir", out)
    assert not list(out.glob(f"{NAME}*"))
    assert (out / "model_index.json").exists()


def test_only_one_of_many_gets_the_lock(tmp_path):
    """Eight processes at once, over a lock without an owner: whoever has it keeps it for a while."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from diffusers_ext.errors import InputError\n"
        "from diffusers_ext.training.lock import RunLock\n"
        "try:\n"
        "    lock = RunLock(Path(sys.argv[1]))\n"
        "except InputError:\n"
        "    print('refused')\n"
        "else:\n"
        "    print('held'); time.sleep(3); lock.release()\n"
    )
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    foreign(tmp_path, machine=lock._machine(), pid=int(gone.stdout), started=0.0)
    started = [stranger.start(code, str(tmp_path)) for _ in range(8)]
    said = [stranger.wait(one).stdout.strip() for one in started]
    assert sorted(said) == ["held"] + ["refused"] * 7
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_counts_as_long_as_it_is_touched(tmp_path):
    foreign(tmp_path)
    with pytest.raises(InputError, match="process 4711 on node7"):
        RunLock(tmp_path)
    os.utime(tmp_path / NAME, (time.time() - 400,) * 2)
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": "x"}'])
def test_what_is_no_lock_is_replaced(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    if content in ("{}", '{"pid": "x"}'):
        os.utime(tmp_path / NAME, (time.time() - 400,) * 2)  # of nobody known: by its time
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    foreign(tmp_path, machine=lock._machine(), pid=os.getppid(), started=1.0)
    RunLock(tmp_path).release()
    foreign(tmp_path, machine=lock._machine(), pid=os.getppid(), started=lock._started(os.getppid()))
    with pytest.raises(InputError, match=f"process {os.getppid()} on node7"):
        RunLock(tmp_path)


def test_the_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    with RunLock(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with RunLock(tmp_path):
        foreign_pid = json.loads((tmp_path / NAME).read_text())["pid"]
        assert foreign_pid == os.getpid()
    assert not list(tmp_path.iterdir())
