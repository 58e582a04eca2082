"""Stage 2: Lorsas from a store."""

from .config import TrainConfig
from .errors import TrainError
from .loop import Look, StepReport, TrainResult, train

__all__ = ["Look", "StepReport", "TrainConfig", "TrainError", "TrainResult", "train"]
