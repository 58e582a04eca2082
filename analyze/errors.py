"""The one error of analysis."""

from ..errors import LorsaError


class AnalyzeError(LorsaError):
    """A run that cannot be analysed as asked; the message says what to change."""
