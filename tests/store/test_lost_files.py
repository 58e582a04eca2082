"""Stores that lost a small file: listed again from what is there, or refused, never begun anew."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lorsa.errors import StoreError
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import clear, is_hardly_begun, require_free
from lorsa.store.read.reader import ActivationStore
from lorsa.store.write.writer import StoreWriter
from small import SMALLEST, create, digests, fill, make_manifest

MakeStore = Callable[..., Path]


def _unfinished(root: Path, n_shards: int, **changes: object) -> None:
    with create(root, make_manifest(**changes)) as writer:
        fill(writer, list(range(n_shards)))


@pytest.mark.parametrize("lost", [["plan.json"], ["plan.json", "w000001.jsonl"]])
def test_a_store_that_lost_its_plan_is_not_begun_anew(tmp_path: Path, lost: list[str]) -> None:
    """The same harvest command deleted all committed shards: the store seemed hardly begun."""
    root = tmp_path / "acts"
    _unfinished(root, 3)
    before = digests(root)
    for name in lost:
        (root / "journal" / name).unlink()
    assert not is_hardly_begun(root)
    for refused in (
        lambda: require_free(root),
        lambda: create(root, make_manifest()),
        lambda: StoreWriter.resume(root),
    ):
        with pytest.raises(StoreError, match=r"has shards but neither manifest.json nor .*plan"):
            refused()
    assert digests(root) == before


def test_a_creation_that_was_killed_before_its_plan_is_begun_anew(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    _unfinished(root, 0)
    (root / "journal/plan.json").unlink()
    assert is_hardly_begun(root)
    require_free(root)
    clear(root)


@pytest.mark.parametrize("changes", [{}, SMALLEST], ids=["float32", "int8"])
@pytest.mark.parametrize(
    "lost", [["w000001.jsonl"], ["text.jsonl"], ["text.jsonl", "w000001.jsonl"]]
)
def test_shards_that_the_journal_lost_are_listed_again(
    make_store: MakeStore, lost: list[str], changes: dict[str, str]
) -> None:
    """They were written again, or the advice was to delete the store and harvest again."""
    root = make_store(**changes)
    rows, before = list(ActivationStore.open(root).entries), digests(root)
    for name in ("manifest.json", "shards.parquet", *(f"journal/{each}" for each in lost)):
        (root / name).unlink()
    inodes = {path: path.stat().st_ino for path in root.glob("*/*/*/c/*/0/0")}
    with pytest.raises(StoreError, match=r"6 whole shards that no line .* --repair"):
        StoreWriter.resume(root)
    assert not verify_store(root)["ok"]
    assert verify_store(root, repair=True)["ok"]
    assert digests(root) == before
    assert inodes == {path: path.stat().st_ino for path in inodes}
    for was, listed in zip(rows, ActivationStore.open(root).entries, strict=True):
        assert listed[:5] == was[:5]
        assert listed[5:] == pytest.approx(was[5:])


def test_a_damaged_shard_is_not_listed_again(make_store: MakeStore) -> None:
    root = make_store()
    for name in ("manifest.json", "shards.parquet", "journal/w000001.jsonl"):
        (root / name).unlink()
    path = root / "layers/3/attn_in/c/1/0/0"
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    found = verify_store(root, repair=True)
    assert (found["ok"], found["next"].split()[:2]) == (False, ["lorsa", "harvest"])
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [1]
        fill(writer)
        writer.finish()
    assert verify_store(root, full=True)["ok"]


def test_shards_that_kills_left_unlisted_are_written_again(tmp_path: Path) -> None:
    """A kill between its last rename and its line is no loss of the journal."""
    root = tmp_path / "acts"
    _unfinished(root, 2)
    (root / "journal/w000001.jsonl").unlink()
    for shard in (0, 1):
        (root / f"journal/{shard}.claim").touch()
    with StoreWriter.resume(root) as writer:
        assert {0, 1} <= set(writer.missing_shards())
