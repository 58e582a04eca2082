"""What a harvest runs on, known from the model's config alone: no weights are loaded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import HarvestError
from ..language.aliases import ModelPath, resolve
from ..language.families import attention_names, require_attention
from ..language.load import LanguageModel, load_config, load_model
from ..store.layers import choose_layers
from ..store.manifest import Manifest
from .config import HarvestConfig
from .processes import own_devices, this_process


class Target(NamedTuple):
    """A model and the layers of it that were asked for."""

    path: ModelPath
    model_config: Any
    """transformers' config"""
    names: dict[int, str]
    """Every layer that has attention, with the name of that module"""
    layers: list[int]
    """Those that were asked for"""
    d_model: int
    devices: list[str]
    """GPUs of this process, or the CPU"""

    def named(self, layers: Sequence[int]) -> dict[int, str]:
        """Return some layers with the names of their attention modules."""
        return {layer: self.names[layer] for layer in layers}

    def load(self, layers: Sequence[int], *, dtype: str) -> LanguageModel:
        """Load the model as far as the last of some layers."""
        return load_model(
            self.path,
            self.model_config,
            dtype=dtype,
            devices=self.devices,
            n_layers=max(layers) + 1,
        )


def find_target(config: HarvestConfig, *, revision: str | None = None) -> Target:
    """Find the model and check the request against it.

    Args:
        config: the request.
        revision: commit of the model, if it must be a certain one.

    Raises:
        HarvestError: no such model, none whose attention can be harvested, layers outside of it,
            sequences longer than it reads, or no such device.
    """
    try:
        devices = own_devices(config.device, this_process())
    except ValueError as error:
        raise HarvestError(str(error)) from None
    path = resolve(config.model)
    if revision is not None:
        path = path._replace(revision=revision)
    model_config = load_config(path)
    facts = model_config.get_text_config()
    longest = getattr(facts, "max_position_embeddings", None)
    if longest is not None and config.n_ctx > longest:
        raise HarvestError(
            f"n_ctx is {config.n_ctx}; {path.id} reads at most {longest} tokens: use --n-ctx "
            f"{longest} or less"
        )
    names = attention_names(model_config)
    among = list(names) if config.layers == "all" else range(facts.num_hidden_layers)
    layers = choose(config.layers, among, where=path.id)
    require_attention(names, layers)
    return Target(path, model_config, names, layers, facts.hidden_size, devices)


def asked_layers(config: HarvestConfig, manifest: Manifest) -> list[int]:
    """Return the layers that are asked for, of the model of a store."""
    model = manifest.model
    among = model.get("attention_layers") or range(model["n_layers"])
    return choose(config.layers, among, where=model["id"])


def choose(text: str, layers: Sequence[int], *, where: str) -> list[int]:
    """Return the layers that a text names; HarvestError if they are not there."""
    try:
        return choose_layers(text, layers, where=where)
    except ValueError as error:
        raise HarvestError(str(error)) from None
