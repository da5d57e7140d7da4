"""The training loop and its parts, which all training scripts share."""

from .adversary import Adversary
from .arguments import TrainingArguments
from .batch import Batch
from .best import Best
from .loop import TrainingLoop

__all__ = ["Adversary", "Batch", "Best", "TrainingArguments", "TrainingLoop"]
