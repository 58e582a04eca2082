"""Machines that fail: no memory, no rights, too many open files. None of it is damage."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from lorsa.errors import StoreError, UnreachableError, remedy_of
from lorsa.store import open_files, parquet, shard
from lorsa.store.care.info import store_info
from lorsa.store.care.repair import verify_store
from lorsa.store.folder import is_complete
from lorsa.store.places import file_sizes
from lorsa.store.read.reader import ActivationStore
from small import create, fill, make_manifest, values

MakeStore = Callable[..., Path]
HARMFUL = ("--repair", "restore", "delete", "damaged", "harvest again", "missing")


def _raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        pa.lib.ArrowMemoryError("malloc of size 64 failed"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ESTALE, "Stale file handle"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")),
)
@pytest.mark.parametrize("place", ["table", "manifest", "shard", "documents"])
def test_a_machine_that_fails_is_no_damage(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    """A good file was called damaged where memory ran out, with advice to repair or delete it."""
    root = make_store()
    if place == "table":
        monkeypatch.setattr(parquet.pq.ParquetFile, "read", _raiser(error))
    elif place == "manifest":
        monkeypatch.setattr("lorsa.store.places.read_json_file", _raiser(error))
    elif place == "shard":
        monkeypatch.setattr("lorsa.store.care.verify.read_checksum", _raiser(error))
    else:
        monkeypatch.setattr("lorsa.store.fixed.read_bounded", _raiser(error))
    asked: list[Callable[[], Any]] = [lambda: verify_store(root, full=True, repair=True)]
    if place in ("table", "manifest"):
        asked += [lambda: ActivationStore.open(root), lambda: store_info(root)]
    elif place == "documents":
        asked.append(lambda: ActivationStore.open(root).document_names())
    for ask in asked:
        with pytest.raises(UnreachableError) as raised:
            ask()
        message = str(raised.value)
        assert (remedy := remedy_of(error)) is not None
        assert message.endswith(remedy)
        assert "\n" not in message
        assert not [word for word in HARMFUL if word in message]
    monkeypatch.undo()
    assert is_complete(root)
    assert verify_store(root, full=True)["ok"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOMEM])
def test_a_file_that_cannot_be_looked_at_is_not_missing(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Every error of a look at a file counted as a missing file, whose shard was to be redone."""
    root = make_store()
    assert file_sizes(root)("tokens/c/9/0") is None
    monkeypatch.setattr("lorsa.store.places.os.stat", _raiser(OSError(code, os.strerror(code))))
    with pytest.raises(UnreachableError, match=os.strerror(code)):
        file_sizes(root)("tokens/c/0/0")


def test_files_are_let_go_where_too_many_are_open(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 384 files stayed open, whatever the limit was; then all that was opened failed."""
    store = ActivationStore.open(make_store())
    store.read("layers/0/attn_in", range(8))
    kept = store._files._files
    assert len(kept) == 2
    real = os.open

    def limited(path: Any, *args: Any, **more: Any) -> int:
        if kept:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *args, **more)

    monkeypatch.setattr("lorsa.store.read.rows.os.open", limited)
    assert torch.equal(store.read("layers/3/attn_in", [0])[0], values(3, 0)[0])
    assert len(kept) == 1


def test_a_writer_lets_files_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token ids that a harvest reads were kept open, and its shards could not be."""
    real = shard.Path.open
    with create(tmp_path / "acts", make_manifest()) as writer:
        writer.tokens(range(22))
        kept = writer._tokens._files._files
        assert len(kept) == 6

        def limited(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
            if kept and mode == "wb":
                raise OSError(errno.EMFILE, "Too many open files")
            return real(path, mode, *args, **more)

        monkeypatch.setattr(shard.Path, "open", limited)
        fill(writer)
        writer.finish()
    assert not kept


@pytest.mark.parametrize(("limit", "most"), [(64, 16), (256, 112), (20, 1), (4096, 384)])
def test_fewer_files_are_kept_open_where_fewer_are_allowed(
    monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda _: (limit, limit))
    assert open_files.OpenFiles()._most == most


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EMFILE, "allow more open files"),
        (errno.EACCES, "give this user the right"),
    ],
)
def test_what_cannot_be_written_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    """Whatever failed, the advice was to make room on the disk."""
    with create(tmp_path / "acts", make_manifest()) as writer:
        error = OSError(code, os.strerror(code))
        monkeypatch.setattr("lorsa.store.journal._append", _raiser(error))
        with pytest.raises(StoreError, match=f"what was committed is safe: {remedy}"):
            fill(writer, [0])
        monkeypatch.undo()
