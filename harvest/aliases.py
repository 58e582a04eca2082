"""What `--model` takes: short names, Hub ids, folders and .gguf files."""

import difflib
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from .errors import HarvestError

ALIASES = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "qwen2-0.5b": "Qwen/Qwen2-0.5B",
    "qwen2-1.5b": "Qwen/Qwen2-1.5B",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "qwen2-72b": "Qwen/Qwen2-72B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B-Base",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}

HUB_TIMEOUT_S = 10


class ModelPath(NamedTuple):
    """Where transformers finds a model."""

    name: str
    """Hub id or folder"""
    gguf_file: str | None = None
    """File in the folder, for GGUF models"""
    revision: str | None = None
    """Commit, for models of the Hub"""
    offline: bool = False
    """Whether only files that are already on this machine may be used"""

    @property
    def id(self) -> str:
        """Return what to type for this model again."""
        return self.name if self.gguf_file is None else str(Path(self.name) / self.gguf_file)


def resolve(model: str) -> ModelPath:
    """Turn what was given as --model into what transformers loads.

    Args:
        model: an alias, a Hub id, a folder, or a .gguf file.

    Raises:
        HarvestError: none of these.
    """
    path = Path(model).expanduser()
    if not model.strip():
        raise HarvestError("model is empty; give an alias, a Hub id, a folder, or a .gguf file")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise HarvestError(f"model {model}: no such file")
        return ModelPath(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HarvestError(f"model {model}: the folder has no config.json of transformers")
        return ModelPath(str(path))
    if path.is_file():
        raise HarvestError(f"model {model} is a file; give a folder of transformers or a .gguf")
    if model.lower() in ALIASES:
        return _pin(ALIASES[model.lower()])
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _pin(model)
    if "/" in model or path.suffix:
        raise HarvestError(f"model {model}: no such folder")
    near = difflib.get_close_matches(model.lower(), ALIASES, n=3, cutoff=0.4) or sorted(ALIASES)[:3]
    raise HarvestError(
        f"model {model!r} is no known alias; did you mean {', '.join(near)}? "
        "Give an alias, a Hub id (owner/name), a folder, or a .gguf file"
    )


def canonical(model: str) -> str:
    """Return one spelling of a --model: the Hub id of an alias, the absolute path of a file."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else ALIASES.get(model.lower(), model)


def _pin(hub_id: str) -> ModelPath:
    """Return a Hub model at its present commit; without a network, at what is cached here.

    Asked once, so that no network shows at once instead of after transformers' many retries.
    """
    try:
        return ModelPath(hub_id, revision=HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S).sha)
    except RepositoryNotFoundError:
        raise HarvestError(
            f"model {hub_id} is not on the Hub, or is private: check the spelling, "
            "or run: hf auth login"
        ) from None
    except HfHubHTTPError as error:
        raise HarvestError(f"model {hub_id}: the Hub answered {_first_line(error)}") from None
    except HFValidationError as error:
        raise HarvestError(f"model {hub_id}: {_first_line(error)}") from None
    except Exception:  # the HTTP library, and so its errors, change with the version of the Hub's
        return ModelPath(hub_id, offline=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
