"""A seal tells every file that is not what was written, and nothing else."""

import json
import os
from pathlib import Path

import pytest
from lorsa.seal import (
    SEAL,
    check_seal,
    first_damage,
    is_sealed,
    read_summed,
    seal_of,
    summed,
    unsummed,
    write_seal,
    write_summed,
)
from lorsa.whole import write_json

NAMES = ("a.json", "data/b.bin", "empty")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "a.json").write_text("{}\n")
    (tmp_path / "data/b.bin").write_bytes(bytes(range(256)) * 20_000)  # more than a block
    (tmp_path / "empty").touch()
    write_seal(tmp_path, NAMES)
    return tmp_path


def test_what_was_written_has_no_problem(sealed: Path) -> None:
    assert is_sealed(sealed)
    assert check_seal(sealed) == []
    (sealed / "notes.txt").write_text("not of the seal")
    assert check_seal(sealed) == []
    again = seal_of({"a.json": b"{}\n", **{name: sealed / name for name in NAMES[1:]}})
    assert json.loads((sealed / SEAL).read_text()) == again
    known = seal_of({"x": b"123456789"})["files"]["x"]
    assert known == {"size": 9, "crc32c": "e3069283"}  # RFC 3720, and every table of checksums


def test_a_folder_without_a_seal_is_not_sealed_and_not_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert not is_sealed(tmp_path)
    assert check_seal(tmp_path) == []


def test_every_file_that_differs_is_a_line(sealed: Path) -> None:
    (sealed / "a.json").unlink()
    data = bytearray((sealed / "data/b.bin").read_bytes())
    data[-1] ^= 1
    (sealed / "data/b.bin").write_bytes(data)
    (sealed / "empty").write_text("x")
    assert check_seal(sealed) == [
        f"{sealed / 'a.json'} is missing",
        f"{sealed / 'data/b.bin'} is damaged (its checksum is wrong)",
        f"{sealed / 'empty'} has 1 bytes; 0 were written",
    ]


def test_a_flipped_bit_of_the_seal_is_found(sealed: Path) -> None:
    """A seal whose own figures are damaged would call whole files damaged."""
    good = (sealed / SEAL).read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 7
        (sealed / SEAL).write_bytes(bad)
        found = check_seal(sealed)
        assert len(found) == 1, bytes(bad)
        assert found[0].startswith(f"{sealed / SEAL} is ")


@pytest.mark.parametrize("name", ["../other", "/etc/hostname", "a/../../b", "two\nlines"])
def test_a_seal_names_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    """Sealed folders are copied and fetched from others."""
    (tmp_path / SEAL).write_text(json.dumps(seal_of({name: b""})))
    (problem,) = check_seal(tmp_path)
    assert "which is no file of the folder" in problem
    assert "\n" not in problem


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "[" * 100_000, "\xff"])
def test_a_seal_that_is_none_is_one_line(sealed: Path, text: str) -> None:
    (sealed / SEAL).write_bytes(text.encode("latin-1"))
    (problem,) = check_seal(sealed)
    assert problem.startswith(f"{sealed / SEAL} is damaged")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_not_called_damaged(sealed: Path) -> None:
    (sealed / "a.json").chmod(0)
    assert check_seal(sealed) == [f"{sealed / 'a.json'} cannot be read (Permission denied)"]


def test_a_file_may_be_written_after_the_seal_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    content = {"nan": float("nan"), "n": [1, 2.5]}
    write_seal(tmp_path, ["a"], {"facts.json": content})
    (problem,) = check_seal(tmp_path)
    assert problem == f"{tmp_path / 'facts.json'} is missing"
    write_json(tmp_path / "facts.json", content)
    assert check_seal(tmp_path) == []
    (tmp_path / "facts.json").write_text("{}")
    assert check_seal(tmp_path, only=["a"]) == []
    assert first_damage(tmp_path) == check_seal(tmp_path)[0]


def test_json_with_a_sum_of_its_own_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    content = {"b": 0.1, "a": {"tuple": (1, 2), "none": float("inf")}}
    write_summed(path, content)
    assert read_summed(path) == {"b": 0.1, "a": {"tuple": [1, 2], "none": None}}
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(ValueError, match="its checksum is wrong"):
        read_summed(path)
    path.write_text('{"b": 0.2}')  # as earlier versions wrote it
    assert read_summed(path) == {"b": 0.2}
    assert unsummed(json.dumps(summed({"x": "ü"}))) == {"x": "ü"}
    with pytest.raises(ValueError, match="nested too deeply"):
        unsummed("[" * 100_000)


def test_what_cannot_be_read_is_no_damage(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files", "a.json")

    monkeypatch.setattr("lorsa.seal._facts", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        first_damage(sealed)
    assert check_seal(sealed)[0].endswith("a.json cannot be read (Too many open files)")
