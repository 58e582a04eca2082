"""What --data takes, and in which order."""

import json
from pathlib import Path

import pytest
from lorsa.errors import HarvestError
from lorsa.harvest.corpus import corpus
from lorsa.harvest.corpus.choices import is_hub_id
from lorsa.harvest.corpus.corpus import Corpus, open_corpus


def _texts(data: Path | str, *, seed: int = 0) -> dict[str, str]:
    return {d.name: d.text for d in open_corpus(str(data), seed=seed).documents()}


def test_a_folder_gives_its_text_files(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.md", "c.rst", "d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for hidden in (".git/e.txt", ".cache/sub/f.txt", ".g.txt"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / hidden).write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text(" \n")
    found = open_corpus(str(tmp_path))
    assert {d.name: d.text for d in found.documents()} == {
        n: n for n in ("a.txt", "sub/b.md", "c.rst", "d.py")
    }
    assert found.counts.to_dict() == {"empty_documents": 1, "other_files": 1}
    assert str(found.counts) == (
        "passed over: 1 empty document (empty.txt), 1 file of another kind (image.png)"
    )


def test_a_hidden_folder_given_by_name_is_read(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/a.txt").write_text("hello")
    assert _texts(tmp_path / ".cache") == {"a.txt": "hello"}


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


def test_what_is_no_utf8_is_repaired_and_counted(tmp_path: Path) -> None:
    """Lone surrogates of JSON stopped the tokenizer; U+FFFD that was there is no repair."""
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe text")
    (tmp_path / "b.txt").write_text("caf\u00e9 \ufffd", "utf-8")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "half \ud83d of \U0001f600"}))
    found = open_corpus(str(tmp_path))
    assert {d.name: d.text for d in found.documents()} == {
        "a.txt": "good \ufffd\ufffd text",
        "b.txt": "caf\u00e9 \ufffd",
        "c.jsonl:0": "half \ufffd of \U0001f600",
    }
    assert found.counts.to_dict() == {"repaired_documents": 2}


def test_a_few_bad_files_do_not_stop_a_folder(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{nonsense\n{"text": null}\n[1]\n')
    (tmp_path / "config.json").write_text('{\n "text": "pretty"\n}\n')
    (tmp_path / "other.csv").write_text("title,body\na,b\n")
    found = open_corpus(str(tmp_path))
    assert sorted(d.text for d in found.documents()) == ["good", "one"]
    assert found.counts.to_dict() == {
        "bad_lines": 2,
        "no_column_files": 1,
        "no_lines_files": 1,
        "no_text_files": 1,
        "null_rows": 1,
        "unreadable_files": 1,
    }
    assert "1 file that is no text (binary.txt)" in str(found.counts)
    assert "2 lines that are no JSON objects (such as lines.jsonl:1)" in str(found.counts)


def test_an_unreadable_folder_within_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so that the refusal is made up."""
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_text("secret")
    from lorsa.harvest.corpus import files

    opened = files._open

    def refuse(file: Path) -> object:
        if file.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file)

    monkeypatch.setattr(files, "_open", refuse)
    found = open_corpus(str(tmp_path))
    assert [d.text for d in found.documents()] == ["good"]
    assert found.counts["unreadable_files"] == 1
    with pytest.raises(HarvestError, match=r"b\.txt: cannot be read \(.*Permission denied"):
        _texts(tmp_path / "b.txt")


NO_TEXT = {
    "none": (None, "no such file or folder; give one, the id of a Hub dataset"),
    "bad.jsonl": (b"{nonsense\n", "line 1 is no JSON object"),
    "bad.json": (b"[1,\n2]\n", "line 1 is no JSON object .*; give a file of one object a line"),
    "a.bin": (b"\x7fELF\0\0", "a.bin: has NUL bytes, so it is no text; give .txt"),
    "a.txt": (b" \n", r"holds no text \(passed over: 1 empty document \(a.txt\)\)"),
    "a.parquet": (b"nonsense", "a.parquet: cannot be read"),
    "a.arrow": (b"nonsense", "a.arrow: cannot be read"),
    "a.jsonl.gz": (b"nonsense", "a.jsonl.gz: cannot be read"),
    "null.jsonl": (b'{"text": null}\n', r"holds no text \(passed over: 1 row without a value"),
    "x.jsonl": (b'{"a": 1, "b": 2}\n', "no column 'text'; there is a, b; choose .*--text-column"),
    "n.jsonl": (b'{"text": 5}\n', "column 'text' is int, not text; choose another"),
    "x.csv": (b"a,b\n1,2\n", "no column 'text'; there is a, b; choose one by --text-column"),
    "n.csv": (b"text,b\n1,2\n", "column 'text' is numbers, not text; choose another"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_no_text_in_a_file_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = NO_TEXT[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(HarvestError, match=message) as error:
        _texts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_no_text_in_a_folder_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "image.png").touch()
    with pytest.raises(HarvestError, match=r"the folder has no \.txt"):
        open_corpus(str(tmp_path))
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    with pytest.raises(HarvestError, match=r"holds no text \(.*file that is no text \(binary.txt"):
        _texts(tmp_path)
    (tmp_path / "other.csv").write_text("title,body\na,b\n")
    with pytest.raises(HarvestError, match="no column 'text'; there is title, body"):
        _texts(tmp_path)


def test_settings_that_do_not_apply_are_refused(text_folder: Path) -> None:
    with pytest.raises(HarvestError, match="is no Hub dataset .*: leave out --data-config"):
        open_corpus(str(text_folder), data_config="x")
    with pytest.raises(HarvestError, match="is no Hub dataset .*: leave out --data-split"):
        open_corpus("stdlib", data_split="test")
    with pytest.raises(HarvestError, match="stdlib is text: leave out --tokens-column"):
        open_corpus("stdlib", tokens_column="input_ids")
    with pytest.raises(HarvestError, match="data is empty"):
        open_corpus(" ")
    assert isinstance(open_corpus("stdlib"), Corpus)


def test_a_hub_id_is_a_name_that_no_path_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("HuggingFaceFW/fineweb")
    (tmp_path / "HuggingFaceFW/fineweb").mkdir(parents=True)
    others = ("HuggingFaceFW/fineweb", "./a/b", "../a", "/a/b", "a", "a/b/c", "~/a", "a/b.jsonl.gz")
    assert not any(map(is_hub_id, others))
