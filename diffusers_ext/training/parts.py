"""What joins a run beside its network: `loop.keep(part)`.

A part trains along (a discriminator), or watches (which pipeline is the best). Parts and the two objects that a run
has for its checkpoints and its results know a run by `Run` alone, so that nothing here imports the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from ..data.batches import Images, Position
    from ..interop import NoiseSchedule
    from ..randomness import Seeds
    from ..subjects import Subject
    from .arguments import TrainingArguments
    from .log import RunLog


class Run(Protocol):
    """What is known of a run: the attributes of `TrainingLoop` that others read."""

    args: TrainingArguments
    accelerator: Accelerator
    subject: Subject
    model: nn.Module
    schedule: NoiseSchedule
    log: RunLog
    output_dir: Path
    validation: Images
    validation_name: str
    position: Position
    seeds: Seeds
    streamed: bool
    images_per_step: int
    step: int
    total_steps: int
    grad_norm: Tensor
    parts: dict[str, Part]

    def stateful(self) -> dict[str, Any]:
        """What trains beside the network, by its name in a checkpoint."""


class Part(Protocol):
    """A checkpoint holds its state; beside the pipeline it is written only if it is `saved`."""

    name: str
    """Of its state in a checkpoint, and of its folder."""
    saved: bool
    """Written beside the pipeline, in a folder of the part's name, and pushed with it."""

    def join(self, run: Run) -> None:
        """Called once, before the run begins, and before `load_state_dict` where the run goes on."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""

    def check(self, means: Mapping[str, float]) -> None:
        """Look at the means of a record of the log, the same on all devices; may raise `TrainingStopped`."""

    def save(self, folder: Path) -> None:
        """Write beside the pipeline in `folder` what belongs there, if it is `saved`."""
