"""Column that a row's document stands in."""

from typing import Any

import numpy as np
import pytest
from lorsa.errors import HarvestError
from lorsa.harvest.corpus.counts import Counts
from lorsa.harvest.corpus.document import Column, documents_of_rows


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        ([1, 2], [1, 2]),
        (np.array([3], np.uint16), [3]),
        ([], []),
        ([1.5], None),
        ([[1]], None),
        (["a"], None),
        ("12", None),
        ([True], None),
        (7, None),
        ([1, [2]], None),
        ([1 << 70], None),
    ],
)
def test_token_ids_are_flat_lists_of_integers(value: Any, ids: list[int] | None) -> None:
    doc = Column("ids", is_ids=True).document("a", value)
    assert (None if doc is None or doc.ids is None else doc.ids.tolist()) == ids


def _read(rows: list[dict[str, Any]], counts: Counts) -> list[str]:
    named = ((str(i), row) for i, row in enumerate(rows))
    found = documents_of_rows(named, Column("text"), where="here", counts=counts)
    return [doc.text for doc in found]


def test_a_first_row_without_the_column_is_passed_over() -> None:
    counts = Counts()
    rows = [{"note": "made by"}, {"text": 5}, {"text": "one"}, {"text": None}, {}]
    assert _read(rows, counts) == ["one"]
    assert counts.to_dict() == {"null_rows": 3, "other_rows": 1}


def test_rows_that_all_lack_the_column_say_so_soon() -> None:
    with pytest.raises(HarvestError, match="data here: no column 'text'; there is a, b; choose"):
        _read([{"a": 1, "b": 2}] * 3, Counts())
    endless = ({"a": i} for i in iter(int, 1))
    named = (("x", row) for row in endless)
    with pytest.raises(HarvestError, match="no column 'text'"):
        list(documents_of_rows(named, Column("text"), where="here", counts=Counts()))
    with pytest.raises(HarvestError, match="column 'text' is int, not text"):
        _read([{"text": None}, {"text": 1}], Counts())
    assert _read([{"text": None}], Counts()) == []
    with pytest.raises(HarvestError, match="c18, c19 and 5 more; choose one"):
        _read([{f"c{i}": 0 for i in range(25)}], Counts())
