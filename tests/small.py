"""A small store written by hand: no language model."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lorsa.seal import json_crc32c
from lorsa.sites import Site, attention_ports
from lorsa.store.entries import Entries
from lorsa.store.layered import pair_facts
from lorsa.store.manifest import Manifest, held_out_shards, read_manifest
from lorsa.store.site_facts import SiteFacts
from lorsa.store.table import write_table
from lorsa.store.write.writer import StoreWriter

N_SEQ, N_CTX, D_MODEL, SHARD_SEQS = 22, 6, 5, 4
LAYERS = (0, 3)
SMALLEST = {"dtype": "int8", "outputs": "derive"}
"""What a store of the fewest bytes is."""


def make_manifest(**changes: Any) -> Manifest:
    """Return the facts of a small store."""
    facts: dict[str, Any] = {
        "uuid": "u",
        "created": "2026-01-01T00:00:00+00:00",
        "lorsa_version": "0",
        "model": {"id": "tiny", "revision": None},
        "tokenizer": {},
        "corpus": {"data": "none", "n_documents": 2},
        "request": {"model": "tiny"},
        "n_seq": N_SEQ,
        "n_ctx": N_CTX,
        "shard_seqs": SHARD_SEQS,
        "dtype": "float32",
        "compression": "none",
    } | changes
    layers = facts.pop("layers", _facts(LAYERS))
    width, outputs = facts.pop("d_model", D_MODEL), facts.pop("outputs", "store")
    if "sites" not in facts:
        pairs = (pair_facts(layer, width, outputs) for layer in layers)
        facts["sites"] = {site: about for pair in pairs for site, about in pair.items()}
        facts["modules"] = {f"{layer}.attention": own for layer, own in layers.items()}
    return Manifest(**facts, held_out_shards=held_out_shards(facts["n_seq"], facts["shard_seqs"]))


def values(layer: int, site: int, width: int = D_MODEL) -> torch.Tensor:
    """Return the activations of a layer that the small store holds, [n_seq, n_ctx, width].

    `site` is the site's place among SITE_NAMES: 0 is attn_in, 1 attn_out.
    """
    generator = torch.Generator().manual_seed(10 * layer + site)
    return torch.randn(N_SEQ, N_CTX, width, generator=generator)


def pair(layer: int, x: Any, y: Any) -> dict[Site, Any]:
    """Return something of a layer's attn_in and of its attn_out, by site."""
    return dict(zip(attention_ports(layer).sites, (x, y), strict=True))


def values_of(manifest: Manifest) -> dict[Site, torch.Tensor]:
    """Return what `values` says of every site of a store."""
    return {site: values(*site.place, about.width) for site, about in manifest.sites.items()}


def weights_of(manifest: Manifest) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights that the small store has of every module."""
    weight = torch.arange(6).view(2, 3).bfloat16()
    return {
        module: dict.fromkeys(facts["weights"], weight)
        for module, facts in manifest.modules.items()
    }


def tokens() -> torch.Tensor:
    """Return its token ids."""
    return torch.arange(N_SEQ * N_CTX, dtype=torch.int32).view(N_SEQ, N_CTX)


def create(root: Path, manifest: Manifest) -> StoreWriter:
    """Begin the small store."""
    return StoreWriter.create(
        root,
        manifest,
        tokens=tokens(),
        documents=tokens() % 2,
        document_names=["a", "b"],
        modules=weights_of(manifest),
        sample=values_of(manifest),
    )


def add_layers(root: Path, layers: list[int]) -> StoreWriter:
    """Begin to add layers to the small store."""
    path = root / "manifest.json"
    outputs = "derive" if path.exists() and read_manifest(path).is_derived else "store"
    return add_sites(root, make_manifest(layers=_facts(layers), outputs=outputs))


def add_sites(root: Path, more: Manifest) -> StoreWriter:
    """Begin to add the sites of a manifest to the small store."""
    return StoreWriter.add_sites(
        root, more.sites, more.modules, modules=weights_of(more), sample=values_of(more)
    )


def _facts(layers: Iterable[int]) -> dict[int, Any]:
    return {layer: {"weights": ["W_Q"]} for layer in layers}


def mlp(**changes: Any) -> Manifest:
    """Return the facts of a small store of the MLP of layer 3 alone."""
    sites = {Site(3, "mlp_in"): SiteFacts(D_MODEL), Site(3, "mlp_out"): SiteFacts(D_MODEL)}
    facts = {"weights": ["W_gate", "W_in"], "geometry": {"activation": "silu"}}
    return make_manifest(sites=sites, modules={"3.mlp": facts}, **changes)


def fill(writer: StoreWriter, shards: list[int] | None = None) -> None:
    """Write shards of the small store, two sequences at a time."""
    for shard in writer.missing_shards() if shards is None else shards:
        rows = writer.manifest.shard_rows(shard)
        held = values_of(writer.manifest)
        with writer.shard(shard) as session:
            for first in range(rows.start, rows.stop, 2):
                part = slice(first, min(first + 2, rows.stop))
                session.append({site: held[site][part] for site in writer.sites_to_write})


def digests(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every array file of a store, by its path in the store."""
    files = [p for p in root.rglob("*") if p.is_file() and "c" in p.relative_to(root).parts]
    assert files
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def edit_manifest(root: Path, **changes: Any) -> None:
    """Change fields of manifest.json, as its writer would have."""
    path = root / "manifest.json"
    content = json.loads(json.dumps(json.loads(path.read_text()) | changes))
    del content["crc32c"]
    path.write_text(json.dumps(content | {"crc32c": json_crc32c(content)}))


def as_before(root: Path) -> None:
    """Take from a store the checksums that version 0.1.0 did not write."""
    for path in (root / "manifest.json", root / "journal/plan.json"):
        content = json.loads(path.read_text())
        del content["checksums"], content["crc32c"]
        path.write_text(json.dumps(content))
    table = pq.read_table(root / "shards.parquet")
    pq.write_table(table.replace_schema_metadata(None), root / "shards.parquet")


def edit_table(root: Path, table: pa.Table) -> None:
    """Write shards.parquet, as its writer would have."""
    write_table(root, Entries.from_arrow(table), read_manifest(root / "manifest.json").uuid)
