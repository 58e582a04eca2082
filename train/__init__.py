"""Stage 2: Lorsas from a store."""

from .config import TrainConfig
from .errors import TrainError
from .events import Look, RunEvent, StepReport, TrainResult
from .many import RunOutcome, check, train, train_many

__all__ = [
    "Look",
    "RunEvent",
    "RunOutcome",
    "StepReport",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "check",
    "train",
    "train_many",
]
