"""Low-Rank Sparse Attention: activations stored once, Lorsas trained, their heads read.

Names are loaded when they are first used, so `import lorsa` and `lorsa --help` load no torch. None
is that of a folder: `lorsa.harvest` and `lorsa.train` are packages, and what their commands do is
`lorsa.harvest_activations` and `lorsa.train_lorsa`. docs/api.md has an example of each.

`PUBLIC` is the one list of names; `__init__.pyi` says the same to type checkers and is made from it
by `python tests/stub.py`.
"""

from importlib import import_module
from typing import Any

PUBLIC = {
    "AblateConfig": "circuits.config.AblateConfig",
    "ActivationStore": "store.read.reader.ActivationStore",
    "Analysis": "analyze.result.Analysis",
    "AnalyzeConfig": "analyze.config.AnalyzeConfig",
    "AnalyzeError": "errors.AnalyzeError",
    "AttachError": "errors.AttachError",
    "CheckpointError": "errors.CheckpointError",
    "ConvertConfig": "exchange.config.ConvertConfig",
    "EvalConfig": "evaluate.config.EvalConfig",
    "ExchangeError": "errors.ExchangeError",
    "ExplainConfig": "analyze.explain.config.ExplainConfig",
    "HarvestConfig": "harvest.config.HarvestConfig",
    "HarvestError": "errors.HarvestError",
    "LanguageModelError": "errors.LanguageModelError",
    "Lorsa": "dictionaries.lorsa.module.Lorsa",
    "LorsaConfig": "dictionaries.lorsa.config.LorsaConfig",
    "LorsaError": "errors.LorsaError",
    "PageServer": "view.serve.PageServer",
    "Ports": "sites.Ports",
    "PublishError": "errors.PublishError",
    "PushConfig": "publish.config.PushConfig",
    "Sae": "dictionaries.sae.Sae",
    "SaeConfig": "dictionaries.linear_config.SaeConfig",
    "Site": "sites.Site",
    "StoreError": "errors.StoreError",
    "Trace": "circuits.tracing.files.Trace",
    "TraceConfig": "circuits.tracing.config.TraceConfig",
    "TrainConfig": "train.config.TrainConfig",
    "TrainError": "errors.TrainError",
    "Transcoder": "dictionaries.transcoder.Transcoder",
    "TranscoderConfig": "dictionaries.linear_config.TranscoderConfig",
    "ablate_heads": "circuits.ablate.ablate",
    "analyze_lorsa": "analyze.features.analyze_run",
    "attention_ports": "sites.attention_ports",
    "build_page": "view.build.build_page",
    "convert_lorsa": "exchange.convert.convert",
    "evaluate_lorsa": "evaluate.evaluate.evaluate_run",
    "evaluate_lorsas": "evaluate.evaluate.evaluate_runs",
    "explain_heads": "analyze.explain.explain.explain",
    "find_heads": "analyze.find.find_heads",
    "harvest_activations": "harvest.harvest.harvest",
    "intervene": "circuits.intervene.intervene",
    "load": "dictionaries.kinds.load",
    "load_language_model": "language.subject.load_language_model",
    "merge_stores": "store.care.merge.merge_stores",
    "plan_explanations": "analyze.explain.explain.estimate",
    "plan_harvest": "harvest.harvest.plan_harvest",
    "ports_between": "sites.ports_between",
    "push_lorsas": "publish.push.push",
    "read_trace": "circuits.tracing.files.read_trace",
    "remove_sites": "store.care.remove.remove_sites",
    "run_demo": "demo.run_demo",
    "store_info": "store.care.info.store_info",
    "sweep_lorsas": "train.sweep.sweep_grid",
    "trace_prompt": "circuits.tracing.trace.trace",
    "train_lorsa": "train.train.train",
    "train_lorsas": "train.train.train_many",
    "verify_paths": "verify.verify_paths",
    "verify_store": "store.care.repair.verify_store",
}
"""Each public name, and where it is defined: module.name."""

_HOMES = {"__version__": "version.__version__", **PUBLIC}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOMES[name].rpartition(".")
    return getattr(import_module(f".{module}", __name__), there)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
