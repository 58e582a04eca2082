"""What a trained Lorsa does, and how well it stands in for its layer."""

from .ablate import Ablation, ablate
from .analyze import analyze_run
from .config import AblateConfig, AnalyzeConfig, EvalConfig
from .errors import AnalyzeError
from .events import Measured
from .fidelity import Fidelities, Fidelity, evaluate_run, evaluate_runs
from .find import FoundHead, find_heads
from .in_model import replaced
from .intervene import intervene
from .losses import CrossEntropy
from .result import Analysis
from .sources import contributions

__all__ = [
    "AblateConfig",
    "Ablation",
    "Analysis",
    "AnalyzeConfig",
    "AnalyzeError",
    "CrossEntropy",
    "EvalConfig",
    "Fidelities",
    "Fidelity",
    "FoundHead",
    "Measured",
    "ablate",
    "analyze_run",
    "contributions",
    "evaluate_run",
    "evaluate_runs",
    "find_heads",
    "intervene",
    "replaced",
]
