"""Reasons to stop early: a signal, and losses that are no longer finite."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class TrainingStopped(Exception):
    """Training ended before its time; the message says why and how to go on, `code` is the exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop at the end of the step; a second one ends the process at once.

    Handlers are set while this is used as a context, in the main thread alone (Python allows no other). Over several
    processes, the signal of one stops all, at the same step: they agree through a group on the CPU, so that no device
    is waited for.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received: int | None = None
        self._group: Any = None
        if accelerator.num_processes > 1 and torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo")
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os.write(2, b"\nstopped at once; resume from the last checkpoint with --resume_from_checkpoint latest\n")
            os._exit(128 + number)
        self.received = number
        os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")

    def agreed(self) -> int | None:
        """The signal that any process received, once all have come here; `None` if there was none."""
        if self._group is None:
            return self.received
        number = torch.tensor(self.received or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(number) or None


class FiniteGuard:
    """Leaves out optimiser steps whose loss or gradient is not finite, and remembers the first, without a wait.

    The decision stays on the device: it reaches the fused AdamW as `found_inf`, in the way that gradient scalers take.
    With float16 the scaler itself leaves steps out when gradients overflow, as it should, and the loss alone is
    watched.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        device = accelerator.device
        self._nothing = torch.tensor(-1.0, device=device)
        self._skipped = torch.zeros((), device=device)
        self._first_step, self._first_sigma = self._nothing, self._nothing
        self._loss_is_bad, self._sigma = torch.zeros((), dtype=torch.bool, device=device), self._nothing

    def watch(self, loss: Tensor, sigma: Tensor, terms: dict[str, Tensor]) -> None:
        """Look at a micro-batch: its loss, and the noise levels (B,) of its loss terms."""
        self._loss_is_bad = self._loss_is_bad | ~loss.detach().isfinite()
        for values in terms.values():
            bad = ~values.detach().isfinite()
            self._sigma = torch.maximum(self._sigma, torch.where(bad, sigma[: len(values)], -1.0).max().float())

    def before_step(self, optimizer: Any, grad_norm: Tensor | None, step: int) -> None:
        """Decide on the step, once its gradient is complete."""
        bad = self._loss_is_bad
        if grad_norm is not None and self.accelerator.scaler is None:
            bad = bad | ~torch.as_tensor(grad_norm, device=bad.device).isfinite()
        if self.accelerator.scaler is None:
            getattr(optimizer, "optimizer", optimizer).found_inf = bad.float()
        first = bad & (self._first_step < 0)
        self._first_step = torch.where(first, float(step), self._first_step)
        self._first_sigma = torch.where(first, self._sigma, self._first_sigma)
        self._skipped = self._skipped + bad
        self._loss_is_bad, self._sigma = torch.zeros_like(self._loss_is_bad), self._nothing

    def check(self, limit: int) -> None:
        """Stop if more than `limit` steps were left out; waits for the device, so call it when a log is due.

        Raises:
            TrainingStopped: with the step and the noise level of the first.
        """
        local = torch.stack([self._skipped, self._first_step, self._first_sigma])
        skipped, step, sigma = self.accelerator.gather(local[None]).amax(0).tolist()
        if skipped <= limit:
            return
        where = f"the loss at sigma = {sigma:.4g}" if sigma > 0 else "the gradient (the loss was finite)"
        raise TrainingStopped(
            f"{where} was not finite at step {step:.0f}; {skipped:.0f} steps were left out, {limit} are allowed by "
            f"--max_skipped_steps. The weights and checkpoints are as they were before. A lower --learning_rate, "
            f"another --seed or --mixed_precision may help",
            code=1,
        )
