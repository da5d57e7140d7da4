"""Parts of a run beside its network: `loop.keep(part)` adds one.

A part trains together with the network (a discriminator), or watches it (`Best`, which keeps the best pipeline). Parts,
`Checkpoints` and `Outcome` know a run only as a `Run`, so that none of them imports the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from ..data.batches import Images, Position
    from ..data.prepared import RunData
    from ..interop import NoiseSchedule
    from ..randomness import Seeds
    from ..subjects import Subject
    from .arguments import TrainingArguments
    from .log import RunLog


class Run(Protocol):
    """The attributes of `TrainingLoop` that its parts, `Checkpoints` and `Outcome` use."""

    args: TrainingArguments
    accelerator: Accelerator
    subject: Subject
    model: nn.Module
    schedule: NoiseSchedule
    log: RunLog
    output_dir: Path
    validation: Images
    data: RunData
    position: Position
    seeds: Seeds
    streamed: bool
    images_per_step: int
    step: int
    total_steps: int
    grad_norm: Tensor
    parts: dict[str, Part]

    def stateful(self) -> dict[str, Any]:
        """Return what has a state beside the network, by its name in a checkpoint."""


class Part(Protocol):
    """A part of a run. Checkpoints hold its state; the result of the run holds it only if it is `saved`."""

    name: str
    """The name of its state in a checkpoint, and of its folder."""
    saved: bool
    """Whether it is written beside the pipeline, in a folder of its name, and pushed with the pipeline."""

    def join(self, run: Run) -> None:
        """Prepare for a run. It calls this once, before training and before `load_state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""

    def check(self, means: Mapping[str, float]) -> None:
        """Look at the means of a log record, the same on all devices; raise `TrainingStopped` to end the run."""

    def save(self, folder: Path) -> None:
        """Write the part into a pipeline's folder, if it is `saved`."""
