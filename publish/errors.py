"""The one error of publishing."""


class PublishError(Exception):
    """A Lorsa that cannot be shared as asked; the message says what to change."""
