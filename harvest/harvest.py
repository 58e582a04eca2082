"""Stage 1 of the work: run the language model once and write a store."""

import time
from dataclasses import dataclass, fields
from typing import Any

from ..errors import BegunError, DamageError, HarvestError, StoreError
from ..sites import Site, spell_site_names
from ..store.folder import (
    is_begun,
    is_complete,
    repair_command,
    require_free,
    site_options,
    sites_being_added,
)
from ..store.layers import spell_layers
from ..store.locks.lock import require_conditions
from ..store.manifest import MANIFEST, PLAN, Manifest, read_manifest
from ..store.places import Place
from ..store.read.reader import ActivationStore
from ..store.spelling import layers_of, names_of, spell_sites
from .config import HarvestConfig
from .events import HarvestReport
from .forward import free_memory
from .plan import Plan, require_same_request
from .processes import this_process, wait_for_main
from .target import asked_sites
from .ways import harvest_more, harvest_new, harvest_rest, preview, preview_more


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestResult:
    """Facts of the store that a harvest wrote."""

    store: str
    """Folder of the store."""
    model: str
    """Id of the language model."""
    layers: list[int]
    """Layers in the store."""
    sites: list[str]
    """Sites in the store, as 12.mlp_in."""
    n_seq: int
    """Sequences in the store."""
    n_tokens: int
    """Tokens in the store."""
    n_bytes: int
    """Bytes of the store's shards."""
    nonfinite_layers: list[int]
    """Layers with NaN or Inf, which cannot be trained on."""
    seconds: float
    """Seconds from the call to the end."""
    tokens_per_second: float
    """Rate of this process while the model ran; 0 if it did not have to run."""


def harvest(config: HarvestConfig, *, report: HarvestReport = lambda event: None) -> HarvestResult:
    """Write activations at sites of a language model's layers to a store.

    The same call resumes where an earlier one was stopped, shard by shard. On a finished store it
    adds the sites that are not there, for the same tokens. Several processes at once share the
    shards.

    Args:
        config: the request.
        report: is called with each event: a line of text, the `Plan`, the `SelfCheck`, the
            `BlockChecks`, the `Estimate`, the `Progress`.

    Raises:
        HarvestError: the model, the text or the request cannot be harvested.
        StoreError: the store cannot be written, or its folder holds something else.
        KeyboardInterrupt: the process was asked to stop, and has finished the shard at hand.
    """
    started = time.perf_counter()
    if not this_process().is_main:
        wait_for_main(lambda: _is_created(config), report)
    while (rate := _harvest_or_join(config, report)) is None or not _is_created(config):
        pass  # or it was unfinished without some sites, which had been removed
    store = ActivationStore.open(config.store)
    _report_outliers(store, report)
    return HarvestResult(
        store=str(config.store),
        model=store.manifest.model["id"],
        layers=store.layers,
        sites=[str(site) for site in store.sites],
        n_seq=store.manifest.n_seq,
        n_tokens=store.manifest.n_seq * store.manifest.n_ctx,
        n_bytes=store.total_bytes,
        nonfinite_layers=layers_of(filter(store.n_nonfinite, store.sites)),
        seconds=time.perf_counter() - started,
        tokens_per_second=rate,
    )


def plan_harvest(config: HarvestConfig, *, report: HarvestReport = lambda event: None) -> Plan:
    """Return what a harvest would write; nothing is written, and no weights are downloaded.

    Text and time are known where tokenizer and weights are on this machine. If the store is there
    already, the plan is of the layers that are unfinished or would be added, without their time.

    Raises:
        HarvestError, StoreError: as `harvest` does; or the store lacks nothing.
    """
    if not is_begun(config.store) and not is_complete(config.store):
        require_free(config.store)
        return preview(config, report)
    plan = _planned(config.store)
    require_same_request(config.store, plan.request, config.request())
    asked, finished = asked_sites(config, plan), _finished_sites(config.store)
    if not finished:
        _require_same_sites(config, plan, asked)
        asked = list(plan.sites)
    new = [site for site in asked if site not in finished]
    if not new:
        raise HarvestError(f"{config.store} has {spell_sites(asked)}: nothing to harvest")
    return preview_more(config, plan, new, report)


def stored_request(store: Place) -> dict[str, Any]:
    """Return the settings that a store was created with and its sites; empty if there is none.

    With them a harvest ends what is unfinished and adds nothing else.

    Raises:
        StoreError: its plan or manifest cannot be read.
    """
    if not is_begun(store) and not is_complete(store):
        return {}
    manifest = _planned(store)
    known = {field.name for field in fields(HarvestConfig)}
    request = {name: value for name, value in manifest.request.items() if name in known}
    adding = sites_being_added(store)
    layers, names = (layers_of(adding), set(names_of(adding))) if adding else _shared(manifest)
    return request | {"layers": spell_layers(layers), "sites": spell_site_names(names)}


def _shared(plan: Manifest) -> tuple[list[int], set[str]]:
    """Return layers and names by which sites of a store are asked for, and none that it has not.

    These are the names that all layers have; where there are none, those of the first layer, and
    the layers that have them.
    """
    of = {n: {site.name for site in plan.sites if site.layer == n} for n in plan.layers}
    shared = set.intersection(*of.values()) or of[plan.layers[0]]
    return [layer for layer in plan.layers if of[layer] >= shared], shared


def _harvest_or_join(config: HarvestConfig, report: HarvestReport) -> float | None:
    """Do what is left to do; None if another process has created the store, which can be joined."""
    try:
        return _harvest(config, report)
    except BegunError as error:
        report(str(error))
    free_memory()  # the model that was loaded for it
    return None


def _harvest(config: HarvestConfig, report: HarvestReport) -> float:
    """Do what is left to do for a request; return tokens per second."""
    if not is_begun(config.store) and not is_complete(config.store):
        require_free(config.store)
        require_conditions(config.store)
        return harvest_new(config, report)
    plan = _planned(config.store)
    require_same_request(config.store, plan.request, config.request())
    asked = asked_sites(config, plan)
    if not is_complete(config.store):
        _require_same_sites(config, plan, asked)
        return harvest_rest(config, report)
    finished = _finished_sites(config.store)
    new = [site for site in asked if site not in finished]
    if not _is_whole(config.store, report):
        _require_same_sites(config, plan, [*asked, *finished])
        return harvest_rest(config, report)
    if not new:
        report(f"{config.store} is already complete")
        return 0.0
    if set(plan.sites) != finished:  # new sites are being added
        _require_same_sites(config, plan, [*asked, *finished])
        return harvest_rest(config, report)
    return harvest_more(config, plan, new, report)


def _planned(store: Place) -> Manifest:
    """Return the manifest that a store will have when it is finished."""
    return read_manifest(store / (PLAN if is_begun(store) else MANIFEST))


def _finished_sites(store: Place) -> set[Site]:
    """Return the sites that a complete store has; none if it is unfinished."""
    return set(read_manifest(store / MANIFEST).sites) if is_complete(store) else set()


def _is_created(config: HarvestConfig) -> bool:
    """Whether the store is there and all sites asked for are in its plan."""
    if not is_begun(config.store) and not is_complete(config.store):
        return False
    plan = _planned(config.store)
    return set(asked_sites(config, plan)) <= set(plan.sites)


def _is_whole(store: Place, report: HarvestReport) -> bool:
    """Whether a complete store lacks no file."""
    try:
        ActivationStore.open(store)
    except DamageError as error:
        if not is_begun(store):
            raise StoreError(
                f"{error}; but its plan is gone too, so first: {repair_command(store)}"
            ) from None
        report(str(error))
        return False
    return True


def _require_same_sites(config: HarvestConfig, plan: Manifest, asked: list[Site]) -> None:
    """Raise HarvestError unless the sites asked for are those of an unfinished store.

    They are compared as they are asked for, by layers and names: some may have been removed. Where
    layers have different sites, those that `stored_request` names stand for all.
    """
    given, every = ((layers_of(sites), set(names_of(sites))) for sites in (asked, list(plan.sites)))
    if given not in (every, _shared(plan)):
        options = site_options(list(plan.sites))
        how = f"with {options}" if options else "without --layers and --sites"
        raise HarvestError(
            f"{config.store} is unfinished with {spell_sites(plan.sites)}, and what is asked for "
            f"is {spell_sites(asked)}: finish it {how}, then add others, or choose another --store"
        )


def _report_outliers(store: ActivationStore, report: HarvestReport) -> None:
    """HarvestReport the largest scale of int8, and how many tokens have NaN or Inf."""
    scales = {site: found for site in store.sites if (found := store.scales(site)) is not None}
    if scales:
        site = max(scales, key=lambda name: scales[name].largest / (scales[name].mean or 1))
        mean, largest = scales[site]
        report(
            f"int8: the largest scale is {largest:.3g}, {largest / (mean or 1):.3g} times the mean "
            f"({site}); a token's values are rounded to whole multiples of its scale"
        )
    if n_bad := sum(map(store.n_nonfinite, store.sites)):
        report(f"{n_bad:,} tokens with NaN or Inf were kept; their layers cannot be trained on")
