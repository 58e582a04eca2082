"""The one error of training."""


class TrainError(Exception):
    """A run that cannot begin or go on; the message says what to change."""
