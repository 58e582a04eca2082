"""The journal and shards.parquet: what was committed, or an error that says so."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorsa.errors import StoreError
from lorsa.store import journal as journal_module
from lorsa.store.entries import Entries, Entry
from lorsa.store.journal import Journal, JournalWriter, read_journal
from lorsa.store.places import read_from
from lorsa.store.read.reader import ActivationStore
from lorsa.store.table import read_table, write_table
from lorsa.store.write.writer import StoreWriter
from small import as_before, create, fill, make_manifest

SUMS = st.floats(0, 1e30, allow_nan=False)
ENTRIES = st.lists(
    st.builds(
        Entry,
        shard=st.integers(0, 2**31 - 1),
        array=st.sampled_from(["tokens", "layers/0/attn_in", "layers/27/attn_in_norm"]),
        n_seq=st.integers(0, 2**31 - 1),
        n_bytes=st.integers(0, 2**63 - 1),
        crc32c=st.integers(0, 2**32 - 1),
        norm_sum=SUMS,
        square_sum=SUMS,
        n_nonfinite=st.integers(0, 2**63 - 1),
        max_scale=SUMS,
    ),
    unique_by=lambda entry: (entry.shard, entry.array),
    max_size=6,
)


def _entry(shard: int, array: str = "layers/0/attn_in", **changes: Any) -> Entry:
    return Entry(shard, array, 4, 100, 7, 1.0, 2.0)._replace(**changes)


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(ENTRIES, max_size=3))
def test_what_is_committed_is_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[list[Entry]]
) -> None:
    root = tmp_path_factory.mktemp("journal")
    (root / "journal").mkdir()
    writer = JournalWriter(root)
    known: dict[tuple[int, str], Entry] = {}
    for entries in lines:
        writer.commit(entries)
        known |= {(entry.shard, entry.array): entry for entry in entries}
    assert list(read_journal(root).in_order()) == sorted(known.values())
    write_table(root, Entries(known.values()), "u")
    assert list(read_table(root, make_manifest()).in_order()) == sorted(known.values())


def test_the_last_writer_is_believed(tmp_path: Path) -> None:
    """Files had random names: of a shard written twice, either line was believed."""
    (tmp_path / "journal").mkdir()
    for n in range(12):
        JournalWriter(tmp_path).commit([_entry(0, crc32c=n)])
    assert len(list((tmp_path / "journal").iterdir())) == 12
    assert [entry.crc32c for entry in read_journal(tmp_path).in_order()] == [11]


def test_a_journal_of_an_earlier_version_is_read_before_ours(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    JournalWriter(tmp_path, "fedcba987654").commit([_entry(0, crc32c=1)])
    JournalWriter(tmp_path).commit([_entry(0, crc32c=2)])
    assert [entry.crc32c for entry in read_journal(tmp_path).in_order()] == [2]


def test_what_is_dropped_is_gone_until_it_is_committed_again(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    JournalWriter(tmp_path).commit([_entry(0), _entry(1)])
    JournalWriter(tmp_path).drop([(0, "layers/0/attn_in"), (5, "layers/0/attn_in")])
    assert [entry.shard for entry in read_journal(tmp_path).in_order()] == [1]
    JournalWriter(tmp_path).commit([_entry(0, crc32c=9)])
    assert sorted((e.shard, e.crc32c) for e in read_journal(tmp_path).in_order()) == [
        (0, 9),
        (1, 7),
    ]


def test_a_shard_written_anew_is_forgotten_first(tmp_path: Path) -> None:
    """Killed between its files and its line, a shard was taken for whole with old checksums."""
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        fill(writer)
    (root / "layers/3/attn_in/c/1/0/0").unlink()
    with StoreWriter.resume(root) as writer, pytest.raises(KeyboardInterrupt):
        with writer.shard(1):
            raise KeyboardInterrupt
    told = set(read_journal(root))
    assert not {(1, "layers/3/attn_in"), (1, "layers/3/attn_in_norm")} & told
    assert {(1, "tokens"), (0, "layers/3/attn_in"), (1, "layers/0/attn_in")} <= told


@pytest.mark.parametrize(
    "fields",
    [
        {"array": "../../etc/passwd"},
        {"array": "/etc/passwd"},
        {"array": "layers/../../x"},
        {"array": "layers/3/attn_in/../../../../x"},
        {"array": "layers/3/.."},
        {"array": "layers/03/attn_in"},
        {"array": "layers/3/attn_in\n"},
        {"array": ""},
        {"array": None},
        {"shard": -1},
        {"shard": "0"},
        {"shard": True},
        {"n_bytes": -5},
        {"crc32c": 2**32},
        {"norm_sum": float("nan")},
        {"n_nonfinite": -1},
        {"n_nonfinite": 0.5},
        {"n_nonfinite": None},
        {"max_scale": -1.0},
        {"max_scale": float("inf")},
        {"max_scale": float("nan")},
        {"max_scale": "1"},
        {"colour": 1},
    ],
)
def test_a_line_that_cannot_be_one_is_damage(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Above all, no path in an index can lead out of the store."""
    root = tmp_path / "acts"
    create(root, make_manifest()).close()
    with (root / "journal" / "w000001.jsonl").open("a") as file:
        file.write(json.dumps([_entry(0)._asdict() | fields]) + "\n")
    with pytest.raises(StoreError, match=r"w000001.jsonl has a damaged line; lorsa store verify"):
        StoreWriter.resume(root)


@pytest.mark.parametrize("key", [[-1, "tokens"], [2**31, "tokens"], ["0", "tokens"], [0, "../x"]])
def test_no_word_is_taken_of_a_file_that_cannot_be_one(tmp_path: Path, key: list[Any]) -> None:
    (tmp_path / "journal").mkdir()
    path = tmp_path / "journal" / "w000001.jsonl"
    path.write_text(json.dumps({"dropped": [[0, "tokens"], key]}) + "\n")
    assert Journal(tmp_path).damaged == [path]


@pytest.mark.parametrize("array", ["../../x", "/x", "layers/../../x/y", "layers/3/../../y"])
def test_no_row_of_the_table_leads_out_of_the_store(
    make_store: Callable[..., Path], array: str
) -> None:
    root = make_store()
    as_before(root)
    table = pq.read_table(root / "shards.parquet").to_pylist()
    table[0]["array"] = array
    pq.write_table(pa.Table.from_pylist(table), root / "shards.parquet")
    with pytest.raises(StoreError, match=r"shards.parquet cannot be read .*is no name of an array"):
        ActivationStore.open(root)


def test_a_table_of_an_earlier_version_is_read(make_store: Callable[..., Path]) -> None:
    path = make_store() / "shards.parquet"
    as_before(path.parent)
    pq.write_table(pq.read_table(path).drop_columns(["n_nonfinite", "max_scale"]), path)
    entries = ActivationStore.open(path.parent).entries
    assert {(entry.n_nonfinite, entry.max_scale) for entry in entries} == {(0, 0.0)}
    pq.write_table(pq.read_table(path).drop_columns(["crc32c"]), path)
    with pytest.raises(StoreError, match="cannot be read .*crc32c"):
        ActivationStore.open(path.parent)


def test_a_line_torn_in_the_middle_of_the_journal_is_named(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    with create(root, make_manifest()) as writer:
        fill(writer, [0, 1, 2])
    path = root / "journal" / "w000001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:40] + lines[2])
    with pytest.raises(StoreError, match=f"damaged line; lorsa store verify {root} --repair"):
        StoreWriter.resume(root)
    assert {
        shard for shard, array in Journal(root).entries if array == "layers/0/attn_in_norm"
    } == {0}


@pytest.mark.parametrize("separator", [b"\r", b"\x0b", b"\x1c", b"\x85"])
def test_a_byte_that_ends_lines_elsewhere_is_damage(tmp_path: Path, separator: bytes) -> None:
    """A return in a line was the end of it, and the rest of the file passed over as torn."""
    (tmp_path / "journal").mkdir()
    for shard in (0, 1, 2):
        JournalWriter(tmp_path, "w000001").commit([_entry(shard)])
    path = tmp_path / "journal" / "w000001.jsonl"
    content = path.read_bytes()
    at = content.index(b"attn_in", content.index(b"\n"))
    path.write_bytes(content[:at] + separator + content[at + 1 :])
    with pytest.raises(StoreError, match="w000001.jsonl has a damaged line"):
        read_journal(tmp_path)
    assert sorted(shard for shard, _ in Journal(tmp_path).entries) == [0, 2]


def test_a_journal_that_could_not_be_written_has_no_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a line was once the beginning of the next."""
    (tmp_path / "journal").mkdir()
    journal = JournalWriter(tmp_path)
    journal.commit([_entry(0)])
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _full)
        with pytest.raises(StoreError, match="No space left on device.*what was committed is safe"):
            journal.commit([_entry(1)])
    journal.commit([_entry(2)])
    assert [entry.shard for entry in read_journal(tmp_path).in_order()] == [0, 2]


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.tuples(st.integers(0, 2), st.booleans(), st.sets(st.integers(0, 4), min_size=1)),
        max_size=12,
    )
)
def test_a_journal_read_on_tells_what_one_read_anew_does(
    tmp_path_factory: pytest.TempPathFactory, words: list[tuple[int, bool, set[int]]]
) -> None:
    """Writers take turns, each with the last word on what it speaks of."""
    root = tmp_path_factory.mktemp("journal")
    (root / "journal").mkdir()
    writers, journal = [JournalWriter(root) for _ in range(3)], Journal(root)
    known: dict[int, int] = {}
    for n, (who, drops, shards) in enumerate(words):
        keys = [(shard, "tokens") for shard in shards]
        if (last := journal.last_mention(keys)) is not None:
            writers[who].come_after(last)
        if drops:
            writers[who].drop(keys)
            known = {shard: crc for shard, crc in known.items() if shard not in shards}
        else:
            writers[who].commit([_entry(shard, "tokens", crc32c=n) for shard in shards])
            known |= dict.fromkeys(shards, n)
        assert journal.read() == shards
        assert {e.shard: e.crc32c for e in journal.entries.values()} == known
        assert dict(Journal(root).entries) == dict(journal.entries)
    assert len(journal.entries) == len(known)


def test_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    JournalWriter(tmp_path).commit([_entry(0)])
    journal, path = Journal(tmp_path), tmp_path / "journal" / "w000001.jsonl"
    line = json.dumps([_entry(1)._asdict()]) + "\n"
    for part in (line[:30], line[30:-1]):
        with path.open("a") as file:
            file.write(part)
        assert journal.read() == set()
    with path.open("a") as file:
        file.write(line[-1])
    assert journal.read() == {1}
    assert journal.read() == set()
    assert not journal.damaged


def test_a_journal_that_is_another_is_read_anew(tmp_path: Path) -> None:
    """What was read before must not be counted on when its line is gone."""
    (tmp_path / "journal").mkdir()
    writer = JournalWriter(tmp_path)
    writer.commit([_entry(0)])
    writer.commit([_entry(1)])
    journal, path = Journal(tmp_path), tmp_path / "journal" / "w000001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])  # cut: the disk was full, and the line is taken back
    assert journal.read() == {0, 1}
    assert [shard for shard, _ in journal.entries] == [0]
    path.unlink()
    JournalWriter(tmp_path).commit([_entry(7)])
    path.write_bytes(path.read_bytes() + lines[1])  # longer
    assert journal.read() == {0, 1, 7}
    assert [shard for shard, _ in journal.entries] == [1, 7]
    path.rename(path.with_name("w000002.jsonl"))
    JournalWriter(tmp_path, "w000001").commit([_entry(3), _entry(7, crc32c=1)])  # comes before
    assert journal.read() == {1, 3, 7}
    assert {e.shard: e.crc32c for e in journal.entries.values()} == {1: 7, 3: 7, 7: 7}
    path.with_name("w000002.jsonl").unlink()
    journal.read()
    assert {e.shard: e.crc32c for e in journal.entries.values()} == {3: 7, 7: 1}


def test_an_earlier_file_does_not_take_back_what_a_later_one_said(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    one, two = JournalWriter(tmp_path), JournalWriter(tmp_path)
    one.commit([_entry(0)])
    two.commit([_entry(1, crc32c=2)])
    journal = Journal(tmp_path)
    one.commit([_entry(1, crc32c=1)])  # as no writer does
    assert journal.read() == {1}
    assert dict(journal.entries) == dict(Journal(tmp_path).entries)
    assert journal.entries[1, "layers/0/attn_in"].crc32c == 2


def test_a_journal_is_read_once_however_many_shards_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every claim read all of it twice: hours of a store of 80 layers and 10 M tokens."""
    root, n_read = tmp_path / "acts", 0

    def counted(path: Path, start: int) -> Iterator[bytes]:
        nonlocal n_read
        for block in read_from(path, start):
            n_read += len(block)
            yield block

    with create(root, make_manifest(shard_seqs=1)) as writer:
        monkeypatch.setattr(journal_module, "read_from", counted)
        each = []
        for shard in writer.claimed_shards():
            fill(writer, [shard])
            each.append(n_read)
    monkeypatch.undo()
    size = sum(path.stat().st_size for path in (root / "journal").glob("w*.jsonl"))
    longest = max(late - early for early, late in pairwise(each))
    assert len(each) == 22
    assert longest < 2 * size / 22
    assert each[-1] < 2 * size


def test_a_table_is_the_same_bytes_as_of_rows(tmp_path: Path) -> None:
    """Tables were written of rows, and are of columns: nothing else may change."""
    found = [
        _entry(s, a, crc32c=s, norm_sum=s / 3) for s in (2, 0, 1) for a in ("tokens", "b", "a")
    ]
    entries = Entries(found[1:])
    write_table(tmp_path, entries, "u")
    content = pa.BufferOutputStream()
    rows = [entry._asdict() for entry in sorted(found[1:])]
    table = pa.Table.from_pylist(rows, schema=pq.read_schema(tmp_path / "shards.parquet"))
    pq.write_table(table, content, write_page_checksum=True)
    assert (tmp_path / "shards.parquet").read_bytes() == content.getvalue().to_pybytes()
    assert list(read_table(tmp_path, make_manifest()).in_order()) == sorted(found[1:])
    write_table(tmp_path, Entries(), "u")
    assert len(read_table(tmp_path, make_manifest())) == 0


def test_entries_are_a_mapping() -> None:
    entries = Entries([_entry(3), _entry(1), _entry(1, "tokens")])
    assert list(entries) == [(1, "layers/0/attn_in"), (1, "tokens"), (3, "layers/0/attn_in")]
    assert entries[3, "layers/0/attn_in"] == _entry(3)
    assert entries.get((3, "tokens")) is None
    assert "tokens" not in entries
    assert entries.whole(4, ["layers/0/attn_in"]).tolist() == [False, True, False, True]
    assert entries.whole(4, ["tokens", "layers/0/attn_in"]).tolist() == [False, True, False, False]
    assert entries.whole(2, ["norms"]).tolist() == [False, False]
    entries.drop([(1, "tokens"), (2, "tokens")], rank=3)
    assert (len(entries), entries.n_bytes) == (2, 200)
    assert entries.last_rank([(2, "tokens"), (3, "layers/0/attn_in")]) == 3
    assert entries.last_rank([(3, "tokens"), (9, "x")]) is None
    assert list(entries.only("tokens".__eq__)) == []
    shards, facts = entries.of("layers/0/attn_in")
    assert (shards.tolist(), facts["n_bytes"].tolist()) == ([1, 3], [100, 100])
