"""Heads that can be called by name: only those of which text and probes say the same."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lorsa.analyze.choices import LEAST_FIRED, LOWER, PROBE_SCORES, STORE_SCORES
from lorsa.analyze.named import DOES, named_heads
from lorsa.analyze.result import Analysis
from lorsa.analyze.schema import HEADS, READABLE, VERSION
from lorsa.analyze.trust import Start, count_agreed, of_type, trusted
from unseal import change_json, unseal

from reading import make_analysis

PLAIN = dict.fromkeys((*STORE_SCORES, *PROBE_SCORES), 0.0) | {"n_fired": 500, "probe_fired": 500}
"""A head that fires often and is of no type."""


def analysis_of(
    root: Path, heads: dict[int, dict[str, Any]], *, version: int = VERSION, **settings: Any
) -> Analysis:
    """Write an analysis in which these heads are as said, and all others of no type.

    Bounds are the scores; version 1 has none.
    """
    make_analysis(root, **settings)
    rows = pq.read_table(root / "heads.parquet").to_pylist()
    for row in rows:
        row.update(PLAIN | {"type": "mixed"} | heads.get(row["head"], {}))
        for name, low in LOWER.items():
            fired = row["probe_fired" if name.startswith("probe") else "n_fired"]
            row[low] = row[name] if version > 1 and fired >= LEAST_FIRED else None
    pq.write_table(pa.Table.from_pylist(rows, HEADS), root / "heads.parquet")
    unseal(root)
    change_json(root / "analysis.json", version=version)
    return Analysis.open(root)


def of(kind: str, text: float, probes: float | None, **other: Any) -> dict[str, Any]:
    """Return a head that is called by a type."""
    return {"type": kind, kind: text, f"probe_{kind}": probes, **other}


@pytest.mark.parametrize("version", READABLE)
def test_the_smaller_of_text_and_probes_counts(tmp_path: Path, version: int) -> None:
    """Heads were ranked by the probe alone: 0.07 in text came first of the previous-token ones."""
    heads = {
        1: of("previous_token", 0.07, 0.99),
        2: of("previous_token", 0.80, 0.70),
        3: of("previous_token", 0.99, 0.10),
        4: of("previous_token", 0.75, 0.90),
        5: of("previous_token", 0.95, 0.95, n_fired=3),
        6: of("previous_token", 0.95, 0.95, probe_fired=3),
        7: of("previous_token", 0.95, None),
    }
    analysis = analysis_of(tmp_path / "a", heads, version=version)
    assert of_type(analysis, "previous_token") == [4, 2]
    score = trusted(analysis, "previous_token")
    assert score[[1, 2, 3, 4]].tolist() == pytest.approx([0.07, 0.70, 0.10, 0.75])
    assert score[[5, 6, 7]].tolist() == pytest.approx([float("nan")] * 3, nan_ok=True)


def test_a_head_of_another_type_is_not_named(tmp_path: Path) -> None:
    """Heads called mixed or first token stood among those of another type."""
    heads = {
        1: of("same_token", 0.9, 0.9) | {"induction": 0.8, "probe_induction": 0.8},
        2: of("induction", 0.7, 0.6),
        3: of("mixed", 0.7, 0.6) | {"local": 0.9, "probe_local": 0.9},
    }
    analysis = analysis_of(tmp_path / "a", heads)
    assert of_type(analysis, "induction") == [2]
    assert of_type(analysis, "local") == []


def test_named_heads_are_of_different_types_first(tmp_path: Path) -> None:
    heads = {
        1: of("local", 0.9, 0.9),
        2: of("induction", 0.83, 0.91),
        3: of("induction", 0.7, 0.6),
        4: of("induction", 0.6, 0.6),
    }
    analysis = analysis_of(tmp_path / "a", heads)
    found = named_heads(analysis, 3)
    assert [(head.head, head.type) for head in found] == [
        (2, "induction"), (1, "local"), (3, "induction")]  # fmt: skip
    assert found[0].sentence == (
        "reads the token after an earlier copy of the current one "
        "(0.83 of its reading in text, 0.91 on probes)"
    )
    assert found[0].score == pytest.approx(0.83)
    assert "<" in (found[0].context or "")
    assert [head.head for head in named_heads(tmp_path / "a", 9)] == [2, 1, 3, 4]


def test_nobody_is_named_where_nobody_can_be_trusted(tmp_path: Path) -> None:
    assert named_heads(analysis_of(tmp_path / "a", {}), 3) == []


def test_without_probes_text_speaks_alone_and_says_so(tmp_path: Path) -> None:
    analysis = analysis_of(tmp_path / "a", {1: of("local", 0.9, None)}, with_model=False)
    (found,) = named_heads(analysis, 3)
    assert (found.head, found.on_probes) == (1, None)
    assert "not tried on probes" in found.sentence


def test_every_type_has_its_words() -> None:
    assert DOES.keys() == set(STORE_SCORES)


def test_a_head_that_is_something_nearer_by_one_measure_is_not_named(tmp_path: Path) -> None:
    """Heads stood under local that are previous-token heads on probes."""
    nearer = {"probe_previous_token": 0.6, "previous_token": 0.4}
    heads = {
        1: of("local", 0.95, 0.95) | nearer,
        2: of("local", 0.7, 0.7),
        3: of("induction", 0.6, 0.9) | {"same_token": 0.7},
        4: of("long_range", 0.8, 0.8, induction=0.52, probe_induction=0.52),
    }
    analysis = analysis_of(tmp_path / "a", heads)
    assert of_type(analysis, "local") == [2]
    assert of_type(analysis, "induction") == of_type(analysis, "long_range") == []


def test_named_heads_are_counted_by_their_shares(tmp_path: Path) -> None:
    """At least 95 % of the heads that a page names are to have that type in text and on probes."""
    heads = {i: of("induction", 0.6 + i / 100, 0.9) for i in range(1, 9)}
    heads |= {i: of("previous_token", 0.9, 0.9) for i in range(9, 12)}
    analysis = analysis_of(tmp_path / "a", heads)
    assert count_agreed(analysis) == (6, 6)
    assert count_agreed(analysis, 50) == (11, 11)


def test_heads_that_a_page_names_wrongly_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {
        1: of("induction", 0.9, 0.9),
        2: of("induction", 0.9, 0.3),
        3: of("mixed", 0.9, 0.9) | {"induction": 0.9, "probe_induction": 0.9},
        4: of("induction", 0.9, 0.9, probe_fired=3),
        5: of("induction", 0.9, 0.9, previous_token=0.95),
    }
    analysis = analysis_of(tmp_path / "a", heads)
    wrong = [Start("induction", [1, 2, 3, 4, 5], [0.9] * 5, 0.9)]
    monkeypatch.setattr("lorsa.analyze.trust.starts", lambda analysis, n: wrong)
    assert count_agreed(analysis) == (5, 1)
