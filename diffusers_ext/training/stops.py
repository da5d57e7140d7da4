"""Reasons to stop early: signals, and losses that are no longer finite."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import SIGNALLED, STOP_SIGNALS, TrainingStopped
from .environment import TIMEOUT


class StopSignals:
    """The signals ask for a stop at the end of the step; a second one ends the process at once.

    Handlers are set while this is used as a context, in the main thread alone (Python allows no other). Over several
    processes, the signal of one stops all, at the same step: they agree through a group on the CPU, so that no device
    is waited for.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received: int | None = None
        self._group: Any = None
        if accelerator.num_processes > 1 and torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os.write(2, b"\nstopped at once; resume from the last checkpoint with --resume_from_checkpoint latest\n")
            os._exit(SIGNALLED + number)
        self.received = number
        os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")

    def agreed(self) -> int | None:
        """Return the signal that any process received, or `None`. All processes must call this together."""
        if self._group is None:
            return self.received
        number = torch.tensor(self.received or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(number) or None


@contextmanager
def stopping_at_once(message: Callable[[], str]) -> Iterator[None]:
    """A context, after the last step of a run, in which a signal raises `TrainingStopped` with this message."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise TrainingStopped(message(), code=SIGNALLED + number)

    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                previous[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class FiniteGuard:
    """Leaves out optimiser steps whose gradient is not finite, and remembers the first, without a wait.

    A loss that is not finite makes every gradient NaN, on all devices once they have averaged: all decide alike.
    The decision stays on the device: it reaches the fused AdamW as `found_inf`, as that of a gradient scaler does. With
    float16 the scaler itself leaves steps out, as it should while it looks for its scale; there only more than
    `MAX_OVERFLOWS` in a row count as a failure.
    """

    MAX_OVERFLOWS = 50

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._nothing = torch.tensor(-1.0, device=accelerator.device)
        self._skipped, self._in_a_row = torch.zeros(2, device=accelerator.device)
        self._first_step = self._first_sigma = self._sigma = self._nothing

    def watch(self, loss: Tensor, sigma: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """Return the loss for the backward pass, NaN if it is not finite; remember the sigma (B,) of such a term."""
        for values in terms.values():
            bad = ~values.detach().isfinite()
            self._sigma = torch.maximum(self._sigma, torch.where(bad, sigma[: len(values)], -1.0).max().float())
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def before_step(self, optimizer: Any, grad_norm: Tensor, step: int) -> None:
        """Decide whether the optimiser makes the step, once its gradient is complete."""
        bad = ~grad_norm.isfinite()
        if self.accelerator.scaler is None:
            getattr(optimizer, "optimizer", optimizer).found_inf = bad.float()
        first = bad & (self._first_step < 0)
        self._first_step = torch.where(first, float(step), self._first_step)
        self._first_sigma = torch.where(first, self._sigma, self._first_sigma)
        self._skipped, self._in_a_row = self._skipped + bad, (self._in_a_row + 1) * bad
        self._sigma = self._nothing

    def check(self, limit: int) -> None:
        """Stop if more than `limit` steps were left out; waits for the device, so call it when a log is due.

        Raises:
            TrainingStopped: the message gives the step and the noise level of the first.
        """
        local = torch.stack([self._skipped, self._in_a_row, self._first_step, self._first_sigma])
        skipped, in_a_row, step, sigma = self.accelerator.gather(local[None]).amax(0).tolist()
        if self.accelerator.scaler is not None and in_a_row <= self.MAX_OVERFLOWS:
            return
        if self.accelerator.scaler is None and skipped <= limit:
            return
        where = f"the loss at sigma = {sigma:.4g}" if sigma > 0 else "the gradient (the loss was finite)"
        raise TrainingStopped(
            f"{where} was not finite at step {step:.0f}; {skipped:.0f} steps were left out, {limit} are allowed by "
            f"--max_skipped_steps. The weights and checkpoints are as they were before. A lower --learning_rate, "
            f"another --seed or --mixed_precision may help",
            code=1,
        )
