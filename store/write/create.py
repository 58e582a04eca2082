"""Creation of a store, or of new sites of a finished one, before any shard is written.

The plan is written last. Without it, the files do not count and are created again. With it, shards
are missing, and any number of writers can join to write them. The manifest does not name sites
that are being added: readers see the old ones until the new ones are complete.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...errors import AGAIN, BegunError, StoreError, remedy_of
from ...sites import Site
from ..arrays import ArraySpec, is_int8, site_arrays, text_arrays
from ..encoding import channel_scale, to_disk
from ..entries import Entry
from ..fixed import write_array, write_documents, write_weights
from ..folder import clear, is_begun, read_folder, require_free
from ..journal import TEXT, JournalWriter, read_journal
from ..layout import create_arrays
from ..locks.lock import take_lock
from ..manifest import MANIFEST, PLAN, Manifest, read_manifest
from ..places import Place, remove_tree, sync, sync_tree, unmade_folders, write_atomically
from ..rooms import own_folders
from ..shard import ShardWriter, publish
from ..site_facts import SiteFacts, channel_of, module_place, needed_modules
from ..spelling import spell_sites

CREATE_WAIT_S = 600.0
"""Seconds to wait for another process that creates the same store or sites"""

Weights = Mapping[str, Mapping[str, Tensor]]
"""Parameters by module and name"""
Sample = Mapping[Site, Tensor]
"""Some activations of each site, [..., width]"""


def create_store(
    root: Place,
    manifest: Manifest,
    *,
    tokens: Tensor,
    documents: Tensor,
    document_names: list[str],
    weights: Weights,
    sample: Sample,
) -> None:
    """Create a new store, but for its shards; see `StoreWriter.create`."""
    shape = (manifest.n_seq, manifest.n_ctx)
    if tokens.shape != shape or documents.shape != shape:
        raise ValueError(
            f"tokens and documents are {tuple(tokens.shape)} and {tuple(documents.shape)}, "
            f"not {shape}"
        )
    _require_given(manifest, manifest.sites, manifest.modules, weights, sample)

    def require_nothing() -> None:
        try:
            require_free(root)
        except StoreError:
            if is_begun(root):
                raise BegunError(f"{root} was begun by another process; go on with it") from None
            raise

    unmade = unmade_folders(root)
    with _creating(root, require_nothing):
        clear(root)
        create_arrays(root, manifest)
        checksums = write_documents(root, document_names)
        checksums |= _write_given(root, manifest, weights, sample)
        journal = JournalWriter(root, TEXT)
        for spec, values in zip(text_arrays(manifest), (tokens, documents), strict=True):
            journal.commit(_write_text(root, manifest, spec, values))
        sync_tree(root)
        for folder in unmade:  # a power cut would take their names
            sync(folder.parent)
        write_atomically(root / PLAN, replace(manifest, checksums=checksums).to_json())


def create_sites(
    root: Place,
    sites: Mapping[Site, SiteFacts],
    modules: Mapping[str, dict[str, Any]],
    *,
    weights: Weights,
    sample: Sample,
) -> None:
    """Create new sites of a finished store, but for their shards; see `StoreWriter.add_sites`."""

    def require_new() -> None:
        folder = read_folder(root)
        if there := set(sites) & set(folder.manifest.sites):
            raise BegunError(f"{root} has {spell_sites(there)} already")
        if set(sites) <= set(folder.plan.sites):
            raise BegunError(f"{root} is given these sites by another process; go on with it")
        folder.require_finished()

    with _creating(root, require_new):
        manifest = read_manifest(root / MANIFEST)
        plan = _with_sites(manifest, sites, modules)
        new = plan.modules.keys() - manifest.modules.keys()
        own = {module: weights[module] for module in sorted(new) if module in weights}
        _require_given(plan, sites, new, own, sample)
        _remove_leftovers(root, manifest, plan, sites)
        create_arrays(root, plan, sites)
        checksums = _write_given(root, plan, own, sample)
        if manifest.is_sealed:
            plan = replace(plan, checksums=manifest.checksums | checksums)
        for folder in own_folders(root, plan, sites):
            sync_tree(folder)
            for parent in _parents(root, folder):  # a power cut would take their names
                sync(parent)
        write_atomically(root / PLAN, plan.to_json())


def _with_sites(
    manifest: Manifest, sites: Mapping[Site, SiteFacts], modules: Mapping[str, dict[str, Any]]
) -> Manifest:
    """Return the facts of a store that has more sites; modules that it has stay what they are."""
    every = {**manifest.sites, **sites}
    every = dict(sorted(every.items(), key=lambda each: each[0].place))
    known = {**modules, **manifest.modules}
    needed = needed_modules(every, known)
    return replace(
        manifest,
        sites=every,
        modules={name: known[name] for name in sorted(needed, key=module_place)},
    )


def _parents(root: Place, folder: Place) -> list[Place]:
    """Return the folders between a folder and the store that it lies in, both left out."""
    found = []
    while (folder := folder.parent) != root:
        found.append(folder)
    return found


@contextmanager
def _creating(root: Place, require: Callable[[], None]) -> Iterator[None]:
    """Hold the lock during a block, if it may run: others may have been quicker."""
    lock = take_lock(root, wait_s=CREATE_WAIT_S, unless=require)
    try:
        require()
        yield
    except OSError as error:
        remedy = remedy_of(error) or AGAIN
        raise StoreError(f"{root} cannot be written ({error.strerror}); {remedy}") from None
    finally:
        lock.release()


def _remove_leftovers(
    root: Place, manifest: Manifest, plan: Manifest, sites: Collection[Site]
) -> None:
    """Remove the files of an interrupted addition or removal of these sites."""
    gone = {spec.name for spec in site_arrays(plan, sites)}
    gone -= {spec.name for spec in site_arrays(manifest, manifest.sites)}
    if dropped := list(read_journal(root).only(gone.__contains__)):
        JournalWriter(root).drop(dropped)
    for folder in own_folders(root, manifest, sites):
        remove_tree(folder)


def _require_given(
    manifest: Manifest,
    sites: Collection[Site],
    modules: Collection[str],
    weights: Weights,
    sample: Sample,
) -> None:
    """Raise ValueError unless weights and sample are complete for these sites and modules."""
    named = {module: sorted(manifest.modules[module]["weights"]) for module in modules}
    if {module: sorted(own) for module, own in weights.items()} != named:
        raise ValueError("weights are not those that the manifest names")
    wanted = {site for site in sites if is_int8(manifest, site)}
    if not wanted <= set(sample):
        raise ValueError("int8 needs a sample of every site that is stored")


def _write_given(
    root: Place, manifest: Manifest, weights: Weights, sample: Sample
) -> dict[str, str]:
    """Write the weights of modules and, for int8, the scales of their sites' channels.

    Returns:
        The checksums of their files.
    """
    checksums: dict[str, str] = {}
    for module, parameters in weights.items():
        checksums |= write_weights(root, module, parameters)
    for site, values in sample.items():
        if is_int8(manifest, site):
            checksums |= write_array(root, channel_of(site.path), channel_scale(values))
    return checksums


def _write_text(root: Place, manifest: Manifest, spec: ArraySpec, values: Tensor) -> list[Entry]:
    entries = []
    for shard in range(manifest.n_shards):
        rows = manifest.shard_rows(shard)
        file = ShardWriter(spec.shard_path(root, shard), n_chunks=manifest.shard_seqs)
        try:
            file.append(to_disk(values[rows.start : rows.stop], spec.dtype))
            done = file.commit()
            publish([file.path])
        except BaseException:
            file.discard()
            raise
        entries.append(Entry(shard, spec.name, len(rows), done.n_bytes, done.crc32c, 0.0, 0.0))
    return entries
