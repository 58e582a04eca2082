"""A run with its store and, if asked for, its language model, checked to belong together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..harvest import (
    AttentionSite,
    HarvestError,
    attention_sites,
    load_config,
    load_model,
    load_tokenizer,
    require_same_weights,
    resolve,
    tokenizer_facts,
)
from ..model import Lorsa
from ..store import ActivationStore, Place
from .errors import AnalyzeError


class Opened(NamedTuple):
    """A Lorsa and the store with its layer."""

    lorsa: Lorsa
    store: ActivationStore
    layer: int


class Subject(NamedTuple):
    """The language model that a Lorsa's layer is of."""

    model: Any
    """transformers' model"""
    site: AttentionSite
    """The layer in it"""
    name: str
    """What was given as --model"""


def open_run(run: Path, store: Place) -> Opened:
    """Open a run and a store.

    Raises:
        CheckpointError: the run holds no Lorsa.
        StoreError: the store cannot be read, or lacks the layer.
        AnalyzeError: the Lorsa is of another model, or says of no layer.
    """
    lorsa = Lorsa.from_pretrained(run)
    opened = ActivationStore.open(store)
    shape, manifest = lorsa.config, opened.manifest
    if shape.layer is None:
        raise AnalyzeError(f"{run} does not say which layer it replaces")
    opened.require_layer(shape.layer)
    same_model = shape.store_uuid == manifest.uuid or shape.base_model == manifest.model["id"]
    if not same_model or shape.d_model != manifest.d_model:
        raise AnalyzeError(
            f"{run} is a Lorsa of {shape.base_model} (d_model {shape.d_model}); "
            f"{store} holds {manifest.model['id']} (d_model {manifest.d_model})"
        )
    return Opened(lorsa, opened, shape.layer)


def load_language_model(
    opened: Opened, model: str, device: str, report: Callable[[str], None]
) -> Subject:
    """Load the language model of a run's layer.

    Raises:
        HarvestError: it cannot be had, or its attention weights are not those of the store.
    """
    manifest = opened.store.manifest
    path = resolve(model)
    config = load_config(path)
    if path.name == manifest.model["id"]:
        path = path._replace(revision=manifest.model["revision"])
    report(f"loading {path.id} on {device}")
    loaded = load_model(path, config, dtype="auto", devices=[device]).model
    sites = attention_sites(loaded, [opened.layer])
    require_same_weights(loaded, sites, opened.store.root, manifest)
    return Subject(loaded, sites[0], model)


def load_store_tokenizer(
    store: ActivationStore, subject: Subject | None, report: Callable[[str], None]
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
