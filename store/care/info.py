"""`lorsa store info`: facts of a store, finished or not."""

from typing import Any

from ...errors import StoreError
from ..facts import StoreFacts
from ..folder import read_folder, resume_command
from ..places import Place, place


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
            "adding": folder.adding,
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
            "outputs": manifest.outputs,
            "has_checksums": manifest.is_sealed,
            "n_bytes": store.total_bytes,
            "layers": {str(layer): _layer_info(store, layer) for layer in store.layers},
            "next": None if complete else resume_command(root, manifest, folder.adding),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{root} lacks facts of its model, text or layers: {error}") from None


def _layer_info(store: StoreFacts, layer: int) -> dict[str, Any]:
    facts, norms = store.manifest.layers[layer], store.mean_norms(layer)
    return {
        "n_bytes": store.n_bytes(layer),
        **_geometry_info(facts.get("geometry")),
        "mean_norm_x": norms.x,
        "mean_norm_y": norms.y,
        "self_check": facts.get("self_check"),
        "n_nonfinite": store.n_nonfinite(layer),
        "int8_scales": {
            site.rpartition("/")[2]: scales._asdict()
            for site, scales in store.scales(layer).items()
        },
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
