"""A flipped bit gives the same result or names the file; a kill gives the same files.

Of benchmarks/bench_damage.py, which flips and kills hundreds of times: a few, always the same.
"""

from pathlib import Path

import drills
import flips
import kills
import pytest

FLIPS = {"a run": 3, "an analysis": 5, "a pushed folder": 8, "a page": 3, "half an analysis": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drill") / "prepared"
    drills.prepare(root)
    return root


@pytest.mark.parametrize("name", FLIPS)
def test_a_flipped_bit_is_harmless_or_named(prepared: Path, tmp_path: Path, name: str) -> None:
    """Of a run 91 of 200 flips, of an analysis 116 of 200 gave another result without a word."""
    outcomes = flips.drill(prepared, tmp_path / "flips", name, FLIPS[name], seed=4)
    assert [each for each in outcomes if each.verdict not in ("same", "told")] == []


@pytest.mark.parametrize("name", ["eval", "view", "push", "harvest --sites"])
def test_a_killed_command_is_ended_by_itself(prepared: Path, tmp_path: Path, name: str) -> None:
    """A page that was killed while it was made left its folder beside the next one."""
    found = kills.drill(prepared, tmp_path / "kills", name, 4, seed=4)
    assert [each for each in found if each.problem] == []


def test_the_drill_sees_what_is_silent(prepared: Path, tmp_path: Path) -> None:
    """A drill that can find nothing proves nothing: without its checks, a flip is not the same."""
    case = flips.CASES["an analysis"]
    flip = flips.Flip("analysis/explanations.jsonl", 12, 0)
    expected = flips.use_all(prepared, case, tmp_path / "one", None)
    found = flips.use_all(prepared, case, tmp_path / "two", None)
    assert flips.judge(flip, found, expected).verdict == "same"
    found["read"]["result"][0]["layer"] = 7
    assert flips.judge(flip, found, expected).verdict == "silent"
    found["read"] = {"error": "something cannot be read", "said": []}
    assert flips.judge(flip, found, expected).verdict == "unnamed"
    found["read"] = {"error": "a/explanations.jsonl: line 1 is damaged", "said": []}
    assert flips.judge(flip, found, expected).verdict == "told"
