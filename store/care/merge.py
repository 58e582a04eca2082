"""`lorsa store merge`: one store of several with the same sites and different text.

Training sequences come first, store by store, then the held-out ones, which stay held out. Every
array is read and written sequence by sequence, in its logical dtype, so the values are the same to
the bit. Document numbers are shifted.
"""

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import StoreError
from ...sites import Site
from ..arrays import ArraySpec, norms_at, site_arrays
from ..encoding import blosc, to_disk
from ..entries import Entry
from ..folder import is_begun, is_complete, require_free
from ..manifest import MANIFEST, PLAN, Manifest, read_manifest
from ..open_files import OpenFiles
from ..places import Place, free_disk_bytes, place
from ..read.reader import ActivationStore
from ..read.rows import Seqs
from ..shard import ShardWriter, publish
from ..site_facts import SiteFacts
from ..write.encode import sums_of
from ..write.writer import StoreWriter
from .mergeable import channels_of, require_mergeable
from .verify import Checked, CheckReport

READ_BYTES = 64 << 20
"""Bytes of one array that are read at a time"""


class _Sources(NamedTuple):
    """Source of every sequence of a merged store, in its order."""

    store: npt.NDArray[np.int64]
    """Number of the source store, [n_seq]"""
    seq: npt.NDArray[np.int64]
    """Number of the sequence in the source store, [n_seq]"""


def merge_stores(
    roots: Sequence[str | Place],
    out: str | Place,
    *,
    report: CheckReport = lambda event: None,
) -> dict[str, Any]:
    """Write a new store with the sequences of others, which stay as they are.

    The same call resumes where an earlier one was stopped.

    Args:
        roots: two finished stores or more.
        out: place of the new store.
        report: called with how much has been written.

    Returns:
        JSON-able facts of the new store.

    Raises:
        StoreError: a store cannot be read, the stores cannot be merged or share sequences, or the
            new one cannot be written.
    """
    if len(roots) < 2:
        raise StoreError(f"to merge takes two stores or more; {len(roots)} given")
    out = place(out)
    files = OpenFiles()
    stores = [ActivationStore.open(root, files) for root in roots]
    for other in stores[1:]:
        require_mergeable(stores[0], other)
    rows, n_train = _order(stores)
    manifest = _manifest(stores, n_train)
    if is_complete(out):
        _require_same_merge(out, MANIFEST, manifest)
    else:
        with _writer(stores, out, rows, manifest) as writer:
            _write(stores, rows, writer, report)
    return _result(stores, ActivationStore.open(out))


def _order(stores: list[ActivationStore]) -> tuple[_Sources, int]:
    """Return the source of each sequence, and the number of training sequences."""
    parts = [(i, s.train_seqs) for i, s in enumerate(stores)]
    n_train = sum(len(seqs) for _, seqs in parts)
    parts += [(i, s.held_out_seqs) for i, s in enumerate(stores)]
    of_store = np.concatenate([np.full(len(seqs), i) for i, seqs in parts])
    return _Sources(of_store, np.concatenate([seqs for _, seqs in parts])), n_train


def _manifest(stores: list[ActivationStore], n_train: int) -> Manifest:
    """Return the facts of the merged store.

    All shards from the first with a held-out sequence on are held out, so what was held out is
    never trained on. The shard size is the largest of any store that holds out few more sequences.
    """
    parts = [store.manifest for store in stores]
    n_seq = sum(part.n_seq for part in parts)
    sizes = sorted({part.shard_seqs for part in parts}, reverse=True)
    shard_seqs = next((n for n in sizes if n <= n_train and n_train % n <= n_seq - n_train), 1)
    merged = [_absolute(store.root) for store in stores]
    first = parts[0]
    corpus = first.corpus | {
        "data": " + ".join(str(part.corpus.get("data")) for part in parts),
        "n_documents": sum(len(store.document_names()) for store in stores),
        "tokens_sha256": None,
    }
    return replace(
        first,
        checksums={},
        sites=_with_own_norms(first),
        uuid=str(uuid.uuid4()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        corpus=corpus,
        request=first.request | {"data": corpus["data"], "tokens": None, "merged": merged},
        n_seq=n_seq,
        shard_seqs=shard_seqs,
        held_out_shards=tuple(range(n_train // shard_seqs, -(-n_seq // shard_seqs))),
    )


def _with_own_norms(manifest: Manifest) -> dict[Site, SiteFacts]:
    """Return the sites of a store, each with an array of norms of its own."""
    return {site: facts._replace(in_pair=False) for site, facts in manifest.sites.items()}


def _absolute(root: Place) -> str:
    """Return the name of a store that is valid in every working folder."""
    return str(root.resolve() if isinstance(root, Path) else root)


def _writer(
    stores: list[ActivationStore], out: Place, rows: _Sources, manifest: Manifest
) -> StoreWriter:
    """Create the new store, or resume it."""
    if is_begun(out):
        _require_same_merge(out, PLAN, manifest)
        return StoreWriter.resume(out)
    require_free(out)
    _require_room(stores, out)
    tokens = _gather([store.tokens(range(store.manifest.n_seq)) for store in stores], rows)
    _require_disjoint(stores, rows, tokens)
    documents: list[Tensor] = []
    names: list[str] = []
    for store in stores:
        documents.append(store.documents(range(store.manifest.n_seq)) + len(names))
        names += store.document_names()
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return StoreWriter.create(
        out,
        replace(manifest, corpus=manifest.corpus | {"tokens_sha256": digest}),
        tokens=tokens,
        documents=_gather(documents, rows),
        document_names=names,
        modules={module: stores[0].weights(module) for module in manifest.modules},
        sample=channels_of(stores[0]),  # the largest values of the channels are their scales
    )


def _require_same_merge(out: Place, name: str, manifest: Manifest) -> None:
    """Raise StoreError unless a folder holds this merge, perhaps without some of its sites."""
    begun = read_manifest(out / name)
    own = replace(
        begun,
        corpus=begun.corpus | {"tokens_sha256": None},
        uuid=manifest.uuid,
        created=manifest.created,
        checksums={},
        sites=_with_own_norms(begun),
    )
    if own != manifest.only(begun.sites):
        raise StoreError(f"{out} holds another store; choose another --out, or delete it")


def _require_room(stores: list[ActivationStore], out: Place) -> None:
    needed = sum(store.total_bytes for store in stores)
    free = free_disk_bytes(out)
    if free is not None and needed > free:
        raise StoreError(
            f"the merged store takes {needed:,} bytes and {free:,} are free at {out}; make "
            "room, or choose another --out"
        )


def _require_disjoint(stores: list[ActivationStore], rows: _Sources, tokens: Tensor) -> None:
    """Raise StoreError if a sequence of token ids is in two stores."""
    seen: dict[bytes, int] = {}
    shared: list[tuple[int, int]] = []
    for row, ids in enumerate(tokens.numpy()):
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        other = seen.setdefault(digest, row)
        if rows.store[other] != rows.store[row]:
            shared.append((other, row))
    if shared:
        places = [f"{rows.seq[r]} of {stores[rows.store[r]].root}" for r in shared[0]]
        raise StoreError(
            f"the stores share {len(shared):,} sequences, such as {' and '.join(places)}; only "
            "stores of different text can be merged"
        )


def _gather(parts: list[Tensor], rows: _Sources) -> Tensor:
    """Return sequences of several stores in the order of the merged one."""
    first = np.cumsum([0, *[len(part) for part in parts]])
    return torch.cat(parts)[torch.from_numpy(first[rows.store] + rows.seq)]


def _write(
    stores: list[ActivationStore],
    rows: _Sources,
    writer: StoreWriter,
    report: CheckReport,
) -> None:
    """Write the missing shards and finish the store."""
    manifest = writer.manifest
    total = sum(store.total_bytes for store in stores)
    first = manifest.n_shards - len(writer.missing_shards())
    for n_done, shard in enumerate(writer.claimed_shards(), start=first):
        report(Checked(total * n_done // manifest.n_shards, total))
        arrays = site_arrays(manifest, writer.begin_shard(shard))
        writer.commit([_write_shard(stores, rows, writer, shard, spec) for spec in arrays])
    writer.finish()
    report(Checked(total, total))


def _write_shard(
    stores: list[ActivationStore], rows: _Sources, writer: StoreWriter, shard: int, spec: ArraySpec
) -> Entry:
    """Write one shard of one array, some sequences at a time."""
    manifest = writer.manifest
    seqs = manifest.shard_rows(shard)
    at_once = max(1, READ_BYTES // spec.row_bytes)
    path = spec.shard_path(writer.root, shard)
    file = ShardWriter(
        path, n_chunks=manifest.shard_seqs, codec=blosc(spec.compression, spec.itemsize)
    )
    try:
        for first in range(seqs.start, seqs.stop, at_once):
            part = slice(first, min(first + at_once, seqs.stop))
            file.append(to_disk(_read(stores, rows, manifest, spec.name, part), spec.dtype))
        done = file.commit()
        publish([path])
    except BaseException:
        file.discard()
        raise
    part = slice(seqs.start, seqs.stop)
    sums = sums_of(
        manifest, spec.name, lambda name: _read(stores, rows, manifest, name, part).numpy()
    )
    return Entry(shard, spec.name, len(seqs), done.n_bytes, done.crc32c, **sums.facts())


def _read(
    stores: list[ActivationStore], rows: _Sources, manifest: Manifest, name: str, part: slice
) -> Tensor:
    """Read consecutive sequences of the merged store from their sources."""
    of_store, seqs = rows.store[part], rows.seq[part]
    cuts = np.flatnonzero(np.diff(of_store)) + 1
    runs = zip(np.split(of_store, cuts), np.split(seqs, cuts), strict=True)
    return torch.cat([_values(stores[of[0]], manifest, name, run) for of, run in runs])


def _values(store: ActivationStore, manifest: Manifest, name: str, seqs: Seqs) -> Tensor:
    """Read an array of the merged store from one that may keep its norms in other arrays."""
    sites = [site for site in manifest.sites if norms_at(manifest, site).array == name]
    norms = [store.norms(site, seqs) for site in sites]
    if not norms:
        return store.read(name, seqs)
    return norms[0] if norms_at(manifest, sites[0]).column is None else torch.stack(norms, dim=-1)


def _result(stores: list[ActivationStore], merged: ActivationStore) -> dict[str, Any]:
    manifest = merged.manifest
    return {
        "store": str(merged.root),
        "merged": [str(store.root) for store in stores],
        "layers": merged.layers,
        "sites": [str(site) for site in merged.sites],
        "n_seq": manifest.n_seq,
        "n_tokens": manifest.n_seq * manifest.n_ctx,
        "n_held_out_tokens": len(merged.held_out_seqs) * manifest.n_ctx,
        "n_shards": manifest.n_shards,
        "n_bytes": merged.total_bytes,
    }
