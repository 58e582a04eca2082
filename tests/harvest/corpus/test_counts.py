"""Counts of what is passed over, and the share that is worth a warning."""

from lorsa.harvest.corpus.counts import CHANGED, PASSED_OVER, UNITS, Counts


def test_counts_are_told_in_one_line_with_an_example() -> None:
    counts, more = Counts(), Counts()
    assert str(counts) == ""
    counts.add("empty_documents", "a.txt")
    counts.add("empty_documents", "b.txt", 1234)
    more.add("bad_rows", "two\nlines")
    more.add("repaired_documents", "c.txt")
    counts.merge(more)
    assert str(counts) == (
        "passed over: 1,235 empty documents (such as a.txt), "
        r"1 row with a wrong number of fields ('two\nlines'); "
        "changed: 1 document with invalid UTF-8 (c.txt)"
    )
    assert counts.to_dict() == {"bad_rows": 1, "empty_documents": 1235, "repaired_documents": 1}
    assert not PASSED_OVER.keys() & CHANGED.keys()
    assert {kind.unit for kind in PASSED_OVER.values()} == {*UNITS, ""}


def test_more_than_a_tenth_passed_over_is_a_warning() -> None:
    """Half of a corpus could be passed over, and the plan said nothing of it."""
    counts, found = Counts(), Counts()
    assert counts.warning() == ""
    counts.keep("texts", 9)
    counts.add("empty_documents", "a")
    assert counts.warning() == ""
    counts.add("bad_lines", "b")
    assert counts.warning() == "passed over: 2 of 11 texts read"
    found.add("dangling_links", "c", 3)
    found.add("side_files", "d", 1000)
    found.keep("entries", 2)
    counts.merge(found)
    counts.add("repaired_documents", "e", 1000)
    assert counts.warning() == "passed over: 3 of 5 files and folders, 2 of 11 texts read"
