"""Plan of a command: which dictionaries it trains of a store, and into which folders."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..dictionaries.choices import ports_of
from ..errors import StoreError
from ..sites import SITE_NAMES, Site, parse_site_names, spell_site_names
from ..store.facts import StoreFacts
from ..store.spelling import names_of, spell_sites
from .recipe import ALL, DEFAULTS, kinds_of, kinds_with

Settings = Mapping[str, Any]
"""Settings of runs, by the names that they have in TrainConfig"""


def plan_runs(
    settings: Settings, store: StoreFacts, layers: Sequence[int] | None, out: Path
) -> list[dict[str, Any]]:
    """Return the settings of each run that is asked for, layer by layer.

    Args:
        settings: what was given for all of them. `kind` may be "all", every kind whose sites a
            layer has, and `site` several names joined by commas, an SAE each.
        store: the store that is trained on.
        layers: layers that are asked for; None takes those that have the sites.
        out: folder in which the runs' folders lie.

    Raises:
        StoreError: the store lacks the sites; the message says how to add them.
        ValueError: a kind or site is unknown, or a setting is of a kind that is not trained.
    """
    asked = [run for layer in layers or store.layers for run in _of_layer(settings, layer)]
    lacking = {site for run in asked for site in sites_of(run) if not store.has(site)}
    there = [run for run in asked if lacking.isdisjoint(sites_of(run))]
    if not there and settings.get("kind") == ALL:
        raise StoreError(_nothing_for_all(store, layers or store.layers, lacking))
    if lacking and (not there or (layers is not None and settings.get("kind") != ALL)):
        store.require_sites(lacking)
    kinds = {str(run["kind"]) for run in there}
    for name in settings:
        if kinds.isdisjoint(kinds_with(name)):
            theirs = [run for run in asked if run["kind"] in kinds_with(name)]
            store.require_sites({site for run in theirs for site in sites_of(run)})
            raise ValueError(
                f"{name} is a setting of kind {' and '.join(kinds_with(name))}, and only kind "
                f"{' and '.join(sorted(kinds))} is trained here: leave it out"
            )
    return [{**run, "out": out / folder_name(run)} for run in there]


def _nothing_for_all(store: StoreFacts, layers: Sequence[int], lacking: Collection[Site]) -> str:
    """Return the message on layers that have the default sites of no kind."""
    have = [site for site in store.sites if site.layer in layers]
    return (
        f"--kind all finds the sites of no kind in {store.root}, which has "
        f"{spell_sites(have, named=True)}: give --kind sae --site "
        f"{spell_site_names(names_of(have))}, or {store.adding(lacking, word='them')}"
    )


def layers_with(store: StoreFacts, runs: Sequence[Settings]) -> list[int]:
    """Return the layers of a store that have the sites of any of some runs; all, if none has."""
    found = [n for n in store.layers if any(has_sites(store, run, n) for run in runs)]
    return found or store.layers


def has_sites(store: StoreFacts, run: Settings, layer: int | None = None) -> bool:
    """Return whether a store has the sites of a run, at its own layer or another."""
    return all(map(store.has, sites_of(run, layer)))


def sites_of(run: Settings, layer: int | None = None) -> tuple[Site, ...]:
    """Return the sites of a run, at its own layer or another; none where they are unknown."""
    kind = run.get("kind", "lorsa")
    site = run.get("site") or DEFAULTS.get(kind, {}).get("site")
    if kind not in DEFAULTS or site not in (None, *SITE_NAMES):
        return ()
    return ports_of(kind, run["layer"] if layer is None else layer, site).sites


def folder_name(run: Settings) -> str:
    """Return the name of a run's folder: layer-12 of a Lorsa, else 12.mlp or 12.resid_out."""
    if run["kind"] == "lorsa":
        return f"layer-{run['layer']}"
    return f"{run['layer']}.{run.get('site') or 'mlp'}"


def _of_layer(settings: Settings, layer: int) -> Iterator[dict[str, Any]]:
    """Yield the runs of a layer, each with the settings that its kind has."""
    for kind in kinds_of(settings.get("kind", "lorsa")):
        own = {name: value for name, value in settings.items() if kind in kinds_with(name)}
        run = own | {"kind": kind, "layer": layer}
        if kind != "sae":
            yield run
            continue
        for site in parse_site_names(settings.get("site") or DEFAULTS[kind]["site"]):
            yield run | {"site": site}
