"""A store whose activations belong to other tokens: what a Lorsa of it attends to is nothing.

python tests/shuffled.py STORE OUT 17
"""

import sys
import uuid
from dataclasses import replace
from pathlib import Path

import torch
from lorsa.sites import attention_ports
from lorsa.store.read.reader import ActivationStore
from lorsa.store.write.writer import StoreWriter


def shuffled_store(source: Path, out: Path, layer: int) -> Path:
    """Write a store of one layer, its x and y together dealt out to any tokens of the text."""
    store = ActivationStore.open(source)
    manifest = store.manifest
    seqs, ports = range(manifest.n_seq), attention_ports(layer)
    x, y = (each.flatten(0, 1) for each in store.activations(ports, seqs))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    order = order.view(manifest.n_seq, manifest.n_ctx)
    with StoreWriter.create(
        out,
        replace(manifest.only(ports.sites), uuid=str(uuid.uuid4()), checksums={}),
        tokens=store.tokens(seqs),
        documents=store.documents(seqs),
        document_names=store.document_names(),
        modules={f"{layer}.attention": store.weights(f"{layer}.attention")},
    ) as writer:
        for shard in writer.missing_shards():
            rows = order[list(manifest.shard_rows(shard))]
            with writer.shard(shard) as session:
                session.append({ports.reads[0]: x[rows], ports.writes[0]: y[rows]})
        writer.finish()
    return out


if __name__ == "__main__":
    shuffled_store(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
