"""What a trained Lorsa does, and how well it stands in for its layer."""

from .ablate import Ablation, ablate
from .config import AblateConfig, EvalConfig
from .errors import AnalyzeError
from .events import Measured
from .fidelity import Fidelities, Fidelity, evaluate_run, evaluate_runs
from .in_model import replaced
from .intervene import intervene
from .losses import CrossEntropy

__all__ = [
    "AblateConfig",
    "Ablation",
    "AnalyzeError",
    "CrossEntropy",
    "EvalConfig",
    "Fidelities",
    "Fidelity",
    "Measured",
    "ablate",
    "evaluate_run",
    "evaluate_runs",
    "intervene",
    "replaced",
]
