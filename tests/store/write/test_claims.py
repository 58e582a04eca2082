"""Many processes write one store: each shard by one of them, whoever dies."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lorsa.errors import BegunError, BusyError, StoreError
from lorsa.store.care.info import store_info
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import is_begun, is_complete
from lorsa.store.journal import JournalWriter, read_journal
from lorsa.store.locks.lock import FolderLock, take_lock
from lorsa.store.write import writer as writer_module
from lorsa.store.write.writer import StoreWriter
from small import create, digests, fill, make_manifest

MakeStore = Callable[..., Path]
N_KILLS = 20


def test_writers_share_the_shards_of_a_store(tmp_path: Path, make_store: MakeStore) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as one, StoreWriter.resume(root) as two:
        ours, theirs = one.claimed_shards(), two.claimed_shards()
        taken = [next(ours), next(theirs)]
        assert taken == [0, 1]
        fill(one, [0])
        fill(two, [1])
        taken += [next(ours), next(theirs)]
        assert taken == [0, 1, 2, 3]
        ours.close()  # which lets 2 go unwritten
        assert next(theirs) == 2
        theirs.close()
        assert one.missing_shards() == two.missing_shards() == [2, 3, 4, 5]
        with pytest.raises(StoreError, match="lacks 4 shards"):
            one.finish()
        for shard in two.claimed_shards():
            fill(two, [shard])
        one.finish()
        assert is_complete(root)
        before = (root / "manifest.json").stat().st_mtime_ns
        two.finish()  # which another has done
        assert (root / "manifest.json").stat().st_mtime_ns == before
    assert digests(root) == digests(make_store("whole"))
    assert not list((root / "journal").glob("*.claim"))


def test_a_shard_that_another_has_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    told: list[int] = []
    with create(root, make_manifest()) as one, StoreWriter.resume(root) as two:
        fill(one, [0, 1, 2, 3])
        held = one.claimed_shards()
        assert next(held) == 4
        with pytest.raises(BusyError, match="shard 4 of .* is being written by another process"):
            fill(two, [4])
        threading.Timer(0.3, held.close).start()
        got = []
        for shard in two.claimed_shards(waiting=told.append):
            got.append(shard)
            fill(two, [shard])
        assert got == [5, 4]
        assert set(told) == {1}
        assert one.missing_shards() == []


def test_what_another_wrote_before_the_claim_is_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as one, StoreWriter.resume(root) as two:
        shards = two.claimed_shards()
        assert next(shards) == 0
        fill(one, [1, 2])
        fill(two, [0])
        assert next(shards) == 3


def test_a_claim_file_that_its_holder_removed_is_no_claim(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, exclusive=False)
    claim = lock.claim("7")
    assert claim is not None
    assert FolderLock(tmp_path, exclusive=False).claim("7") is None
    assert lock.claimed() == {"7"}
    claim.release()
    assert lock.claimed() == set()
    again = FolderLock(tmp_path, exclusive=False).claim("7")
    assert again is not None


def test_what_changes_the_store_is_refused_beside_writers_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()):
        for change in (
            lambda: remove_sites(root, "3"),
            lambda: verify_store(root, repair=True),
            lambda: take_lock(root),
        ):
            with pytest.raises(BusyError, match="is being written by another process; wait"):
                change()
        with pytest.raises(BegunError, match="was begun by another process; go on with it"):
            create(root, make_manifest())
    monkeypatch.setattr(writer_module, "LOCK_WAIT_S", 0.2)
    lock = take_lock(root)
    with pytest.raises(BusyError, match="is being changed by another process; wait"):
        StoreWriter.resume(root)
    monkeypatch.setattr(writer_module, "LOCK_WAIT_S", 10)
    threading.Timer(0.3, lock.release).start()
    StoreWriter.resume(root).close()


def test_a_writer_that_nobody_holds_any_more_holds_nothing(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    create(root, make_manifest())
    remove_sites(root, "3")


def test_a_shard_dropped_and_written_again_wins_over_journals_begun_later(tmp_path: Path) -> None:
    """What one process says of a file that another spoke of comes after it."""
    root = tmp_path / "acts"
    with create(root, make_manifest()) as one:
        fill(one, [0])
        with StoreWriter.resume(root) as two:
            fill(two, [1])
        path = root / "layers/3/attn_in/c/1/0/0"
        path.unlink()
        assert one.missing_shards() == [1, 2, 3, 4, 5]
        fill(one)
        one.finish()
    names = sorted(path.stem for path in (root / "journal").glob("w*.jsonl"))
    assert names == ["w000001", "w000002", "w000003"]
    assert verify_store(root, full=True)["ok"]


def test_a_shard_that_was_dropped_by_a_dead_process_counts_when_written(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as one:
        fill(one, [0])
        (entry,) = [e for e in read_journal(root).values() if e[:2] == (0, "layers/3/attn_in_norm")]
        JournalWriter(root).drop([(0, entry.array)])
        fill(one)
        assert one.missing_shards() == []


def test_two_journals_begun_at_once_have_two_names(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    writers = [JournalWriter(tmp_path) for _ in range(8)]
    threads = [threading.Thread(target=writer.drop, args=([],)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((tmp_path / "journal").glob("w*.jsonl"))) == 8


HOLD = """
import sys, time, pathlib
from lorsa.store.locks.lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]), exclusive=True)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_dead_process_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "LOCK_WAIT_S", 0.0)
    root = tmp_path / "acts"
    create(root, make_manifest()).close()
    child = subprocess.Popen([sys.executable, "-c", HOLD, root], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(BusyError, match=f"{root} is being changed by another process; wait"):
        StoreWriter.resume(root)
    child.kill()
    child.wait()
    child.stdout.close()
    StoreWriter.resume(root).close()
    take_lock(root).release()


def team(root: Path, *, kills: int, writers: int = 3, **facts: Any) -> dict[str, Any]:
    """Let processes write a store, some of which are killed; return what is told of it.

    Meanwhile the store is looked at, as often as that goes.
    """
    script = Path(__file__).parent.with_name("team.py")
    command = [sys.executable, script, root, "1", str(kills), str(writers), json.dumps(facts)]
    missing: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            if is_begun(root):
                missing.append(store_info(root)["n_missing_shards"])
            time.sleep(0.02)
        assert process.stdout is not None
        result: dict[str, Any] = json.loads(process.stdout.read())
    assert missing == sorted(missing, reverse=True)
    assert len(set(missing)) > 2
    return result


def test_twenty_kills_among_three_writers_change_nothing(
    tmp_path: Path, make_store: MakeStore
) -> None:
    """Killed in the middle of shards, always begun again, and in the end finished by one."""
    whole = make_store("whole", shard_seqs=1)
    root = tmp_path / "acts"
    done = team(root, kills=N_KILLS, shard_seqs=1)
    assert done["n_kills"] >= N_KILLS
    assert not done["done_early"]
    assert is_complete(root)
    assert digests(root) == digests(whole)
    assert verify_store(root, full=True)["ok"]
    left = {path.name for path in (root / "journal").iterdir() if path.suffix != ".jsonl"}
    assert left == {"lock", "plan.json"}
    assert not list(root.rglob("*.partial"))
    assert len(read_journal(root)) == 22 * (2 + 2 * 4)
    assert n_commits(root) == dict.fromkeys(range(22), 1)


def n_commits(root: Path) -> dict[int, int]:
    """Return how often each shard's activations were committed."""
    found: dict[int, int] = {}
    for path in (root / "journal").glob("w*.jsonl"):
        for line in path.read_text().splitlines():
            shard = json.loads(line)["committed"][0]["shard"]
            found[shard] = found.get(shard, 0) + 1
    return dict(sorted(found.items()))


def test_one_then_three_then_one_writer_make_the_same_store(
    tmp_path: Path, make_store: MakeStore
) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        fill(writer, [0])
    assert is_begun(root)
    team(root, kills=0)
    assert digests(root) == digests(make_store("whole"))
