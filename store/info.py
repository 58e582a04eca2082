"""What `lorsa store info` tells."""

from pathlib import Path
from typing import Any

from .reader import ActivationStore


def store_info(root: Path) -> dict[str, Any]:
    """Return the facts of a finished store as JSON-able data.

    Raises:
        StoreError: as `ActivationStore.open`; an unfinished store says how to go on.
    """
    store = ActivationStore.open(root)
    manifest = store.manifest
    held_out = len(store.held_out_seqs)
    return {
        "store": str(root),
        "uuid": manifest.uuid,
        "created": manifest.created,
        "complete": True,
        "model": manifest.model["id"],
        "revision": manifest.model["revision"],
        "corpus": manifest.corpus["data"],
        "n_documents": manifest.corpus["n_documents"],
        "n_ctx": manifest.n_ctx,
        "n_seq": manifest.n_seq,
        "n_tokens": manifest.n_seq * manifest.n_ctx,
        "n_train_tokens": (manifest.n_seq - held_out) * manifest.n_ctx,
        "n_held_out_tokens": held_out * manifest.n_ctx,
        "n_shards": manifest.n_shards,
        "dtype": manifest.dtype,
        "compression": manifest.compression,
        "outputs": manifest.outputs,
        "n_bytes": sum(entry.n_bytes for entry in store.entries),
        "layers": {str(layer): _layer_info(store, layer) for layer in store.layers},
    }


def _layer_info(store: ActivationStore, layer: int) -> dict[str, Any]:
    facts = store.manifest.layers[layer]
    geometry, norms = facts["geometry"], store.mean_norms(layer)
    return {
        "n_bytes": store.n_bytes(layer),
        "heads": f"{geometry['n_heads']} x {geometry['d_head']}",
        "kv_heads": geometry["n_kv_heads"],
        "d_model": geometry["d_model"],
        "qk_norm": geometry["qk_norm"] is not None,
        "rotary_pairs": len(geometry["rope"]["inv_freq"]) if geometry["rope"] else 0,
        "window": geometry["window"],
        "mean_norm_x": norms.x,
        "mean_norm_y": norms.y,
        "self_check": facts["self_check"],
        "n_nonfinite": store.n_nonfinite(layer),
        "int8_scales": {
            site.rpartition("/")[2]: scales._asdict()
            for site, scales in store.scales(layer).items()
        },
    }


def format_bytes(n_bytes: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:  # or it would be written 1e+03
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"
