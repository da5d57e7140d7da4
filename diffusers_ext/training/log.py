"""The log of a run: its progress bar, `logs/log.jsonl` and accelerate's tracker.

Losses are summed on the device, by noise level, and are read every `logging_steps`; nothing waits for them in between.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.measures import SIGMA_BINS
from ..files import write_file
from ..noise_levels import log_linear_sigmas
from ..progress import progress_bar, say
from .arguments import TrainingArguments

# Losses are reported for this many bins of log sigma; the range suits data in [-1, 1].
SIGMA_RANGE = 0.02, 20.0


class RunLog:
    """Logs a run; see the module's docstring.

    Args:
        args: the run's arguments.
        accelerator: the run's accelerator.
        sigma_range: the lowest and the highest noise level of the training.
        images_per_step: images of an optimiser step, over all devices.
        total_steps: optimiser steps of the whole run.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        sigma_range: tuple[float, float],
        images_per_step: int,
        total_steps: int,
    ) -> None:
        self.args, self.accelerator = args, accelerator
        self.images_per_step, self.total_steps = images_per_step, total_steps
        self.path = Path(args.output_dir) / "logs" / "log.jsonl"
        self.sigma_range = max(sigma_range[0], SIGMA_RANGE[0]), min(sigma_range[1], SIGMA_RANGE[1])
        edges = log_linear_sigmas(SIGMA_BINS + 1, *self.sigma_range).flip(0).log()
        self._middles = ((edges[1:] + edges[:-1]) / 2).exp().tolist()
        self._edges = edges[1:-1].to(accelerator.device, torch.float32)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._values: dict[str, list[Tensor]] = {}
        self.bar: Any = None
        self._elsewhere = 0.0  # seconds without steps since the last record
        self._unreadable: set[str] = set()
        self._lost = False
        self.warnings: list[str] = []

    def start(self, project: str, step: int) -> None:
        """Open everything at `step`. Later records of a killed run are dropped, as they will be written again."""
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_after(step)
        scalars = {k: v for k, v in asdict(self.args).items() if isinstance(v, int | float | str | bool)}
        self.accelerator.init_trackers(project, {k: v for k, v in scalars.items() if "token" not in k})
        shown = self.accelerator.is_main_process
        self.bar = progress_bar(None, total=self.total_steps, initial=step, unit="step", shown=shown)
        self._since, self._since_step = time.monotonic(), step
        device, kind = str(self.accelerator.device), str(self.accelerator.distributed_type.value)
        where = {"processes": self.accelerator.num_processes, "distributed": kind, "device": device}
        self.write({"step": step, "start": {**where, "images_per_step": self.images_per_step}})

    def _drop_after(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        write_file(self.path, "".join(line + "\n" for line in kept))

    def record(self, sigma: Tensor, terms: dict[str, Tensor]) -> None:
        """Add loss terms at noise levels sigma (B,); each term is (B,), or shorter for the first samples alone."""
        bins = torch.bucketize(sigma.detach().float().log(), self._edges)
        for name, values in terms.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(SIGMA_BINS, device=bins.device)
                self._counts[name] = torch.zeros(SIGMA_BINS, device=bins.device)
            values = values.detach().float()
            self._sums[name].index_add_(0, bins[: len(values)], values)
            self._counts[name].index_add_(0, bins[: len(values)], torch.ones_like(values))

    def record_value(self, name: str, value: Tensor) -> None:
        """Add a scalar tensor that belongs to an optimiser step, such as a gradient norm."""
        self._values.setdefault(name, []).append(value.detach().float())

    def flush(self, step: int, lr: float, grad_norm: float) -> dict[str, float]:
        """Average what was recorded, over all devices, then show, write and return it; all get the same values.

        A tracker gets the norm of the last gradient, and each loss by noise level, too. The images per second are those
        of the steps alone, without validations.
        """
        names, now = sorted(self._sums), time.monotonic()
        both = torch.stack([torch.stack([self._sums[n], self._counts[n]]) for n in names])
        sums, counts = self.accelerator.reduce(both, "sum").cpu().unbind(1)
        means = {n: (s.sum() / c.sum()).item() for n, s, c in zip(names, sums, counts, strict=True)}
        if self._values:
            averaged = torch.stack([torch.stack(values).mean() for values in self._values.values()])
            averaged = self.accelerator.reduce(averaged, "mean").tolist()
            means |= dict(zip(self._values, averaged, strict=True))
        seconds = max(now - self._since - self._elsewhere, 1e-9)
        speed = (step - self._since_step) * self.images_per_step / seconds
        values = means | {"lr": lr, "images_per_second": speed}
        self.bar.set_postfix({"img/s": f"{speed:.0f}"} | {n: f"{v:.2g}" for n, v in means.items()})
        by_sigma = {
            n: [v / k if k else None for v, k in zip(s.tolist(), c.tolist(), strict=True)]
            for n, s, c in zip(names, sums, counts, strict=True)
        }
        of_levels = {f"{n}_by_sigma/{key}": v for n in names for key, v in self._named(by_sigma[n])}
        self.accelerator.log(values | {"grad_norm": grad_norm} | of_levels, step=step)
        self.write({"step": step, "images": step * self.images_per_step, **values, "by_sigma": by_sigma})
        self._sums.clear()
        self._counts.clear()
        self._values.clear()
        self._since, self._since_step, self._elsewhere = now, step, 0.0
        return values

    def _named(self, by_bin: list[float | None]) -> list[tuple[str, float]]:
        """The values of the bins of noise levels that have some, each by the sigma in the middle of its bin."""
        return [(f"{sigma:.3g}", v) for sigma, v in zip(self._middles, by_bin, strict=True) if v is not None]

    def track_held_out(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Give a validation's measurements to the tracker: the mean loss, that by noise level, and the distance."""
        losses = metrics["eps_mse"]
        values = {"held_out/eps_mse": sum(losses) / len(losses)}
        for sigma, v in zip(metrics["sigmas"], losses, strict=True):
            values[f"held_out_by_sigma/{sigma:.3g}"] = v
        if "frechet_distance" in metrics:
            values["held_out/frechet_distance"] = metrics["frechet_distance"]
        for tracker in self.accelerator.trackers:
            tracker.log(values, step=step)

    def unreadable(self, step: int, names: list[str]) -> None:
        """Report the names of images that could not be read, each once."""
        for name in names:
            if name not in self._unreadable:
                self._unreadable.add(name)
                tqdm.write(_printable(f"unreadable image skipped ({len(self._unreadable)} so far): {name}"))
                self.write({"step": step, "unreadable": name})

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to the log, on the main process; on a full disk the run goes on without it."""
        if not self.accelerator.is_main_process:
            return
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # no half of a line
            if not self._lost:
                self.warn(f"{self.path} cannot be written: {error}; the run goes on, and lines are missing there")
            self._lost = True

    def warn(self, message: str) -> None:
        """Print a warning and remember it."""
        self.warnings.append(message)
        print(f"\nwarning: {message}")

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """A context that shows what is being done now: before the bar of the steps, or, without one, in a line."""
        if self.bar is None:
            say(what)
            yield
            return
        self.bar.set_description(what)
        start = time.monotonic()
        try:
            yield
        finally:
            self.bar.set_description(None)
            self._elsewhere += time.monotonic() - start

    @contextmanager
    def goes_on_without(self, what: str, step: int) -> Iterator[None]:
        """A context that turns a failed write, for instance on a full disk, and too little memory into a warning."""
        try:
            yield
        except (OSError, torch.OutOfMemoryError) as error:
            self.warn(f"{what} of step {step} could not be written: {error}")

    def close(self) -> None:
        """Close the progress bar, when training ends or stops."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None
        if self._unreadable:
            print(f"unreadable images skipped: {len(self._unreadable)}; their names stand above")


def _printable(text: str) -> str:
    """Return the text as the terminal can show it: names of files may hold anything."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return float("inf")
