"""An analysis on disk, whatever happens while it is written."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
from lorsa.analyze.result import Analysis
from lorsa.analyze.schema import TABLES
from lorsa.errors import AnalyzeError
from power import PowerCutError, power_cut

from reading import make_analysis


@pytest.mark.parametrize("at", range(1, 12))
def test_a_power_cut_leaves_the_old_the_new_or_none(tmp_path: Path, at: int) -> None:
    make_analysis(tmp_path, n_heads=6)
    with pytest.raises(PowerCutError), power_cut(at):
        make_analysis(tmp_path, n_heads=8)
    with suppress(AnalyzeError):
        found = Analysis.open(tmp_path)
        assert found.heads.num_rows == found.facts["n_ov_heads"] == 6
    make_analysis(tmp_path, n_heads=8)
    assert Analysis.open(tmp_path).heads.num_rows == 8


def test_tables_are_on_the_disk_before_the_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power the facts were there, and tables empty."""
    synced: list[int] = []
    real = os.fsync

    def fsync(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    make_analysis(tmp_path)
    files = [*(f"{name}.parquet" for name in TABLES), "seal.json", "analysis.json"]
    files_synced = [number for number in synced if number != tmp_path.stat().st_ino]
    assert files_synced == [(tmp_path / name).stat().st_ino for name in files]
