"""An analysis is compared with its seal before anything of it is believed."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.analyze import folder as folders
from lorsa.analyze import result as results
from lorsa.analyze.explanations import EXPLANATIONS, Record, read_explanations
from lorsa.analyze.folder import earlier_facts, load_partial, save_partial
from lorsa.analyze.result import Analysis
from lorsa.analyze.schema import TABLES
from lorsa.errors import AnalyzeError
from unseal import unseal

from reading import make_analysis

FILES = ("analysis.json", "seal.json", *(f"{name}.parquet" for name in TABLES))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_analysis(tmp_path / "analysis")


def _flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_a_line_that_names_the_file(made: Path, name: str) -> None:
    """84 of 200 flips were noticed: the others gave another page, with other tokens or numbers."""
    for byte in (5, 77, -9):
        _flip(made / name, byte)
        with pytest.raises(AnalyzeError, match=f"{made / name} is damaged.* or analyze again"):
            Analysis.open(made)
        _flip(made / name, byte)
    assert Analysis.open(made).heads.num_rows


def test_a_table_of_another_analysis_is_not_taken(made: Path, tmp_path: Path) -> None:
    """Whole by itself, it was shown under the facts of this one."""
    other = make_analysis(tmp_path / "other", n_top=3)
    (made / "examples.parquet").write_bytes((other / "examples.parquet").read_bytes())
    with pytest.raises(AnalyzeError, match=r"examples.parquet has \d+ bytes; \d+ were written"):
        Analysis.open(made)


def test_an_analysis_of_an_earlier_version_opens(made: Path) -> None:
    unseal(made)
    assert Analysis.open(made).heads.num_rows


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_what_cannot_be_read_is_not_called_damaged(
    made: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Too many open files, and the advice was to delete the table and to analyse again."""

    def refuse(folder: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(folder / "heads.parquet"))

    monkeypatch.setattr(results, "first_damage", refuse)
    for reader in (Analysis.open, lambda folder: earlier_facts(folder, print)):
        with pytest.raises(AnalyzeError) as caught:
            reader(made)
        assert str(caught.value).startswith(
            f"{made / 'heads.parquet'} cannot be read ({os.strerror(number)})"
        )


def test_no_memory_for_a_table_is_no_damage(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = Analysis.open(made)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "malloc of size 64 failed")

    monkeypatch.setattr(results, "read_parquet", refuse)
    with pytest.raises(AnalyzeError) as caught:
        _ = analysis.heads
    assert "malloc of size 64 failed" in str(caught.value)
    assert "delete" not in str(caught.value)


def test_damage_of_half_an_analysis_is_collected_anew(tmp_path: Path) -> None:
    """Half an analysis with a flipped bit was gone on with: other heads, or a traceback."""
    path, request = tmp_path / "partial.safetensors", {"n_seqs": 8}
    save_partial(path, {"n_fired": torch.arange(5)}, 4, request)
    told: list[Any] = []
    assert load_partial(path, request, told.append)[1] == 4
    for byte in (-1, path.read_bytes().index(b'"4"') + 1):
        _flip(path, byte)
        assert load_partial(path, request, told.append) == ({}, 0)
        _flip(path, byte)
    assert told == [f"{path} is damaged (its checksum is wrong); collecting anew"] * 2


def test_half_an_analysis_that_cannot_be_opened_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors calls every file missing that cannot be opened, and all was collected anew."""
    path = tmp_path / "partial.safetensors"
    save_partial(path, {"n_fired": torch.arange(5)}, 4, {})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AnalyzeError, match="cannot be read .Too many open files"):
        load_partial(path, {}, print)


@pytest.mark.parametrize("byte", [3, 12, 20, 48, 68])
def test_a_damaged_explanation_is_a_line(tmp_path: Path, byte: int) -> None:
    """It was passed over in silence, or said something else of the head."""
    path = tmp_path / EXPLANATIONS
    with Record(path) as record:
        for head in range(3):
            record.add({"head": head, "text": f"reads the word {head}", "model": "m"})
    start = path.read_bytes().index(b"\n") + 1
    _flip(path, start + byte)
    with pytest.raises(AnalyzeError, match=f"{path}: line 2 is damaged"):
        read_explanations(path)


def test_a_line_without_its_end_is_whole_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / EXPLANATIONS
    with Record(path) as record:
        record.add({"head": 0, "text": "a"})
        record.add({"head": 1, "text": "b"})
    path.write_bytes(path.read_bytes()[:-1])
    assert set(read_explanations(path)) == {0, 1}
    with Record(path) as record:
        record.add({"head": 2, "text": "c"})
    path.write_bytes(path.read_bytes()[:-9])
    assert set(read_explanations(path)) == {0, 1}
    with Record(path) as record:
        record.add({"head": 3, "text": "d"})
    assert set(read_explanations(path)) == {0, 1, 3}
    assert len(path.read_bytes().splitlines()) == 3


def test_explanations_stay_where_the_facts_of_their_analysis_are_damaged(made: Path) -> None:
    """Their name was changed to one that nobody reads, after a flip in analysis.json."""
    (made / EXPLANATIONS).touch()
    _flip(made / "analysis.json", 30)
    folders.archive_explanations(made, {"weights_crc32": 7})
    assert (made / EXPLANATIONS).exists()
