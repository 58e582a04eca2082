"""Creation of a store, or of new layers of a finished one, before any shard is written.

The plan is written last. Without it, the files do not count and are created again. With it, shards
are missing, and any number of writers can join to write them. The manifest does not name layers
that are being added: readers see the old ones until the new ones are complete.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...errors import AGAIN, BegunError, StoreError, remedy_of
from ..arrays import ArraySpec, channel_of, sites, text_arrays
from ..encoding import channel_scale, to_disk
from ..entries import Entry
from ..fixed import write_array, write_documents, write_weights
from ..folder import clear, is_begun, layer_folders, read_folder, require_free
from ..journal import TEXT, JournalWriter, read_journal
from ..layers import spell_layers
from ..layout import create_arrays
from ..locks.lock import take_lock
from ..manifest import MANIFEST, PLAN, Manifest, read_manifest
from ..places import Place, remove_tree, sync, sync_tree, unmade_folders, write_atomically
from ..shard import ShardWriter

CREATE_WAIT_S = 600.0
"""Seconds to wait for another process that creates the same store or layers"""

Weights = Mapping[int, dict[str, Tensor]]
Sample = Mapping[int, Sequence[Tensor]]


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
    _require_given(manifest, manifest.layers, weights, sample)

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


def create_layers(
    root: Place,
    layers: Mapping[int, dict[str, Any]],
    *,
    weights: Weights,
    sample: Sample,
) -> None:
    """Create new layers of a finished store, but for their shards; see `StoreWriter.add_layers`."""

    def require_new() -> None:
        folder = read_folder(root)
        if there := sorted(set(layers) & set(folder.manifest.layers)):
            raise BegunError(f"{root} has layers {spell_layers(there)} already")
        if set(layers) <= set(folder.plan.layers):
            raise BegunError(f"{root} is given these layers by another process; go on with it")
        folder.require_finished()

    with _creating(root, require_new):
        manifest = read_manifest(root / MANIFEST)
        plan = replace(manifest, layers=dict(sorted({**manifest.layers, **layers}.items())))
        _require_given(plan, layers, weights, sample)
        _remove_leftovers(root, layers)
        create_arrays(root, plan, layers)
        checksums = _write_given(root, plan, weights, sample)
        if manifest.is_sealed:
            plan = replace(plan, checksums=manifest.checksums | checksums)
        for folder in layer_folders(root, layers):
            sync_tree(folder)
            sync(folder.parent)
        write_atomically(root / PLAN, plan.to_json())


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


def _remove_leftovers(root: Place, layers: Mapping[int, Any]) -> None:
    """Remove the files of an interrupted addition or removal of these layers."""
    gone = tuple(f"layers/{layer}/" for layer in layers)
    if dropped := list(read_journal(root).only(lambda array: array.startswith(gone))):
        JournalWriter(root).drop(dropped)
    for folder in layer_folders(root, layers):
        remove_tree(folder)


def _require_given(
    manifest: Manifest, layers: Mapping[int, Any], weights: Weights, sample: Sample
) -> None:
    """Raise ValueError unless weights and sample are complete for these layers."""
    named = {layer: sorted(manifest.layers[layer]["weights"]) for layer in layers}
    if {layer: sorted(own) for layer, own in weights.items()} != named:
        raise ValueError("weights are not those that the manifest names")
    if manifest.dtype == "int8" and set(sample) != set(layers):
        raise ValueError("int8 needs a sample of every layer")


def _write_given(
    root: Place, manifest: Manifest, weights: Weights, sample: Sample
) -> dict[str, str]:
    """Write the weights of layers and, for int8, the scales of their channels.

    Returns:
        The checksums of their files.
    """
    checksums: dict[str, str] = {}
    for layer, parameters in weights.items():
        checksums |= write_weights(root, layer, parameters)
    for layer, pair in sample.items() if manifest.dtype == "int8" else ():
        for site, values in zip(sites(manifest, layer), pair, strict=False):
            checksums |= write_array(root, channel_of(site), channel_scale(values))
    return checksums


def _write_text(root: Place, manifest: Manifest, spec: ArraySpec, values: Tensor) -> list[Entry]:
    entries = []
    for shard in range(manifest.n_shards):
        rows = manifest.shard_rows(shard)
        file = ShardWriter(spec.shard_path(root, shard), n_chunks=manifest.shard_seqs)
        try:
            file.append(to_disk(values[rows.start : rows.stop], spec.dtype))
            done = file.commit()
        except BaseException:
            file.discard()
            raise
        entries.append(Entry(shard, spec.name, len(rows), done.n_bytes, done.crc32c, 0.0, 0.0))
    return entries
