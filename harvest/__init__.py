"""Stage 1: a language model's attention inputs and outputs, written to a store."""

from .aliases import ALIASES, resolve
from .capture import Capture, module_input, module_output
from .config import HarvestConfig
from .errors import HarvestError
from .events import Progress
from .loop import HarvestResult, harvest, plan_harvest, stored_request
from .models import LanguageModel, load_config, load_model
from .plan import Estimate, Plan
from .selfcheck import LayerCheck, SelfCheck, check_geometry, require_same_weights
from .sites import AttentionSite, attention_sites, read_geometry, read_weights

__all__ = [
    "ALIASES",
    "AttentionSite",
    "Capture",
    "Estimate",
    "HarvestConfig",
    "HarvestError",
    "HarvestResult",
    "LanguageModel",
    "LayerCheck",
    "Plan",
    "Progress",
    "SelfCheck",
    "attention_sites",
    "check_geometry",
    "harvest",
    "load_config",
    "load_model",
    "module_input",
    "module_output",
    "plan_harvest",
    "read_geometry",
    "read_weights",
    "require_same_weights",
    "resolve",
    "stored_request",
]
