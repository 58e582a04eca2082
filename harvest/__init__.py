"""Stage 1: a language model's attention inputs and outputs, written to a store."""

from .aliases import ALIASES, resolve
from .capture import Capture
from .config import HarvestConfig
from .errors import HarvestError
from .events import Progress
from .families import attention_names
from .loop import HarvestResult, harvest, plan_harvest, stored_request
from .models import (
    LanguageModel,
    Loaded,
    load_by_name,
    load_config,
    load_model,
    load_tokenizer,
    tokenizer_facts,
)
from .packing import starts_with_bos
from .plan import Estimate, Plan
from .readings import Reading
from .selfcheck import LayerCheck, SelfCheck, Understood, require_same_weights, understand

__all__ = [
    "ALIASES",
    "Capture",
    "Estimate",
    "HarvestConfig",
    "HarvestError",
    "HarvestResult",
    "LanguageModel",
    "LayerCheck",
    "Loaded",
    "Plan",
    "Progress",
    "Reading",
    "SelfCheck",
    "Understood",
    "attention_names",
    "harvest",
    "load_by_name",
    "load_config",
    "load_model",
    "load_tokenizer",
    "plan_harvest",
    "require_same_weights",
    "resolve",
    "starts_with_bos",
    "stored_request",
    "tokenizer_facts",
    "understand",
]
