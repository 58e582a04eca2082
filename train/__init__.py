"""Stage 2: Lorsas from a store."""

from .config import TrainConfig
from .errors import TrainError
from .events import Look, StepReport, TrainResult
from .loop import check, train

__all__ = ["Look", "StepReport", "TrainConfig", "TrainError", "TrainResult", "check", "train"]
