"""Stage 2: Lorsas from a store."""

from .config import TrainConfig
from .errors import TrainError
from .events import Ended, Event, Look, RunEvent, StepReport, TrainResult
from .loop import check, train

__all__ = [
    "Ended",
    "Event",
    "Look",
    "RunEvent",
    "StepReport",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "check",
    "train",
]
