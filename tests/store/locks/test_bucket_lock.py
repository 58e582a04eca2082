"""Many writers of a store in a bucket, against a real S3 protocol server on loopback."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lorsa.errors import BusyError, StoreError
from lorsa.sites import attention_ports
from lorsa.store import journal as journal_module
from lorsa.store.bucket import BucketPath
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import is_complete
from lorsa.store.locks import lease as lease_module
from lorsa.store.locks.bucket_lock import BucketLock
from lorsa.store.locks.lease import Lease
from lorsa.store.locks.lock import take_lock
from lorsa.store.write import writer as writer_module
from lorsa.store.write.writer import StoreWriter
from small import add_layers, create, digests, fill, make_manifest

pytest.importorskip("obstore", reason="obstore is not installed (lorsa[s3])")


def same_as(root: BucketPath, local: Path) -> bool:
    """Tell whether a store has the array files of another, and no others."""
    names = {path.relative_to(root): path for path in root.sizes()}
    ours = {str(name): path.read_bytes() for name, path in names.items() if "c" in name.parts}
    return ours == {name: (local / name).read_bytes() for name in digests(local)}


def left(root: BucketPath) -> set[str]:
    """Return what is in the journal besides what it tells."""
    names = {str(path.relative_to(root / "journal")) for path in (root / "journal").sizes()}
    return {name for name in names if not name.endswith(".jsonl")}


def kill(lock: BucketLock) -> None:
    """Let a lock be as if its process had been killed."""
    lock._lease._ended.set()
    lock._lease._thread.join()
    facts = json.loads(lock._lease.path.read_bytes()) | {"pid": 2**31 - 1}
    lock._lease.path.write_bytes(json.dumps(facts).encode())


def test_writers_share_the_shards_of_a_bucket(
    root: BucketPath, make_store: Callable[..., Path]
) -> None:
    with create(root, make_manifest()) as one, StoreWriter.resume(root) as two:
        ours, theirs = one.claimed_shards(), two.claimed_shards()
        assert [next(ours), next(theirs)] == [0, 1]
        fill(one, [0])
        fill(two, [1])
        assert [next(theirs), next(ours)] == [2, 3]
        with pytest.raises(BusyError, match="shard 2 of .* is being written by another process"):
            fill(one, [2])
        threading.Timer(0.3, theirs.close).start()
        fill(one, [3])
        for shard in ours:
            fill(one, [shard])
        one.finish()
        two.finish()
    assert left(root) == {"lock", "plan.json"}
    assert same_as(root, make_store())
    with add_layers(root, [5]) as one, StoreWriter.resume(root) as two:
        for writer in (one, two):
            assert writer.sites_to_write == list(attention_ports(5).sites)
            shards = writer.claimed_shards()
            fill(writer, [next(shards)])
        fill(two)
        one.finish()
    layers = {layer: {"weights": ["W_Q"]} for layer in (0, 3, 5)}
    assert same_as(root, make_store("more", layers=layers))


def test_what_changes_a_bucket_is_refused_beside_writers_and_the_other_way_round(
    root: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with create(root, make_manifest()) as writer:
        fill(writer)
        for change in (lambda: remove_sites(root, "3"), lambda: verify_store(root, repair=True)):
            with pytest.raises(BusyError, match=r"is being written by process \d+ on .*; wait"):
                change()
        fill(writer)
    monkeypatch.setattr(writer_module, "LOCK_WAIT_S", 0.1)
    lock = take_lock(root)
    with pytest.raises(BusyError, match=r"is being written by process \d+ on .*; wait"):
        StoreWriter.resume(root)
    lock.release()
    StoreWriter.resume(root).close()
    assert left(root) == {"lock", "plan.json"}


def test_two_that_look_at_each_other_at_once_are_not_both_let_in(root: BucketPath) -> None:
    """One is shared, the other exclusive; both may withdraw, never may both go on."""
    for _ in range(5):
        found: list[BucketLock] = []
        start = threading.Barrier(2)

        def take(
            exclusive: bool,
            start: threading.Barrier = start,
            found: list[BucketLock] = found,
        ) -> None:
            start.wait()
            with suppress(BusyError):
                found.append(BucketLock(root, exclusive=exclusive))

        threads = [threading.Thread(target=take, args=(exclusive,)) for exclusive in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) < 2
        for lock in found:
            lock.release()


def test_the_claim_of_a_dead_writer_is_taken_over_and_it_finds_out(root: BucketPath) -> None:
    first, second = (BucketLock(root, exclusive=False) for _ in range(2))
    claim = first.claim("7")
    assert claim is not None
    assert (second.claim("7"), first.claim("7")) == (None, None)
    assert second.claimed() == {"7"}
    kill(first)
    taken = second.claim("7")
    assert taken is not None
    assert first._lease._put(first._lease._version) is None  # its next renewal
    first._lease._lost = True
    with pytest.raises(StoreError, match="could not be kept locked"):
        first.require_held()
    claim.release()  # which leaves the second's alone
    assert second.claimed() == {"7"}
    taken.release()
    assert second.claimed() == set()


def test_what_dead_writers_leave_is_swept_and_in_nobodys_way(root: BucketPath) -> None:
    dead = BucketLock(root, exclusive=False)
    assert dead.claim("3") is not None
    kill(dead)
    lock = BucketLock(root, exclusive=True)
    assert lock.claim("finish") is not None
    lock.sweep()
    assert left(root) == {"lock", "finish.claim"}  # which is its own
    lock.release()


@pytest.mark.parametrize("claim", [b"", b"[]", b"torn", b'{"lease": "../x", "owner": 1}'])
def test_a_claim_that_makes_no_sense_is_nobodys(root: BucketPath, claim: bytes) -> None:
    (root / "journal" / "7.claim").write_bytes(claim)
    lock = BucketLock(root, exclusive=False)
    assert lock.claim("7") is not None
    lock.release()


def test_a_lease_that_is_buried_does_not_rise(root: BucketPath) -> None:
    lease = Lease(root, root / "journal/writers/1")
    assert lease_module.expire(lease.path, lease.path.read_version())
    assert lease._put(lease._version) is None
    assert not lease_module.expire(lease.path, lease.path.read_version()._replace(etag='"old"'))
    lease._lost = True
    lease.release()


def test_kills_among_writers_on_several_machines_change_nothing(
    root: BucketPath, make_store: Callable[..., Path]
) -> None:
    """Nobody sees another's process: a dead one is one that is silent for too long."""
    script = Path(__file__).parent.with_name("team.py")
    command = [sys.executable, str(script), str(root), "1", "5", "2", json.dumps({})]
    done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert done["n_kills"] >= 5
    assert not done["done_early"]
    assert is_complete(root)
    assert same_as(root, make_store())
    assert verify_store(root, full=True)["ok"]
    assert not {name for name in left(root) if name.endswith(".claim")}


def test_requests_and_bytes_of_a_shard_do_not_grow_with_the_shards_before(
    root: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal was one object, read whole at every claim and put whole at every commit."""
    monkeypatch.setattr(journal_module, "OBJECT_BYTES", 4000)  # of about three lines
    n_requests = n_bytes = 0
    talk, put = BucketPath._talk, BucketPath.write_bytes

    def counted(path: BucketPath, **how: Any) -> AbstractContextManager[None]:
        nonlocal n_requests
        n_requests += "/writers/" not in path.key  # which are renewed by the clock
        return talk(path, **how)

    def measured(path: BucketPath, content: bytes) -> None:
        nonlocal n_bytes
        n_bytes += len(content) if path.key.endswith(".jsonl") else 0
        put(path, content)

    each: list[tuple[int, int]] = []
    with create(root, make_manifest(shard_seqs=1)) as writer:
        monkeypatch.setattr(BucketPath, "_talk", counted)
        monkeypatch.setattr(BucketPath, "write_bytes", measured)
        for shard in writer.claimed_shards():
            each.append((n_requests, n_bytes))  # so far, with this claim
            fill(writer, [shard])
        monkeypatch.undo()
        writer.finish()
    names = [path.stem for path in (root / "journal").glob("w*.jsonl")]
    assert len(names) > 5
    shards = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(each)]
    assert max(n for n, _ in shards[-7:]) <= max(n for n, _ in shards[:7])
    assert all(0 < n <= 4000 for _, n in shards)
    assert verify_store(root, full=True)["ok"]
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == []
