"""What a trained Lorsa does, and how well it stands in for its layer."""

from .analyze import AnalyzeConfig, Step, analyze_run
from .errors import AnalyzeError
from .explain import Estimate, Explained, Said, estimate, explain
from .explain_config import ExplainConfig
from .fidelity import CrossEntropy, EvalConfig, Fidelity, evaluate_run, replaced
from .find import FoundHead, find_heads
from .result import Analysis
from .sources import contributions

__all__ = [
    "Analysis",
    "AnalyzeConfig",
    "AnalyzeError",
    "CrossEntropy",
    "Estimate",
    "EvalConfig",
    "ExplainConfig",
    "Explained",
    "Fidelity",
    "FoundHead",
    "Said",
    "Step",
    "analyze_run",
    "contributions",
    "estimate",
    "evaluate_run",
    "explain",
    "find_heads",
    "replaced",
]
