"""Parts of a stranger's model besides its weights: code is never run, adapters are refused.

A model's files may name Python code for its configuration, model, tokenizer or generation
(`auto_map`), a kernel of the Hub for its attention, and an adapter (PEFT). transformers asks on the
terminal whether to run the first, downloads the second, and passes the third over without a word
where the package peft is missing.
"""

from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_leaves
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import LanguageModelError
from ..reading import read_json
from .aliases import ModelPath

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
"""Settings of transformers' configs that may name a kernel to download."""


def require_no_adapter(path: ModelPath) -> None:
    """Raise LanguageModelError if there is an adapter beside a model, or in its place."""
    folder = Path(path.name)
    if folder.is_dir():
        found = next((name for name in ADAPTER_FILES if (folder / name).exists()), None)
        base = _base_of(folder / ADAPTER_FILES[0])
    else:
        file = _on_the_hub(path)
        found, base = (None, None) if file is None else (file.name, _base_of(file))
    if found is not None:
        raise LanguageModelError(
            f"model {path.id} has an adapter ({found}{'' if base is None else f', of {base}'}), "
            "which lorsa does not apply: merge it into its model (merge_and_unload of the package "
            "peft, then save_pretrained) and give that folder, or move the adapter away"
        )


def _on_the_hub(path: ModelPath) -> Path | None:
    """Return the configuration of an adapter in a repository; None if it is not known of one."""
    try:
        file = find_adapter_config_file(
            path.name, revision=path.revision, local_files_only=path.offline
        )
    except Exception:  # no such repository, no network: the model's own files say it better
        return None
    return None if file is None else Path(file)


def _base_of(file: Path) -> str | None:
    """Return the model that an adapter's configuration names, fit to print."""
    try:
        named = read_json(file, constant=float)["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return repr(named)[1:-1][:100] if isinstance(named, str) else None


def own_code(config: Any) -> list[str]:
    """Return the files of code that a transformers config or a tokenizer's settings name.

    Args:
        config: transformers' config, or the settings of a tokenizer, a dict where they are whole.
    """
    settings = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    names = tree_leaves(settings.get("auto_map"))
    files = {name.split("--")[-1].split(".")[0] for name in names if isinstance(name, str)}
    return sorted(f"{repr(file)[1:-1][:60]}.py" for file in files)


def without_kernels(config: Any) -> None:
    """Take names of repositories off a config: code to compute its attention or experts with."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        for name in IMPLEMENTATIONS:
            if "/" in str(getattr(part, name, None)):
                setattr(part, name, None)
