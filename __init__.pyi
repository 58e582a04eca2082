"""Public names, for type checkers; made by tests/stub.py from the table in __init__.py."""

from .analyze.config import AnalyzeConfig
from .analyze.explain.config import ExplainConfig
from .analyze.explain.explain import explain as explain_heads
from .analyze.explain.explain import estimate as plan_explanations
from .analyze.features import analyze_run as analyze_lorsa
from .analyze.find import find_heads
from .analyze.result import Analysis
from .circuits.ablate import ablate as ablate_heads
from .circuits.config import AblateConfig
from .circuits.intervene import intervene
from .circuits.tracing.config import TraceConfig
from .circuits.tracing.files import Trace
from .circuits.tracing.files import read_trace
from .circuits.tracing.trace import trace as trace_prompt
from .demo import run_demo
from .dictionaries.kinds import load
from .dictionaries.linear_config import SaeConfig
from .dictionaries.linear_config import TranscoderConfig
from .dictionaries.lorsa.config import LorsaConfig
from .dictionaries.lorsa.module import Lorsa
from .dictionaries.sae import Sae
from .dictionaries.transcoder import Transcoder
from .errors import AnalyzeError
from .errors import AttachError
from .errors import CheckpointError
from .errors import ExchangeError
from .errors import HarvestError
from .errors import LanguageModelError
from .errors import LorsaError
from .errors import PublishError
from .errors import StoreError
from .errors import TrainError
from .evaluate.config import EvalConfig
from .evaluate.evaluate import evaluate_run as evaluate_lorsa
from .evaluate.evaluate import evaluate_runs as evaluate_lorsas
from .exchange.config import ConvertConfig
from .exchange.convert import convert as convert_lorsa
from .harvest.config import HarvestConfig
from .harvest.harvest import harvest as harvest_activations
from .harvest.harvest import plan_harvest
from .language.subject import load_language_model
from .publish.config import PushConfig
from .publish.push import push as push_lorsas
from .sites import Ports
from .sites import Site
from .sites import attention_ports
from .sites import ports_between
from .store.care.info import store_info
from .store.care.merge import merge_stores
from .store.care.remove import remove_sites
from .store.care.repair import verify_store
from .store.read.reader import ActivationStore
from .train.config import TrainConfig
from .train.sweep import sweep_grid as sweep_lorsas
from .train.train import train as train_lorsa
from .train.train import train_many as train_lorsas
from .verify import verify_paths
from .view.build import build_page
from .view.serve import PageServer
from .version import __version__

PUBLIC: dict[str, str]

__all__ = [
    "__version__",
    "AblateConfig",
    "ActivationStore",
    "Analysis",
    "AnalyzeConfig",
    "AnalyzeError",
    "AttachError",
    "CheckpointError",
    "ConvertConfig",
    "EvalConfig",
    "ExchangeError",
    "ExplainConfig",
    "HarvestConfig",
    "HarvestError",
    "LanguageModelError",
    "Lorsa",
    "LorsaConfig",
    "LorsaError",
    "PageServer",
    "Ports",
    "PublishError",
    "PushConfig",
    "Sae",
    "SaeConfig",
    "Site",
    "StoreError",
    "Trace",
    "TraceConfig",
    "TrainConfig",
    "TrainError",
    "Transcoder",
    "TranscoderConfig",
    "ablate_heads",
    "analyze_lorsa",
    "attention_ports",
    "build_page",
    "convert_lorsa",
    "evaluate_lorsa",
    "evaluate_lorsas",
    "explain_heads",
    "find_heads",
    "harvest_activations",
    "intervene",
    "load",
    "load_language_model",
    "merge_stores",
    "plan_explanations",
    "plan_harvest",
    "ports_between",
    "push_lorsas",
    "read_trace",
    "remove_sites",
    "run_demo",
    "store_info",
    "sweep_lorsas",
    "trace_prompt",
    "train_lorsa",
    "train_lorsas",
    "verify_paths",
    "verify_store",
]
