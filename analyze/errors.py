"""The one error of analysis."""


class AnalyzeError(Exception):
    """A run that cannot be analysed as asked; the message says what to change."""
