"""The one error of training, and what can end a single run."""

from ..errors import LorsaError
from ..model import CheckpointError
from ..store import StoreError


class TrainError(LorsaError):
    """A run that cannot begin or go on; the message says what to change."""


RUN_ERRORS = (TrainError, CheckpointError, StoreError, OSError)
"""What ends one of several runs and leaves the others."""
