"""`lorsa store info`: facts of a store, finished or not."""

from typing import Any

from ...errors import StoreError
from ...sites import Site
from ..facts import StoreFacts
from ..folder import read_folder, resume_command
from ..places import Place, place
from ..spelling import layers_of


def store_info(root: str | Place) -> dict[str, Any]:
    """Return the facts of a store, finished or not, as JSON-able data.

    Raises:
        StoreError: no store, another format version, or facts that are missing or damaged.
    """
    folder = read_folder(root := place(root))
    manifest = folder.manifest
    store = StoreFacts(root, manifest, folder.entries)
    missing = folder.missing_shards()
    complete = folder.complete and not missing and not folder.adding
    held_out = len(store.held_out_seqs)
    n_missing = sum(len(manifest.shard_rows(shard)) for shard in missing)
    try:
        return {
            "store": str(root),
            "uuid": manifest.uuid,
            "created": manifest.created,
            "complete": complete,
            "adding": layers_of(folder.adding),
            "adding_sites": [str(site) for site in folder.adding],
            "model": manifest.model["id"],
            "revision": manifest.model["revision"],
            "corpus": manifest.corpus["data"],
            "n_documents": manifest.corpus["n_documents"],
            "n_ctx": manifest.n_ctx,
            "n_seq": manifest.n_seq,
            "n_tokens": manifest.n_seq * manifest.n_ctx,
            "n_train_tokens": (manifest.n_seq - held_out) * manifest.n_ctx,
            "n_held_out_tokens": held_out * manifest.n_ctx,
            "n_missing_tokens": n_missing * manifest.n_ctx,
            "n_shards": manifest.n_shards,
            "n_missing_shards": len(missing),
            "dtype": manifest.dtype,
            "compression": manifest.compression,
            "outputs": "derive" if manifest.is_derived else "store",
            "has_checksums": manifest.is_sealed,
            "n_bytes": store.total_bytes,
            "layers": {str(layer): _layer_info(store, layer) for layer in store.layers},
            "sites": {str(site): _site_info(store, site) for site in store.sites},
            "modules": {
                module: {"self_check": facts.get("self_check")}
                for module, facts in manifest.modules.items()
            },
            "next": None if complete else resume_command(root, manifest, folder.adding),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{root} lacks facts of its model, text or layers: {error}") from None


def _layer_info(store: StoreFacts, layer: int) -> dict[str, Any]:
    """Return the facts of a layer: of all its sites, and of its attention where that is stored."""
    sites = [site for site in store.sites if site.layer == layer]
    attention = store.manifest.modules.get(f"{layer}.attention", {})
    norms = {site.name: store.mean_norm(site) for site in sites}
    scales = {site.name: found for site in sites if (found := store.scales(site)) is not None}
    return {
        "n_bytes": store.n_bytes(sites),
        "sites": [site.name for site in sites],
        **_geometry_info(attention.get("geometry")),
        "mean_norm_x": norms.get("attn_in"),
        "mean_norm_y": norms.get("attn_out"),
        "self_check": attention.get("self_check"),
        "n_nonfinite": sum(map(store.n_nonfinite, sites)),
        "int8_scales": {name: found._asdict() for name, found in scales.items()},
    }


def _site_info(store: StoreFacts, site: Site) -> dict[str, Any]:
    width, derived, _ = store.manifest.sites[site]
    return {
        "n_bytes": store.n_bytes([site]),
        "width": width,
        "derived_from": [] if derived is None else [str(source) for source in derived.sites],
        "derived_by": None if derived is None else derived.by,
        "mean_norm": store.mean_norm(site),
        "n_nonfinite": store.n_nonfinite(site),
    }


def _geometry_info(geometry: dict[str, Any] | None) -> dict[str, Any]:
    """Return the attention geometry of a layer; empty where another writer recorded none."""
    if geometry is None:
        return {}
    return {
        "heads": f"{geometry['n_heads']} x {geometry['d_head']}",
        "kv_heads": geometry["n_kv_heads"],
        "d_model": geometry["d_model"],
        "qk_norm": geometry["qk_norm"] is not None,
        "rotary_pairs": len(geometry["rope"]["inv_freq"]) if geometry["rope"] else 0,
        "window": geometry["window"],
    }


def format_bytes(n_bytes: float) -> str:
    """Return a number of bytes for people, as 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:  # or it would be written 1e+03
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"
