"""A run with its store and its language model, checked to belong together."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..dictionaries.lorsa.module import Lorsa
from ..errors import AnalyzeError, HarvestError
from ..language.aliases import resolve
from ..language.blocks import AttentionSite, attention_sites
from ..language.device import choose_device
from ..language.load import load_config, load_model, load_tokenizer
from ..language.stored import require_same_weights
from ..language.tokenizer import tokenizer_facts
from ..store.read.reader import ActivationStore

Report = Callable[[str], None]


class Opened(NamedTuple):
    """A Lorsa and the store with its layer."""

    run: Path
    lorsa: Lorsa
    store: ActivationStore
    layer: int


class LanguageModel(NamedTuple):
    """The language model that a store is of."""

    model: Any
    """transformers' model"""
    sites: dict[int, AttentionSite]
    """Layers in it, by number"""
    name: str
    """What was given as --model"""


def device_for(name: str) -> str:
    """Return the device that is meant; AnalyzeError if it is not there."""
    try:
        return choose_device(name)
    except ValueError as error:
        raise AnalyzeError(str(error)) from None


def layer_of(lorsa: Lorsa, run: Path) -> int:
    """Return the layer that a Lorsa stands for.

    Raises:
        AnalyzeError: it does not say, or reads something else than that layer's input.
    """
    if lorsa.config.layer is None:
        raise AnalyzeError(f"{run} does not say which layer it replaces")
    if lorsa.config.hook_in is not None:
        raise AnalyzeError(
            f"{run} reads {lorsa.config.hook_in}, not the layer's input after the norm's weight; "
            f"type: lorsa convert {run} FOLDER --model MODEL"
        )
    return lorsa.config.layer


def open_run(run: Path, store: ActivationStore, device: str) -> Opened:
    """Load the Lorsa of a run, after checking that the store has its layer.

    Raises:
        CheckpointError: the run holds no Lorsa.
        StoreError: the store lacks the layer.
        AnalyzeError: the Lorsa is of another model, or says of no layer.
    """
    lorsa = Lorsa.from_pretrained(run)
    layer = layer_of(lorsa, run)
    store.require_layer(layer)
    shape, manifest = lorsa.config, store.manifest
    same_model = shape.store_uuid == manifest.uuid or shape.base_model == manifest.model["id"]
    if not same_model or shape.d_model != manifest.d_model:
        raise AnalyzeError(
            f"{run} is a Lorsa of {shape.base_model} (d_model {shape.d_model}); "
            f"{store.root} holds {manifest.model['id']} (d_model {manifest.d_model})"
        )
    return Opened(run, lorsa.to(device), store, layer)


def load_language_model(
    store: ActivationStore, model: str, layers: Sequence[int], device: str, report: Report
) -> LanguageModel:
    """Load the language model that a store is of.

    Raises:
        HarvestError: it cannot be had, or the layers' weights are not those of the store.
    """
    manifest = store.manifest
    path = resolve(model)
    if path.name == manifest.model["id"]:
        path = path._replace(revision=manifest.model["revision"])
    config = load_config(path)
    report(f"loading {path.id} on {device}")
    loaded = load_model(path, config, dtype="auto", devices=[device]).model
    sites = attention_sites(loaded, sorted(set(layers)))
    require_same_weights(loaded, sites, store.root, manifest)
    return LanguageModel(loaded, {site.layer: site for site in sites}, model)


def load_store_tokenizer(
    store: ActivationStore, subject: LanguageModel | None, report: Report
) -> Any:
    """Return the tokenizer of a store's text, or None, said, where it cannot be had."""
    manifest = store.manifest
    wanted = manifest.tokenizer.get("vocabulary_sha256")
    if wanted is None:
        return None
    name = subject.name if subject is not None else manifest.request.get("model", "")
    try:
        tokenizer = load_tokenizer(resolve(name), needed=False)
    except HarvestError:
        tokenizer = None
    if tokenizer is None or tokenizer_facts(tokenizer)["vocabulary_sha256"] != wanted:
        report(f"the tokenizer of {manifest.model['id']} is not at hand: token ids are shown")
        return None
    return tokenizer
