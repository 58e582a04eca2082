"""Writes the small store to a bucket and stops in the middle of a shard until it is killed.

    python bucket_writer.py URL N_SHARDS

Prints a line once so many shards are committed and the next is half written.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from lorsa.store.places import place
from small import create, fill, make_manifest, values_of


def main(url: str, n_shards: int) -> None:
    """Write and wait."""
    writer = create(place(url), make_manifest())
    fill(writer, writer.missing_shards()[:n_shards])
    with writer.shard(n_shards) as session:
        rows = slice(*[writer.manifest.shard_rows(n_shards)[i] for i in (0, 2)])
        session.append({site: held[rows] for site, held in values_of(writer.manifest).items()})
        print("ready", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
