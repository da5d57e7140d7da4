"""The trained pipeline on the Hub: pushes in the background that never stop the training.

    pusher = HubPusher("user/name", output_dir, private=True, token=None)
    write_model_card(output_dir, name=pusher.repo_id, ...)
    pusher.push(output_dir, "step 1000")        # returns at once; training may overwrite the folder
    ...
    failure = pusher.finish(timeout=3600)       # None, or what was not pushed, why, and the command that pushes it

What goes up is an allow list made from `model_index.json`, see `pushed_files`; one push is one commit, so that nobody
downloads half of two. A push is tried again after anything that may pass (cut connections, time-outs, HTTP 408, 409,
412, 429 and 5xx), and given up at once after a refusal.

This module needs `huggingface_hub` alone.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import textwrap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from ..errors import InputError
from ..fields import Ranged, arg
from ..files import holds_result, write_file
from .card import complete_card, merged

_logger = logging.getLogger(__name__)

TOP_LEVEL_FILES = (
    *("model_index.json", "README.md", "metrics.json", "pipeline.py", "pytorch_lora_weights.safetensors"),
    *("config.json", "diffusion_pytorch_model.safetensors", "offsets.png"),  # of a calibration, or of a bridge
    *("diffusion_time.png", "diffusion_time.json"),
)
# What save_pretrained writes, without pickles, and code that lies beside it.
COMPONENT_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".npz", ".py")
PASSING_STATUS_CODES = (408, 409, 412, 429)  # beside 5xx: time-out, conflict, moved branch, rate limit
_SNAPSHOT_PREFIX = ".pushing-"
_PATIENCE = 3.0  # seconds that `finish` waits before it says what it waits for


@dataclass
class HubArguments(Ranged):
    """Arguments of a script that say where on the Hub the result goes."""

    push_to_hub: bool = arg(False, "Push the result to the Hub.")
    hub_model_id: str | None = arg(None, "Repository, `user/name`; by default the output folder's name.")
    hub_private_repo: bool = arg(False, "Make a new repository private, and push to no public one.")
    hub_token: str | None = arg(None, "By default the token that `hf auth login` has stored.")
    license: str | None = arg(
        None, "Licence of the result, as the Hub calls it, e.g. apache-2.0; by default that of the card that exists."
    )
    hub_timeout: float = arg(
        600.0, "Seconds that the end of the run waits for an unfinished push.", at_least=0, at_most=10**9
    )


# --- what goes up -----------------------------------------------------------------------------------------------------


def pushed_files(folder: Path, also: Sequence[str] = ()) -> list[Path]:
    """Return the files of a folder that inference needs, relative to it, sorted: the allow list of every push.

    For a pipeline these are `model_index.json` and the configurations and safetensors of the components that it names,
    for a calibration its `config.json`, tables and scheduler, for a LoRA its file; in any case the model card, the
    newest sample grid, `pipeline.py`, `metrics.json` and the pictures where there are any.

    Args:
        folder: the folder of a pipeline, a calibration or a bridge.
        also: models in folders of their own beside it, which the pipeline does not name.

    Raises:
        FileNotFoundError: the folder holds no pipeline, calibration or LoRA: nobody could load what is pushed.
    """
    if not (folder / "model_index.json").exists() and (folder / "config.json").exists():
        components = ["scheduler"]
    elif not (folder / "model_index.json").exists() and holds_result(folder):  # a LoRA
        components = []
    else:
        index = json.loads((folder / "model_index.json").read_text())
        components = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    files = [folder / name for name in TOP_LEVEL_FILES]
    for name in (*components, *also):
        files += [f for f in (folder / name).rglob("*") if f.suffix in COMPONENT_SUFFIXES]
    grids = sorted(folder.glob("samples/*.png"), key=lambda f: (f.stat().st_mtime_ns, f.name))
    relative = (f.relative_to(folder) for f in files + grids[-1:] if f.is_file())
    return sorted(f for f in relative if not any(part.startswith(".") for part in f.parts))


@dataclass(eq=False)
class _Push:
    folder: Path
    """The user finds the files here."""
    message: str
    files: list[Path]
    snapshot: tempfile.TemporaryDirectory[str] | None
    """The files as they were when the push was asked for."""
    failure: str | None = None
    """The reason why the last attempt failed."""
    done: bool = False


class _Refusal(Exception):
    """The push is refused on this side, and trying again would not help."""


class HubPusher:
    """Pushes a pipeline's folder to one repository of the Hub, in the background; a newer push replaces one that waits.

    The constructor does not touch the network. It removes the snapshots of a former run that was killed.

    Args:
        repo_id: `user/name`, or a bare name under the user's name; `None` takes the output folder's name.
        output_dir: snapshots are kept here, in a hidden folder, until they are pushed.
        private: visibility of the repository; `None` leaves it to the account's default. Nothing is pushed to a
            public repository where `private` is asked for.
        token: `None` takes that of `hf auth login` or `HF_TOKEN`.
        license: the licence that was asked for; it replaces that of the card on the Hub.
        attempts: how often a push is tried.
        wait: seconds between the first two attempts; doubles from one to the next.

    Raises:
        ValueError: `repo_id` is no name of a repository.
    """

    def __init__(
        self,
        repo_id: str | None,
        output_dir: Path,
        *,
        private: bool | None,
        token: str | None,
        license: str | None = None,
        attempts: int = 5,
        wait: float = 2.0,
    ) -> None:
        self._asked_id = self._repo_id = _repository_name(output_dir) if repo_id is None else repo_id
        validate_repo_id(self._repo_id)
        self._output_dir, self._private, self._token = output_dir, private, token
        self._license, self._attempts, self._wait = license, attempts, wait
        self._api = HfApi(token=token)
        self._changed = threading.Condition()
        self._waiting: _Push | None = None
        self._newest: _Push | None = None
        self._pushed: str | None = None
        self._thread: threading.Thread | None = None
        self._is_private: bool | None = None  # the repository, as the Hub says
        for left in output_dir.glob(f"{_SNAPSHOT_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)

    @property
    def repo_id(self) -> str:
        """The repository's name; a bare one is completed with the user's name by the first push."""
        return self._repo_id

    def require_login(self, timeout: float = 20.0) -> None:
        """Ask the Hub whose token this is, before there is any work to lose.

        A Hub that does not answer in `timeout` seconds, or cannot be reached, may be there later: this warns.

        Raises:
            InputError: there is no token, the Hub refuses it, or the environment forbids to ask.
        """
        found: list[Exception] = []

        def ask() -> None:
            try:
                self._api.whoami()
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=ask, name="HubLogin", daemon=True)
        thread.start()
        thread.join(timeout)
        if not found and not thread.is_alive():
            return
        reason = self._without_token(_describe(found[0])) if found else f"no answer in {timeout:g} seconds"
        if found and _is_of_login(found[0]):
            raise InputError(
                f"--push_to_hub: nothing could be pushed: {reason}. Log in (`hf auth login`), or leave "
                f"--push_to_hub away"
            )
        _logger.warning("the Hub cannot be reached now: %s; the result is pushed when it can", reason)

    def push(self, folder: Path, message: str, also: Sequence[str] = ()) -> None:
        """Take a snapshot of what inference needs, and push it in the background as one commit.

        This returns before anything is sent. A failure of the network or the disk raises nothing here: `finish` reports
        it. A push that still waits, for its turn or for its next attempt, is dropped for this one. For `also` see
        `pushed_files`.

        Raises:
            FileNotFoundError: there is no `model_index.json` in the folder.
        """
        push = _Push(folder, message, pushed_files(folder, also), None)
        try:
            push.snapshot = _snapshot(folder, push.files, self._output_dir)
        except OSError as error:
            push.failure, push.done = f"its snapshot could not be written: {error}", True
            _logger.warning("%r is not pushed to the Hub: %s", message, push.failure)
        self._newest = push
        if not push.done:
            self._hand_over(push)

    def _hand_over(self, push: _Push) -> None:
        with self._changed:
            dropped, self._waiting = self._waiting, push
            self._changed.notify_all()
        _discard(dropped)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="HubPusher", daemon=True)
            self._thread.start()

    def finish(self, timeout: float | None = None) -> str | None:
        """Wait until the newest push has gone up or has been given up.

        Args:
            timeout: the longest wait in seconds. The client itself knows no limit: without one, a server that accepts
                connections and never answers is waited for until Ctrl-C, which ends the wait and not the program.

        Returns:
            `None` if the Hub holds the newest push (or there was none); else a message that says what was not pushed,
            why, and how to push it by hand.
        """
        push = self._newest
        if push is None:
            return None
        try:
            reason = self._wait_for(push, timeout)
        except KeyboardInterrupt:
            reason = "interrupted"
        if not push.done:
            reason = f"{reason}; last error: {push.failure}" if push.failure else reason
        return None if reason is None else self._failure_message(push, reason)

    def _wait_for(self, push: _Push, timeout: float | None) -> str | None:
        """Return why the push has not gone up in time, or `None` if it has."""
        patience = _PATIENCE if timeout is None else min(_PATIENCE, timeout)
        with self._changed:
            if self._changed.wait_for(lambda: push.done, patience):
                return push.failure
            print(f"waiting for the push to {self._repo_id} (Ctrl-C ends the wait)", flush=True)
            left = None if timeout is None else timeout - patience
            if self._changed.wait_for(lambda: push.done, left):
                return push.failure
            return f"still under way after {timeout} seconds"

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                push, self._waiting = self._waiting, None
            assert push is not None
            delivered = self._deliver(push)
            _discard(push)
            with self._changed:
                push.done = True
                if delivered:
                    push.failure, self._pushed = None, push.message
                self._changed.notify_all()

    def _deliver(self, push: _Push) -> bool:
        """Try until it works, is refused, or a newer push has come; the last error is the push's `failure`."""
        for attempt in range(self._attempts):
            try:
                with _no_progress_bars():
                    self._upload(push)
                return True
            except Exception as error:
                push.failure = self._without_token(_describe(error))
                refused = _is_refusal(error)
            if refused or attempt + 1 == self._attempts or self._newer_within(self._wait * 2**attempt):
                break
        _logger.warning("%r is not pushed to the Hub: %s", push.message, push.failure)
        return False

    def _newer_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is not None, seconds)

    def _upload(self, push: _Push) -> None:
        assert push.snapshot is not None
        root = Path(push.snapshot.name)
        self._repo_id = self._api.create_repo(self._repo_id, private=self._private, exist_ok=True).repo_id
        self._check_visibility()
        complete_card(root / "README.md", self._asked_id, self._repo_id)
        self._keep_card(root / "README.md")
        additions = [CommitOperationAdd(path_in_repo=f.as_posix(), path_or_fileobj=root / f) for f in push.files]
        for addition in additions:
            # Not `upload_folder`: it may split a folder into several commits, and it hands several files to a pool of
            # threads that Python joins at exit, so that a server which hangs would keep the program from ending.
            self._api.preupload_lfs_files(self._repo_id, additions=[addition])
        deletions = [CommitOperationDelete(path_in_repo=path) for path in self._older_grids(push)]
        self._api.create_commit(self._repo_id, operations=[*additions, *deletions], commit_message=push.message)

    def _keep_card(self, card: Path) -> None:
        """Merge the card into that of the repository, whose text and metadata stay."""
        if card.is_file() and self._api.file_exists(self._repo_id, card.name):
            there = Path(self._api.hf_hub_download(self._repo_id, card.name, local_dir=card.parent / ".hub"))
            write_file(card, merged(there.read_text("utf-8-sig"), card.read_text("utf-8"), self._license))

    def _check_visibility(self) -> None:
        first = self._is_private is None
        self._is_private = bool(self._api.model_info(self._repo_id).private)
        if self._private and not self._is_private:
            raise _Refusal(
                "a private repository was asked for, but this one exists and is public: make it private, or take "
                "another name"
            )
        if self._private is False and self._is_private and first:
            _logger.warning("a public repository was asked for; %s exists, and stays private", self._repo_id)

    def _older_grids(self, push: _Push) -> list[str]:
        kept = {f.as_posix() for f in push.files}
        there = self._api.list_repo_files(self._repo_id)
        return [path for path in there if re.fullmatch(r"samples/step-\d+\.png", path) and path not in kept]

    # --- messages -----------------------------------------------------------------------------------------------------

    def _without_token(self, text: str) -> str:
        stored = None
        with contextlib.suppress(Exception):  # it may ask the network
            stored = get_token()
        for token in (self._token, stored):
            text = text.replace(token, "***") if token else text
        return text

    def _failure_message(self, push: _Push, reason: str) -> str:
        held = "" if self._pushed is None else f" The Hub holds {self._pushed!r}."
        unsure = self._private and self._is_private is None
        note = "; `--private` does not change a repository that exists: see that it is private" if unsure else ""
        return (
            f"{push.message!r} was not pushed to {self._repo_id} on the Hub: {reason}.{held}\n"
            f"The model is safe in {push.folder}. To push it, logged in (`hf auth login`){note}:\n"
            f"    {self._command(push)}"
        )

    def _command(self, push: _Push) -> str:
        """Return the shell command that does what the push should have done."""
        words = ["hf", "upload", self._repo_id, str(push.folder), "."]
        for file in push.files:
            words += ["--include", glob.escape(file.as_posix())]
        words += ["--commit-message", push.message]
        if self._private is not None:
            words.append("--private" if self._private else "--no-private")
        upload = shlex.join(words)
        if self._private and self._is_private is False:
            return f"{shlex.join(['hf', 'repos', 'settings', self._repo_id, '--private'])} && {upload}"
        return upload


def make_pusher(args: HubArguments, folder: Path, is_main_process: bool) -> HubPusher | None:
    """Make the pusher that the arguments ask for, on the main process alone.

    Raises:
        InputError: the name of the repository is not valid, or nobody is logged in.
    """
    if not (args.push_to_hub and is_main_process):
        return None
    try:
        options: dict[str, Any] = {"private": args.hub_private_repo or None, "token": args.hub_token}
        options["license"] = args.license
        pusher = HubPusher(args.hub_model_id, folder, **options)
    except ValueError as error:
        raise InputError(f"--hub_model_id: {error}") from error
    pusher.require_login()
    return pusher


def push_and_wait(pusher: HubPusher | None, folder: Path, what: str, timeout: float) -> str | None:
    """Push a finished folder, where there is a pusher, and wait; return why that failed, or `None`.

    Args:
        what: what the folder holds, for the commit's message.
        timeout: seconds.
    """
    if pusher is None:
        return None
    pusher.push(folder, what)
    return pusher.finish(timeout)


def _repository_name(folder: Path) -> str:
    """Return the folder's name in the Hub's alphabet."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.resolve().name)
    name = re.sub(r"([-.])[-.]+", r"\1", name)[:96]
    return name.removesuffix(".git").strip("-.") or "model"


def _snapshot(folder: Path, files: list[Path], beside: Path) -> tempfile.TemporaryDirectory[str]:
    """Keep the files in a hidden folder: weights as hard links (they are replaced by rename), the others as copies."""
    beside.mkdir(parents=True, exist_ok=True)
    snapshot = tempfile.TemporaryDirectory(dir=beside, prefix=_SNAPSHOT_PREFIX, ignore_cleanup_errors=True)
    try:
        for file in files:
            source, target = os.path.realpath(folder / file), Path(snapshot.name) / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                _link_or_copy(source, target)
            else:
                shutil.copyfile(source, target)
    except OSError:
        snapshot.cleanup()
        raise
    return snapshot


def _link_or_copy(source: str, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _discard(push: _Push | None) -> None:
    if push is not None and push.snapshot is not None:
        push.snapshot.cleanup()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the Hub client's bars out of the training's, unless the environment says otherwise."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and what it was raised from: the client wraps errors of large files."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_refusal(error: Exception) -> bool:
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return 400 <= status < 500 and status not in PASSING_STATUS_CODES
        if isinstance(cause, _Refusal | OfflineModeIsEnabled | HFValidationError | LocalTokenNotFoundError):
            return True
    return False


def _is_of_login(error: Exception) -> bool:
    """Whether it says that this token, or none, pushes nothing. A server without the question (404) does not."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in (401, 403)
        if isinstance(cause, OfflineModeIsEnabled | LocalTokenNotFoundError):
            return True
    return False


def _describe(error: Exception) -> str:
    """Describe the error in one line, with its cause where the client has wrapped it."""
    causes = [error, error.__cause__] if isinstance(error, RuntimeError) else [error]
    texts = [str(c) or type(c).__name__ for c in causes if c is not None]
    return textwrap.shorten(": ".join(texts), 600, placeholder=" ...").rstrip(".")
