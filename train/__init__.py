"""Stage 2: Lorsas from a store."""

from .config import TrainConfig
from .errors import TrainError
from .events import Ended, Event, Look, RunEvent, StepReport, TrainResult
from .many import RunOutcome, check, train, train_many
from .sweep import Point, SweepResult, grid, points, sweep, sweep_grid, write_sweep

__all__ = [
    "Ended",
    "Event",
    "Look",
    "Point",
    "RunEvent",
    "RunOutcome",
    "StepReport",
    "SweepResult",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "check",
    "grid",
    "points",
    "sweep",
    "sweep_grid",
    "train",
    "train_many",
    "write_sweep",
]
