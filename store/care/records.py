"""Records of a store (manifest, plan, table, journal) and the damage found in them."""

from typing import Any, Literal, NamedTuple

from ...errors import FormatVersionError, StoreError, UnreachableError
from ...sites import Site
from ..arrays import all_arrays
from ..entries import Entries
from ..folder import added_sites, different_facts, remove_command, why_not_a_store
from ..journal import Journal
from ..manifest import JOURNAL, MANIFEST, PLAN, Manifest, read_manifest
from ..places import Place
from ..table import TABLE, read_table

Fix = Literal["harvest", "rewrite", "none"]


class Damage(NamedTuple):
    """One thing that is wrong with a store."""

    path: str
    """Path of the file in the store"""
    problem: str
    fix: Fix
    """Remedy: another "harvest" of its shard, a "rewrite" from other records, or "none": only a
    copy helps"""
    shard: int | None = None

    @property
    def is_dropped(self) -> bool:
        """Whether a repair drops the file from journal and table."""
        return self.fix == "harvest" and self.shard is not None


def read_manifests(root: Place, damages: list[Damage]) -> tuple[Manifest, list[Site]]:
    """Return the manifest, or the plan if it adds sites, and the sites that are being added.

    Damage to either file is appended to damages.
    """
    found: dict[str, Manifest] = {}
    errors: list[StoreError] = []
    there = [name for name in (MANIFEST, PLAN) if (root / name).exists()]
    if not there:
        raise StoreError(why_not_a_store(root))
    for name in there:
        try:
            found[name] = read_manifest(root / name)
        except (FormatVersionError, UnreachableError):
            raise
        except StoreError as error:
            errors.append(error)
            damages.append(Damage(name, "is damaged", "rewrite"))
    if not found:
        raise errors[0]
    if MANIFEST in found and PLAN not in there:
        damages.append(Damage(PLAN, "is missing", "rewrite"))
    if len(found) == 2 and found[MANIFEST] != found[PLAN]:
        if adding := _adding(found[MANIFEST], found[PLAN]):
            return found[PLAN], adding
        damages.append(_disagreement(root, found[MANIFEST], found[PLAN]))
    return next(iter(found.values())), []


def _adding(manifest: Manifest, plan: Manifest) -> list[Site]:
    """Return the sites that a plan adds; none if it also differs in other ways."""
    return added_sites(manifest, plan) if plan.only(manifest.sites) == manifest else []


def _disagreement(root: Place, manifest: Manifest, plan: Manifest) -> Damage:
    removed = added_sites(plan, manifest)
    if removed and manifest.only(plan.sites) == plan:
        rest = remove_command(root, manifest, removed)
        text = f"still has sites that were being removed: end that with {rest}"
    else:
        different = ", ".join(different_facts(manifest, plan))
        text = f"says another {different} than {PLAN}; move the one that is wrong out of the store"
    return Damage(MANIFEST, text, "none")


def committed_files(
    root: Place, manifest: Manifest, complete: bool, damages: list[Damage], new: set[str]
) -> Entries:
    """Return the committed files, by shards.parquet or, if that is damaged, by the journal.

    Args:
        root: place of the store.
        manifest: its facts, with the sites that are being added.
        complete: whether manifest.json is there.
        damages: damage to table and journal is appended here.
        new: names of the arrays that are being added, which only the journal lists.
    """
    journal = Journal(root)
    journalled = journal.entries
    for path in journal.damaged:
        damages.append(Damage(name_of(root, path), "has a line that cannot be read", "rewrite"))
    if complete:
        try:
            table = read_table(root, manifest)
            if not journal.damaged and not _covers(journalled, table, manifest):
                text = f"does not list every file of {TABLE}"
                damages.append(Damage(JOURNAL, text, "rewrite"))
            found = table.only(lambda array: array not in new)
            found.put(journalled.only(new.__contains__).in_order())
            return found
        except UnreachableError:
            raise
        except StoreError:
            problem = "cannot be read" if (root / TABLE).exists() else "is missing"
            damages.append(Damage(TABLE, problem, "rewrite"))
    return journalled


def _covers(journalled: Entries, table: Entries, manifest: Manifest) -> bool:
    """Return whether the journal lists the files of the table, except those of removed sites.

    A harvest that has to write a shard again uses the journal.
    """
    arrays = all_arrays(manifest)
    rows = table.only(arrays.__contains__).in_order()
    return all(
        (known := journalled.get((row.shard, row.array))) is not None and known.crc32c == row.crc32c
        for row in rows
    )


def name_of(root: Any, path: Any) -> str:
    """Return the path of a file relative to its store."""
    name: str = path.relative_to(root).as_posix()
    return name
