"""Text in, documents out."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lorsa.harvest import HarvestError, corpus
from lorsa.harvest.corpus import documents


def _texts(data: Path | str, *, seed: int = 0, text_column: str = "text") -> dict[str, str]:
    return {d.name: d.text for d in documents(str(data), text_column=text_column, seed=seed)}


def test_a_folder_gives_its_text_files(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.md", "c.rst", "d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text(" \n")
    assert _texts(tmp_path) == {n: n for n in ("a.txt", "sub/b.md", "c.rst", "d.py")}


def test_a_file_of_any_name_is_text(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("hello")
    assert _texts(tmp_path / "README") == {"README": "hello"}


def test_jsonl_and_parquet_rows_are_documents(tmp_path: Path) -> None:
    rows = [{"body": "one", "n": 1}, {"body": "", "n": 2}, {"body": "three", "n": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert _texts(tmp_path, text_column="body") == {
        "a.jsonl:0": "one",
        "a.jsonl:2": "three",
        "b.parquet:0": "one",
        "b.parquet:2": "three",
    }


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet"])
def test_a_missing_column_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    pq.write_table(pa.Table.from_pylist([{"content": "x"}]), tmp_path / "b.parquet")
    with pytest.raises(HarvestError, match=r"no column 'text'; there is content; .*--text-column"):
        _texts(tmp_path / name)


def test_invalid_utf8_does_not_stop_a_harvest(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe text")
    assert _texts(tmp_path)["a.txt"].startswith("good ")


def test_order_is_fixed_by_the_seed(text_folder: Path) -> None:
    first, again, other = (list(_texts(text_folder, seed=s)) for s in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)
    assert first != sorted(first)


def test_a_small_buffer_streams_everything(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BUFFER_CHARACTERS", 100)
    assert len(_texts(text_folder)) == 12


def test_stdlib_is_on_every_machine() -> None:
    texts = _texts("stdlib")
    assert "Lib/argparse.py" in texts
    assert sum(map(len, texts.values())) > 5_000_000


@pytest.mark.parametrize("make", ["missing", "folder", "broken"])
def test_no_text_is_named(tmp_path: Path, make: str) -> None:
    (tmp_path / "image.png").touch()
    (tmp_path / "bad.jsonl").write_text("{nonsense\n")
    where = {"missing": tmp_path / "none", "folder": tmp_path, "broken": tmp_path / "bad.jsonl"}[
        make
    ]
    if make == "folder":
        (tmp_path / "bad.jsonl").unlink()
    message = {"missing": "no such file", "folder": "has no .txt", "broken": "line 1 is no JSON"}[
        make
    ]
    with pytest.raises(HarvestError, match=message):
        _texts(where)
