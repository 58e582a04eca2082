"""Low-Rank Sparse Attention: harvest a model's attention, train Lorsas on it, read their heads.

Names are loaded when they are first used, so `import lorsa` and `lorsa --help` load no torch. None
is that of a folder: `lorsa.harvest` and `lorsa.train` are packages, and what their commands do is
`lorsa.harvest_activations` and `lorsa.train_lorsa`. docs/api.md has an example of each.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same as _HOMES, for type checkers
    from .analyze import (
        AblateConfig,
        Analysis,
        AnalyzeConfig,
        AnalyzeError,
        EvalConfig,
        ExplainConfig,
        find_heads,
    )
    from .analyze import analyze_run as analyze_lorsa
    from .analyze import estimate as plan_explanations
    from .analyze import evaluate_run as evaluate_lorsa
    from .analyze import evaluate_runs as evaluate_lorsas
    from .analyze.ablate import ablate as ablate_heads
    from .analyze.explain import explain as explain_heads
    from .analyze.intervene import intervene
    from .demo import run_demo
    from .errors import LorsaError
    from .exchange import ConvertConfig, ExchangeError
    from .exchange.convert import convert as convert_lorsa
    from .harvest import HarvestConfig, HarvestError, plan_harvest
    from .harvest import harvest as harvest_activations
    from .harvest import load_by_name as load_language_model
    from .model import AttachError, CheckpointError, Lorsa, LorsaConfig
    from .publish import PublishError, PushConfig
    from .publish.push import push as push_lorsas
    from .store import (
        ActivationStore,
        StoreError,
        merge_stores,
        remove_layers,
        store_info,
        verify_store,
    )
    from .train import TrainConfig, TrainError
    from .train import sweep_grid as sweep_lorsas
    from .train import train as train_lorsa
    from .train import train_many as train_lorsas
    from .view import PageServer, build_page

_HOMES = {
    "AblateConfig": "analyze.AblateConfig",
    "ActivationStore": "store.ActivationStore",
    "Analysis": "analyze.Analysis",
    "AnalyzeConfig": "analyze.AnalyzeConfig",
    "AnalyzeError": "analyze.AnalyzeError",
    "AttachError": "model.AttachError",
    "CheckpointError": "model.CheckpointError",
    "ConvertConfig": "exchange.ConvertConfig",
    "EvalConfig": "analyze.EvalConfig",
    "ExchangeError": "exchange.ExchangeError",
    "ExplainConfig": "analyze.ExplainConfig",
    "HarvestConfig": "harvest.HarvestConfig",
    "HarvestError": "harvest.HarvestError",
    "Lorsa": "model.Lorsa",
    "LorsaConfig": "model.LorsaConfig",
    "LorsaError": "errors.LorsaError",
    "PageServer": "view.PageServer",
    "PublishError": "publish.PublishError",
    "PushConfig": "publish.PushConfig",
    "StoreError": "store.StoreError",
    "TrainConfig": "train.TrainConfig",
    "TrainError": "train.TrainError",
    "ablate_heads": "analyze.ablate.ablate",
    "analyze_lorsa": "analyze.analyze_run",
    "build_page": "view.build_page",
    "convert_lorsa": "exchange.convert.convert",
    "evaluate_lorsa": "analyze.evaluate_run",
    "evaluate_lorsas": "analyze.evaluate_runs",
    "explain_heads": "analyze.explain.explain",
    "find_heads": "analyze.find_heads",
    "harvest_activations": "harvest.harvest",
    "intervene": "analyze.intervene.intervene",
    "load_language_model": "harvest.load_by_name",
    "merge_stores": "store.merge_stores",
    "plan_explanations": "analyze.estimate",
    "plan_harvest": "harvest.plan_harvest",
    "push_lorsas": "publish.push.push",
    "remove_layers": "store.remove_layers",
    "run_demo": "demo.run_demo",
    "store_info": "store.store_info",
    "sweep_lorsas": "train.sweep_grid",
    "train_lorsa": "train.train",
    "train_lorsas": "train.train_many",
    "verify_store": "store.verify_store",
}
"""Where each public name is: module.name."""

__all__ = [
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
    "Lorsa",
    "LorsaConfig",
    "LorsaError",
    "PageServer",
    "PublishError",
    "PushConfig",
    "StoreError",
    "TrainConfig",
    "TrainError",
    "__version__",
    "ablate_heads",
    "analyze_lorsa",
    "build_page",
    "convert_lorsa",
    "evaluate_lorsa",
    "evaluate_lorsas",
    "explain_heads",
    "find_heads",
    "harvest_activations",
    "intervene",
    "load_language_model",
    "merge_stores",
    "plan_explanations",
    "plan_harvest",
    "push_lorsas",
    "remove_layers",
    "run_demo",
    "store_info",
    "sweep_lorsas",
    "train_lorsa",
    "train_lorsas",
    "verify_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOMES[name].rpartition(".")
    return getattr(import_module(f".{module}", __name__), there)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
