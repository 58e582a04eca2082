"""A run with its store and its language model, checked to belong together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..dictionaries.attach import require_site_read
from ..dictionaries.lorsa.module import Lorsa
from ..errors import AnalyzeError, LanguageModelError
from ..language.blocks import AttentionSite, attention_sites
from ..language.device import choose_device
from ..language.selfcheck import require_same_weights
from ..language.subject import Subject
from ..language.tokenizer import tokenizer_facts
from ..progress import Report
from ..sites import Site, attention_ports
from ..store.read.reader import ActivationStore


class Opened(NamedTuple):
    """A Lorsa and the store with its layer."""

    run: Path
    lorsa: Lorsa
    store: ActivationStore
    layer: int


class LanguageModel(NamedTuple):
    """The language model that a store is of, loaded."""

    model: Any
    """transformers' model"""
    sites: dict[int, AttentionSite]
    """Attention layers by number"""
    subject: Subject
    """Configuration and tokenizer of the model"""


def device_for(name: str) -> str:
    """Return the device that is meant.

    Raises:
        AnalyzeError: it is not there.
    """
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
    require_site_read(lorsa.config, run, AnalyzeError)
    return lorsa.config.layer


def open_run(run: Path, store: ActivationStore, device: str) -> Opened:
    """Load the Lorsa of a run, after checking that the store has its layer.

    Raises:
        CheckpointError: the run holds no Lorsa.
        StoreError: the store lacks the layer.
        AnalyzeError: the Lorsa is of another model, of another revision of it, or says of no layer.
    """
    lorsa = Lorsa.from_pretrained(run)
    layer = layer_of(lorsa, run)
    store.require_sites(attention_ports(layer).sites)
    _require_same_model(lorsa, run, store, layer)
    return Opened(run, lorsa.to(device), store, layer)


def _require_same_model(lorsa: Lorsa, run: Path, store: ActivationStore, layer: int) -> None:
    """Raise AnalyzeError unless a Lorsa and a store are of the same model and revision of it."""
    shape, manifest = lorsa.config, store.manifest
    same_store = shape.store_uuid == manifest.uuid
    same_model = same_store or shape.base_model == manifest.model["id"]
    width = store.width(Site(layer, "attn_in"))
    if not same_model or shape.d_model != width:
        raise AnalyzeError(
            f"{run} is a Lorsa of {shape.base_model} (d_model {shape.d_model}); "
            f"{store.root} holds {manifest.model['id']} (d_model {width})"
        )
    ours, theirs = shape.base_revision, manifest.model.get("revision")
    if not same_store and None not in (ours, theirs) and ours != theirs:
        raise AnalyzeError(
            f"{run} is a Lorsa of revision {ours} of {shape.base_model}; {store.root} holds "
            f"revision {theirs}: give a store of the Lorsa's revision, or train on this one"
        )


def load_store_model(
    store: ActivationStore, model: str, layers: Sequence[int], device: str, report: Report
) -> LanguageModel:
    """Load the language model that a store is of, at the store's revision.

    Raises:
        LanguageModelError: it cannot be loaded, or the layers' weights are not those of the store.
    """
    manifest = store.manifest
    subject = Subject.find(model, revisions=_revisions(store))
    for line in subject.left_out():
        report(line)
    report(f"loading {subject.id} on {device}")
    loaded = subject.load(devices=[device])
    sites = attention_sites(loaded, sorted(set(layers)))
    require_same_weights(loaded, sites, store.root, manifest)
    return LanguageModel(loaded, {site.layer: site for site in sites}, subject)


def load_store_tokenizer(
    store: ActivationStore, language: LanguageModel | None, report: Report
) -> Any:
    """Return the tokenizer of a store's text; None, and a report, where there is none to be had.

    Args:
        store: whose text it is.
        language: the store's language model, where it is loaded; None finds its tokenizer alone.
        report: is called with a line of text.
    """
    manifest = store.manifest
    wanted = manifest.tokenizer.get("vocabulary_sha256")
    if wanted is None:
        return None
    tokenizer = _tokenizer(store) if language is None else language.subject.tokenizer(needed=False)
    if tokenizer is None or tokenizer_facts(tokenizer)["vocabulary_sha256"] != wanted:
        report(f"the tokenizer of {manifest.model['id']} is not at hand: token ids are shown")
        return None
    return tokenizer


def _tokenizer(store: ActivationStore) -> Any:
    """Return the tokenizer of the model that a store was harvested from, None without one."""
    try:
        subject = Subject.find(store.manifest.request.get("model", ""), revisions=_revisions(store))
    except LanguageModelError:
        return None
    return subject.tokenizer(needed=False)


def _revisions(store: ActivationStore) -> dict[str | None, str | None]:
    """Return the commit of the language model that a store was harvested from, by its Hub id."""
    model = store.manifest.model
    return {model["id"]: model.get("revision")}
