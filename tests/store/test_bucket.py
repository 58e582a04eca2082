"""Stores in a bucket, against a real S3 protocol server on loopback."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from lorsa import cli
from lorsa.errors import StoreError, UnreachableError
from lorsa.sites import Site, attention_ports
from lorsa.store.bucket import BucketPath
from lorsa.store.care.info import store_info
from lorsa.store.care.merge import merge_stores
from lorsa.store.care.remove import remove_sites
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import is_complete
from lorsa.store.locks import lease as lease_module
from lorsa.store.locks.bucket_lock import BucketLock
from lorsa.store.locks.lease import Lease
from lorsa.store.places import place
from lorsa.store.read.loader import batches
from lorsa.store.read.reader import ActivationStore
from lorsa.store.read.sampler import Sampler
from lorsa.store.write.writer import StoreWriter
from small import (
    add_sites,
    create,
    digests,
    fill,
    make_manifest,
    mlp,
    tokens,
    values,
    values_of,
)
from typer.testing import CliRunner

pytest.importorskip("obstore", reason="obstore is not installed (lorsa[s3])")


@pytest.fixture
def whole(root: BucketPath) -> BucketPath:
    """A whole small store."""
    return write(root)


def write(root: BucketPath, **changes: object) -> BucketPath:
    with create(root, make_manifest(**changes)) as writer:
        fill(writer)
        writer.finish()
    return root


def objects(root: BucketPath) -> dict[str, bytes]:
    """Return the array files of a store as `small.digests` chooses them."""
    names = {path.relative_to(root): path for path in root.sizes()}
    return {str(name): path.read_bytes() for name, path in names.items() if "c" in name.parts}


def test_place_reads_what_users_write() -> None:
    expected = BucketPath("b", "runs/acts")
    for text in ("s3://b/runs/acts", "s3://b/runs//acts/", Path("s3://b/runs/acts"), expected):
        assert place(text) == expected
    assert str(expected) == "s3://b/runs/acts"
    assert place("runs/acts") == Path("runs/acts")


@pytest.mark.parametrize("text", ["s3://b", "s3:///", "s3://b/../x", "gs://b/x", "http://b/x"])
def test_place_refuses_what_is_none(text: str) -> None:
    with pytest.raises(StoreError, match="no place for a store"):
        place(text)


def test_place_without_obstore_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    from lorsa.store import bucket as module

    module._obstore.cache_clear()
    with pytest.raises(StoreError, match=r"pip install 'lorsa\[s3\]'"):
        place("s3://b/x")
    module._obstore.cache_clear()


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16", "compression": "zstd"}, {"dtype": "int8"}, {"outputs": "derive"}],
    ids=["float32", "zstd", "int8", "derive"],
)
def test_a_store_in_a_bucket_is_byte_for_byte_that_of_a_disk(
    root: BucketPath, make_store: Callable[..., Path], changes: dict[str, str]
) -> None:
    local = make_store(**changes)
    here = {name: (local / name).read_bytes() for name in digests(local)}
    assert objects(write(root, **changes)) == here


def test_activation_store_reads_a_bucket(whole: BucketPath) -> None:
    store = ActivationStore.open(str(whole))
    seqs = [21, 0, 7, 7, 12]
    x, y = store.activations(attention_ports(3), seqs)
    assert torch.equal(x, values(3, 0)[seqs])
    assert torch.equal(y, values(3, 1)[seqs])
    assert torch.equal(store.tokens(seqs), tokens()[seqs])
    assert store.document_names() == ["a", "b"]
    assert torch.equal(store.weights("0.attention")["W_Q"], torch.arange(6).view(2, 3).bfloat16())
    with pytest.raises(IndexError, match="sequence 22"):
        store.tokens([0, 22])


def test_batches_of_a_bucket_are_those_of_a_disk(
    whole: BucketPath, make_store: Callable[..., Path]
) -> None:
    def read(where: Path | BucketPath) -> list[torch.Tensor]:
        store = ActivationStore.open(where)
        order = Sampler(store.train_seqs, 4, batch_seqs=3, seed=1)
        found = batches(store, attention_ports(0), order, first_step=0, n_steps=14)
        return [batch.stored.parts[Site(0, "attn_in")].values.clone() for batch in found]

    here, there = read(make_store()), read(whole)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_plain_zarr_reads_a_bucket(whole: BucketPath) -> None:
    from obstore.store import S3Store

    bucket = S3Store(whole.bucket, prefix=whole.key)
    group = zarr.open_group(zarr.storage.ObjectStore(bucket, read_only=True), mode="r")
    x = group["layers/3/attn_in"]
    assert isinstance(x, zarr.Array)
    assert np.array_equal(x[5], values(3, 0)[5].numpy())


def test_a_copy_of_a_bucket_is_a_folder_and_of_a_folder_a_bucket(
    whole: BucketPath, root: BucketPath, tmp_path: Path
) -> None:
    for path in whole.sizes():
        file = tmp_path / path.relative_to(whole)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.read_bytes())
    assert verify_store(tmp_path, full=True)["ok"]
    with StoreWriter.resume(tmp_path) as writer:  # which leaves the lock of a disk
        writer.finish()
    again = root.parent / "again"
    for file in tmp_path.rglob("*"):
        if file.is_file():
            again.joinpath(*file.relative_to(tmp_path).parts).write_bytes(file.read_bytes())
    with StoreWriter.resume(again) as writer:
        writer.finish()
    assert verify_store(again, full=True)["ok"]


def test_store_info_of_a_bucket(whole: BucketPath, root: BucketPath) -> None:
    info = store_info(str(whole))
    assert (info["store"], info["complete"], info["next"]) == (str(root), True, None)


def killed_writer(root: BucketPath, n_shards: int) -> "subprocess.Popen[str]":
    """Return a process that has committed so many shards and is in the middle of the next."""
    script = Path(__file__).with_name("bucket_writer.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(root), str(n_shards)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_writer_loses_only_what_was_not_committed(
    root: BucketPath, make_store: Callable[..., Path]
) -> None:
    """Its shard is not to be had while it lives, and written by another once it is killed."""
    process = killed_writer(root, 2)
    try:
        with StoreWriter.resume(root) as writer:
            with pytest.raises(StoreError, match="shard 2 of .* is being written by another"):
                fill(writer, [2])
        with pytest.raises(StoreError, match=rf"written by process {process.pid} on .* wait"):
            remove_sites(root, "3")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    info = store_info(root)
    assert (info["complete"], info["n_missing_shards"]) == (False, 4)
    assert f"--store {root}" in info["next"]
    with pytest.raises(StoreError, match="unfinished"):
        ActivationStore.open(root)
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [2, 3, 4, 5]
        fill(writer)
        writer.finish()
    local = make_store()
    assert objects(root) == {name: (local / name).read_bytes() for name in digests(local)}


def test_a_store_that_was_hardly_begun_is_begun_anew(root: BucketPath) -> None:
    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorsa.store.write.create.write_documents", stop)
        with pytest.raises(StopError):
            create(root, make_manifest())
    (root / "layers" / "9" / "old").write_bytes(b"left")
    assert ActivationStore.open(write(root)).layers == [0, 3]
    assert not (root / "layers" / "9").exists()


def test_a_place_with_other_things_is_refused(root: BucketPath) -> None:
    (root / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StoreError, match="other things"):
        create(root, make_manifest())


def test_a_shard_that_fails_leaves_nothing_visible(root: BucketPath) -> None:
    with create(root, make_manifest()) as writer:
        with pytest.raises(RuntimeError):
            with writer.shard(0) as session:
                session.append({site: values(*site.place)[:4] for site in writer.sites_to_write})
                raise RuntimeError
        assert not (root / "layers" / "0" / "attn_in" / "c").exists()
        assert writer.missing_shards() == list(range(6))


def test_a_full_tmpdir_is_one_line(root: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with create(root, make_manifest()) as writer:
        monkeypatch.setattr("tempfile.TemporaryFile", full)
        with pytest.raises(StoreError, match="No space left on device in .*see TMPDIR"):
            fill(writer)


def test_lease_is_taken_over_from_a_holder_that_is_silent(
    root: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease(root, root / "lock")
    with pytest.raises(StoreError, match="taken for dead after 120 s"):
        Lease(root, root / "lock")
    monkeypatch.setattr(lease_module, "DEAD_S", -1.0)
    second = Lease(root, root / "lock")
    monkeypatch.setattr(lease_module, "DEAD_S", 120.0)
    second.require_held()
    assert first._put(first._version) is None
    first._lost = True
    first.release()  # which leaves the second's alone
    with pytest.raises(StoreError, match="being written"):
        Lease(root, root / "lock")
    second.release()
    Lease(root, root / "lock").release()


def test_lease_is_renewed_and_its_loss_is_noticed(
    root: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.02)
    lease = Lease(root, root / "lock")
    begun = lease._version
    for _ in range(500):
        if lease._version != begun:
            break
        threading.Event().wait(0.01)
    assert lease._version != begun
    (root / "lock").write_bytes(json.dumps({"owner": "another", "held": True}).encode())
    lease._thread.join(10)
    with pytest.raises(StoreError, match="could not be kept locked"):
        lease.require_held()
    lease.release()
    assert b"another" in (root / "lock").read_bytes()


def test_lease_of_two_at_once_is_one_s(root: BucketPath) -> None:
    outcomes: list[object] = []
    start = threading.Barrier(8)

    def take() -> None:
        start.wait()
        try:
            outcomes.append(Lease(root, root / "lock"))
        except StoreError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [found for found in outcomes if isinstance(found, Lease)]
    assert (len(held), len(outcomes)) == (1, 8)
    held[0].release()


def test_a_writer_that_lost_its_lock_commits_nothing(root: BucketPath) -> None:
    with create(root, make_manifest()) as writer:
        fill(writer, [0])
        assert isinstance(writer._lock, BucketLock)
        writer._lock._lease._lost = True
        with pytest.raises(StoreError, match="could not be kept locked"):
            fill(writer, [1])
    assert store_info(root)["n_missing_shards"] == 5


@pytest.mark.parametrize("at", [0, 60, 125, 300, 450, 500, 563])
def test_a_flipped_byte_is_found(whole: BucketPath, at: int) -> None:
    path = whole / "layers/3/attn_in/c/1/0/0"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))
    store = ActivationStore.open(whole)
    with pytest.raises(StoreError, match=f"{path} .*--repair"):
        store.values(Site(3, "attn_in"), range(4, 8))
    found = verify_store(whole, full=True)
    assert [d["path"] for d in found["damages"]] == ["layers/3/attn_in/c/1/0/0"]


def test_missing_and_cut_objects_are_found(whole: BucketPath) -> None:
    path = whole / "layers/0/attn_out/c/2/0/0"
    content = path.read_bytes()
    store = ActivationStore.open(whole)
    path.unlink()
    with pytest.raises(StoreError, match=f"{path} .*No such file.*--repair"):
        store.stored(attention_ports(0), [8])
    with pytest.raises(StoreError, match=f"{path} is missing"):
        ActivationStore.open(whole)
    path.write_bytes(content[:-100])
    with pytest.raises(StoreError, match="is damaged"):
        store.stored(attention_ports(0), [8])
    with pytest.raises(StoreError, match=f"{path} has 464 bytes instead of 564"):
        ActivationStore.open(whole)
    path.write_bytes(content)
    store.stored(attention_ports(0), [8])  # now its index is known
    for cut in (content[:10], b""):
        path.write_bytes(cut)
        with pytest.raises(StoreError, match=f"{path} ends before byte"):
            store.stored(attention_ports(0), [9])


def test_verify_mends_a_bucket(whole: BucketPath) -> None:
    before = objects(whole)
    (whole / "layers/0/attn_out/c/2/0/0").unlink()
    (whole / "shards.parquet").write_bytes(b"torn")
    (whole / "layers/0/attn_in/zarr.json").unlink()
    assert not verify_store(whole)["ok"]
    assert verify_store(whole, full=True, repair=True)["dropped_shards"] == [2]
    assert not is_complete(whole)
    with StoreWriter.resume(whole) as writer:
        assert writer.missing_shards() == [2]
        fill(writer)
        writer.finish()
    assert verify_store(whole, full=True)["ok"]
    assert objects(whole) == before


def test_verify_does_not_take_a_server_that_fails_for_damage(
    whole: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: BucketPath) -> bytes:
        raise UnreachableError(f"{path} cannot be read (ServiceUnavailable)")

    for name in ("manifest.json", "shards.parquet", "documents.parquet"):
        with monkeypatch.context() as patch:
            real = BucketPath.read_bytes
            patch.setattr(
                BucketPath,
                "read_bytes",
                lambda p: (fail if p.name == name else real)(p),  # noqa: B023
            )
            with pytest.raises(UnreachableError, match=name):
                verify_store(whole, repair=True)
    assert verify_store(whole)["ok"]


def test_remove_sites_of_a_bucket(whole: BucketPath) -> None:
    assert remove_sites(whole, "3")["layers"] == [0]
    assert not any("layers/3/" in path.key for path in whole.sizes())
    assert ActivationStore.open(whole).layers == [0]
    assert verify_store(whole, full=True)["ok"]


def test_sites_of_a_bucket_are_added_and_removed(whole: BucketPath) -> None:
    before = objects(whole)
    with add_sites(whole, mlp()) as writer:
        fill(writer)
        writer.finish()
    store = ActivationStore.open(whole)
    for site, held in values_of(mlp()).items():
        assert torch.equal(store.values(site, [5, 2]), held[[5, 2]])
    assert store.weights("3.mlp").keys() == {"W_gate", "W_in"}
    assert objects(whole).items() > before.items()
    assert verify_store(whole, full=True)["ok"]
    assert remove_sites(whole, sites="mlp")["removed_sites"] == ["3.mlp_in", "3.mlp_out"]
    assert objects(whole) == before
    found = verify_store(whole, full=True)
    assert (found["ok"], found["leftovers"]) == (True, [])


def test_merge_from_a_bucket_and_a_disk_into_a_bucket(
    whole: BucketPath, root: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("small.tokens", lambda: tokens() + 1000)
    with create(tmp_path / "b", make_manifest()) as writer:
        fill(writer)
        writer.finish()
    out = root.parent / "merged"
    assert merge_stores([whole, tmp_path / "b"], out)["n_seq"] == 44
    merged = ActivationStore.open(out)
    n_train = len(ActivationStore.open(whole).train_seqs)
    assert torch.equal(merged.values(Site(3, "attn_in"), range(n_train)), values(3, 0)[:n_train])
    assert verify_store(out, full=True)["ok"]


def test_what_a_server_refuses_is_one_line(bucket: str) -> None:
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/acts.*NoSuchBucket.*AWS_"):
        ActivationStore.open("s3://no-such-bucket/acts")
    with pytest.raises(StoreError, match="does not exist; make a store with"):
        ActivationStore.open(f"{bucket}/nothing-here")


def test_the_command_line_takes_a_bucket(whole: BucketPath) -> None:
    result = CliRunner().invoke(cli.app, ["store", "info", str(whole), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["store"] == str(whole)
    result = CliRunner().invoke(cli.app, ["store", "verify", str(whole), "--full"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli.app, ["store", "info", f"s3://{whole.bucket}"])
    assert result.exit_code == 1
    assert os.environ["AWS_ACCESS_KEY_ID"] == "test"


def test_a_large_object_goes_up_in_parts_and_down_in_ranges(
    root: BucketPath, tmp_path: Path
) -> None:
    content = np.random.default_rng(0).bytes(20 << 20)
    (tmp_path / "shard").write_bytes(content)
    with (tmp_path / "shard").open("rb") as file:
        root.upload(file)
    assert root.read_version().etag.endswith('-3"')  # S3's sign of three parts
    first, second = bytearray(5), bytearray(7)
    parts = [memoryview(first), memoryview(second)]
    assert root.preadv(parts, (8 << 20) - 6) == 12
    assert bytes(first + second) == content[(8 << 20) - 6 :][:12]
    assert root.preadv(parts, len(content) - 3) == 3
    assert root.preadv(parts, len(content)) == 0
    assert b"".join(block.tobytes() for block in root.read_blocks()) == content
