"""What the training scripts share."""

from .adversary import Adversary
from .arguments import InputError, TrainingArguments, command, parse_arguments
from .batch import Batch
from .best import Best
from .loop import TrainingLoop
from .presets import PRESETS
from .stops import TrainingStopped

__all__ = [
    "PRESETS",
    "Adversary",
    "Batch",
    "Best",
    "InputError",
    "TrainingArguments",
    "TrainingLoop",
    "TrainingStopped",
    "command",
    "parse_arguments",
]
