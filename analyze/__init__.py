"""What a trained Lorsa does, and how well it stands in for its layer."""

from .analyze import AnalyzeConfig, Step, analyze_run
from .errors import AnalyzeError
from .fidelity import CrossEntropy, EvalConfig, Fidelity, evaluate_run, replaced
from .find import FoundHead, find_heads
from .result import Analysis
from .sources import contributions

__all__ = [
    "Analysis",
    "AnalyzeConfig",
    "AnalyzeError",
    "CrossEntropy",
    "EvalConfig",
    "Fidelity",
    "FoundHead",
    "Step",
    "analyze_run",
    "contributions",
    "evaluate_run",
    "find_heads",
    "replaced",
]
