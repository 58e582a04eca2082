"""Folders: which files are read, and what is said of the others."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from lorsa.errors import HarvestError
from lorsa.harvest.corpus.corpus import Corpus, open_corpus

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def _read(folder: Path) -> tuple[dict[str, str], Corpus]:
    corpus = open_corpus(str(folder))
    return {doc.name: doc.text for doc in corpus.documents()}, corpus


def _arrow(path: Path, rows: list[str]) -> None:
    table = pa.table({"text": rows})
    with pa.ipc.new_stream(path, table.schema) as out:
        out.write_table(table)


def test_names_that_are_not_utf8_are_spelt_out(tmp_path: Path) -> None:
    """A harvest ended in a traceback over a file, or a folder, with Latin-1 in its name."""
    root = os.fsencode(tmp_path)
    for name in (b"caf\xe9.txt", b"\xe9t\xe9/a.jsonl", b"\xff.arrow"):
        path = Path(os.fsdecode(os.path.join(root, name)))
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".arrow":
            _arrow(tmp_path / "made", ["three"])
            (tmp_path / "made").rename(path)
        else:
            path.write_text("one" if path.suffix == ".txt" else '{"text": "two"}\n')
    texts, _corpus = _read(tmp_path)
    assert texts == {
        r"caf\udce9.txt": "one",
        r"\udce9t\udce9/a.jsonl:0": "two",
        r"\udcff.arrow:0": "three",
    }
    assert all(name.encode() for name in texts)


def test_linked_folders_and_files_are_read_once(tmp_path: Path) -> None:
    """Linked folders were passed over in silence; two links to a file doubled its text."""
    outside, data = tmp_path / "outside", tmp_path / "data"
    for path in (outside / "deep/b.txt", data / "a.txt", outside / "c"):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(path.name)
    (data / "part").symlink_to(outside)
    (data / "again").symlink_to(outside / "deep")
    (data / "a_too.txt").symlink_to("a.txt")
    (data / "c.txt").symlink_to(outside / "c")
    (outside / "d.txt").symlink_to(data / "a.txt")
    texts, corpus = _read(data)
    assert texts == {"a.txt": "a.txt", "again/b.txt": "b.txt", "c.txt": "c"}
    assert corpus.counts.to_dict() == {"double_links": 3}
    assert corpus.counts.warning() == ""


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    """Links that are followed may lead up, to each other, or to themselves."""
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("not of the corpus")
    (tmp_path / "data/a.txt").write_text("one")
    (tmp_path / "data/sub/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/above").symlink_to(tmp_path)
    (tmp_path / "data/self.txt").symlink_to("self.txt")
    texts, corpus = _read(tmp_path / "data")
    assert texts == {"a.txt": "one"}
    assert corpus.counts.to_dict() == {"dangling_links": 1, "upward_links": 2}


def test_what_is_in_place_of_data_is_told(tmp_path: Path) -> None:
    """Links to nothing and half-fetched files were dropped in silence, pointers were the text."""
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "annex.txt").symlink_to("/nowhere/annex/key")
    (tmp_path / "lfs.txt").write_text(LFS)
    (tmp_path / "unlocked.md").write_text("/annex/objects/SHA256E-s5--00.md\n")
    (tmp_path / "b.jsonl.part").write_text("{")
    (tmp_path / "c.txt").write_bytes(b"half")
    (tmp_path / "c.txt.aria2").write_bytes(b"control")
    (tmp_path / "d.jsonl").touch()
    (tmp_path / "e.tar.gz").touch()
    os.mkfifo(tmp_path / "f.txt")
    texts, corpus = _read(tmp_path)
    assert texts == {"a.txt": "good"}
    assert corpus.counts.to_dict() == {
        "archive_files": 1,
        "dangling_links": 1,
        "empty_files": 1,
        "partial_files": 2,
        "pointer_files": 2,
        "special_files": 1,
    }
    assert corpus.counts.warning() == (
        "passed over: 5 of 9 files and folders, 3 of 4 files read, "
    ).rstrip(", ")
    assert "2 half-fetched files (such as b.jsonl.part)" in str(corpus.counts)


def test_pointers_alone_say_what_to_do(tmp_path: Path) -> None:
    """A clone without its data was harvested as the text of its pointers, or had 'no column'."""
    for name in ("a.txt", "b.jsonl", "c.parquet"):
        (tmp_path / name).write_text(LFS)
    with pytest.raises(HarvestError, match="is a pointer in place of its data: fetch it, as by "):
        _read(tmp_path)
    with pytest.raises(HarvestError, match=r"c\.parquet: is a pointer"):
        _read(tmp_path / "c.parquet")


def test_a_folder_without_text_says_what_it_has(tmp_path: Path) -> None:
    """A folder of downloads that were stopped was told to have no file of a known kind."""
    (tmp_path / "a.parquet.incomplete").touch()
    (tmp_path / "b.zip").touch()
    message = r"has no \.txt.*\(passed over: 1 half-fetched file \(a.parquet.incomplete\), 1 arch"
    with pytest.raises(HarvestError, match=message):
        open_corpus(str(tmp_path))


def test_a_saved_dataset_is_what_it_lists(tmp_path: Path) -> None:
    """The cache of a map beside a saved dataset was read too: each document twice, once changed."""
    for split, rows in (("train", ["one", "two"]), ("test", ["three"])):
        folder = tmp_path / split
        folder.mkdir()
        _arrow(folder / "data-00000-of-00002.arrow", rows)
        _arrow(folder / "cache-0123.arrow", [row.upper() for row in rows])
        _arrow(folder / "tmpabc.arrow", ["left over"])
        listed = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
        (folder / "state.json").write_text(json.dumps({"_data_files": listed}, indent=2))
        (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    texts, corpus = _read(tmp_path)
    assert sorted(texts.values()) == ["one", "three", "two"]
    assert corpus.counts.to_dict() == {"missing_files": 2, "side_files": 9}
    assert "2 files that a saved dataset lacks (such as " in str(corpus.counts)


def test_the_cache_of_datasets_is_read_without_its_maps(tmp_path: Path) -> None:
    """The cache itself has no list: its data are what is not called cache-*.arrow."""
    _arrow(tmp_path / "news-train.arrow", ["one"])
    _arrow(tmp_path / "cache-0123_00000_of_00002.arrow", ["ONE"])
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}}))
    texts, corpus = _read(tmp_path)
    assert texts == {"news-train.arrow:0": "one"}
    assert corpus.counts.to_dict() == {"side_files": 2}


def test_files_that_are_only_called_so_are_read(tmp_path: Path) -> None:
    """A state.json may hold states, and cache-1.arrow may be data."""
    (tmp_path / "state.json").write_text('{"text": "Ohio"}\n{"text": "Utah"}\n')
    _arrow(tmp_path / "cache-1.arrow", ["one"])
    texts, corpus = _read(tmp_path)
    assert sorted(texts.values()) == ["Ohio", "Utah", "one"]
    assert corpus.counts.to_dict() == {}
