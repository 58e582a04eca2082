"""Sites of an MLP and of the residual stream, added by hand to a small store of attention."""

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from lorsa.sites import Site, attention_ports
from lorsa.store.read.reader import ActivationStore
from lorsa.store.site_facts import SiteFacts
from lorsa.store.write.writer import StoreWriter
from tiny import N_CTX
from torch import Tensor

D_MODEL, D_MLP = 32, 48
ADDED = {1: ("mlp_in", "mlp_out", "resid_out"), 2: ("mlp_in", "mlp_out")}
"""Names of the sites that are added to each layer."""
GEOMETRY = {"d_model": D_MODEL, "d_mlp": D_MLP, "activation": "silu", "gated": True}


def with_sites(store: Path, folder: Path) -> Path:
    """Return a copy of a store of layers 1 and 2, in a folder, with the sites of `ADDED`."""
    shutil.copytree(store, folder)
    whole = ActivationStore.open(folder)
    n_seq = whole.manifest.n_seq
    values = {}
    for layer in ADDED:
        x, y = whole.activations(attention_ports(layer), range(n_seq))
        values |= _values(layer, x.float(), y.float())
    sites = [Site(layer, name) for layer, names in ADDED.items() for name in names]
    facts = {"weights": list(mlp(1)), "geometry": GEOMETRY, "self_check": {"passed": True}}
    writer = StoreWriter.add_sites(
        folder,
        {site: SiteFacts(D_MODEL) for site in sites},
        {f"{layer}.mlp": facts for layer in ADDED} | {"1.block": {"weights": []}},
        modules={f"{layer}.mlp": mlp(layer) for layer in ADDED} | {"1.block": {}},
    )
    with writer:
        for shard in writer.missing_shards():
            rows = writer.manifest.shard_rows(shard)
            with writer.shard(shard) as session:
                session.append({site: values[site][rows.start : rows.stop] for site in sites})
        writer.finish()
    return folder


def mlp(layer: int) -> dict[str, Tensor]:
    """Return the weights of a layer's MLP."""
    generator = torch.Generator().manual_seed(layer)
    shapes = {"W_up": (D_MLP, D_MODEL), "W_gate": (D_MLP, D_MODEL), "W_down": (D_MLP, D_MODEL)}
    return {
        name: torch.randn(shape, generator=generator) * D_MODEL**-0.5
        for name, shape in shapes.items()
    }


def _values(layer: int, x: Tensor, y: Tensor) -> dict[Site, Tensor]:
    """Return the sites of a layer, [n_seq, n_ctx, d_model] each, given its attention's."""
    weights = mlp(layer)
    mlp_in = F.rms_norm(x + y, (D_MODEL,))
    mlp_out = (F.silu(mlp_in @ weights["W_gate"].T) * (mlp_in @ weights["W_up"].T)) @ weights[
        "W_down"
    ]
    made = {"mlp_in": mlp_in, "mlp_out": mlp_out, "resid_out": 2 * x + y + mlp_out}
    assert x.shape[1] == N_CTX
    return {Site(layer, name): made[name] for name in ADDED[layer]}
