"""Writing: whole shards or nothing, and going on after any stop."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.errors import BusyError, StoreError
from lorsa.sites import Site, attention_ports
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import is_begun, is_complete
from lorsa.store.read.reader import ActivationStore
from lorsa.store.shard import ShardWriter
from lorsa.store.write import create as create_module
from lorsa.store.write import writer as writer_module
from lorsa.store.write.commit_log import CommitLog
from lorsa.store.write.writer import StoreWriter
from power import PowerCutError
from small import (
    D_MODEL,
    LAYERS,
    N_CTX,
    N_SEQ,
    SHARD_SEQS,
    create,
    digests,
    fill,
    make_manifest,
    tokens,
    values,
)

SITES = [site for layer in LAYERS for site in attention_ports(layer).sites]


def test_a_store_is_complete_only_when_finished(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    writer = create(root, make_manifest())
    assert is_begun(root)
    fill(writer, [0, 1])
    with pytest.raises(StoreError, match="lacks 4 shards"):
        writer.finish()
    assert not is_complete(root)
    fill(writer)
    writer.finish()
    assert is_complete(root)


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    writer = create(root, make_manifest())
    with pytest.raises(ZeroDivisionError), writer.shard(0) as session:
        session.append({site: values(*site.place)[:2] for site in SITES})
        raise ZeroDivisionError
    assert 0 in writer.missing_shards()
    files = {p.name for p in (root / "layers").rglob("*") if p.is_file()}
    assert files == {"zarr.json"}


def test_a_shard_that_is_short_of_sequences_is_not_committed(tmp_path: Path) -> None:
    writer = create(tmp_path / "acts", make_manifest())
    with (
        pytest.raises(ValueError, match="has 4 sequences; 2 were appended"),
        writer.shard(0) as session,
    ):
        session.append({site: values(*site.place)[:2] for site in SITES})
    assert 0 in writer.missing_shards()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    writer = create(tmp_path / "acts", make_manifest())
    y = values(3, 1)[4:8].clone()
    y[2, 1, 0] = bad
    with (
        pytest.raises(StoreError, match="layers/3/attn_out of sequence 6 is not finite"),
        writer.shard(1) as session,
    ):
        session.append({site: values(*site.place)[4:8] for site in SITES} | {SITES[3]: y})
    assert 1 in writer.missing_shards()


def test_activations_that_are_not_finite_are_counted_and_kept_if_asked_for(
    tmp_path: Path,
) -> None:
    root = tmp_path / "acts"
    y = values(3, 1)[4:8].clone()
    y[2, 1, 0] = float("nan")
    y[2, 3, 1] = float("inf")
    with create(root, make_manifest()) as writer:
        with writer.shard(1, keep_nonfinite=True) as session:
            session.append({site: values(*site.place)[4:8] for site in SITES} | {SITES[3]: y})
        fill(writer)
        writer.finish()
    store = ActivationStore.open(root)
    assert [store.n_nonfinite(site) for site in SITES] == [0, 0, 0, 2]
    assert torch.equal(
        store.activations(attention_ports(3), [6]).y[0].nan_to_num(), y[2].nan_to_num()
    )
    assert 0 < store.mean_norm(Site(3, "attn_out")) < 10


def test_what_waits_for_the_disk_is_bounded(tmp_path: Path) -> None:
    site_bytes = 2 * N_CTX * 4 * (D_MODEL + 1)  # values and norms of two sequences
    with StoreWriter.create(
        tmp_path / "acts",
        make_manifest(),
        tokens=tokens(),
        documents=tokens(),
        document_names=["a"],
        modules={f"{layer}.attention": {"W_Q": torch.zeros(2, 3)} for layer in LAYERS},
        buffer_bytes=site_bytes,
    ) as writer:
        fill(writer)
        writer.finish()
        assert writer.peak_buffer_bytes == site_bytes
    ActivationStore.open(tmp_path / "acts")


def test_a_buffer_too_small_for_a_layer_is_named(tmp_path: Path) -> None:
    create(tmp_path / "acts", make_manifest()).close()
    with StoreWriter.resume(tmp_path / "acts", buffer_bytes=100) as writer:
        with pytest.raises(StoreError, match="use a larger --buffer-gb or smaller --batch-size"):
            fill(writer)


def test_int8_needs_a_sample(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int8 needs a sample of every site that is stored"):
        StoreWriter.create(
            tmp_path / "acts",
            make_manifest(dtype="int8"),
            tokens=tokens(),
            documents=tokens(),
            document_names=["a"],
            modules={f"{layer}.attention": {"W_Q": torch.zeros(2, 3)} for layer in LAYERS},
        )


def test_values_beyond_float16_name_the_dtype(tmp_path: Path) -> None:
    writer = create(tmp_path / "acts", make_manifest(dtype="float16"))
    x = values(0, 0)[:4] * 1e6
    with pytest.raises(
        StoreError, match=r"does not fit float16 \(.*\); use --dtype bfloat16, into a new"
    ):
        with writer.shard(0) as session:
            session.append(dict.fromkeys(SITES, x))


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StoreError, match="other things"):
        create(tmp_path, make_manifest())
    with pytest.raises(StoreError, match="is a file"):
        create(tmp_path / "notes.txt", make_manifest())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_store_that_was_hardly_begun_is_begun_again(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    create(root, make_manifest()).close()
    (root / "journal" / "plan.json").unlink()
    (root / "zarr.923bf3cc.partial").touch()  # of zarr, when a kill falls on its write
    writer = create(root, make_manifest())
    fill(writer)
    writer.finish()
    assert len(ActivationStore.open(root).read("tokens", range(N_SEQ))) == N_SEQ


def test_a_folder_of_somebody_else_is_never_cleared(tmp_path: Path) -> None:
    """A folder called journal once made any folder look like a store that was hardly begun."""
    for name in ("journal/diary.jsonl", "documents/thesis.tex", "layers/cake.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(StoreError, match="other things"):
        create(tmp_path, make_manifest())
    assert sum(p.is_file() for p in tmp_path.rglob("*")) == 3


def test_leftovers_of_a_store_that_was_hardly_begun_are_cleared(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    create(root, make_manifest()).close()
    (root / "journal" / "plan.json").unlink()
    layers = {0: {"weights": ["W_Q"]}}
    with create(root, make_manifest(layers=layers)) as writer:
        fill(writer)
        writer.finish()
    assert not (root / "layers" / "3").exists()
    assert not (root / "weights" / "3").exists()


@pytest.mark.parametrize("name", ["layers/3/attn_in/c/0/0/0", "layers/0/attn_in_norm/c/1/0"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_committed_file_that_is_cut_or_gone_is_written_again(
    tmp_path: Path, name: str, how: str
) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        fill(writer, [0, 1, 2])
    path = root / name
    path.write_bytes(path.read_bytes()[:-5]) if how == "cut" else path.unlink()
    with StoreWriter.resume(root) as writer:
        fill(writer)
        writer.finish()
    store = ActivationStore.open(root)
    assert torch.equal(store.activations(attention_ports(3), range(N_SEQ)).x, values(3, 0))


def test_token_ids_that_are_gone_cannot_be_made_again(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    create(root, make_manifest()).close()
    (root / "tokens/c/1/0").unlink()
    with pytest.raises(StoreError, match="lacks token ids: .* or harvest into another --store"):
        StoreWriter.resume(root)


def test_a_writer_that_fails_frees_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = tmp_path / "acts"
    with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space left") as kept:
        patch.setattr(create_module, "sync_tree", full)
        create(root, make_manifest())
    with create(root, make_manifest()) as writer:  # while the error lives, as in a notebook
        fill(writer)
        writer.finish()
    assert kept.traceback


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokens": torch.zeros(1, 1, dtype=torch.int32)},
            r"\(1, 1\) and \(22, 6\), not \(22, 6\)",
        ),
        ({"modules": {}}, "not those that the manifest names"),
    ],
)
def test_what_is_not_in_the_manifest_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    parts = {"tokens": tokens(), "documents": tokens(), "document_names": ["a"], "modules": {}}
    with pytest.raises(ValueError, match=message):
        StoreWriter.create(tmp_path / "acts", make_manifest(), **(parts | change))
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {site: values(0, 0)[:4] for site in SITES[:2]},
            "the batch has 0.attn_in, 0.attn_out; to write: 0.attn_in, 0.attn_out, 3.attn_in, ",
        ),
        (
            dict.fromkeys(SITES, values(0, 0)[:4]) | {SITES[2]: values(0, 0)[:4, :, :3]},
            r"3.attn_in must be \[4, 6, 5\]; it is \[4, 6, 3\]",
        ),
        (dict.fromkeys(SITES, values(0, 0)[:5]), "5 were appended"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path, batch: Any, message: str) -> None:
    with create(tmp_path / "acts", make_manifest()) as writer:
        with pytest.raises(ValueError, match=message), writer.shard(0) as session:
            session.append(batch)
        assert 0 in writer.missing_shards()


def test_a_batch_may_be_used_again_by_its_owner(tmp_path: Path) -> None:
    """The thread that writes must not see what happens to a batch after it was handed over."""
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        for shard in writer.missing_shards():
            rows = writer.manifest.shard_rows(shard)
            with writer.shard(shard) as session:
                for seq in rows:
                    batch = {site: values(*site.place)[[seq]] for site in SITES}
                    session.append(batch)
                    for part in batch.values():
                        part.zero_()
        writer.finish()
    assert torch.equal(
        ActivationStore.open(root).activations(attention_ports(0), range(N_SEQ)).x, values(0, 0)
    )


def test_a_torn_journal_line_costs_its_shard_only(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    writer = create(root, make_manifest())
    fill(writer, [0, 1])
    writer.close()
    journal = next(p for p in (root / "journal").glob("*.jsonl") if p.stem != "text")
    journal.write_bytes(journal.read_bytes()[:-9])
    again = StoreWriter.resume(root)
    assert again.missing_shards() == [1, 2, 3, 4, 5]
    again.close()


def test_a_damaged_journal_line_is_named(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    create(root, make_manifest()).close()
    journal = root / "journal" / "text.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0][:5] + "\n", *lines[1:]]))
    with pytest.raises(StoreError, match=r"text.jsonl has a damaged line; .* --repair lists again"):
        StoreWriter.resume(root)


CHILD = """
import sys, pathlib, time
sys.path.insert(0, {tests!r})
from small import create, fill, make_manifest
from lorsa.store.folder import is_begun
from lorsa.store.write.writer import StoreWriter
root = pathlib.Path({root!r})
writer = StoreWriter.resume(root) if is_begun(root) else create(root, make_manifest())
print("begun", flush=True)
for shard in writer.missing_shards():
    fill(writer, [shard])
    print(shard, flush=True)
writer.finish()
"""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_killed_and_resumed_is_byte_identical(
    tmp_path: Path, make_store: Callable[..., Path], after: int
) -> None:
    """SIGKILL right after `after` lines of output, then resume in this process."""
    root = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parents[2]), root=str(root))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(after):
        child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not is_complete(root)
    writer = StoreWriter.resume(root)
    fill(writer)
    writer.finish()
    assert digests(root) == digests(make_store("whole"))


def test_shards_hold_runs_of_sequences() -> None:
    manifest = make_manifest()
    assert manifest.n_shards == 6
    assert [len(manifest.shard_rows(s)) for s in range(6)] == [SHARD_SEQS] * 5 + [2]
    assert manifest.held_out_shards == (5,)
    assert torch.equal(torch.tensor(list(manifest.shard_rows(1))), torch.arange(4, 8))


def test_a_complete_store_is_unfinished_while_a_shard_is_written_anew(
    make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the journal's line, it opened as complete, with the sums of the old files."""

    def killed(*_: Any) -> None:
        raise PowerCutError

    root = make_store()
    whole = digests(root)
    (root / "layers/3/attn_in/c/1/0/0").unlink()
    with StoreWriter.resume(root) as writer, monkeypatch.context() as patch:
        patch.setattr(CommitLog, "commit", killed)
        with pytest.raises(PowerCutError), writer.shard(1) as session:
            part = -values(0, 0)[4:8]  # not the old bytes
            session.append(dict.fromkeys(writer.sites_to_write, part))
    with pytest.raises(StoreError, match="is unfinished"):
        ActivationStore.open(root)
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [1]
        fill(writer)
        writer.finish()
    assert digests(root) == whole
    assert verify_store(root, full=True)["ok"]


def test_the_names_of_new_folders_last_through_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new store's own name, and those of folders made for it, were never flushed."""
    flushed: list[Path] = []
    monkeypatch.setattr(create_module, "sync", flushed.append)
    create(tmp_path / "a" / "b" / "acts", make_manifest()).close()
    assert flushed == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]


@pytest.mark.parametrize("lost", ["*.jsonl", "text.jsonl"])
def test_a_complete_store_with_a_shorter_journal_is_mended(
    make_store: Callable[..., Path], lost: str
) -> None:
    """The message was to delete a store of which one shard could not be read."""
    root = make_store()
    whole = digests(root)
    for path in (root / "journal").glob(lost):
        path.unlink()
    (root / "layers/3/attn_in/c/1/0/0").unlink()
    with pytest.raises(StoreError, match=f"lorsa store verify {root} --repair$"):
        StoreWriter.resume(root)
    assert verify_store(root, repair=True)["repaired"]
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [1]
        fill(writer)
        writer.finish()
    assert digests(root) == whole


def test_a_shard_is_committed_while_the_next_is_written(
    tmp_path: Path, make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model does not wait for the disk between two shards; others cannot take them."""
    go = threading.Event()
    commit = ShardWriter.commit

    def slow(self: ShardWriter) -> Any:
        assert go.wait(10)
        return commit(self)

    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer, StoreWriter.resume(root) as other:
        monkeypatch.setattr(ShardWriter, "commit", slow)
        for shard in writer.claimed_shards():
            with writer.shard(shard, wait=False) as session:
                append_all(writer, session, shard)
                writer.settle(wait=False)
            if shard == 1:
                assert writer.unsettled == [0, 1]
                assert other.missing_shards() == [0, 1, 2, 3, 4, 5]
                with pytest.raises(BusyError), other.shard(0):
                    pass
                go.set()
        assert writer.unsettled == []
        assert other.missing_shards() == []
        writer.finish()
    assert digests(root) == digests(make_store("whole"))


def test_what_the_disk_has_is_committed_when_the_next_shard_fails(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        with writer.shard(0, wait=False) as session:
            append_all(writer, session, 0)
        with pytest.raises(ZeroDivisionError), writer.shard(1, wait=False) as session:
            append_all(writer, session, 1)
            raise ZeroDivisionError
        assert writer.missing_shards() == [1, 2, 3, 4, 5]
        with writer.shard(1, wait=False) as session:
            append_all(writer, session, 1)
        writer._queue.drain()
    with StoreWriter.resume(root) as writer:
        assert writer.missing_shards() == [2, 3, 4, 5]
    assert not list(root.rglob("*.partial"))


def test_a_disk_that_is_full_is_said_at_the_next_shard(
    tmp_path: Path, make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the two shards is taken for written, and the same writer can go on."""

    def full(self: ShardWriter) -> Any:
        raise StoreError("the disk is full")

    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "commit", full)
            with writer.shard(0, wait=False) as session:
                append_all(writer, session, 0)
            with pytest.raises(StoreError, match="the disk is full"):
                with writer.shard(1, wait=False) as session:
                    writer._queue._wait()
                    append_all(writer, session, 1)
        assert writer.missing_shards() == [0, 1, 2, 3, 4, 5]
        assert not list(root.rglob("*.partial"))
        fill(writer)
        writer.finish()
    assert digests(root) == digests(make_store("whole"))


def test_a_shard_that_failed_is_still_claimed_for_another_try(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    """On a full GPU it is tried again with a smaller batch; another process took it meanwhile."""
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer, StoreWriter.resume(root) as other:
        for shard in writer.claimed_shards():
            with pytest.raises(MemoryError), writer.shard(shard, wait=False) as session:
                append_all(writer, session, shard)
                raise MemoryError
            with pytest.raises(BusyError), other.shard(shard):
                pass
            with writer.shard(shard, wait=False) as session:
                append_all(writer, session, shard)
        writer.finish()
    assert digests(root) == digests(make_store("whole"))
    assert not list((root / "journal").glob("*.claim"))


def test_a_failure_of_the_shard_before_is_told_whatever_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was forgotten where the next shard failed by itself, and the shard was never written."""

    def full(self: ShardWriter) -> Any:
        raise StoreError("the disk is full")

    with create(tmp_path / "acts", make_manifest()) as writer:
        monkeypatch.setattr(ShardWriter, "commit", full)
        with writer.shard(0, wait=False) as session:
            append_all(writer, session, 0)
        with pytest.raises(StoreError, match="the disk is full"):
            with writer.shard(1, wait=False):
                raise MemoryError


def test_no_claim_is_released_while_its_shard_may_still_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of cleaning up: another process could have opened the same files."""
    root = tmp_path / "acts"

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    with create(root, make_manifest()) as writer, StoreWriter.resume(root) as other:
        shards = writer.claimed_shards()
        with monkeypatch.context() as patch:
            patch.setattr(writer_module.WriteQueue, "reset", interrupted)
            with pytest.raises(KeyboardInterrupt), writer.shard(next(shards)) as session:
                append_all(writer, session, 0)
                raise KeyboardInterrupt
            shards.close()
        with pytest.raises(BusyError), other.shard(0):
            pass
        writer.close()
        with other.shard(0) as session:
            append_all(other, session, 0)


def append_all(writer: StoreWriter, session: Any, shard: int) -> None:
    """Append the small store's values of a shard."""
    rows = slice(writer.manifest.shard_rows(shard)[0], writer.manifest.shard_rows(shard)[-1] + 1)
    session.append({site: values(*site.place)[rows] for site in SITES})
