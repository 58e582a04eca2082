"""Whole shards that the journal does not list, as where a journal file was lost.

A kill between a shard's last rename and its line in the journal leaves one like this, with a claim.
Others are a journal that was lost: their files are listed again, not written again.
"""

from collections.abc import Callable, Iterable, Iterator

from ..errors import StoreError
from ..sites import Site
from .arrays import ArraySpec, site_arrays, text_arrays, together
from .entries import Entries
from .folder import repair_command
from .locks.bucket_lock import CLAIM
from .manifest import JOURNAL, Manifest
from .places import Place, file_sizes, files_in

IN_FLIGHT = 1
"""Shards without a claim that a crash may have left unlisted."""


def unlisted_shards(
    root: Place, manifest: Manifest, entries: Entries, sites: Iterable[Site]
) -> Iterator[tuple[int, list[ArraySpec]]]:
    """Yield the shards of the text and of sites whose files are all there and never mentioned.

    Args:
        root: place of the store.
        manifest: its facts.
        entries: what its journal lists, and what it no longer does.
        sites: sites to look at.
    """
    size = file_sizes(root)
    groups = [[spec] for spec in text_arrays(manifest)]
    each = dict.fromkeys(tuple(together(manifest, site)) for site in sites)
    groups += [site_arrays(manifest, group) for group in each]
    for shard in range(manifest.n_shards):
        for specs in groups:
            if entries.last_rank((shard, spec.name) for spec in specs) is not None:
                continue
            if all(size(spec.shard_name(shard)) is not None for spec in specs):
                yield shard, specs


def lost_shards(
    root: Place, manifest: Manifest, entries: Entries, sites: Iterable[Site]
) -> set[int]:
    """Return the shards of which the journal has lost a line; none if a kill may have done that.

    Whoever writes a shard has claimed it until its line is there.
    """
    found = {shard for shard, _ in unlisted_shards(root, manifest, entries, sites)}
    if found:
        found -= {
            int(path.stem)
            for path in files_in(root / JOURNAL, f"*{CLAIM}")
            if path.stem.isdecimal()
        }
    return found if len(found) > IN_FLIGHT else set()


def require_listed(root: Place, manifest: Manifest, read: Callable[[], Entries]) -> None:
    """Raise StoreError if the journal has lost lines: their shards must not be written again.

    Args:
        root: place of the store.
        manifest: its facts.
        read: reads what was added to the journal; returns all of it.
    """
    if not lost_shards(root, manifest, read(), manifest.sites):
        return
    if lost := lost_shards(root, manifest, read(), manifest.sites):  # not listed meanwhile
        raise StoreError(
            f"{root} has {len(lost)} whole shards that no line of its journal lists; list them "
            f"again with: {repair_command(root)}"
        )
