"""What a trained Lorsa does, and how well it stands in for its layer."""

from .ablate import Ablation, ablate
from .analyze import analyze_run
from .config import AblateConfig, AnalyzeConfig, EvalConfig
from .errors import AnalyzeError
from .events import Measured
from .explain import Estimate, Explained, Said, estimate, explain
from .explain_config import ExplainConfig
from .fidelity import Fidelities, Fidelity, evaluate_run, evaluate_runs
from .find import FoundHead, find_heads
from .intervene import intervene
from .losses import CrossEntropy
from .result import Analysis

__all__ = [
    "AblateConfig",
    "Ablation",
    "Analysis",
    "AnalyzeConfig",
    "AnalyzeError",
    "CrossEntropy",
    "Estimate",
    "EvalConfig",
    "ExplainConfig",
    "Explained",
    "Fidelities",
    "Fidelity",
    "FoundHead",
    "Measured",
    "Said",
    "ablate",
    "analyze_run",
    "estimate",
    "evaluate_run",
    "evaluate_runs",
    "explain",
    "find_heads",
    "intervene",
]
