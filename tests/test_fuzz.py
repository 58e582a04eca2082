"""No command ends in a trace, whatever is wrong with its inputs; see benchmarks/fuzz.py."""

from pathlib import Path

import pytest
from fuzzing import Outcome, fuzz, make_world, run_case

SECONDS = 5.0


@pytest.fixture(scope="module")
def world(
    model_folder: Path,
    text_folder: Path,
    store_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "world"
    folder.mkdir()
    make_world(folder, model_folder, text_folder, store_folder)
    return folder


def test_odd_inputs_end_in_a_line(world: Path) -> None:
    """Mistyped options, files and texts ended commands in traces of several dozen lines."""
    faults: list[str] = []

    def report(seed: int, found: Outcome) -> None:
        if found.fault is not None:
            faults.append(f"{seed}: {found.fault}: {found.argv}: {found.changed}: {found.err}")

    n = fuzz(world, range(10_000), seconds=SECONDS, report=report)
    assert n > 0
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("seed", [2, 80, 110, 208, 226, 1012])
def test_what_once_was_a_trace_is_a_line(seed: int, world: Path) -> None:
    """A home of nobody, a table with a sequence twice or nulls, settings of a tokenizer."""
    found = run_case(seed, world, world.parent / f"case-{seed}")
    assert found.fault is None, found
