"""What the training scripts share."""

from .arguments import InputError, TrainingArguments, command, parse_arguments
from .loop import Batch, TrainingLoop
from .presets import PRESETS
from .stops import TrainingStopped

__all__ = [
    "PRESETS",
    "Batch",
    "InputError",
    "TrainingArguments",
    "TrainingLoop",
    "TrainingStopped",
    "command",
    "parse_arguments",
]
