"""The one reader of JSON that lies on a disk."""

import json
from pathlib import Path

import pytest
from lorsa import reading
from lorsa.reading import parse_json, read_json

DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * DEEP + "]" * DEEP, "nested too deeply"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "nested too deeply"),
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ('{"a": {"b": 1, "b": 2}}', "it has 'b' twice"),
        ('{"a": NaN}', "it has NaN, which is no number"),
        ("[1, -Infinity]", "it has -Infinity"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
    ids=["lists", "objects", "a little too deep", "twice", "NaN", "infinity", "cut", "empty"],
)
def test_what_is_no_json_of_ours_is_a_value_error(text: str, message: str) -> None:
    """Deep JSON raised RecursionError, which was caught in two of twenty places."""
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_ours_is_read() -> None:
    content = {"a": [1, 2.5, None, {"b": "é"}], "c": [[{}] * 99]}
    assert parse_json(json.dumps(content)) == content
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json("[NaN, 1]", constant=lambda name: None) == [None, 1]


def test_a_file_larger_than_ours_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(["x" * 100]))
    assert read_json(path)
    with pytest.raises(ValueError, match="more than 50 bytes"):
        read_json(path, most_bytes=50)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than"):
        read_json(path, most_bytes=1 << 20)


def test_every_json_file_is_read_by_it() -> None:
    """json.loads of a whole file is left only where a line or another's data is parsed."""
    root = Path(reading.__file__).parent
    own = {"reading.py", "store/journal.py", "harvest/corpus/files.py", "harvest/corpus/folder.py"}
    own |= {"store/manifest.py", "store/schema.py", "seal.py"}  # of what they have just made
    others = ("tests", "benchmarks", "docs", "examples")
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not path.relative_to(root).parts[0].startswith((".", *others))
        and "json.loads(" in path.read_text("utf-8")
    }
    assert found <= own
