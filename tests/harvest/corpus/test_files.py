"""Documents of local files of every kind."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from lorsa.errors import HarvestError
from lorsa.harvest.corpus import files
from lorsa.harvest.corpus.corpus import open_corpus

ROWS = [{"body": "one\ntwo, three", "n": 1}, {"body": "", "n": 2}, {"body": "caf\u00e9", "n": 3}]
IDS = [{"input_ids": [1, 2, 3]}, {"input_ids": None}, {"input_ids": []}, {"input_ids": [4]}]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the name tells."""
    table = pa.Table.from_pylist(rows)
    lines = "".join(f"{json.dumps(row)}\n\n" for row in rows).encode()
    match path.name.split(".", 1)[1]:
        case "jsonl" | "json":
            path.write_bytes(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "jsonl.zst":
            with pa.output_stream(str(path), compression="zstd") as out:
                out.write(lines)
        case "csv" | "tsv" as kind:
            options = pa_csv.WriteOptions(delimiter="," if kind == "csv" else "\t")
            pa_csv.write_csv(table, path, options)
        case "csv.gz":
            with pa.output_stream(str(path), compression="gzip") as out:
                pa_csv.write_csv(table, out)
        case "parquet":
            pq.write_table(table, path, row_group_size=2)
        case "arrow":
            with pa.ipc.new_file(path, table.schema) as out:
                out.write_table(table, max_chunksize=2)
        case "stream.arrow":
            with pa.ipc.new_stream(path, table.schema) as out:
                out.write_table(table, max_chunksize=2)
    return path


NAMES = (
    *("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.csv.gz"),
    *("a.parquet", "a.arrow", "a.stream.arrow"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_a_document(tmp_path: Path, name: str) -> None:
    file = _write(tmp_path / name, ROWS)
    found = open_corpus(str(file), text_column="body")
    texts = {d.name.split(":")[1]: d.text for d in found.documents()}
    step = 2 if ".json" in name else 1  # a line's number; every second one is blank
    assert texts == {"0": ROWS[0]["body"], str(2 * step): ROWS[2]["body"]}
    assert found.counts.to_dict() == {"empty_documents": 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_column_is_named(tmp_path: Path, name: str) -> None:
    file = _write(tmp_path / name, ROWS)
    with pytest.raises(HarvestError, match=r"no column 'text'; there is body, n; .*--text-column"):
        list(open_corpus(str(file)).documents())
    with pytest.raises(HarvestError, match=r"column 'n' is (int|int64|numbers), not text"):
        list(open_corpus(str(file), text_column="n").documents())


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow", "a.stream.arrow"])
def test_token_ids_are_read_from_a_column(tmp_path: Path, name: str) -> None:
    file = _write(tmp_path / name, IDS)
    found = open_corpus(str(file), tokens_column="input_ids")
    ids = [doc.ids for doc in found.documents()]
    assert all(one is not None and one.dtype == np.int64 for one in ids)
    assert sorted(one.tolist() for one in ids if one is not None) == [[1, 2, 3], [4]]
    assert found.counts.to_dict() == {"empty_documents": 1, "null_rows": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", "is string, not lists of token ids; choose another by --tokens-column"),
        ("a.csv", "is text, not lists of token ids"),
        ("a.jsonl", "is str, not lists of token ids"),
        ("a.txt", "no column 'body'; there is none"),
    ],
)
def test_what_holds_no_token_ids_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    file = _write(tmp_path / name, ROWS)
    with pytest.raises(HarvestError, match=message):
        list(open_corpus(str(file), tokens_column="body").documents())


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), "dictionary"])
def test_text_of_every_arrow_type_is_text(tmp_path: Path, kind: Any) -> None:
    column = pa.array(["one", None, "two"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pa.table({"text": column})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    texts = [doc.text for doc in open_corpus(str(tmp_path / "a.arrow")).documents()]
    assert sorted(texts) == ["one", "two"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), "dictionary"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bytes_without_the_mark_of_utf8_are_text(tmp_path: Path, name: str, kind: Any) -> None:
    """Text that old Spark, Hive and Impala write as bytes was refused as binary."""
    column = pa.array(["caf\u00e9".encode(), None, b"bad \xff byte"], pa.binary())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pa.table({"text": column})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as out:
            out.write_table(table)
    found = open_corpus(str(tmp_path / name))
    assert sorted(doc.text for doc in found.documents()) == ["bad \ufffd byte", "caf\u00e9"]
    assert found.counts.to_dict() == {"null_rows": 1, "repaired_documents": 1}


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    column = pa.array([rng.bytes(2000) for _ in range(300)], pa.binary())
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    with pytest.raises(HarvestError, match=r"a\.parquet:0 is no text in UTF-8: convert it, or"):
        list(open_corpus(str(tmp_path / "a.parquet"), text_column="image").documents())


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv"])
@pytest.mark.parametrize("column", ["text", "ids"])
def test_two_columns_of_a_name_are_refused(tmp_path: Path, name: str, column: str) -> None:
    """Two columns 'text', as joins make them, were a KeyError, and in .csv the first was taken."""
    ids = pa.array([[1, 2]]) if name != "a.csv" else pa.array(["1"])
    arrays = [pa.array(["one"]), ids, pa.array(["two"]), ids]
    table = pa.Table.from_arrays(arrays, names=["text", "ids", "text", "ids"])
    if name == "a.csv":
        pa_csv.write_csv(table, tmp_path / name)
    elif name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as out:
            out.write_table(table)
    found = open_corpus(
        str(tmp_path / name), **{"tokens_column" if column == "ids" else "text_column": column}
    )
    with pytest.raises(HarvestError, match=f"2 columns are called '{column}': rename all but one"):
        list(found.documents())


def _packed(name: str, content: bytes) -> bytes:
    match name.rsplit(".", 1)[1]:
        case "gz":
            return gzip.compress(content)
        case "xz":
            return lzma.compress(content)
        case "bz2":
            return bz2.compress(content)
        case "lz4" | "zst" as kind:
            codec = pa.Codec({"lz4": "lz4", "zst": "zstd"}[kind])
            return bytes(codec.compress(content, asbytes=True))
    return content


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".lz4", ".zst"])
def test_compressed_text_is_read_whole_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    """Files of .xz and .lz4 were of another kind, and those without the suffix were no text."""
    packed = [_packed(suffix, f"part {i}\n".encode()) for i in range(2)]
    (tmp_path / f"a.txt{suffix}").write_bytes(b"".join(packed))
    (tmp_path / "b.txt").write_bytes(b"".join(packed))
    texts = [doc.text for doc in open_corpus(str(tmp_path)).documents()]
    assert texts == ["part 0\npart 1\n"] * 2


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".lz4", ".zst"])
def test_a_compressed_file_that_is_cut_is_told(tmp_path: Path, suffix: str) -> None:
    content = np.random.default_rng(0).bytes(100_000).hex().encode()
    packed = _packed(suffix, content)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(HarvestError, match=r"a\.txt\.\w+: cannot be read"):
        list(open_corpus(str(tmp_path / f"a.txt{suffix}")).documents())


def test_a_table_compressed_as_a_whole_says_so(tmp_path: Path) -> None:
    """A .parquet.gz was told to lack magic bytes."""
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    packed = gzip.compress((tmp_path / "a.parquet").read_bytes())
    for name in ("a.parquet.gz", "b.arrow"):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(HarvestError, match="is compressed by gzip: unpack it"):
            list(open_corpus(str(tmp_path / name)).documents())


def test_rows_of_another_type_are_passed_over_once_some_fit(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": 2}, {"other": 3}, {"text": "four"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_corpus(str(tmp_path / "a.jsonl"))
    assert sorted(doc.text for doc in found.documents()) == ["four", "one"]
    assert found.counts.to_dict() == {"null_rows": 1, "other_rows": 1}


def test_a_csv_with_bad_rows_and_bad_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\n"good, \xff",1\nbad,2,3\nalso good,x\n')
    found = open_corpus(str(tmp_path / "a.csv"))
    assert sorted(doc.text for doc in found.documents()) == ["also good", "good, \ufffd"]
    assert found.counts.to_dict() == {"bad_rows": 1, "repaired_documents": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.txt"])
def test_a_document_of_ten_megabytes_on_one_line_is_read(tmp_path: Path, name: str) -> None:
    long = "x" * 10_000_000
    if name == "a.txt":
        (tmp_path / name).write_text(long)
    else:
        _write(tmp_path / name, [{"text": "short"}, {"text": long}])
    texts = [doc.text for doc in open_corpus(str(tmp_path / name)).documents()]
    assert max(map(len, texts)) == len(long)


def test_a_long_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("one two\nthree four five six\n1")
    found = open_corpus(str(tmp_path / "a.txt"))
    parts = {d.name: d.text for d in found.documents()}
    assert "".join(parts[name] for name in sorted(parts)) == "one two\nthree four five six\n1"
    assert parts["a.txt:0"] == "one two\n"
    assert max(map(len, parts.values())) <= 10
    assert found.counts.to_dict() == {"parted_files": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.stream.arrow"])
def test_a_damaged_end_keeps_what_was_read(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    rows = [{"text": rng.bytes(2000).hex()} for _ in range(300)]
    file = _write(tmp_path / name, rows)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 - 100])
    found = open_corpus(str(file))
    assert 0 < len(list(found.documents())) < 300
    expected = {"a.jsonl": {"bad_lines": 1}, "a.csv": {}}  # half a field is a field
    assert found.counts.to_dict() == expected.get(name, {"unreadable_files": 1})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """Reading 200 MB takes 15 to 80 MB, and of ten times as many no more."""
    block = pa.table({"text": ["some words that are repeated " * 300] * 1_000})
    n_blocks = 24
    path = tmp_path / name
    if name == "a.jsonl":
        with path.open("w") as out:
            for text in block.column(0).to_pylist() * n_blocks:
                out.write(f'{{"text": "{text}"}}\n')
    elif name == "a.csv":
        pa_csv.write_csv(pa.concat_tables([block] * n_blocks), path)
    elif name == "a.parquet":
        table = pa.concat_tables([block] * n_blocks)
        pq.write_table(table, path, use_dictionary=False, compression="none", row_group_size=30_000)
    else:
        with pa.ipc.new_file(path, block.schema) as out:
            for _ in range(n_blocks):
                out.write_table(block)
    code = (
        "import re, sys; from pathlib import Path\n"
        "from lorsa.harvest.corpus.files import read_file\n"
        "from lorsa.harvest.corpus.document import Column, Counts\n"
        "status = Path('/proc/self/status')\n"
        "held = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', status.read_text())[1])\n"
        "before = peak = held(); size = 0\n"
        "for i, doc in enumerate(read_file(Path(sys.argv[1]), 'a', Column('text'), Counts())):\n"
        "    size += len(doc.text)\n"
        "    peak = peak if i % 100 else max(peak, held())\n"
        "print(size, (peak - before) * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    n_characters, n_bytes = map(int, done.stdout.split())
    assert n_characters == n_blocks * 1_000 * 8_700
    assert n_bytes < n_characters / 2, f"{n_bytes / 1e6:.0f} MB"
