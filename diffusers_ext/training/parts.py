"""What trains beside the network, or watches it: `TrainingLoop.add`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Part(Protocol):
    """A checkpoint holds its state; beside the pipeline it lies only if it is `saved`."""

    saved: bool
    """Written beside the pipeline, in a folder of the part's name, and pushed with it."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def check(self, means: Mapping[str, float]) -> None:
        """Look at the means of a record of the log, the same on all devices; may raise `TrainingStopped`."""

    def save(self, folder: Path) -> None:
        """Write beside the pipeline in `folder` what belongs there, if it is `saved`."""
