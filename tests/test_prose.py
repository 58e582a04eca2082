"""Docstrings that stand alone, functions and files that a reader can hold."""

from pathlib import Path

from prose import FRAGMENTS, KERNELS, ROOT, docstrings, functions, problems, product_files

MOST_LINES_OF_NINE_IN_TEN = 25


def test_every_file_can_be_read() -> None:
    """149 docstrings opened with a fragment; a module's first line is one sentence."""
    assert [problem for path in product_files() for problem in problems(path)] == []


def test_nine_functions_in_ten_are_short() -> None:
    lengths = sorted(
        length
        for path in product_files()
        if path.relative_to(ROOT).parts[0] != KERNELS
        for _, _, length in functions(path)
    )
    assert lengths[int(0.9 * len(lengths))] <= MOST_LINES_OF_NINE_IN_TEN


def test_a_fragment_is_found(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text('"""Numbers of things."""\n\nN = 3\n"""Of things."""\n')
    assert [each.opening for each in docstrings(path)] == ["Numbers", "Of"]
    assert "Of" in FRAGMENTS
