"""Names of types of heads, as people write them."""

import pytest
from lorsa.analyze.choices import KINDS
from lorsa.analyze.type_names import spelled, type_named
from lorsa.cli import app
from typer.testing import CliRunner


@pytest.mark.parametrize("name", KINDS)
def test_either_spelling_is_read(name: str) -> None:
    """find_heads('previous-token') was a ValueError, though messages spell it so."""
    assert (
        type_named(name) == type_named(spelled(name)) == type_named(spelled(name).upper()) == name
    )


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("inductoin", "did you mean induction?"),
        ("previous", "did you mean previous-token?"),
        ("prev", "did you mean previous-token?"),
        ("first", "did you mean first-token?"),
        ("long-rnage", "did you mean long-range?"),
        ("xyzzy", "'xyzzy'; allowed: previous-token, same-token"),
    ],
)
def test_a_wrong_type_is_told_the_nearest(wrong: str, near: str) -> None:
    """Eight names were listed, of which the reader had to find the nearest."""
    with pytest.raises(ValueError) as refused:
        type_named(wrong)
    assert near in str(refused.value)
    done = CliRunner().invoke(app, ["find", wrong, "run"])
    assert (done.exit_code, near in done.stderr) == (2, True)


def test_people_read_one_spelling() -> None:
    """Help had previous_token, messages previous-token, the page "previous token"."""
    shown = CliRunner().invoke(app, ["find", "--help"], env={"COLUMNS": "200"}).output
    assert "previous-token" in shown
    assert "previous_token" not in shown
