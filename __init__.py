"""Low-Rank Sparse Attention: harvest a model's attention, train Lorsas on it, read their heads.

Names are loaded when they are first used, so `import lorsa` and `lorsa --help` load no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .model import Lorsa, LorsaConfig
    from .store import ActivationStore

_HOMES = {"Lorsa": "model", "LorsaConfig": "model", "ActivationStore": "store"}

__all__ = ["ActivationStore", "Lorsa", "LorsaConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
