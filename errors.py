"""The error that all others of the package are kinds of."""


class LorsaError(Exception):
    """A known failure; the message is one line that says what was given and what to do."""
