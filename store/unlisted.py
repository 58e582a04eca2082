"""Whole shards that the journal does not list, as where a journal file was lost.

A kill between a shard's last rename and its line in the journal leaves one shard of a process like
this. More of them are a journal that was lost: their files are listed again, not written again.
"""

from collections.abc import Callable, Iterable, Iterator

from ..errors import StoreError
from .arrays import ArraySpec, layer_arrays, text_arrays
from .entries import Entries
from .folder import repair_command
from .manifest import Manifest
from .places import Place, file_sizes

IN_FLIGHT = 1
"""Shards that a kill may have left unlisted."""


def unlisted_shards(
    root: Place, manifest: Manifest, entries: Entries, layers: Iterable[int]
) -> Iterator[tuple[int, list[ArraySpec]]]:
    """Yield the shards of the text and of layers whose files are all there and never mentioned.

    Args:
        root: place of the store.
        manifest: its facts.
        entries: what its journal lists, and what it no longer does.
        layers: layers to look at.
    """
    size = file_sizes(root)
    groups = [[spec] for spec in text_arrays(manifest)]
    groups += [layer_arrays(manifest, layer) for layer in layers]
    for shard in range(manifest.n_shards):
        for specs in groups:
            if entries.last_rank((shard, spec.name) for spec in specs) is not None:
                continue
            if all(size(spec.shard_name(shard)) is not None for spec in specs):
                yield shard, specs


def require_listed(
    root: Place, manifest: Manifest, entries: Entries, others: Callable[[], bool]
) -> None:
    """Raise StoreError if the journal has lost lines: their shards must not be written again.

    Args:
        root, manifest, entries: as `unlisted_shards` takes them.
        others: whether other processes write the store, who list their shards in a moment.
    """
    n_lost = len({shard for shard, _ in unlisted_shards(root, manifest, entries, manifest.layers)})
    if n_lost > IN_FLIGHT and not others():
        raise StoreError(
            f"{root} has {n_lost} whole shards that no line of its journal lists; list them again "
            f"with: {repair_command(root)}"
        )
