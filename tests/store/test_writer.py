"""Writing: whole shards or nothing, and going on after any stop."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorsa.store import ActivationStore, StoreError, StoreWriter, is_begun, is_complete
from small import LAYERS, N_SEQ, SHARD_SEQS, create, fill, make_manifest, values


def _digest(root: Path) -> dict[str, str]:
    """Return the hash of every shard file."""
    files = [p for p in root.rglob("*") if p.is_file() and "c" in p.relative_to(root).parts]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


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
        session.append({layer: (values(layer, 0)[:2], values(layer, 1)[:2]) for layer in LAYERS})
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
        session.append({layer: (values(layer, 0)[:2], values(layer, 1)[:2]) for layer in LAYERS})
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
        session.append({0: (values(0, 0)[4:8], values(0, 1)[4:8]), 3: (values(3, 0)[4:8], y)})
    assert 1 in writer.missing_shards()


def test_values_beyond_float16_name_the_dtype(tmp_path: Path) -> None:
    writer = create(tmp_path / "acts", make_manifest(dtype="float16"))
    x = values(0, 0)[:4] * 1e6
    with pytest.raises(StoreError, match="does not fit float16; use --dtype bfloat16"):
        with writer.shard(0) as session:
            session.append(dict.fromkeys(LAYERS, (x, x)))


def test_two_writers_are_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    writer = create(root, make_manifest())
    with pytest.raises(StoreError, match="being written by another process"):
        StoreWriter.resume(root)
    writer.close()
    StoreWriter.resume(root).close()


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
    writer = create(root, make_manifest())
    fill(writer)
    writer.finish()
    assert len(ActivationStore.open(root).read("tokens", range(N_SEQ))) == N_SEQ


def test_a_torn_journal_line_costs_its_shard_only(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    writer = create(root, make_manifest())
    fill(writer, [0, 1])
    writer.close()
    journal = max((root / "journal").glob("*.jsonl"), key=lambda p: p.stat().st_size)
    journal.write_bytes(journal.read_bytes()[:-9])
    again = StoreWriter.resume(root)
    assert again.missing_shards() == [1, 2, 3, 4, 5]
    again.close()


def test_a_damaged_journal_line_is_named(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    create(root, make_manifest()).close()
    journal = next((root / "journal").glob("*.jsonl"))
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0][:5] + "\n", *lines[1:]]))
    with pytest.raises(StoreError, match=f"{journal.name} has a damaged line"):
        StoreWriter.resume(root)


CHILD = """
import sys, pathlib, time
sys.path.insert(0, {tests!r})
from small import create, fill, make_manifest
from lorsa.store import StoreWriter, is_begun
root = pathlib.Path({root!r})
writer = StoreWriter.resume(root) if is_begun(root) else create(root, make_manifest())
print("begun", flush=True)
for shard in writer.missing_shards():
    fill(writer, [shard])
    print(shard, flush=True)
writer.finish()
"""


@pytest.mark.parametrize("after", [1, 2, 4])
def test_killed_and_resumed_is_byte_identical(
    tmp_path: Path, make_store: Callable[..., Path], after: int
) -> None:
    """SIGKILL right after `after` lines of output, then resume in this process."""
    root = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent.parent), root=str(root))
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
    assert _digest(root) == _digest(make_store("whole"))


def test_shards_hold_runs_of_sequences() -> None:
    manifest = make_manifest()
    assert manifest.n_shards == 6
    assert [len(manifest.shard_rows(s)) for s in range(6)] == [SHARD_SEQS] * 5 + [2]
    assert manifest.held_out_shards == (5,)
    assert torch.equal(torch.tensor(list(manifest.shard_rows(1))), torch.arange(4, 8))
