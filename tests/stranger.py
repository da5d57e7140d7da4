"""Processes of their own, without the time that importing torch and diffusers takes: `run`, `start` and `ranks`.

A server that has imported them, and not this package, forks for each piece of code. A child is what a new interpreter
with this code, environment, folder and arguments would be, but for two things: PYTHONHASHSEED is 1, whatever the
environment says, and MKL is reproducible (see `precision.py`). The Hub's address is read again from the environment.
There is one server for each process of pytest, started when it is first needed. Where processes cannot be forked
safely, outside Linux, each child is a new interpreter.
"""

import atexit
import gc
import importlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

FIXED = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
_SERVER = []


def run(code, *argv, env=None, cwd=None) -> subprocess.CompletedProcess:
    """Run `code`, or the script that a `Path` names, and wait for it; texts of stdout and stderr are in the result."""
    return wait(start(code, *argv, env=env, cwd=cwd))


def ranks(number, script, *argv, env=None, cwd=None) -> subprocess.CompletedProcess:
    """Run a script as so many processes of one group on the CPU, as torchrun would; their outputs are joined."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = dict(os.environ if env is None else env) | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    env |= {name: str(value) for name, value in world.items()}
    started = [
        start(Path(script), *argv, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=cwd)
        for rank in range(number)
    ]
    done = [wait(one) for one in started]
    code = next((one.returncode for one in done if one.returncode), 0)
    return subprocess.CompletedProcess(
        argv, code, "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    )


def stop() -> None:
    """End the server; called at the end of the tests."""
    if _SERVER:
        connection, server = _SERVER
        connection.close()
        server.wait()


def start(code, *argv, env=None, cwd=None):
    """Begin what `run` does; `wait` gives its result."""
    env = dict(os.environ if env is None else env) | FIXED
    argv = list(map(str, argv))
    if sys.platform != "linux":
        command = [sys.executable, str(code)] if isinstance(code, Path) else [sys.executable, "-c", code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, *argv], env=env, cwd=cwd, text=True, **pipes)
    if not _SERVER:
        ours, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        server = subprocess.Popen(command, env=os.environ | FIXED, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        _SERVER[:] = ours, server
    request, out, error = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(3))  # noqa: SIM115
    request.write(repr((isinstance(code, Path), str(code), argv, env, str(cwd or Path.cwd()))))
    request.flush()
    receive, send = os.pipe()
    socket.send_fds(_SERVER[0], [b"x"], [request.fileno(), out.fileno(), error.fileno(), send])
    os.close(send)
    request.close()
    return receive, out, error, argv


def wait(started):
    if isinstance(started, subprocess.Popen):
        out, error = started.communicate()
        return subprocess.CompletedProcess(started.args, started.returncode, out, error)
    receive, out, error, argv = started
    with os.fdopen(receive) as pipe:
        code = pipe.read()
    texts = []
    for file in (out, error):
        file.seek(0)
        texts.append(file.read())
        file.close()
    if not code:
        raise RuntimeError(f"the server of strangers has ended: {texts[1]}")
    return subprocess.CompletedProcess(argv, int(code), *texts)


# --- the server -------------------------------------------------------------------------------------------------------


def _serve(connection):
    """Fork for each request; a second fork waits for the child and says how it ended."""
    import diffusers
    import torch

    torch.set_num_threads(1)
    for name in ("DiffusionPipeline", "DDIMPipeline", "DDPMPipeline", "DiTPipeline", "StableDiffusionPipeline"):
        getattr(diffusers, name)
    gc.freeze()  # what a child's collector visits would be copied
    running = set()
    while True:
        message, files, *_ = socket.recv_fds(connection, 1, 4)
        running -= {pid for pid in running if os.waitpid(pid, 0 if not message else os.WNOHANG)[0]}
        if not message:
            os._exit(0)
        running.add(os.fork())
        if 0 in running:
            connection.close()
            request, out, error, send = files
            child = os.fork()
            if child == 0:
                os.close(send)
                return request, out, error
            os.write(send, str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
            os._exit(0)
        for file in files:
            os.close(file)


def _become(request, out, error):
    """The process that was asked for, up to its first line."""
    with os.fdopen(request) as file:
        file.seek(0)
        is_script, code, argv, env, cwd = eval(file.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(error, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    sys.argv = [code if is_script else "-c", *argv]
    sys.path[0] = str(Path(code).parent) if is_script else ""
    _read_the_environment_again()
    main = types.ModuleType("__main__")
    if is_script:
        main.__file__ = code
    sys.modules["__main__"] = main
    return compile(Path(code).read_text() if is_script else code, sys.argv[0], "exec"), main.__dict__


def _read_the_environment_again():
    """The client of the Hub reads it when it is imported, and other modules hold the values under the same names."""
    import huggingface_hub

    for source in ("huggingface_hub.constants", "diffusers.utils.constants"):
        before = dict(vars(sys.modules[source]))
        after = vars(importlib.reload(sys.modules[source]))
        changed = {k: v for k, v in before.items() if isinstance(v, str | bool) and after[k] != v}
        for name, module in list(sys.modules.items()):
            if name.startswith(("huggingface_hub.", "diffusers.")):
                for key, old in changed.items():
                    if vars(module).get(key) == old:
                        setattr(module, key, after[key])
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT


def _run(code, scope):
    """As the interpreter does, but that at the end modules are not taken down: they, too, would be copied first."""
    status = 0
    try:
        exec(code, scope)
    except SystemExit as stopped:
        status = 0 if stopped.code is None else stopped.code
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _run(*_become(*_serve(socket.socket(fileno=int(sys.argv[1])))))
