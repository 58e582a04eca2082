"""A run with its store and its language model, checked to belong together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..dictionaries.attach import require_site_read
from ..dictionaries.dictionary import Dictionary
from ..dictionaries.kinds import load
from ..dictionaries.lorsa.module import Lorsa
from ..errors import AnalyzeError, LanguageModelError
from ..language.blocks import AttentionSite, attention_sites
from ..language.device import choose_device
from ..language.same import require_same_weights
from ..language.subject import Subject
from ..language.tokenizer import tokenizer_facts
from ..progress import Report
from ..sites import Ports
from ..store.read.reader import ActivationStore


class Opened(NamedTuple):
    """A dictionary and the store with its sites."""

    run: Path
    dictionary: Dictionary
    store: ActivationStore
    layer: int

    @property
    def ports(self) -> Ports:
        """Sites that it reads and writes."""
        return self.dictionary.config.ports

    @property
    def name(self) -> str:
        """What it is of, in a word or two: layer 12 of a Lorsa, else 12.mlp or 12.resid_out."""
        return self.dictionary.config.place.replace("-", " ")

    @property
    def lorsa(self) -> Lorsa:
        """The dictionary of a run that `open_run` required to hold a Lorsa."""
        assert isinstance(self.dictionary, Lorsa)
        return self.dictionary


class LanguageModel(NamedTuple):
    """The language model that a store is of, loaded."""

    model: Any
    """transformers' model"""
    sites: dict[int, AttentionSite]
    """Attention layers by number, of the layers whose attention the store knows"""
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


def layer_of(dictionary: Dictionary, run: Path) -> int:
    """Return the layer at which a dictionary lies.

    Raises:
        AnalyzeError: it does not say, or reads something else than its site.
    """
    if dictionary.config.layer is None:
        raise AnalyzeError(f"{run} does not say which layer it replaces")
    require_site_read(dictionary.config, run, AnalyzeError)
    return dictionary.config.layer


def open_run(
    run: Path, store: ActivationStore, device: str, *, needs_lorsa: bool = False
) -> Opened:
    """Load the dictionary of a run, after checking that the store has its sites.

    Args:
        run: its folder.
        store: store with its sites.
        device: device to put it on.
        needs_lorsa: whether to refuse other kinds.

    Raises:
        CheckpointError: the run holds no dictionary.
        StoreError: the store lacks a site; the message says how to add it.
        AnalyzeError: the dictionary is of another model, of another revision of it, or says of no
            layer; or it is of another kind than is needed.
    """
    dictionary = load(run)
    if needs_lorsa and not isinstance(dictionary, Lorsa):
        title = dictionary.config.title
        raise AnalyzeError(
            f"{run} holds {title}, and only Lorsas are analysed; lorsa eval and lorsa ablate take "
            f"{title} too"
        )
    opened = Opened(run, dictionary, store, layer_of(dictionary, run))
    store.require_sites(opened.ports.sites)
    _require_same_model(opened)
    return opened._replace(dictionary=dictionary.to(device))


def _require_same_model(opened: Opened) -> None:
    """Raise AnalyzeError unless dictionary and store are of the same model and revision of it."""
    run, store = opened.run, opened.store
    shape, manifest = opened.dictionary.config, store.manifest
    same_store = shape.store_uuid == manifest.uuid
    same_model = same_store or shape.base_model == manifest.model["id"]
    width = store.width(opened.ports.reads[0])
    if not same_model or shape.d_model != width:
        raise AnalyzeError(
            f"{run} is {shape.title} of {shape.base_model} (d_model {shape.d_model}); "
            f"{store.root} holds {manifest.model['id']} (d_model {width})"
        )
    ours, theirs = shape.base_revision, manifest.model.get("revision")
    if not same_store and None not in (ours, theirs) and ours != theirs:
        raise AnalyzeError(
            f"{run} is {shape.title} of revision {ours} of {shape.base_model}; {store.root} holds "
            f"revision {theirs}: give a store of the {shape.noun}'s revision, or train on this one"
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
    known = [n for n in sorted(set(layers)) if f"{n}.attention" in manifest.modules]
    sites = attention_sites(loaded, known)
    require_same_weights(loaded, sorted(set(layers)), store.root, manifest)
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
