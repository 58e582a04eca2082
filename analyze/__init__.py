"""What a trained Lorsa does, and how well it stands in for its layer."""

from .errors import AnalyzeError
from .fidelity import CrossEntropy, EvalConfig, Fidelity, evaluate_run, replaced
from .result import Analysis

__all__ = [
    "Analysis",
    "AnalyzeError",
    "CrossEntropy",
    "EvalConfig",
    "Fidelity",
    "evaluate_run",
    "replaced",
]
